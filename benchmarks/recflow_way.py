"""Rows a second of our trainer, and of training in the way of RecFlow's released code, on the same made-up log.

    python -m benchmarks.recflow_way [--videos 60000 1000000] [--table-rows 100000 1000000 10000000]

The model is RecFlow's DSSM (configs/papers/recflow_pre_ranking.yaml): ids of width 8, towers of 128, 64 and 32, the
mean of 50 past views, binary cross-entropy on exposures, about 1,024 rows a batch. Their way, written anew here: a
dataset that looks every row up in dictionaries, torch's DataLoader, `nn.Embedding` with dense gradients, Adam. Ours:
the trainer as it is, its loader and reports included. One process, one thread, in turn; processor seconds, medians.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as Rows

from benchmarks.recflow_days import make_day, write_day
from benchmarks.step import WARM_UP, trainer
from joint.config import load_config
from joint.data.assemble import logged
from joint.data.dataset import Dataset
from joint.data.recflow.reader import prepare_recflow
from joint.experiment import Config
from joint.schema import Stage
from towers.mlp import Mlp

CONFIG = Path("configs/papers/recflow_pre_ranking.yaml")
DAYS = ("2024-02-01", "2024-02-02", "2024-02-03")  # two to train on, one held out
BATCH, REQUESTS = 1024, 256  # rows of theirs, requests of ours: about as many rows
HISTORY, WIDTH = 50, 8
USER = ("weekday", "hour", "minute", "user_id", "device_id", "age", "gender", "province")
PAST = ("video_id", "author_id", "category_level_two", "category_level_one", "upload_type")
TIMES = ("upload_weekday", "upload_hour", "upload_minute")  # in the tables of the request's time
ITEM = (*TIMES, *PAST)
ROUNDS = 3


class Looked(Rows[dict[str, np.generic | np.ndarray]]):
    """Exposed rows, each looked up by its request and its video when it is asked for: feature -> one id, or [50, 5]."""

    def __init__(self, dataset: Dataset) -> None:
        requests = dataset.read_split("train")
        ids = requests.scalars("request_id").tolist()
        past = requests.lists("effective").newest(HISTORY)
        items = np.stack([np.asarray(dataset.catalogue[name]) for name in PAST], axis=1)
        self.user = _by_key(ids, {name: requests.scalars(name).astype(np.int64) for name in USER})
        self.item = _by_key(range(len(items)), {name: dataset.catalogue[name].astype(np.int64) for name in ITEM})
        self.history: dict[int, np.ndarray] = {}
        for request, start, end in zip(ids, past.offsets, past.offsets[1:], strict=False):
            self.history[request] = np.zeros((HISTORY, len(PAST)), np.int64)
            self.history[request][: end - start] = items[past.values[start:end]]
        self.length = float(past.lengths.mean())
        candidates = logged(requests, dataset)
        shown = np.flatnonzero(candidates.stages & int(Stage.EXPOSED))
        rows = np.asarray(ids)[candidates.items.rows[shown]].tolist(), candidates.items.values[shown].tolist()
        self.rows = list(zip(*rows, candidates.labels["effective_view"][shown], strict=True))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, np.generic | np.ndarray]:
        request, video, label = self.rows[index]
        return {**self.user[request], **self.item[video], "past": self.history[request], "label": label}


def _by_key(keys: Iterable[int], columns: dict[str, np.ndarray]) -> dict[int, dict[str, np.generic]]:
    rows = zip(*columns.values(), strict=True)
    return {key: dict(zip(columns, row, strict=True)) for key, row in zip(keys, rows, strict=True)}


class Dssm(nn.Module):
    """Two towers over rows of whole tables."""

    def __init__(self, sizes: dict[str, int]) -> None:
        super().__init__()
        self.tables = nn.ModuleDict({name: nn.Embedding(size, WIDTH) for name, size in sizes.items()})
        widths = WIDTH * (len(USER) + len(PAST)), WIDTH * len(ITEM)
        self.user, self.item = (nn.Sequential(Mlp(width, (128, 64)), nn.Linear(64, 32)) for width in widths)

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        """`[B]` of the ids `[B]` of every feature and the past `[B, 50, 5]`, 0 as padding."""
        past = batch["past"]
        real = (past[:, :, :1] > 0).float()
        rows = torch.cat([self.tables[name](past[:, :, n]) for n, name in enumerate(PAST)], dim=2)
        mean = (rows * real).sum(1) / real.sum(1).clamp(min=1)
        user, item = ([self._table(name)(batch[name]) for name in names] for names in (USER, ITEM))
        return (self.user(torch.cat([*user, mean], dim=1)) * self.item(torch.cat(item, dim=1))).sum(1)

    def _table(self, name: str) -> nn.Module:
        return self.tables[name.removeprefix("upload_") if name in TIMES else name]


def their_way(rows: Looked, sizes: dict[str, int], steps: int) -> float:
    """Rows a second of so many steps, or of an epoch if it has fewer."""
    model = Dssm(sizes)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    count, began = 0, 0.0
    for step, batch in enumerate(itertools.islice(DataLoader(rows, BATCH, shuffle=True), steps)):
        if step == WARM_UP:
            count, began = 0, time.process_time()
        optimizer.zero_grad()
        binary_cross_entropy_with_logits(model(batch), batch["label"]).backward()
        optimizer.step()
        count += len(batch["label"])
    return count / (time.process_time() - began)


def our_config(dataset: Path, out: Path, *more: str) -> Config:
    """RecFlow's DSSM on the made-up log."""
    features = ",".join([*USER, "viewed", *ITEM])
    overrides = [f"tables.{name}.dim={WIDTH}" for name in ("weekday", "hour", "minute")]
    overrides += [f"data.path={dataset}", "data.not_eligible=[]", f"data.requests_per_batch={REQUESTS}"]
    overrides += [f"heads.pre_ranking.features=[{features}]", "data.epochs=9", f"run.dir={out}", "run.name=way"]
    return load_config(CONFIG, [*overrides, *more])[0]


