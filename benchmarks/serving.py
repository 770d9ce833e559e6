"""How long an exported model takes to answer: one thread, one request at a time.

    python -m benchmarks.serving FOLDER

Makes a small planted world in FOLDER, trains `configs/joint.yaml` on it for an epoch, exports it without its teacher
and adds new items up to 100,000. The user tower and the whole request are set against the eager TorchRec forward of the
same model, retrieval and pre-ranking against the bare product of the same matrix and vector.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from joint.batch import Batch
from joint.config import load_config
from joint.data.dataset import Dataset
from joint.data.order import Position
from joint.data.planted.simulate import parameters_of, simulate
from joint.data.ragged import Ragged
from joint.data.sampling import unlabelled
from joint.data.softmax_pool import NO_POOL
from joint.evaluating.finished_run import open_model
from joint.exporting.build import Choices, export_run
from joint.exporting.golden import synthetic_requests
from joint.exporting.more_items import add_items
from joint.serving import Recommender
from joint.serving.inputs import request_inputs
from joint.training import train

ITEMS, DIM, KEPT = 100_000, 32, 3_000
PLACE = 4  # of the golden request with a full history


def timed(name: str, call: Callable[[], object], rounds: int = 300) -> float:
    """Print and return the median of a call."""
    for _ in range(10):
        call()
    seconds = []
    for _ in range(rounds):
        began = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - began)
    median, worst = 1e6 * np.quantile(seconds, [0.5, 0.99])
    print(f"| {name} | {median:,.0f} | {worst:,.0f} |", flush=True)
    return float(median)


def prepared(folder: Path) -> tuple[Path, Path]:
    """A run and its export with 100,000 items; what is there already is used again."""
    run, out = folder / "runs/joint", folder / "export"
    if not (run / "eval.json").is_file():
        shutil.rmtree(folder, ignore_errors=True)
        simulate(folder / "world", parameters_of("biased", "small", ["items=4000"]), seed=0, world="biased")
        places = [f"data.path={folder / 'world'}", f"run.dir={folder / 'runs'}", "data.epochs=1"]
        config, _ = load_config(Path("configs/joint.yaml"), places)
        train(config, Dataset(config.data.path))
    if not (out / "2").is_dir():
        shutil.rmtree(out, ignore_errors=True)
        export_run(run, out, Choices())
        catalogue = pq.read_table(folder / "world/items.parquet")
        more = ITEMS - len(catalogue)
        table = catalogue.take(pa.array(np.random.default_rng(0).integers(0, len(catalogue), more)))
        ids = pa.array(np.arange(ITEMS - more + 1, ITEMS + 1))
        place = table.column_names.index("video_id")
        pq.write_table(table.set_column(place, "video_id", ids).drop_columns("first_day"), folder / "new.parquet")
        add_items(out, folder / "new.parquet", out)
    return run, out


def eager(name: str, run: Path, candidates: int) -> float:
    """Time the training forward of the student heads on one request; with candidates, the making of its batch too."""
    with open_model(run, []) as opened:
        assembler = opened.evaluator.assembler
        requests = synthetic_requests(assembler.plan, assembler.dataset).take(np.array([PLACE]))
        items = Ragged(np.arange(candidates) % assembler.dataset.schema.items, np.array([0, candidates]))
        chosen = unlabelled(items, assembler.dataset.schema.labels)
        heads = ("retrieval", "pre_ranking")

        def assembled() -> Batch:
            return assembler(requests, chosen, NO_POOL, position=Position(), scoring=heads)

        batch = assembled()
        with torch.no_grad():
            if not candidates:
                return timed(name, lambda: opened.evaluator.forward(batch))
            return timed(name, lambda: opened.evaluator.forward(assembled()))


def search(recommender: Recommender, count: int) -> None:
    """Time retrieval of 500 of so many items against the bare product."""
    vectors = np.random.default_rng(0).standard_normal((count, DIM)).astype(np.float32)
    query, index = vectors[0] + 1, recommender.index
    assert index is not None
    index.vectors, index.rows = vectors, np.arange(count)
    ours = timed(f"retrieval of 500 of {count:,}", lambda: index.search(query, 500), 100)
    bare = timed("  bare product", lambda: vectors @ query, 100)
    print(f"  {ours / bare:.1f} times the bare product")


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="benchmarks.serving")
    parser.add_argument("folder", type=Path)
    run, out = prepared(parser.parse_args().folder)
    torch.set_num_threads(1)
    recommender = Recommender(out, quotas={"retrieval": KEPT})
    request = json.loads((out / "2/selfcheck/request.json").read_text())[PLACE] | {"day": "2100-01-01"}
    requests = recommender.read([request])
    reads, catalogue = recommender.reads["user_tower"], recommender.items.catalogue
    inputs = request_inputs(reads, catalogue, requests)
    user = recommender.run("user_tower", inputs)
    print("| step | median µs | 99 % |\n|---|---|---|")
    tower = timed("user tower", lambda: recommender.run("user_tower", inputs))
    print(f"  {eager('  TorchRec eager, no candidate', run, 0) / tower:.1f} times as fast")
    rows = np.sort(np.random.default_rng(0).choice(ITEMS, KEPT, replace=False))
    ours = timed(f"{KEPT:,} candidates pre-ranked", lambda: recommender.score("pre_ranking", user, requests, rows))
    flat, vector = recommender.items.vectors["pi"], user["pu"].reshape(-1)
    bare = timed("  their rows gathered, and the bare product", lambda: flat[rows] @ vector)
    print(f"  {ours / bare:.1f} times the bare product")
    timed("reading a request", lambda: request_inputs(reads, catalogue, recommender.read([request])))
    whole = timed(f"whole request, {ITEMS:,} items, {KEPT:,} pre-ranked", lambda: recommender.recommend(request))
    plain = eager(f"  TorchRec eager, {KEPT:,} candidates, nothing retrieved", run, KEPT)
    print(f"  {plain / whole:.1f} times as fast")
    search(recommender, ITEMS)
    search(recommender, 10 * ITEMS)


if __name__ == "__main__":
    main()
