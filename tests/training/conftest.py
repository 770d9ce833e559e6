"""A tiny MovieLens-like log, prepared once, and a small config of everything the trainer can do with it."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from joint import checkpoint
from joint.batch import Batch
from joint.config import load_config
from joint.data.assemble import Assembler
from joint.data.dataset import Dataset
from joint.data.loader import Loader
from joint.data.movielens import prepare_movielens
from joint.data.order import Position
from joint.data.softmax_pool import PoolItems
from joint.distributed import process_group
from joint.experiment import HEADS, Config
from joint.features import Plan

USERS, ITEMS, GENRES = 40, 61, 5

CONFIG = """
run: {name: tiny, dir: RUNS, seed: 3}
data:
  path: DATA
  requests_per_batch: 16
  shards: 2
  epochs: 2
  candidates: {exposed: all, random: 6}
  not_eligible: [rated]
tasks:
  like: {label: rating, at_least: 4}
  fine: {label: rating, at_least: 3}
tables:
  user_id: {dim: 8}
  item_id: {dim: 8, rows: 63, sharding: row_wise}
  gender: {dim: 4}
  genres: {dim: 8}
  rating: {dim: 4}
encoders:
  liked_mean: {history: liked, features: [item_id, genres], length: 6, by: {kind: mean}}
  rated_sequence:
    {history: rated, features: [item_id, genres], events: [rating], length: 6,
     by: {kind: self_attention, heads: 2, positions: 6, dropout: 0.2}}
  rated_attention: {history: rated, features: [item_id], length: 6, by: {kind: target_attention, hidden: [8]}}
heads:
  retrieval: {features: [user_id, liked_mean, rated_sequence, item_id, genres], item_hidden: [12], dim: 8,
              trunk: {kind: shared_bottom, hidden: [16], dropout: 0.2}, fusion: {like: 1.0}}
  pre_ranking: {features: [user_id, gender, liked_mean, item_id], trunk: {kind: mmoe, experts: 2, hidden: [12]}, dim: 8}
  ranking: {features: [user_id, gender, liked_mean, rated_attention, item_id, genres],
            trunk: {kind: snr, subnetworks: 2, hidden: [12, 8]}, task_hidden: [6]}
objectives:
  teacher: {head: ranking, loss: binary, space: [exposed]}
  student: {head: pre_ranking, loss: binary, space: [exposed, random], positive_weight: 2.0}
  distill: {head: pre_ranking, loss: distillation, space: [exposed], weight: 0.5, temperature: 2.0}
  negatives: {head: pre_ranking, loss: adaptive_contrastive, space: [exposed_neg, random], tasks: [like]}
  retrieve: {head: retrieval, loss: multi_class, space: [corpus], tasks: [like]}
optimizer: {tables: {lr: 0.1}, dense: {lr: 0.01}, warmup_steps: 4}
train: {log_every: 1, checkpoint_every: 5, keep: 3}
evaluation:
  task: like
  k: [3, 10]
  quotas: {retrieval: 20, pre_ranking: 8, ranking: 3}
  whole_catalogue: [pre_ranking, ranking]
  candidates_per_batch: 500
  baselines: true
