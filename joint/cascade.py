"""The funnel: each head keeps its best candidates and hands them to the next. Ragged, no loop over requests."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from joint.ranks import order_within, positions


def top_k(scores: Tensor, offsets: Tensor, k: int) -> Tensor:
    """True for the K best of each request, bool `[N]`; among equal scores the earlier candidate."""
    order = order_within(scores, offsets, torch.arange(len(scores), device=scores.device))
    place = torch.empty_like(order).scatter_(0, order, positions(offsets))
    return place < k


def funnel(scores: Mapping[str, Tensor], quotas: Mapping[str, int], offsets: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The stages in the order of `quotas`, each with its survivors, bool `[N]`.

    Args:
        scores: head -> fused scores `[N]` on the same ragged candidates; only survivors' are read.
        quotas: head -> how many it keeps of those the stage before left.
    """
    alive = torch.ones(int(offsets[-1]), dtype=torch.bool, device=offsets.device)
    for head, quota in quotas.items():
        alive = alive & top_k(scores[head].where(alive, -torch.inf), offsets, quota)
        yield head, alive
