"""A small log with every kind of column, words instead of ids, two pools; a run on it, exported with its teacher."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from joint.config import load_config
from joint.data.dataset import Dataset, DatasetWriter
from joint.data.ragged import Ragged, offsets_of
from joint.data.requests import Requests
from joint.fit import check_against
from joint.schema import NEVER, Feature, History, Schema, Stage
from joint.training import train

# The extra [export], which [dev] holds; without it there is nothing to test here.
if any(find_spec(package) is None for package in ("onnx", "onnxscript", "onnxruntime", "faiss")):
    collect_ignore_glob = ["test_*.py"]

ITEMS, USERS = 60, 30
CITIES = ["Bonn", "Köln", "Lyon"]
CONFIG = """
run: {name: shop, dir: RUNS, seed: 3}
data:
  path: DATA
  requests_per_batch: 16
  shards: 2
  candidates: {exposed: all, random: 4}
  pool: shelf
  not_eligible: [bought]
tasks:
  click: {label: click}
  minutes: {label: minutes, kind: weighted, at_least: 0.01}
tables:
  user_id: {dim: 8, rows: 20}
  city: {dim: 4, rows: 7, hash: true}
  item_id: {dim: 8}
  tags: {dim: 8}
  device: {dim: 4}
encoders:
  viewed: {history: viewed, features: [item_id, tags, price, image], events: [device, seconds], length: 5,
           by: {kind: mean}}
  lately: {history: viewed, features: [item_id], length: 2, by: {kind: sum}}
  against: {history: viewed, features: [item_id, tags, price], competing: {hidden: [6]}, length: 4,
            by: {kind: self_attention, heads: 1, positions: 3}}
  attended: {history: bought, features: [item_id, tags], length: 3, by: {kind: target_attention, hidden: [8, 6]}}
cross:
  again: {history: viewed, feature: item_id, length: 7}
  since: {history: bought, feature: item_id, of: recency, length: 4}
heads:
  retrieval: {features: [user_id, city, age, taste, clubs, viewed, lately, item_id, tags, price, image],
              item_hidden: [12], dim: 8, similarity: cosine, temperature: 0.5, bias: true,
              trunk: {kind: mmoe, experts: 2, hidden: [12]}, interaction: {kind: dcn_v2, rank: 4},
              fusion: {click: 1.0, minutes: 0.5}, fusion_by_group: {"1": {click: 0.5, minutes: 2.0}}}
  pre_ranking: {features: [user_id, clubs, against, item_id, tags], trunk: {kind: snr, subnetworks: 2, hidden: [8]},
                gate: {alpha: 2.0}, dim: 8, fusion: {click: 2.0, minutes: 0.1},
                fusion_of: {click: sigmoid, minutes: exp}}
  ranking: {features: [user_id, city, viewed, attended, again, since, item_id, tags, image],
            interaction: {kind: pnn, dim: 8}, trunk: {kind: ple, hidden: [8]}, task_hidden: [6],
            task_gate: {prior: [user_id]}, fusion_by_group: {"1": {minutes: 1.0}}}
objectives:
  teacher: {head: ranking, loss: binary, space: [exposed]}
  student: {head: pre_ranking, loss: binary, space: [exposed, random]}
  retrieve: {head: retrieval, loss: multi_class, space: [corpus]}
  masked: {head: retrieval, loss: binary, space: [exposed]}
