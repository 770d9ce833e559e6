"""A funnel log of three days with every kind of column, written with `DatasetWriter`, and a config for it."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from joint.config import load_config
from joint.data.assemble import Assembler
from joint.data.dataset import Dataset, DatasetWriter
from joint.data.ragged import Ragged, offsets_of
from joint.data.requests import Requests
from joint.features import Plan
from joint.fit import check_against
from joint.schema import Feature, History, Schema, Stage

ITEMS = 50
DAYS = {"2024-02-28": 150, "2024-02-29": 7, "2024-03-01": 90}  # training requests
CONFIG = """
run: {{name: funnel, seed: 3}}
data:
  path: {dataset}
  epochs: 2
  shards: 8
  requests_per_batch: 32
  candidates: {{exposed: all, ranked: 2, coarse_neg: 1, random: 3}}
  not_eligible: [watched, saved]
tasks:
  click: {{label: click}}
  minutes: {{label: minutes, at_least: 5}}
  share: {{label: share, kind: ratio, at_least: 0.5}}
tables:
  user_id: {{dim: 4}}
  item_id: {{dim: 4}}
  words: {{dim: 4}}
  device: {{dim: 2}}
encoders:
  watched: {{history: watched, features: [item_id, words], events: [seen_on], length: 3, by: {{kind: mean}}}}
  saved: {{history: saved, features: [item_id], length: 2, by: {{kind: mean}}}}
heads:
  retrieval: {{features: [user_id, hour, watched, item_id, price], dim: 4,
              trunk: {{kind: mmoe, experts: 2, hidden: [4]}}}}
  pre_ranking: {{features: [user_id, saved, item_id, words], trunk: {{kind: snr, hidden: [4]}}, dim: 4}}
  ranking: {{features: [user_id, device, watched, item_id, price, words], trunk: {{kind: snr, hidden: [4]}}}}
objectives:
  teacher: {{head: ranking, loss: binary, space: [exposed]}}
  distill: {{head: pre_ranking, loss: distillation, space: [exposed, ranked], teacher: ranking}}
  negatives: {{head: pre_ranking, loss: adaptive_contrastive, space: [coarse_neg, random], tasks: [click]}}
  retrieve: {{head: retrieval, loss: multi_class, space: [corpus]}}
evaluation: {{task: click, test: valid}}
"""
KINDS = [
    Stage.COARSE_NEG,
    Stage.RANKED | Stage.RANK_NEG,
    Stage.RANKED | Stage.RANK_POS,
    Stage.RANKED | Stage.RANK_POS | Stage.EXPOSED,
]


def _requests(rng: np.random.Generator, first_id: int, count: int) -> Requests:
    def lists(most: int) -> Ragged:
        lengths = rng.integers(0, most + 1, count)
        lengths[: 2 if count > 2 else 0] = 0
        values = [rng.permutation(ITEMS)[:n] for n in lengths]  # an item once a list
        return Ragged(np.concatenate([np.zeros(0, int), *values]).astype(np.int32), offsets_of(lengths))

    def label(chance: float, highest: float) -> np.ndarray:
        values = rng.random(len(candidates.values)) * highest
        values[rng.random(len(values)) > chance] = 0
        values[rng.random(len(values)) < 0.1] = np.nan  # not observed
        return values.astype(np.float32)

    candidates, watched = lists(9), lists(6)
    return Requests(
        {
            "request_id": np.arange(first_id, first_id + count),
            "timestamp": np.arange(count) + first_id,
            "group": (np.arange(count) % 3).astype(np.int8),
            "user_id": rng.integers(0, 20, count),
            "device": rng.integers(0, 4, count).astype(np.int8),
            "hour": rng.random(count),
            "watched": watched,
            "watched.seen_on": watched.with_values(rng.integers(0, 4, len(watched.values)).astype(np.int8)),
            "saved": lists(3),
            "candidates": candidates,
            "stages": candidates.with_values(
                rng.choice([int(k) for k in KINDS], len(candidates.values)).astype(np.uint16)
            ),
            "click": candidates.with_values(np.ceil(label(0.4, 1))),
            "minutes": candidates.with_values(label(0.5, 10)),
            "share": candidates.with_values(label(0.6, 1.5)),
        }
    )


def write_funnel(out: Path) -> Schema:
    """Write the log to OUT."""
    rng = np.random.default_rng(1)
    words = rng.integers(0, 4, ITEMS)
    with DatasetWriter(out) as writer:
        writer.items(
            {
                "item_id": rng.permutation(ITEMS) + 1,
                "price": rng.random(ITEMS),
                "words": Ragged(rng.integers(1, 9, words.sum()), offsets_of(words)),
            }
        )
        for number, (day, count) in enumerate(DAYS.items()):
            for split, share in (("train", count), ("valid", 5)):
                first = 1000 * number + (500 if split == "valid" else 0)
                writer.add(_requests(rng, first, share), day=day, split=split)
        return writer.finish(
            Schema(
                name="funnel",
                items=ITEMS,
                features=(
                    Feature(name="user_id", level="request", kind="id", size=20),
                    Feature(name="device", level="request", kind="id", size=4),
                    Feature(name="hour", level="request", kind="float"),
                    Feature(name="item_id", level="item", kind="id", size=ITEMS + 1),
                    Feature(name="price", level="item", kind="float"),
                    Feature(name="words", level="item", kind="ids", size=9),
                    Feature(name="seen_on", level="event", kind="id", space="device", size=4),
                ),
                histories=(History(name="watched", events=("seen_on",)), History(name="saved")),
                labels=("click", "minutes", "share"),
                stages=("coarse_neg", "ranked", "rank_neg", "rank_pos", "exposed"),
                input_space={"pre_ranking": ("coarse_neg", "ranked")},
            )
        )


@pytest.fixture(scope="session")
def funnel_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The log on disk. Do not change it: copy it."""
    out = tmp_path_factory.mktemp("funnel") / "dataset"
    write_funnel(out)
    return out


@pytest.fixture
def assembler(funnel_path: Path, tmp_path: Path) -> Callable[..., Assembler]:
    """Overrides of the config -> an assembler of it over the log."""

    def make(*overrides: str) -> Assembler:
        path = tmp_path / "funnel.yaml"
        path.write_text(CONFIG.format(dataset=funnel_path))
        config, tree = load_config(path, overrides)
        dataset = Dataset(funnel_path)
        check_against(config, tree, dataset.schema)
        return Assembler(Plan(config, dataset.schema), dataset)

    return make
