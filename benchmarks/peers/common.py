"""What the runners of all peers share: the workload's sizes, the rows, a stopwatch, one line of JSON as the result.

It needs numpy and pyarrow alone, since every peer runs in an environment of its own.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

USER = {"user_id": 50_000, "gender": 3, "age": 10, "city": 400, "level": 8}  # feature -> ids 1 .. so many; 0 is unknown
CONTEXT = {"hour": 24, "scene": 6, "device": 8}
ITEM = {"item_id": 100_000, "category": 200, "brand": 2000, "price": 20}
SIZES = {**USER, **CONTEXT, **ITEM}
REQUEST_SIDE, ITEM_SIDE = [*USER, *CONTEXT], [*ITEM]
LABELS = ["click", "long_view", "like"]
HISTORY = 50
DIM, EXPERTS, EXPERT, TOWER = 16, 4, [128, 64], [64]  # rows of tables; MMoE's experts, and the towers of its tasks
TOWERS = [128, 64]  # of the two-tower model
TEMPERATURE = 0.1
LR, TABLE_LR = 1e-3, 0.02  # Adam; row-wise Adagrad, where tables have that
STD = 0.01  # of the rows at first

Rows = dict[str, np.ndarray]  # feature or label -> [N], `history` [N, 50]


@dataclass(frozen=True)
class Run:
    """What is to be run."""

    data: Path
    model: str
    batch: int
    bf16: bool
    seed: int


def asked(*models: str) -> Run:
    """What the command line asks for: `DATA --model M --batch B --seed S [--bf16]`."""
    parser = argparse.ArgumentParser()
    parser.add_argument("data", type=Path)
    parser.add_argument("--model", choices=models, required=True)
    parser.add_argument("--batch", type=int, default=4096)
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    return Run(**vars(parser.parse_args()))


def rows(folder: Path, split: str, kind: type = np.int64) -> Rows:
    """The rows of `train` or `test`."""
    table = pq.read_table(folder / f"{split}.parquet", columns=[*SIZES, *LABELS, "history"])
    found = {name: table.column(name).to_numpy().astype(kind) for name in [*SIZES, *LABELS]}
    lists = table.column("history").combine_chunks()
    assert isinstance(lists, pa.ListArray)
    return {**found, "history": lists.flatten().to_numpy().reshape(-1, HISTORY).astype(kind)}


def clicked(found: Rows) -> Rows:
    """The rows with a click: a softmax over the batch takes every row for a positive."""
    return {name: values[found["click"] > 0] for name, values in found.items()}


def labels_of(found: Rows) -> np.ndarray:
    """All labels side by side, float32 [N, 3]."""
    return np.stack([found[name] for name in LABELS], axis=1).astype(np.float32)


def auc(label: np.ndarray, score: np.ndarray) -> float:
    """The share of pairs of a positive and a negative in the right order, ties as half."""
    _, place, count = np.unique(np.asarray(score, np.float64).ravel(), return_inverse=True, return_counts=True)
    rank = (count.cumsum() - (count - 1) / 2)[place]
    positive = np.asarray(label).ravel() > 0
    won = rank[positive].sum() - positive.sum() * (positive.sum() + 1) / 2
    return float(won / (positive.sum() * (~positive).sum()))


class Timed:
    """Wall and processor seconds from the beginning of a `with` block to its end, or from when it is made to `stop`."""

    def __init__(self) -> None:
        self.began = np.array([time.perf_counter(), time.process_time()])

    def stop(self) -> None:
        """The work ends here, unless it goes on and stops again."""
        self.wall, self.processor = np.array([time.perf_counter(), time.process_time()]) - self.began

    def __enter__(self) -> Timed:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def done(self, samples: int, found: float) -> None:
        """Print the result: rows trained on, and click AUC of the test rows after that."""
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        result = {"samples": samples, "wall": self.wall, "processor": self.processor, "auc": found, "peak_mb": peak}
        print(json.dumps(result), flush=True)
