"""An approximate index is taken only where it finds what the exact one does, for users as they are."""

from __future__ import annotations

import json
from pathlib import Path

import faiss
import numpy as np
import pytest

from joint.exporting.index import build, gate, mixtures, spread, write_index


def clustered(count: int, *, seed: int, skew: float = 0.0) -> np.ndarray:
    """Vectors about 20 centres, their lengths lognormal of this deviation."""
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(0).standard_normal((20, 16))
    points = centres[rng.integers(0, 20, count)] + 0.3 * rng.standard_normal((count, 16))
    points /= np.linalg.norm(points, axis=1, keepdims=True)
    return (points * rng.lognormal(0, skew, (count, 1))).astype(np.float32)


USERS = clustered(2 * 64, seed=1).reshape(64, 2, 16)
WEIGHTS = np.array([[0.7, 0.3]])


def test_of_vectors_of_very_different_lengths_hnsw_misses_and_is_refused() -> None:
    vectors = clustered(4000, seed=2, skew=1.5)
    found = gate("hnsw", build("hnsw", vectors), build("flat", vectors), USERS, WEIGHTS, 100)
    assert not found.passed
    assert found.recall < 0.95


def test_a_good_index_passes() -> None:
    vectors = clustered(4000, seed=2)
    exact = build("flat", vectors)
    assert gate("ivf", exact, exact, USERS, WEIGHTS, 100).recall == 1.0
    lists = build("ivf", vectors)
    lists.nprobe = lists.nlist
    assert gate("ivf", lists, exact, USERS, WEIGHTS, 100).passed


def test_recall_is_of_as_many_as_are_served() -> None:
    """One list of the nearest vectors holds the ten best, but not the 2,000 best."""
    vectors = clustered(4000, seed=2)
    exact, lists = build("flat", vectors), build("ivf", vectors)
    lists.nprobe = 20
    shallow, deep = (gate("ivf", lists, exact, USERS, WEIGHTS, count) for count in (10, 2000))
    assert shallow.recall > deep.recall
    assert not deep.passed


def test_every_group_s_weights_are_measured() -> None:
    assert len(mixtures(USERS, np.array([[0.7, 0.3], [-1.0, 2.0]]))) == len(mixtures(USERS, WEIGHTS)) + 1


def test_users_that_are_all_alike_prove_nothing() -> None:
    vectors = clustered(500, seed=2)
    exact, alike = build("flat", vectors), np.repeat(USERS[:1], 64, axis=0)
    assert spread(alike) < 1e-6 < spread(USERS)
    assert not gate("ivf", exact, exact, alike, WEIGHTS, 100).passed
    assert "all alike" in gate("ivf", exact, exact, alike, WEIGHTS, 100).reason
    assert not gate("ivf", exact, exact, USERS[:0], WEIGHTS, 100).passed


def test_mixtures_by_hand() -> None:
    mixed = mixtures(np.array([[[1.0], [10.0]]]), np.array([[0.5, 2.0]]))
    assert np.concatenate(mixed)[:, 0] == pytest.approx([20.5, 7.3, 3.7, 1.0, 3.7, 7.3, 10.0])


def test_a_pool_called_all_has_an_index_of_its_own(tmp_path: Path) -> None:
    vectors = clustered(500, seed=2)
    whole, pool = write_index(tmp_path, "", vectors, "abc"), write_index(tmp_path, "all", vectors[:9], "abc")
    assert faiss.read_index(str(tmp_path / whole["file"])).ntotal == 500
    assert faiss.read_index(str(tmp_path / pool["file"])).ntotal == 9
    assert whole["sidecar"] != pool["sidecar"]


def test_what_is_refused_gives_way_to_the_exact_index(tmp_path: Path) -> None:
    vectors = clustered(4000, seed=2, skew=1.5)
    entry = write_index(tmp_path, "", vectors, "abc", kind="hnsw", users=USERS, weights=WEIGHTS, deep=100)
    assert entry["file"] == "index/all.flat.faiss"
    assert entry["kind"] == "flat"
    assert entry["gate"]["kind"] == "hnsw"
    assert not entry["gate"]["passed"]
    index = faiss.read_index(str(tmp_path / entry["file"]))
    assert index.ntotal == 4000
    said = json.loads((tmp_path / "index/all.json").read_text())
    assert said["model_hash"] == "abc"
    assert said["gate"]["recall"] == entry["gate"]["recall"]
