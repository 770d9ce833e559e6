"""How varied lists are: different values of a feature in each, and the share of the catalogue that anyone is given."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from joint.metrics import PerRequest


@dataclass(frozen=True, eq=False)
class Coverage:
    """Which items were in anyone's list, bool `[C]`."""

    seen: Tensor

    def merge(self, *others: Coverage) -> Coverage:
        """What any of them has seen."""
        return Coverage(torch.stack([self.seen, *(other.seen for other in others)]).any(0))

    @property
    def value(self) -> float:
        """The share of the items; nan of none."""
        return self.seen.double().mean().item()


def variety(scores: Tensor, values: Tensor, name: str, k: int) -> dict[str, PerRequest | Coverage]:
    """`retrieval/distinct/NAME@K`, of lists of the K best of `scores [R, C]`, and `retrieval/coverage@K`.

    Args:
        scores: -inf for what is in no list.
        values: of the items `[C]`, such as categories: how many different ones a list has, its mean over requests.
    """
    best = scores.topk(min(k, scores.shape[1]), dim=1)
    real = best.values > -torch.inf
    own = torch.where(real, values[best.indices], -1).sort(dim=1).values
    fresh = (own >= 0) & torch.cat([torch.ones_like(real[:, :1]), own.diff(dim=1) != 0], dim=1)
    distinct = fresh.sum(1)
    seen = torch.zeros(scores.shape[1], dtype=torch.bool, device=scores.device)
    seen[best.indices[real]] = True
    return {
        f"retrieval/distinct/{name}@{k}": PerRequest.of(distinct, torch.ones_like(distinct)),
        f"retrieval/coverage@{k}": Coverage(seen.cpu()),
    }
