"""What may be recommended to a request: one rule for sampling, softmax masks, metrics, the funnel and the baselines.

An item is eligible if it has joined the pool by the day of the request and is in none of the histories that the
config names, such as what was already watched.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from joint.data.ragged import Ragged, concatenate, contains, draw, offsets_of, side_by_side
from joint.data.requests import Requests
from joint.schema import NEVER, Stage

if TYPE_CHECKING:  # serving imports this module, and does without torch
    from joint.data.dataset import Dataset
    from joint.experiment import Data

ATTEMPTS = 8  # draws for a slot before it is given up: with half the pool taken, 1 in 256 stays empty


class Eligibility:
    """The rule for one dataset and config."""

    def __init__(self, dataset: Dataset, data: Data) -> None:
        self.first_day = dataset.first_day[data.pool]
        self.items = len(self.first_day)
        self.histories = data.not_eligible
        self.popular = _logged_counts(dataset, data.train).cumsum() if data.random_by == "popularity" else None

    @cached_property
    def corpus(self) -> np.ndarray:
        """The items that are ever in the pool, ascending: the columns of a corpus softmax. int64 [C]."""
        return np.flatnonzero(self.first_day < NEVER)

    @cached_property
    def _column(self) -> np.ndarray:
        column = np.full(self.items, -1)
        column[self.corpus] = np.arange(len(self.corpus))
        return column

    @cached_property
    def _by_day(self) -> tuple[np.ndarray, np.ndarray]:
        order = np.argsort(self.first_day, kind="stable")
        return order, self.first_day[order]

    def columns(self, items: np.ndarray) -> np.ndarray:
        """Each item's place in `corpus`, -1 where it has none."""
        return self._column[items]

    def slice(self, rank: int, world_size: int) -> np.ndarray:
        """A rank's share of `corpus`; all shares are equally long, the last ones padded with -1."""
        share = -(-len(self.corpus) // world_size)
        mine = self.corpus[rank * share : (rank + 1) * share]
        return np.pad(mine, (0, share - len(mine)), constant_values=-1)

    def is_open(self, items: np.ndarray, day: int) -> np.ndarray:
        """Which items, -1 for none, have joined the pool by a day: bool, shaped as `items`."""
        return open_items(self.first_day, items, day)

    def taken(self, requests: Requests) -> Ragged:
        """The items in the named histories of each request, int64."""
        return taken_items(requests, self.histories)

    def mask(self, requests: Requests) -> np.ndarray:
        """Which items of `corpus` are eligible for each request: bool [R, C]."""
        free = self.first_day[self.corpus] <= requests.scalars("day")[:, None]
        taken = self.taken(requests)
        column = self.columns(taken.values)
        free[taken.rows[column >= 0], column[column >= 0]] = False
        return free

    def eligible(self, requests: Requests) -> Ragged:
        """The eligible items of each request, ascending."""
        return self.marked(self.mask(requests))

    def marked(self, mask: np.ndarray) -> Ragged:
        """The items of the corpus that a mask `[R, C]` marks for each request, ascending."""
        return Ragged(self.corpus[np.nonzero(mask)[1]], offsets_of(mask.sum(axis=1)))

    def available(self, day: int) -> int:
        """How many items have joined the pool by a day."""
        return int(np.searchsorted(self._by_day[1], day, side="right"))

    def draw_available(self, random: np.ndarray, day: int) -> np.ndarray:
        """Items of the pool on a day, uniform by random bits (uint64 [n]); none where the pool is empty. int64."""
        order, available = self._by_day[0], self.available(day)
        return order[(random % np.uint64(max(available, 1))).astype(np.int64)][: len(random) if available else 0]

    def random(self, requests: Requests, quota: int, keys: np.ndarray, *, but: Ragged, uniform: bool = False) -> Ragged:
        """Up to `quota` eligible items of each request, with replacement, none of those in `but`.

        Uniform, or as `random_by` says, as often as the training log holds them. A slot that hits a taken item is
        drawn again, up to ATTEMPTS times, then left empty.

        Args:
            keys: uint64 [R], a hash of (seed, epoch, request): the draw depends on it and the slot alone.
            uniform: whatever `random_by` says.
        """
        popular = None if uniform else self.popular
        taken, _ = side_by_side(self.taken(requests), Ragged(but.values.astype(np.int64), but.offsets))
        taken_pairs = np.sort(taken.rows * self.items + taken.values)
        order, first_day = self._by_day
        available = np.searchsorted(first_day, requests.scalars("day"), side="right")
        rows = np.repeat(np.arange(len(keys)), quota)
        slots = np.tile(np.arange(quota), len(keys))
        drawn = np.full(len(rows), -1)
        open_ = np.flatnonzero(available[rows])
        for attempt in range(ATTEMPTS):
            if not len(open_):
                break
            row = rows[open_]
            bits = draw(keys[row], slots[open_], attempt)
            if popular is None:
                tried = order[(bits % available[row].astype(np.uint64)).astype(np.int64)]
            else:
                tried = np.searchsorted(popular, bits % np.uint64(popular[-1]), side="right")
            free = ~contains(taken_pairs, row * self.items + tried)
            free &= self.first_day[tried] <= requests.scalars("day")[row]
            drawn[open_[free]] = tried[free]
            open_ = open_[~free]
        return Ragged(drawn, offsets_of(np.full(len(keys), quota))).keep(drawn >= 0)


def open_items(first_day: np.ndarray, items: np.ndarray, day: int) -> np.ndarray:
    """Which items, -1 for none, have joined by a day: bool, shaped as `items`."""
    return (items >= 0) & (first_day[items] <= day)


def taken_items(requests: Requests, histories: Sequence[str]) -> Ragged:
    """The items in these histories of each request, int64."""
    count, names = len(requests), histories
    if not names:
        return Ragged(np.zeros(0, np.int64), np.zeros(count + 1, np.int64))
    joined = concatenate([requests.lists(name) for name in names])
    order = np.arange(len(names) * count).reshape(len(names), count).T.ravel()
    taken = joined.take(order)
    return Ragged(taken.values.astype(np.int64), taken.offsets[:: len(names)])


def _logged_counts(dataset: Dataset, splits: Sequence[str]) -> np.ndarray:
    """How often each item is a candidate that was not exposed, or where none else is logged, an exposed one."""
    counts = np.zeros((2, dataset.schema.items), np.uint64)
    for parts in dataset.parts(splits).values():
        for part in parts:
            requests = dataset.read(part)
            hidden = (requests.lists("stages").values & Stage.EXPOSED) == 0
            items = requests.lists("candidates").values
            for row, chosen in enumerate((items[~hidden], items[hidden])):
                counts[row] += np.bincount(chosen, minlength=len(counts[row])).astype(np.uint64)
    return counts[1] if counts[1].any() else counts[0]