"""

Configure = Callable[..., Config]


def write_log(folder: Path) -> Path:
    """ML-100K's files for a log in which users of one half like the items of the same half; one item nobody rates."""
    rng = np.random.default_rng(0)
    folder.mkdir()
    ratings = []
    for user in range(1, USERS + 1):
        items = rng.choice(ITEMS - 1, size=int(rng.integers(16, 28)), replace=False) + 1
        alike = (items % 2) == (user % 2)
        stars = np.where(alike, rng.integers(3, 6, len(items)), rng.integers(1, 5, len(items)))
        times = np.sort(rng.integers(800_000_000, 801_000_000, len(items)))
        ratings += [f"{user}\t{i}\t{s}\t{t}" for i, s, t in zip(items, stars, times, strict=True)]
    (folder / "u.data").write_text("\n".join(ratings) + "\n")
    (folder / "u.genre").write_text("".join(f"genre{g}|{g}\n" for g in range(GENRES)))
    flags = rng.random((ITEMS, GENRES)) < 0.4
    films = [f"{i}|Film {i} ({1990 + i % 9})|01-Jan-1995||http://x|" for i in range(1, ITEMS + 1)]
    films = [film + "|".join(map(str, row)) for film, row in zip(films, flags.astype(int), strict=True)]
    (folder / "u.item").write_text("\n".join(films) + "\n", encoding="latin-1")
    users = [f"{u}|{20 + u}|{'MF'[u % 2]}|{'artist' if u % 3 else 'writer'}|{u % 7}0000" for u in range(1, USERS + 1)]
    (folder / "u.user").write_text("\n".join(users) + "\n")
    return folder


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared dataset of 126 training requests in 8 row groups."""
    folder = tmp_path_factory.mktemp("tiny")
    prepare_movielens(write_log(folder / "log"), folder / "data", run=5, seed=0, overwrite=False)
    return folder / "data"


@pytest.fixture(scope="session")
def tiny_text(tiny_data: Path) -> Callable[[Path], str]:
    """`tiny_text(runs)`: the config as text, its runs kept in the folder `runs`."""
    return lambda runs: CONFIG.replace("RUNS", str(runs)).replace("DATA", str(tiny_data))


@pytest.fixture
def tiny_file(tiny_text: Callable[[Path], str], tmp_path: Path) -> Path:
    """The config as a file; its runs go to `tmp_path/runs`."""
    path = tmp_path / "tiny.yaml"
    path.write_text(tiny_text(tmp_path / "runs"))
    return path


@pytest.fixture
def configure(tiny_file: Path) -> Configure:
    """`configure('key=value', ...)`: the config under overrides."""
    return lambda *overrides: load_config(tiny_file, overrides)[0]


@pytest.fixture
def group() -> Iterator[torch.device]:
    """A process group of one rank."""
    with process_group() as device:
        yield device


class Assemble:
    """Batches of a few requests, by config."""

    @staticmethod
    def plan(config: Config) -> Plan:
        """The plan of a config over its dataset."""
        return Plan(config, Dataset(config.data.path).schema)

    @staticmethod
    def assembler(config: Config) -> Assembler:
        """The assembler of a config over its dataset."""
        dataset = Dataset(config.data.path)
        return Assembler(Plan(config, dataset.schema), dataset)

    def __call__(self, config: Config, *, all_rows: bool = False) -> Batch:
        """Five training requests (the first two without a past), their sampled candidates, and the whole corpus."""
        assembler = self.assembler(config)
        chosen = assembler.dataset.read_split("train").take(np.array([3, 20, 60, 90, 125]))
        candidates = Loader(assembler, rank=0, world_size=1)._sample(chosen, 0)
        return assembler(
            chosen,
            candidates,
            PoolItems.corpus(np.arange(ITEMS)),
            position=Position(),
            scoring=HEADS if all_rows else None,
        )


@pytest.fixture(scope="session")
def assemble() -> Assemble:
    """Builds batches."""
    return Assemble()


@pytest.fixture(scope="session")
def flat(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], dict[str, Tensor]]:
    """`flat(checkpoints)`: all tensors of the newest checkpoint of a folder, unsharded, by name."""
    scratch = tmp_path_factory.mktemp("flat") / "flat.pt"

    def read(checkpoints: Path) -> dict[str, Tensor]:
        dcp_to_torch_save(checkpoint.steps(checkpoints)[-1], scratch)
        return dict(leaves("", torch.load(scratch, weights_only=False)))

    def leaves(name: str, value: object) -> Iterator[tuple[str, Tensor]]:
        if isinstance(value, dict):
            for key, child in value.items():
                yield from leaves(f"{name}/{key}", child)
        elif isinstance(value, Tensor):
            yield name, value

    return read


@pytest.fixture
def heeding_ctrl_c():
    """SIGINT as on a terminal; a job in the background ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
