"""Cross features: numbers of (history, candidate), computed for every candidate, sampled ones too.

A logged cross column would tell a sampled negative by its missing value.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from joint.data.ragged import Ragged


@dataclass(frozen=True, kw_only=True)
class Cross:
    """A feature of (history, candidate), computed for every candidate alike, sampled ones too.

    `count`: log(1 + how many of the history's events share the candidate's value of an item feature). `recency`:
    1 / (1 + events since the latest that does), 0 if none does.
    """

    history: str  # a history of the dataset
    feature: str  # item feature, of ids
    of: Literal["count", "recency"] = "count"  # what the number says
    length: int = 50  # newest events read

    def __post_init__(self) -> None:
        if self.length < 1:
            raise ValueError(f"length must be at least 1, found {self.length}")


def cross_values(past: Ragged, candidates: Ragged, of: Literal["count", "recency"]) -> np.ndarray:
    """What each candidate's value means in the history of its request, float32 [N].

    Args:
        past: the feature's ids of each request's events, oldest first; 0, the unknown, matches nothing.
        candidates: the feature's ids of each request's candidates.
        of: `count`, log(1 + events that share the id); `recency`, 1 / (1 + events since the latest that does), or 0.
    """
    known = past.values != 0
    age = np.repeat(past.offsets[1:], past.lengths) - 1 - np.arange(len(past.values))
    row, value, age = past.rows[known], past.values[known], age[known]
    order = np.lexsort((age, value, row))
    row, value, age = row[order], value[order], age[order]
    size = max(int(past.values.max(initial=0)), int(candidates.values.max(initial=0))) + 1
    keys = row * size + value
    wanted = candidates.rows * size + candidates.values
    first = np.searchsorted(keys, wanted, side="left")
    count = np.searchsorted(keys, wanted, side="right") - first
    if of == "count":
        return np.log1p(count).astype(np.float32)
    latest = np.append(age, 0)[np.minimum(first, len(age))]
    return np.where(count > 0, 1 / (1 + latest), 0).astype(np.float32)
