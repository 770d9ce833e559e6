"""The items that a batch brings for a softmax to be over: the corpus, or impressions and shared random items."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from joint.data.eligibility import Eligibility
from joint.data.ragged import draw
from joint.data.sampling import Candidates
from joint.schema import Stage


@dataclass(frozen=True)
class PoolItems:
    """This rank's part; -1 is padding."""

    items: np.ndarray  # int64 [P]
    in_batch: np.ndarray  # bool [P]
    sampled: bool = False

    @classmethod
    def corpus(cls, items: np.ndarray) -> PoolItems:
        """A slice of the corpus, or nothing of it."""
        return cls(items, np.zeros(len(items), bool))


NO_POOL = PoolItems.corpus(np.zeros(0, np.int64))


def sampled_items(candidates: Candidates | None, drawn: np.ndarray) -> PoolItems:
    """The distinct impressions of a batch's candidates (None: a rank without requests), then random items."""
    shown = np.zeros(0, np.int64)
    if candidates is not None:
        exposed = (candidates.stages & Stage.EXPOSED) != 0
        shown = np.unique(candidates.items.values[exposed]).astype(np.int64)
    in_batch = np.arange(len(shown) + len(drawn)) < len(shown)
    return PoolItems(np.concatenate([shown, drawn]), in_batch, sampled=True)


def shared_random(eligibility: Eligibility, count: int, rank: int, world_size: int, day: int, *keys: int) -> np.ndarray:
    """This rank's share of the random items that all requests of a global batch are set against, int64.

    Args:
        count: of the whole batch, whatever the number of ranks; uniform and with replacement among those of the day.
        keys: what names the batch: seed, epoch, day, number.
    """
    slots = np.arange(count)[rank::world_size]
    return eligibility.draw_available(draw(*keys, slots), day)
