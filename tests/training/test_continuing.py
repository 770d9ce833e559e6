"""Runs of a day each, one going on from the other, are the run of all days."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor

import joint
from joint import checkpoint
from joint.config import load_config
from joint.data.dataset import Dataset
from joint.data.flat.map import read_map
from joint.data.flat.reader import prepare_log
from joint.data.planted.simulate import parameters_of, simulate
from joint.data.problems import Problems
from joint.errors import CheckpointError, ConfigError, UserError
from joint.features import Plan
from joint.fit import check_against
from joint.optimizers import build_optimizer
from joint.task import build_task
from joint.train import main

JOINT = Path(joint.__file__).parents[1] / "configs" / "joint.yaml"
SETTINGS = [
    *("data.epochs=1", "data.requests_per_batch=16", "evaluation.quotas={}", "optimizer.warmup_steps=5"),
    *("data.shared_random=20", "objectives.retrieve.space=[in_batch, random]", "heads.ranking.trunk.dropout=0.1"),
]
Flat = Callable[[Path], dict[str, Tensor]]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A world of a few requests a day."""
    out = tmp_path_factory.mktemp("world") / "biased"
    simulate(out, parameters_of("biased", "small", ["requests=400", "users=60"]), seed=0, world="biased")
    return out


def train(world: Path, runs: Path, name: str, days: Sequence[str], *more: str) -> Path:
    """Train on these days, from the first to the last; returns the run directory."""
    said = [f"data.path={world}", f"run.dir={runs}", f"run.name={name}", f"data.days=[{days[0]}, {days[-1]}]"]
    assert main([str(JOINT), *SETTINGS, *said, *more]) == 0
    return runs / name


