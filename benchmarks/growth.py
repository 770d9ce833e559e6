"""How time and memory of a training step grow with seven sizes, one at a time.

    python -m benchmarks.growth [--sizes candidates history …] [--kept FILE] [--picture docs/pictures/growth.png]

Three heads on a made-up log: a softmax over the corpus, binary losses, distillation and FS-LTR's pairs; the teacher
attends from every candidate to every past item. Each point is a process of its own with one thread: the median of its
steps by processor time, its loader's thread included, and its peak memory. The exponent is the slope of the logarithms
over the upper half of the points, where what does not grow matters least.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import matplotlib as mpl
import numpy as np
import torch
import yaml

from benchmarks.step import trainer
from joint.colours import BLUE
from joint.config import load_config
from joint.data.dataset import Dataset, DatasetWriter
from joint.data.ragged import Ragged
from joint.data.requests import Requests
from joint.schema import Feature, History, Schema, Stage

BASE = {"requests": 4096, "batch": 64, "candidates": 50, "history": 50, "corpus": 10_000, "rows": 100_000, "tasks": 2}
SIZES: dict[str, list[int]] = {
    "requests": [1024, 4096, 16_384, 65_536],
    "batch": [16, 64, 256, 1024, 2048],
    "candidates": [10, 25, 50, 100, 200, 400],
    "history": [10, 30, 100, 300, 1000],
    "corpus": [1000, 10_000, 100_000, 1_000_000],
    "rows": [100_000, 1_000_000, 10_000_000, 100_000_000],
    "tasks": [1, 2, 4, 8],
}
EXPOSED = 5
COLUMNS = (  # of the picture
    ("ms", "time", "ms a step", (30, 100, 300, 1000)),
    ("mb", "memory", "peak MB", (500, 1000, 2000, 5000)),
)
UNITS = {
    "requests": "requests in the log",
    "batch": "requests a batch",
    "candidates": "candidates a request",
    "history": "past items a request",
    "corpus": "items in the corpus",
    "rows": "rows of the item table",
    "tasks": "tasks",
}
CONFIG = """
run: {name: growth}
data: {candidates: {exposed: all, ranked: all}}
tables: {user_id: {dim: 8}, item_id: {dim: 16}}
encoders:
  past: {history: seen, features: [item_id], by: {kind: mean}}
  attended: {history: seen, features: [item_id], by: {kind: target_attention, hidden: [32]}}
heads:
  retrieval: {features: [user_id, past, item_id], trunk: {kind: shared_bottom, hidden: [64]}}
  pre_ranking: {features: [user_id, past, item_id], trunk: {kind: shared_bottom, hidden: [64]}}
  ranking: {features: [user_id, attended, item_id], trunk: {kind: mmoe, hidden: [64, 32]}}
objectives:
  retrieve: {head: retrieval, loss: multi_class, space: [corpus]}
  teacher: {head: ranking, loss: binary, space: &all [exposed, ranked]}
  student: {head: pre_ranking, loss: binary, space: *all}
  distill: {head: pre_ranking, loss: distillation, space: *all}
  order: {head: pre_ranking, loss: pairwise, space: *all}
train: {evaluate_every_epochs: 0}
evaluation: {task: task0}
"""


def made(folder: Path, size: Mapping[str, int]) -> Dataset:
    """A log of uniform chance: two days, the second held out."""
    random = np.random.default_rng(0)
    labels = [f"task{task}" for task in range(size["tasks"])]

    def lists(width: int, count: int, high: int, kind: type) -> Ragged:
        return Ragged(random.integers(0, high, count * width).astype(kind), width * np.arange(count + 1))

    def day(first: int, count: int) -> Requests:
        stages = np.full((count, size["candidates"]), int(Stage.RANKED), np.uint16)
        stages[:, :EXPOSED] |= int(Stage.EXPOSED)
        columns = {
            "request_id": np.arange(first, first + count),
            "timestamp": np.full(count, 86_400 * (19_700 + (first > 0))),
            "group": np.zeros(count, np.int8),
            "user_id": random.integers(1, 1000, count),
            "seen": lists(size["history"], count, size["corpus"], np.int32),
            "candidates": lists(size["candidates"], count, size["corpus"], np.int32),
        }
        columns["stages"] = columns["candidates"].with_values(stages.ravel())
        more = {name: lists(size["candidates"], count, 2, np.float32) for name in labels}
        return Requests(columns | more)

    with DatasetWriter(folder / "dataset") as writer:
        writer.items({"item_id": np.arange(1, size["corpus"] + 1)})
        writer.add(day(0, size["requests"]), day="2023-12-09", split="train")
        writer.add(day(size["requests"], 64), day="2023-12-10", split="test")
        features = (
            Feature(name="user_id", level="request", kind="id", size=1000),
            Feature(name="item_id", level="item", kind="id", size=size["corpus"] + 1),
        )
        more = {"histories": (History(name="seen"),), "labels": tuple(labels), "stages": ("exposed", "ranked")}
        writer.finish(Schema(name="growth", items=size["corpus"], features=features, input_space={}, **more))
    return Dataset(folder / "dataset")


def point(size: Mapping[str, int], steps: int) -> dict[str, float]:
    """Processor milliseconds of a step, and the peak memory of this process."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        dataset = made(Path(folder), size)
        config = yaml.safe_load(CONFIG)
        config["tasks"] = {f"task{task}": {"label": f"task{task}"} for task in range(size["tasks"])}
        config["data"] |= {"path": str(dataset.directory), "requests_per_batch": size["batch"], "epochs": 99}
        config["tables"]["item_id"]["rows"] = max(size["rows"], size["corpus"] + 1)
        for encoder in config["encoders"].values():
            encoder["length"] = size["history"]
        config["run"]["dir"] = folder
        (Path(folder) / "config.yaml").write_text(yaml.safe_dump(config))
        between, _, _ = trainer(load_config(Path(folder) / "config.yaml", [])[0], dataset, steps)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"ms": 1e3 * float(between[:, 1].median()), "mb": peak}


