"""Ids → rows of a table of any size, by a 64-bit hash: for the loader and for serving, so without torch."""

from __future__ import annotations

import math

import numpy as np

from joint.data.ragged import draw

MEASURED = 5_000_000  # ids up to which collisions are counted; beyond, they are expected


def hashed_rows(ids: np.ndarray, rows: int) -> np.ndarray:
    """A row from 1 to `rows` - 1 for every id, the same everywhere and for ever; id 0, the unknown, keeps row 0.

    Any 64-bit integer is an id. `rows` is at least 2. Returns int64, the shape of `ids`.
    """
    assert rows >= 2
    row = (draw(ids) % np.uint64(rows - 1)).astype(np.int64) + 1
    return np.where(ids == 0, 0, row)


def collision_rate(ids: int, rows: int) -> float:
    """The share of the ids 1 … `ids` that share their row with another of them; of very many, its expectation."""
    if ids < 2:
        return 0.0
    if ids > MEASURED:
        return -math.expm1((ids - 1) * math.log1p(-1 / (rows - 1))) if rows > 2 else 1.0
    row = hashed_rows(np.arange(1, ids + 1), rows)
    return float((np.bincount(row, minlength=rows)[row] > 1).mean())