@pytest.fixture(scope="module")
def runs(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`whole`, and three runs of a day each: `day-0`, `day-1`, `day-2`."""
    folder, days = tmp_path_factory.mktemp("runs"), Dataset(world).schema.days(["train"])[:3]
    train(world, folder, "whole", days)
    train(world, folder, "day-0", days[:1])
    for number in (1, 2):
        train(world, folder, f"day-{number}", [days[number]], "--continue", str(folder / f"day-{number - 1}"))
    return folder


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert len(one) > 50
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def test_three_daily_runs_are_one_run_of_three_days(runs: Path, flat: Flat) -> None:
    whole, last = flat(runs / "whole" / "checkpoints"), flat(runs / "day-2" / "checkpoints")
    same(whole, last)
    steps = [checkpoint.steps(runs / name / "checkpoints")[-1].name for name in ("whole", "day-2")]
    assert steps == ["step-00000024"] * 2  # counted through
    one, other = (json.loads((runs / name / "eval.json").read_text()) for name in ("whole", "day-2"))
    assert one == other
    said = json.loads((runs / "day-2" / "environment.json").read_text())
    assert said["continues"] == str(runs / "day-1")
    assert len(said["days"]) == 1


def test_the_same_command_resumes_a_run_that_goes_on_from_another(world: Path, runs: Path, flat: Flat) -> None:
    before, log = flat(runs / "day-1" / "checkpoints"), runs / "day-1" / "train.log"
    days = Dataset(world).schema.days(["train"])
    train(world, runs, "day-1", [days[1]], "--continue", str(runs / "day-0"))
    same(before, flat(runs / "day-1" / "checkpoints"))
    assert "resuming after step" in log.read_text()


def refused(world: Path, runs: Path, days: Sequence[str], message: str, *more: str, name: str = "new") -> None:
    with pytest.raises(UserError, match=message):
        train(world, runs, name, days, "--continue", str(runs / "day-0"), *more)
    assert not (runs / "new").exists()


def test_what_may_not_go_on(world: Path, runs: Path, tmp_path: Path) -> None:
    days = Dataset(world).schema.days(["train"])
    other = "only run.*, the data's days and evaluation.* may differ .*optimizer.dense.lr: 0.003 != 0.1"
    refused(world, runs, [days[1]], other, "optimizer.dense.lr=0.1")
    refused(world, runs, days[:2], f"has trained up to {days[0]}; data.days must begin later, found {days[0]}")
    simulate(tmp_path / "w", parameters_of("biased", "small", ["requests=400", "users=60"]), seed=1, world="biased")
    refused(tmp_path / "w", runs, [days[1]], "was not appended to that")
    with pytest.raises(CheckpointError, match="was begun without --continue"):
        train(world, runs, "whole", days[:3], "--continue", str(runs / "day-0"))
    with pytest.raises(CheckpointError, match=r"day-1: was begun with --continue .*day-0, not .*whole"):
        train(world, runs, "day-1", [days[1]], "--continue", str(runs / "whole"))
    with pytest.raises(CheckpointError, match="not a run directory"):
        train(world, runs, "new", [days[1]], "--continue", str(tmp_path / "nowhere"))


def test_days_that_are_none(world: Path) -> None:
    for wrong, message in (
        ("[2024-02-30, 2024-03-01]", "'2024-02-30' is no day"),
        ("[20240201, 2024-03-01]", "'20240201' is no day; expected YYYY-MM-DD"),
        ("[2024-03-02, 2024-03-01]", "end on 2024-03-01, before they begin on 2024-03-02"),
        ("[2024-03-02]", "expected 2 items, found 1"),
    ):
        with pytest.raises(ConfigError, match=message):
            load_config(JOINT, [f"data.days={wrong}"])
    config, tree = load_config(JOINT, [f"data.path={world}", "data.days=[1999-01-01, 1999-01-02]"])
    with pytest.raises(ConfigError, match="no request in 1999-01-01 to 1999-01-02; there are from 20"):
        check_against(config, tree, Dataset(world).schema)


# --- a dataset that grows -------------------------------------------------------------------------------------------

MONDAY, DAY = 1_704_067_200, 86_400  # 2024-01-01
MAP = """
user: user
item: item
time: {column: time, unit: s}
labels: {click: click}
"""
CONFIG = """
run: {name: RUN, dir: RUNS}
data: {path: DATA, requests_per_batch: 8, shards: 2, candidates: {exposed: all}}
tasks: {click: {label: click}}
tables: {user_id: {dim: 4}, item_id: {dim: 4}}
heads:
  retrieval: {features: [user_id, item_id], dim: 4}
  ranking: {features: [user_id, item_id]}
objectives:
  teacher: {head: ranking, loss: binary, space: [exposed]}
  retrieve: {head: retrieval, loss: multi_class, space: [in_batch]}
train: {evaluate_every_epochs: 0}
evaluation: {task: click, k: [3]}
"""


# No random items: those are drawn from the catalogue, which is not the same on the day and in hindsight.


def grow(folder: Path, days: Sequence[int], *, append: bool) -> None:
    """Prepare (or append) a log of these days, each with users and items that no earlier day has."""
    rng = np.random.default_rng(days[0])
    rows = [(day, *rng.integers(10 + 5 * day, size=2), rng.integers(2)) for day in days for _ in range(30)]
    day, user, item, click = (np.array(column) for column in zip(*rows, strict=True))
    time = MONDAY + DAY * day + np.concatenate([np.sort(rng.integers(DAY, size=30)) for _ in days])
    pq.write_table(pa.table({"user": user, "item": item, "time": time, "click": click}), folder / "log.parquet")
    (folder / "map.yaml").write_text(MAP)
    m, tree = read_map(folder / "map.yaml")
    prepare_log([folder / "log.parquet"], folder / "data", m, tree, problems=Problems(skip=False), append=append)


def test_a_run_goes_on_when_the_log_has_grown(tmp_path: Path, flat: Flat) -> None:
    for name in ("first", "second", "whole"):
        said = CONFIG.replace("RUNS", str(tmp_path)).replace("RUN", name).replace("DATA", str(tmp_path / "data"))
        (tmp_path / f"{name}.yaml").write_text(said)
    grow(tmp_path, [0, 1, 2], append=False)
    assert main([str(tmp_path / "first.yaml")]) == 0
    grow(tmp_path, [3], append=True)  # its last day is the test part now, and the second day trains
    schema = Dataset(tmp_path / "data").schema
    days = schema.days(["train"])
    assert len(days) == 2
    second = ["--continue", str(tmp_path / "first"), f"data.days=[{days[1]}, {days[1]}]"]
    assert main([str(tmp_path / "second.yaml"), *second]) == 0
    assert main([str(tmp_path / "whole.yaml")]) == 0
    first, second_, whole = (flat(tmp_path / name / "checkpoints") for name in ("first", "second", "whole"))
    grown = [name for name in whole if name in first and whole[name].shape != first[name].shape]
    assert any("item_id.weight" in name for name in grown)
    assert any("momentum" in name for name in grown)
    assert any("frequency.interval" in name for name in grown)
    assert [name for name in whole if not torch.equal(whole[name], second_[name])] == []


def test_rows_that_were_saved_are_kept_and_new_ones_begin_anew(tiny_file: Path, tmp_path: Path, group) -> None:
    def built(*overrides: str) -> tuple:
        config, _ = load_config(tiny_file, overrides)
        model = build_task(Plan(config, Dataset(config.data.path).schema), group)
        return model, build_optimizer(model, config.optimizer)

    def item_rows(model) -> Tensor:
        found = {name: value for name, value in model.state_dict().items() if "item_id.weight" in name}
        (value,) = found.values()
        return value.local_shards()[0].tensor

    model, optimizer = built()
    item_rows(model).fill_(7.0)
    checkpoint.Saver(tmp_path / "saved", model, optimizer, keep=1).save(checkpoint.Progress(5))
    larger, optimizer = built("tables.item_id.rows=70")
    fresh = item_rows(larger).clone()
    with pytest.raises(CheckpointError, match="Size mismatch"):
        checkpoint.load_latest(tmp_path / "saved", larger, optimizer)
    assert checkpoint.load_latest(tmp_path / "saved", larger, optimizer, grown=True).step == 5
    after = item_rows(larger)
    assert (after[:63] == 7).all()
    assert after[63:].equal(fresh[63:])
    smaller, optimizer = built("tables.item_id.rows=62")
    with pytest.raises(CheckpointError, match="Size mismatch"):
        checkpoint.load_latest(tmp_path / "saved", smaller, optimizer, grown=True)