def measured(size: Mapping[str, int], steps: int) -> dict[str, float]:
    """A point in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.growth", "--point", json.dumps(size), "--steps", str(steps)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def exponent(sizes: list[int], values: list[float]) -> float:
    """The slope of the logarithms over the upper half of the points, two at least."""
    upper = slice(min(len(sizes) // 2, len(sizes) - 2), None)
    return float(np.polyfit(np.log(sizes[upper]), np.log(values[upper]), 1)[0])


def draw(found: Mapping[str, list[dict[str, float]]], sizes: Mapping[str, list[int]], out: Path) -> None:
    """Time beside memory, a row a size, both axes logarithmic."""
    mpl.use("Agg")
    from matplotlib import pyplot

    figure = pyplot.figure(figsize=(9, 2.2 * len(found)), layout="constrained")
    axes = figure.subplots(len(found), 2, squeeze=False, sharey="col")
    for row, (name, points) in enumerate(found.items()):
        for column, (key, what, label, ticks) in enumerate(COLUMNS):
            values, axis = [of[key] for of in points], axes[row, column]
            axis.loglog(sizes[name], values, "o-", color=BLUE)
            axis.set_title(f"{what} grows as {name}^{exponent(sizes[name], values):.2f}", fontsize=13, loc="left")
            axis.grid(alpha=0.3)
            axis.set_xticks(sizes[name], [f"{size:,}" for size in sizes[name]])
            axis.set_yticks(ticks, [f"{value:,}" for value in ticks])
            axis.minorticks_off()
            axis.set_xlabel(UNITS[name], fontsize=12)
            axis.set_ylabel(label, fontsize=12)
    figure.savefig(out, dpi=90)


def main() -> None:
    """Prints the table, draws the picture."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="benchmarks.growth", description=__doc__, formatter_class=form)
    parser.add_argument("--sizes", nargs="*", choices=SIZES, default=[*SIZES])
    parser.add_argument("--steps", type=int, default=9)
    parser.add_argument("--most", type=float, default=float("inf"), help="leave out larger sizes")
    parser.add_argument("--kept", type=Path, help="a JSON file of points: those in it are not measured again")
    parser.add_argument("--picture", type=Path)
    parser.add_argument("--point", type=json.loads, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.point:
        print(json.dumps(point(asked.point, asked.steps)))
        return
    sizes = {name: [size for size in SIZES[name] if size <= asked.most] for name in asked.sizes}
    kept = json.loads(asked.kept.read_text()) if asked.kept and asked.kept.exists() else {}
    found = {}
    print("| size | values | ms a step | exponent | peak MB | exponent |\n|---|---|---|---|---|---|")
    for name, values in sizes.items():
        for value in values:
            if (key := f"{name} {value}") not in kept:
                kept[key] = measured(BASE | {name: value}, asked.steps)
            if asked.kept:
                asked.kept.write_text(json.dumps(kept, indent=1))
        found[name] = [kept[f"{name} {value}"] for value in values]
        ms, mb = ([of[key] for of in found[name]] for key in ("ms", "mb"))
        cells = [" · ".join(f"{value:,.0f}" for value in of) for of in (values, ms, mb)]
        slopes = [f"{exponent(values, of):.2f}" for of in (ms, mb)]
        print(f"| {name} | {cells[0]} | {cells[1]} | {slopes[0]} | {cells[2]} | {slopes[1]} |", flush=True)
    if asked.picture:
        draw(found, sizes, asked.picture)


if __name__ == "__main__":
    main()
