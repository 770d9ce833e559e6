"""Rows a second of our trainer, and of training in the way of RecFlow's released code, on the same made-up day.

    python -m benchmarks.recflow_way [--models DSSM FS-LTR DIN] [--videos 60000 1000000] [--rounds 3]
                                     [--table-rows 100000 1000000 10000000]

RecFlow's models at their sizes: DSSM and DIN on exposures, FS-LTR on requests with their stage samples; ids of width 8,
50 past views. Their way (`theirs.py`) with dictionaries, DataLoader, `nn.Embedding` and dense Adam; ours is the trainer
as it is, its loader and reports included. One process, one thread, in turn; processor seconds, medians. A quarter
of an hour on an idle core, of which two minutes make the days.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.recflow_way import theirs
from benchmarks.recflow_way.log import Files, prepared
from benchmarks.recflow_way.ours import MODELS, epoch_seconds, our_config
from benchmarks.step import trainer
from joint.data.dataset import Dataset

# model -> requests of our two batches, rows of theirs (about as many), and how many steps of theirs are timed
BATCHES = {
    "DSSM": ((256, 1024, 16), (1024, 4096, 5)),
    "DIN": ((256, 1024, 12), (1024, 4096, 4)),
    "FS-LTR": ((1024, 1024, 5), (4096, 4096, 2)),
}


def sizes_of(dataset: Dataset) -> dict[str, int]:
    """Table -> its rows."""
    return {name: dataset.schema.feature(name).size for name in dict.fromkeys((*theirs.USER, *theirs.ITEM))}


def their_rate(model: str, files: Files, sizes: dict[str, int], batch: int, steps: int) -> float:
    """Rows a second of processor time."""
    module = theirs.Din(sizes) if model == "DIN" else theirs.Dssm(sizes)
    rows = theirs.StageSamples(files) if model == "FS-LTR" else theirs.Exposures(files)
    loss = theirs.on_pairs if model == "FS-LTR" else theirs.on_exposures
    return theirs.train(rows, module, loss, batch=batch, steps=steps, warm_up=2)[0]


def compare(model: str, dataset: Dataset, files: Files, rounds: int) -> None:
    """Prints the lines of a model."""
    rows = len(files.requests if model == "FS-LTR" else files.exposures)
    precisions = ("float32", "bfloat16") if model == "FS-LTR" else ("float32",)
    for requests, batch, steps in BATCHES[model]:
        rates: dict[str, list[float]] = {name: [] for name in ("theirs", *precisions)}
        for _ in range(rounds):
            rates["theirs"].append(their_rate(model, files, sizes_of(dataset), batch, steps))
            for precision in precisions:
                with tempfile.TemporaryDirectory() as out:
                    more = f"train.precision={precision}"
                    config = our_config(model, dataset.directory, Path(out), more, requests=requests)
                    rates[precision].append(rows / epoch_seconds(config, dataset, files))
        base, *ours = (statistics.median(found) for found in rates.values())
        for precision, rate in zip(precisions, ours, strict=True):
            print(f"| {model}, {precision} | {dataset.schema.items:,} | {batch:,} ", end="")
            print(f"| {base:,.0f} | {rate:,.0f} | {rate / base:.1f}× |", flush=True)  # noqa: RUF001


def flatness(dataset: Dataset, files: Files, table_rows: list[int]) -> None:
    """Prints processor milliseconds a step of DSSM, ours and theirs, by the rows of one table."""
    print("\n| rows of video_id's table | ours, ms a step | theirs, ms a step |\n|---|---|---|")
    for size in table_rows:
        with tempfile.TemporaryDirectory() as out:
            config = our_config("DSSM", dataset.directory, Path(out), f"tables.video_id.rows={size}", requests=256)
            between, _, _ = trainer(config, dataset, steps=40)
        theirs_ms = "not run"
        if size < 10**7:  # their step sweeps the whole table
            rate = their_rate("DSSM", files, sizes_of(dataset) | {"video_id": size}, 1024, 6)
            theirs_ms = f"{1.024e6 / rate:.0f}"
        print(f"| {size:,} | {1e3 * float(between[:, 1].median()):.1f} | {theirs_ms} |", flush=True)


def main() -> None:
    """Prints both tables."""
    command = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    command.add_argument("--models", nargs="*", choices=MODELS, default=[*MODELS])
    command.add_argument("--videos", type=int, nargs="*", default=[60_000, 1_000_000])
    command.add_argument("--table-rows", type=int, nargs="*", default=[100_000, 1_000_000, 10_000_000])
    command.add_argument("--requests", type=int, default=33_000, help="a day; from 32,768 its files are read as large")
    command.add_argument("--rounds", type=int, default=3)
    arguments = command.parse_args()
    torch.set_num_threads(1)
    os.environ["TZ"] = "CST-8"  # the release's times are China's, and its code asks the process for local ones
    time.tzset()
    print("| model | videos | rows a batch | theirs, rows/s | ours, rows/s | ratio |\n|---|---|---|---|---|---|")
    for videos in arguments.videos if arguments.models else ():
        with tempfile.TemporaryDirectory() as folder:
            dataset, files = prepared(Path(folder), videos, arguments.requests)
            for model in arguments.models:
                compare(model, dataset, files, arguments.rounds)
    if arguments.table_rows:
        with tempfile.TemporaryDirectory() as folder:
            flatness(*prepared(Path(folder), 60_000, arguments.requests), arguments.table_rows)


if __name__ == "__main__":
    main()