def prepared(folder: Path, videos: int, requests: int) -> Dataset:
    """Made-up days, users with as many requests as fill their histories."""
    for day in DAYS:
        made = make_day(day, requests, users=max(1, requests // 40), videos=videos)
        write_day(folder / "log", day, made, folders=("all_stage",))
    prepare_recflow(folder / "log", folder / "dataset", held_out=(0, 1))
    return Dataset(folder / "dataset")


def compare(folder: Path, videos: int, requests: int, steps: int) -> str:
    """A line of the first table."""
    dataset = prepared(folder, videos, requests)
    rows = Looked(dataset)
    sizes = {name: dataset.schema.feature(name).size for name in (*USER, *PAST)}
    found: dict[str, list[float]] = {"theirs": [], "ours": []}
    for turn in range(ROUNDS):
        found["theirs"].append(their_way(rows, sizes, steps))
        between, counts, _ = trainer(our_config(dataset.directory, folder / f"run{turn}"), dataset, steps)
        found["ours"].append(sum(counts) / float(between[:, 1].sum()))
    theirs, ours = (statistics.median(rates) for rates in found.values())
    return f"| {videos:,} | {rows.length:.0f} | {theirs:,.0f} | {ours:,.0f} | {ours / theirs:.1f}× |"  # noqa: RUF001


def main() -> None:
    """Prints both tables."""
    command = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    command.add_argument("--videos", type=int, nargs="*", default=[60_000, 1_000_000])
    command.add_argument("--table-rows", type=int, nargs="*", default=[100_000, 1_000_000, 10_000_000])
    command.add_argument("--requests", type=int, default=4000, help="a day")
    command.add_argument("--steps", type=int, default=30)
    arguments = command.parse_args()
    torch.set_num_threads(1)
    print("| videos | events of a history | RecFlow's way, rows/s | ours, rows/s | ratio |\n|---|---|---|---|---|")
    for videos in arguments.videos:
        with tempfile.TemporaryDirectory() as folder:
            print(compare(Path(folder), videos, arguments.requests, arguments.steps), flush=True)
    print("\n| rows of video_id's table | ours, ms a step |\n|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        dataset = prepared(Path(folder), 60_000, arguments.requests)
        for size in arguments.table_rows:
            config = our_config(dataset.directory, Path(folder) / f"run{size}", f"tables.video_id.rows={size}")
            between, _, _ = trainer(config, dataset, arguments.steps)
            print(f"| {size:,} | {1e3 * float(between[:, 1].median()):.1f} |", flush=True)


if __name__ == "__main__":
    main()
