"""Embedding tables as one file that all graphs point into: `tables.bin`, in float32, float16, or 8 bits a number."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import onnx
import torch
from onnx.external_data_helper import set_external_data
from torch import Tensor

from joint.serving.manifest import TABLES
from towers.embeddings import TableShape

Precision = Literal["fp32", "fp16", "int8"]
ALIGNMENT = 4096  # of every table in the file, so that it can be mapped into memory
QUANTISED = "#scale"  # suffix of the float32 [rows, 2] beside an 8-bit table: a row's scale and least value
BLOCK = 65_536  # rows that are converted at a time
TYPES = {"float32": onnx.TensorProto.FLOAT, "float16": onnx.TensorProto.FLOAT16, "uint8": onnx.TensorProto.UINT8}


@dataclass(frozen=True)
class Stored:
    """Where a tensor lies in `tables.bin`."""

    name: str
    dtype: str
    shape: tuple[int, int]
    offset: int
    bytes: int


def placeholder(shape: TableShape, precision: Precision, table: Tensor | None) -> dict[str, Tensor]:
    """The tensors that hold a table, by name; without the table itself, two rows of noise to trace a graph with."""
    if table is None:
        table = torch.rand(2, shape.dim)  # no two alike, or the exporter would merge them
    return {name: torch.from_numpy(part) for name, part in converted(shape.name, table.numpy(), precision).items()}


def converted(name: str, rows: np.ndarray, precision: Precision) -> dict[str, np.ndarray]:
    """Some rows of a table as they are stored, by tensor.

    8 bits: each row's numbers are steps of (largest - least) / 255 above its least one.
    """
    match precision:
        case "fp32":
            return {name: rows}
        case "fp16":
            return {name: rows.astype(np.float16)}
        case "int8":
            least = rows.min(axis=1, keepdims=True)
            scale = (rows.max(axis=1, keepdims=True) - least) / 255
            steps = np.rint((rows - least) / np.where(scale > 0, scale, 1)).astype(np.uint8)
            return {name: steps, name + QUANTISED: np.concatenate([scale, least], axis=1)}


def write_tables(path: Path, tables: Mapping[str, Tensor], precision: Precision) -> list[Stored]:
    """Write `tables.bin`, tensor after tensor; returns what lies where."""
    stored: list[Stored] = []
    with path.open("wb") as file:
        for name, table in tables.items():
            rows = table.numpy()
            for part, first in converted(name, rows[:1], precision).items():
                file.seek(-(-file.tell() // ALIGNMENT) * ALIGNMENT)
                offset, shape = file.tell(), (len(rows), first.shape[1])
                for begin in range(0, len(rows), BLOCK):
                    file.write(converted(name, rows[begin : begin + BLOCK], precision)[part].tobytes())
                stored.append(Stored(part, str(first.dtype), shape, offset, file.tell() - offset))
    return stored


def point_into_tables(graph: onnx.GraphProto, stored: list[Stored]) -> None:
    """Let a graph's placeholders be tensors of `tables.bin` instead."""
    known = {f"lookup.{part.name}": part for part in stored}
    for tensor in graph.initializer:
        if part := known.get(tensor.name):
            tensor.ClearField("dims")
            tensor.dims.extend(part.shape)
            tensor.data_type = TYPES[part.dtype]
            tensor.raw_data = b"\0"  # what says that it is raw; the file holds it
            set_external_data(tensor, TABLES, offset=part.offset, length=part.bytes)
            tensor.ClearField("raw_data")