optimizer: {tables: {lr: 0.5}, dense: {lr: 0.02}}
train: {evaluate_every_epochs: 0}
evaluation: {task: click, k: [5], quotas: {retrieval: 25, pre_ranking: 15, ranking: 10}}
"""


def _lists(rng: np.random.Generator, lengths: np.ndarray, high: int, *, low: int = 0) -> Ragged:
    return Ragged(rng.integers(low, high, lengths.sum()).astype(np.int32), offsets_of(lengths))


def _requests(rng: np.random.Generator, first: int, count: int) -> Requests:
    viewed = _lists(rng, rng.integers(0, 9, count), ITEMS)
    candidates = Ragged(
        np.concatenate([rng.permutation(ITEMS)[:6] for _ in range(count)]).astype(np.int32), np.arange(count + 1) * 6
    )
    shown = len(candidates.values)
    clubs = _lists(rng, rng.integers(0, 4, count), 5, low=1)
    return Requests(
        {
            "request_id": np.arange(first, first + count),
            "timestamp": np.arange(count) + first,
            "group": (np.arange(count) % 2).astype(np.int8),
            "user_id": rng.integers(0, USERS, count),
            "city": rng.integers(0, len(CITIES) + 1, count),
            "age": rng.random(count, np.float32),
            "taste": Ragged(rng.standard_normal(count * 3).astype(np.float32), np.arange(count + 1) * 3),
            "clubs": clubs,
            "viewed": viewed,
            "viewed.device": viewed.with_values(rng.integers(0, 4, len(viewed.values))),
            "viewed.seconds": viewed.with_values(rng.random(len(viewed.values), np.float32)),
            "viewed.competitors": Ragged(
                rng.integers(-1, ITEMS, 2 * len(viewed.values)).astype(np.int32), 2 * viewed.offsets
            ),
            "bought": _lists(rng, rng.integers(0, 4, count), ITEMS),
            "candidates": candidates,
            "stages": candidates.with_values(np.full(shown, Stage.EXPOSED, np.uint16)),
            "click": candidates.with_values((rng.random(shown) < 0.4).astype(np.float32)),
            "minutes": candidates.with_values(rng.random(shown, np.float32) * (rng.random(shown) < 0.5)),
        }
    )


def write_shop(out: Path) -> Schema:
    """Write the log to OUT: items are called by words, some are not on the shelf and some only from the last day on."""
    rng = np.random.default_rng(1)
    tags = rng.integers(0, 4, ITEMS)
    shelf = np.where(np.arange(ITEMS) % 10 == 7, NEVER, 0)
    shelf[np.arange(ITEMS) % 10 == 3] = 19_783  # 2024-03-01
    with DatasetWriter(out) as writer:
        writer.vocabulary("item_id", [f"item {n}" for n in range(ITEMS)])
        writer.vocabulary("user_id", [1000 + 7 * n for n in range(USERS - 1)])
        writer.vocabulary("city", CITIES)
        writer.items(
            {
                "item_id": rng.permutation(ITEMS) + 1,
                "tags": Ragged(rng.integers(1, 9, tags.sum()), offsets_of(tags)),
                "price": rng.random(ITEMS),
                "image": Ragged(rng.standard_normal(ITEMS * 4).astype(np.float32), np.arange(ITEMS + 1) * 4),
                "first_day.shelf": shelf.astype(np.int32),
            }
        )
        for number, day in enumerate(("2024-02-29", "2024-03-01")):
            for split, count in (("train", 64), ("test", 24)):
                writer.add(_requests(rng, 1000 * number + 500 * (split == "test"), count), day=day, split=split)
        feature = Feature
        return writer.finish(
            Schema(
                name="shop",
                items=ITEMS,
                features=(
                    feature(name="user_id", level="request", kind="id", size=USERS),
                    feature(name="city", level="request", kind="id", size=len(CITIES) + 1),
                    feature(name="age", level="request", kind="float"),
                    feature(name="taste", level="request", kind="vector", size=3),
                    feature(name="clubs", level="request", kind="ids", space="tags", size=9),
                    feature(name="item_id", level="item", kind="id", size=ITEMS + 1),
                    feature(name="tags", level="item", kind="ids", size=9),
                    feature(name="price", level="item", kind="float"),
                    feature(name="image", level="item", kind="vector", size=4),
                    feature(name="device", level="event", kind="id", size=4),
                    feature(name="seconds", level="event", kind="float"),
                ),
                histories=(
                    History(name="viewed", events=("device", "seconds"), competitors=2),
                    History(name="bought"),
                ),
                labels=("click", "minutes"),
                stages=("exposed",),
                input_space={},
                pools=("shelf",),
            )
        )


@pytest.fixture(scope="session")
def shop_text(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The config of a run on the shop's log, as text."""
    folder = tmp_path_factory.mktemp("shop")
    write_shop(folder / "data")
    return CONFIG.replace("RUNS", str(folder / "runs")).replace("DATA", str(folder / "data"))


@pytest.fixture(scope="session")
def shop_run(shop_text: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run."""
    path = tmp_path_factory.mktemp("config") / "shop.yaml"
    path.write_text(shop_text)
    config, tree = load_config(path)
    dataset = Dataset(config.data.path)
    check_against(config, tree, dataset.schema)
    train(config, dataset)
    return Path(config.run.dir) / config.run.name


@pytest.fixture(scope="session")
def exported(shop_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run's export, with its teacher, version 1. Do not change it: `copied` gives one to change."""
    from joint.exporting.build import Choices, export_run

    out = tmp_path_factory.mktemp("exports")
    return export_run(shop_run, out, Choices(teacher=True))[0]


@pytest.fixture(scope="session")
def light(shop_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run's export without its teacher, tables of 8 bits."""
    from joint.exporting.build import Choices, export_run

    out = tmp_path_factory.mktemp("light")
    return export_run(shop_run, out, Choices(precision="int8"))[0]


@pytest.fixture
def copied(exported: Path, tmp_path: Path) -> Path:
    """An export to change."""
    return Path(shutil.copytree(exported, tmp_path / "1"))


Asked = Callable[..., dict[str, Any]]


@pytest.fixture
def asked(exported: Path) -> Asked:
    """`asked(field=value, ...)`: a golden request with a past, changed."""
    request = json.loads((exported / "selfcheck/request.json").read_text())[2]
    return lambda **changes: {**request, **changes}
