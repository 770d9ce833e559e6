"""Several pools of items, one two-tower model: an index for each pool, and places reserved for its best items.

A pool's list is of its own items, by the same scores. Of what retrieval keeps, each pool has its quota of places, pool
by pool; the rest goes to the best of all that are left (industrial methodologies, 2 and 5.1).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import torch
from torch import Tensor

from joint.data.dataset import Dataset
from joint.experiment import ItemPool
from joint.metrics import PerRequest, recall_by_request
from joint.ranks import pool_ranks


def members(pools: Mapping[str, ItemPool], dataset: Dataset, corpus: np.ndarray, day: np.ndarray) -> dict[str, Tensor]:
    """Name -> which of the items `corpus [C]` are in the pool on each request's `day [R]`: bool `[R, C]`."""
    found = {}
    for name, pool in pools.items():
        age = day[:, None].astype(np.int64) - dataset.first_day[pool.pool][corpus]
        oldest = np.inf if pool.joined_within is None else pool.joined_within
        found[name] = torch.from_numpy((age >= 0) & (age <= oldest))
    return found


def recall_by_pool(
    scores: Tensor, pools: Mapping[str, Tensor], row: Tensor, column: Tensor, cuts: tuple[int, ...]
) -> Iterator[tuple[str, PerRequest]]:
    """`retrieval/POOL/recall@K`: of what is relevant in the pool, how much is among the K best of it.

    Args:
        scores: `[R, C]`; -inf for what is not eligible.
        pools: name -> its items, bool `[R, C]`.
        row: the request of every relevant item `[M]`, `column` its place in the corpus (-1: none).
    """
    for name, inside in pools.items():
        mask = inside & (scores > -torch.inf)
        own = (column >= 0) & mask[row, column.clamp(min=0)]
        place = pool_ranks(scores.where(mask, -torch.inf), row[own], column[own], mask=mask)
        for k in cuts:
            yield f"retrieval/{name}/recall@{k}", recall_by_request(place, row[own], len(scores), k)


def with_reserved(scores: Tensor, pools: Mapping[str, Tensor], quotas: Mapping[str, int]) -> Tensor:
    """The scores `[R, C]`, +inf for the best of each pool, as many as its quota: who takes the best takes these first.

    An item is reserved for the first pool that has it among its best; the next one takes its next best.
    """
    taken = torch.zeros_like(scores, dtype=torch.bool)
    for name, inside in pools.items():
        best = scores.where(inside & ~taken, -torch.inf).topk(min(quotas[name], scores.shape[1]), dim=1)
        chosen = torch.zeros_like(taken).scatter_(1, best.indices, best.values > -torch.inf)
        taken |= chosen
    return scores.masked_fill(taken, torch.inf)
