"""Some chance in retrieval, so that lists differ: noise on the user's vector, a part of the history left out.

Numpy alone, and a function of (seed, request) alone: who serves draws what was measured (industrial
methodologies, 4.1).
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from joint.data.ragged import Ragged, draw
from joint.data.requests import Column, Requests
from joint.schema import History

NOISE, THINNING = -2, -3  # among the keys of draws


def narrowness(values: Ragged) -> np.ndarray:
    """How few different `values` (such as categories) each list has, float64 `[R]` in [0, 1): 1 - distinct / all.

    0 for all different, and for an empty list.
    """
    pairs = np.unique(np.stack([values.rows, values.values]), axis=1)
    distinct = np.bincount(pairs[0].astype(np.int64), minlength=len(values))
    return 1 - np.where(values.lengths, distinct / np.maximum(values.lengths, 1), 1)


def noisy(vectors: np.ndarray, keys: np.ndarray, narrow: np.ndarray, *, noise: float) -> np.ndarray:
    """User vectors `[R, D]` with Gaussian noise, as long as `noise (1 + narrow [R])` times the vector on average.

    `keys`: uint64 `[R]`, of (seed, request). A narrow user's noise is up to twice that of a broad one.
    """
    slots = np.arange(vectors.shape[1])
    first, second = (_uniform(draw(keys[:, None], NOISE, slots, part)) for part in (0, 1))
    gaussian = np.sqrt(-2 * np.log(first)) * np.cos(2 * np.pi * second)  # Box and Muller
    size = np.linalg.norm(vectors, axis=1) / np.sqrt(vectors.shape[1])
    return vectors + (noise * (1 + narrow) * size)[:, None].astype(vectors.dtype) * gaussian.astype(vectors.dtype)


def thinned(
    requests: Requests, histories: Iterable[History], keys: np.ndarray, *, keep: float, newest: int
) -> Requests:
    """Requests whose histories hold their `newest` events, and of the older ones a share `keep`, drawn one by one.

    `keys`: uint64 `[R]`, of (seed, request). Columns parallel to a history go with it.
    """
    columns: dict[str, Column] = dict(requests.columns)
    for number, history in enumerate(histories):
        events = requests.lists(history.name)
        age = events.offsets[1:][events.rows] - 1 - np.arange(len(events.values))
        chance = _uniform(draw(keys[events.rows], THINNING, number, age))
        kept = (age < newest) | (chance <= keep)
        columns[history.name] = events.keep(kept)
        for event in (*history.events, "timestamp"):
            if (name := f"{history.name}.{event}") in columns:
                columns[name] = requests.lists(name).keep(kept)
        if (name := f"{history.name}.competitors") in columns:
            columns[name] = requests.lists(name).keep(np.repeat(kept, history.competitors))
    return Requests(columns)


def _uniform(bits: np.ndarray) -> np.ndarray:
    """Random bits as float64 in (0, 1]."""
    return ((bits >> np.uint64(11)).astype(np.float64) + 1) / 2**53
