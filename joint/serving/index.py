"""The index of a pool: its items by the inner product of their vectors with the user's."""

from __future__ import annotations

import json
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import numpy as np

from joint.serving.errors import ExportError
from joint.serving.items import Items
from joint.serving.manifest import Manifest, inside, reading

# Without it a plain matrix product does, up to some hundred thousand items.
faiss: Any = import_module("faiss") if find_spec("faiss") else None


class Index:
    """Best items first. An exact index is searched by numpy, and so is every index where there is no faiss.

    Raises:
        ExportError: there is none for this pool, or it is of another model or another number of items.
    """

    def __init__(self, manifest: Manifest, items: Items, pool: str) -> None:
        known = manifest.json["items"]["index"]
        if pool not in known:
            raise ExportError(f"{manifest.folder}: no index for pool {pool!r}; found: {', '.join(map(repr, known))}")
        path = inside(manifest.folder, known[pool]["file"])
        sidecar = inside(manifest.folder, known[pool]["sidecar"])
        with reading(sidecar):
            said: dict[str, Any] = json.loads(sidecar.read_text())
            made_by, kind = said["model_hash"], said["kind"]
        manifest.check_model(made_by, path)
        self.rows = items.of_pool(pool)
        self.joins = np.sort(items.first_day[pool][self.rows])  # the days on which its items join, ascending
        self.index = None
        if faiss is None:
            self.vectors = items.vectors["v"][self.rows]
            return
        with reading(path):
            index = faiss.read_index(str(path))
        if index.ntotal != len(self.rows) or index.d != items.vectors["v"].shape[1]:
            raise ExportError(f"{path}: holds {index.ntotal} vectors of width {index.d}; mixed versions?")
        if kind == "flat":  # for one query numpy's product and partition of the same vectors are faster
            self.vectors = index.reconstruct_n(0, index.ntotal)
        else:
            self.index = index

    def search(self, query: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
        """The rows of the `count` best items for a user vector `[D]`, and their scores; or all there are."""
        count = min(count, len(self.rows))
        if self.index is not None:
            scores, found = self.index.search(query[None].astype(np.float32), max(count, 1))
            there = found[0] >= 0  # where an approximate search found fewer
            return self.rows[found[0][there]], scores[0][there]
        scores, rest = self.vectors @ query, len(self.rows) - count
        best = np.argpartition(scores, rest)[rest:] if 0 < rest < len(scores) else np.arange(rest, len(scores))
        best = best[np.argsort(-scores[best], kind="stable")]
        return self.rows[best], scores[best]
