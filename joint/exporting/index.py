"""An index per item pool: exact, unless an approximate one finds what the exact one does for real users."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import faiss
import numpy as np

from joint.schema import NEVER

Kind = Literal["flat", "ivf", "hnsw"]
GATE = 0.95  # least recall against the exact index, for every mixture of the tasks
QUERIES = 256  # users that it is measured on, at least where there are so many
SPREAD = 1e-3  # users' least deviation from one another, as a part of their vectors' length


@dataclass(frozen=True)
class Gate:
    """What the gate said of an approximate index."""

    kind: Kind
    recall: float  # the least over mixtures of tasks
    queries: int
    passed: bool
    reason: str = ""


def mixtures(users: np.ndarray, weights: np.ndarray) -> list[np.ndarray]:
    """Fused user vectors `[R, D]` of `[R, T, D]`: with each of the config's weights `[W, T]`, each task alone, and in
    between."""
    tasks = users.shape[1]
    rest = (1 - np.eye(tasks)) / max(1, tasks - 1)
    grid = [w * np.eye(tasks)[t] + (1 - w) * rest[t] for t in range(tasks) for w in (0.3, 0.7, 1.0)]
    return [np.einsum("t,rtd->rd", mix, users).astype(np.float32) for mix in (*weights, *grid)]


def spaced(count: int, most: int) -> np.ndarray:
    """At most so many of `count` places, evenly, int64."""
    return np.linspace(0, count - 1, min(most, count)).astype(np.int64)


def spread(users: np.ndarray) -> float:
    """How far users are from one another: the deviation of their vectors, as a part of their length."""
    flat = users.reshape(len(users), -1)
    length = float(np.linalg.norm(flat, axis=1).mean())
    return float(np.linalg.norm(flat.std(axis=0)) / length) if length else 0.0


def build(kind: Kind, vectors: np.ndarray) -> Any:
    """A faiss index by inner product over these vectors, `[items, D]`."""
    count, dim = vectors.shape
    index: Any
    match kind:
        case "flat":
            index = faiss.IndexFlatIP(dim)
        case "ivf":
            lists = max(1, min(int(4 * count**0.5), count // 39))
            index = faiss.IndexIVFFlat(faiss.IndexFlatIP(dim), dim, lists, faiss.METRIC_INNER_PRODUCT)
            index.train(vectors)
            index.nprobe = max(1, lists // 8)
        case "hnsw":
            index = faiss.IndexHNSWFlat(dim, 32, faiss.METRIC_INNER_PRODUCT)
            index.hnsw.efConstruction, index.hnsw.efSearch = 80, 256
    index.add(vectors)
    return index


def gate(kind: Kind, index: Any, exact: Any, users: np.ndarray, weights: np.ndarray, deep: int) -> Gate:
    """Whether an approximate index finds the `deep` best of the exact one, for users `[R, T, D]` and every mixture."""
    if len(users) == 0 or spread(users) < SPREAD:
        return Gate(
            kind, float("nan"), len(users), False, "the user vectors are all alike, so recall would say nothing"
        )
    deep = min(deep, exact.ntotal)
    recalls = []
    for queries in mixtures(users, weights):
        _, wanted = exact.search(queries, deep)
        _, found = index.search(queries, deep)
        hits = [len(np.intersect1d(a, b)) for a, b in zip(wanted, found, strict=True)]
        recalls.append(sum(hits) / wanted.size)
    return Gate(kind, min(recalls), len(users), min(recalls) >= GATE)


def write_indices(
    folder: Path, vectors: np.ndarray, first_day: Mapping[str, np.ndarray], model_hash: str, **gated: Any
) -> dict[str, dict[str, Any]]:
    """Write the index of every pool that any item ever joins; returns pool -> its entry in the manifest.

    `vectors [C, D]` are of the whole catalogue; `gated` as in `write_index`.
    """
    members = {pool: days < NEVER for pool, days in first_day.items()}
    return {
        pool: write_index(folder, pool, vectors[member], model_hash, **gated)
        for pool, member in members.items()
        if member.any()
    }


def write_index(
    folder: Path,
    pool: str,
    vectors: np.ndarray,
    model_hash: str,
    *,
    kind: Kind = "flat",
    users: np.ndarray | None = None,
    weights: np.ndarray | None = None,
    deep: int = 0,
) -> dict[str, Any]:
    """Write the index of a pool and what is known of it; returns its entry in the manifest.

    An approximate kind is measured on `users [R, T, D]` under the config's `weights [W, T]` of the tasks and others, as
    `deep` as retrieval's quota; where it does not pass the gate it gives way to the exact one, and the entry says so.
    """
    exact = build("flat", vectors)
    chosen, index, said = "flat", exact, None
    if kind != "flat" and users is not None and weights is not None:
        tried = build(kind, vectors)
        said = gate(kind, tried, exact, users, weights, deep)
        if said.passed:
            chosen, index = kind, tried
    stem = f"index/pool.{pool}" if pool else "index/all"  # a pool may be called `all`
    (folder / "index").mkdir(exist_ok=True)
    faiss.write_index(index, str(folder / f"{stem}.{chosen}.faiss"))
    entry: dict[str, Any] = {
        "file": f"{stem}.{chosen}.faiss",
        "sidecar": f"{stem}.json",
        "kind": chosen,
        "gate": asdict(said) if said else None,
    }
    known: Mapping[str, Any] = {
        "rows": len(vectors),
        "metric": "inner_product",
        "kind": chosen,
        "gate": entry["gate"],
        "model_hash": model_hash,
    }
    (folder / f"{stem}.json").write_text(json.dumps(known, indent=1))
    return entry
