"""Modules to ONNX files, their sizes left open: any number of requests, items, events and ids of an item."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import onnx
import torch
from torch import Tensor, nn
from torch.export import Dim

from joint.data.columns import width_of
from joint.errors import UserError
from joint.exporting.graphs import input_name
from joint.exporting.tables import Stored, point_into_tables
from joint.keys import Key, Reads

Axes = dict[str, tuple[str | int, ...]]  # input -> its axes: the name of an open one, or a fixed size
TRACED = {"batch": 4, "items": 6}  # sizes while tracing: a size of 1 would be taken for a fixed one
OTHERWISE = 3
FORBIDDEN = ("Loop", "Sequence")  # what slow or unsupported graphs are made of


def axes_of(keys: Sequence[Key], reads: Reads, *, batch: str | int = "batch") -> Axes:
    """The inputs that look-ups of these keys take; `batch` 1 for a graph of one request."""
    axes: Axes = {}
    for key in keys:
        name = input_name(key)
        outer: tuple[str | int, ...]
        match key.side:
            case "request":
                outer = (batch,)
            case "history":
                outer = (batch, f"{key.history}.events")
                axes[f"{key.history}.length"] = (batch,)
            case "competitors":
                outer = (batch, f"{key.history}.events", reads.competitors[key.history])
                axes[f"{key.history}.competitors"] = outer
            case _:
                outer = ("items",)
        if not key.embedded:
            outer = (*outer, width_of(key.feature))
        axes[name] = outer if key.feature.kind != "ids" else (*outer, f"{name}.ids")
        if key.feature.kind == "ids":
            axes[f"{name}.length"] = outer
    return axes


def types_of(keys: Sequence[Key]) -> dict[str, str]:
    """The type of every input that is none of ids or lengths (int64)."""
    numbers = {input_name(key): "float32" for key in keys if not key.embedded}
    return numbers | {f"{key.history}.competitors": "bool" for key in keys if key.side == "competitors"}


@torch.no_grad()
def write_graph(
    module: nn.Module, axes: Axes, types: Mapping[str, str], outputs: Sequence[str], path: Path, stored: list[Stored]
) -> None:
    """Trace a module of one dict of inputs and write it, its tables being those `stored` beside it.

    Raises:
        UserError: what came out could not be served well.
    """
    open_axes = {axis: Dim(f"axis_{place}", min=1) for place, axis in enumerate(_open(axes))}
    example = {name: _example(sizes, types.get(name, "int64")) for name, sizes in axes.items()}
    shapes = {
        name: {place: open_axes[axis] for place, axis in enumerate(sizes) if isinstance(axis, str)}
        for name, sizes in axes.items()
    }
    with _quietly():
        program = torch.onnx.export(
            module.eval(),
            kwargs={"inputs": example},
            dynamo=True,
            dynamic_shapes={"inputs": shapes},
            input_names=list(axes),
            output_names=list(outputs),
            verbose=False,
        )
    assert program is not None
    model = program.model_proto
    found = sorted({node.op_type for node in model.graph.node if node.op_type.startswith(FORBIDDEN)})
    if found:
        raise UserError(f"{path.name}: holds {', '.join(found)}, which is slow, and which some servers refuse")
    point_into_tables(model.graph, stored)
    for part in (*model.graph.node, *model.graph.value_info, *model.graph.input, *model.graph.output):
        part.ClearField("metadata_props")  # from which file and line it came
        part.ClearField("doc_string")
    onnx.save(model, path)


def _open(axes: Axes) -> list[str]:
    return list(dict.fromkeys(axis for sizes in axes.values() for axis in sizes if isinstance(axis, str)))


def _example(sizes: Sequence[str | int], dtype: str) -> Tensor:
    shape = [TRACED.get(size, OTHERWISE) if isinstance(size, str) else size for size in sizes]
    return torch.ones(shape, dtype=getattr(torch, dtype))


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Without what the exporter says to its developers."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
