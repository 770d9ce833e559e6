"""The funnel: each head keeps its best candidates and hands them to the next; what of the wanted survives each stage.

Ragged, no loop over requests; where the first candidates come from does not matter here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from joint.data.planted.truth import LIST, Truth
from joint.data.ragged import Ragged
from joint.data.requests import Requests
from joint.metrics import PerRequest, kendall_by_request
from joint.ranks import order_within, positions, request_sums


@dataclass(frozen=True)
class Wanted:
    """Items that a funnel should let through: which of its N candidates they are, and how many each request has."""

    inside: Tensor  # bool [N]
    total: Tensor  # [R]


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


def true_rewards(worth: Tensor, offsets: Tensor, lists: Mapping[str, Tensor]) -> Iterator[tuple[str, PerRequest]]:
    """What the lists served to fresh requests of a planted world are worth: `NAME/true_reward@10`.

    The expected true reward per place of the list, an empty place being worth nothing: the primary endpoint.

    Args:
        worth: the true reward of each candidate, `[N]`.
        lists: name -> the candidates (at most ten a request) that are served, bool `[N]`.
    """
    for name, served in lists.items():
        total = request_sums(worth.where(served, 0), offsets)
        one = torch.ones_like(total)
        yield f"{name}/true_reward@{LIST}", PerRequest.of(total / LIST, one)


def true_favourites(truth: Truth, requests: Requests, items: Ragged, eligible: np.ndarray) -> Wanted:
    """The ten items of most true worth of each request, among its candidates `items`.

    Args:
        eligible: bool `[R, items of the catalogue]`.
    """
    best = truth.best(requests, LIST, eligible)
    size = eligible.shape[1]
    favourite = np.isin(items.rows * size + items.values, best.rows * size + best.values)
    return Wanted(torch.from_numpy(favourite), torch.from_numpy(best.lengths))


def teacher_favourites(score: Tensor, offsets: Tensor) -> Wanted:
    """The ten candidates of each request that the teacher scores best, of `[N]`."""
    favourite = top_k(score, offsets, LIST)
    return Wanted(favourite, request_sums(favourite, offsets))


def survival(
    stages: Mapping[str, Tensor], quotas: Mapping[str, int], offsets: Tensor, wanted: Mapping[str, Wanted]
) -> Iterator[tuple[str, PerRequest]]:
    """The share of what is wanted that is left after each stage: `funnel/HEAD/recall@QUOTA`, `funnel/HEAD/KIND`.

    Args:
        stages: head -> its survivors, bool `[N]`.
        wanted: kind -> items; `positives` are those of the recall.
    """
    for kind, items in wanted.items():
        for head, alive in stages.items():
            left = request_sums(alive & items.inside.to(alive.device), offsets)
            name = f"recall@{quotas[head]}" if kind == "positives" else kind
            yield f"funnel/{head}/{name}", PerRequest.of(left, items.total)


def served(stages: Mapping[str, Tensor], scores: Mapping[str, Tensor], offsets: Tensor) -> Tensor:
    """The ten that the funnel serves, bool `[N]`: the best of what the last stage left, in its own order."""
    last, alive = list(stages.items())[-1]
    return alive & top_k(scores[last].where(alive, -torch.inf), offsets, LIST)


def orders_of_the_retrieved(
    scores: Mapping[str, Tensor], orders: Mapping[str, Tensor], offsets: Tensor, quota: int
) -> Iterator[tuple[str, PerRequest]]:
    """Each head's order of what was retrieved, against the teacher's (RRA's NKTD@N) and whoever else's `orders`."""
    for whose, order in orders.items():
        for head in (head for head in scores if head != whose):
            name = f"alignment/nktd@{quota}/" if whose == "ranking" else f"alignment/{whose}/nktd@{quota}/"
            yield name + head, kendall_by_request(scores[head].double(), order.double(), offsets)
