"""The funnel: each head keeps its best candidates and hands them to the next; what of the wanted survives each stage.

Ragged, no loop over requests; where the first candidates come from does not matter here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from joint.data.planted.truth import LIST
from joint.data.ragged import Ragged
from joint.data.requests import Requests
from joint.metrics import PerRequest, kendall_by_request
from joint.ranks import request_sums, top_k

OUTSIDE = "outside"  # who loses what is not eligible, or outside the pool: no head could have found it


@dataclass(frozen=True)
class Wanted:
    """Items that a funnel should let through: M pairs of a request and an item."""

    row: np.ndarray  # int64 [M]
    item: np.ndarray  # int64 [M]
    eligible: np.ndarray  # bool [M]
    place: np.ndarray  # int64 [M]: which of the funnel's candidates it is, -1: none
    weight: Mapping[str, np.ndarray] = field(default_factory=dict)  # weighted task -> what each pair weighs [M]

    @classmethod
    def among(
        cls,
        items: Ragged,
        row: np.ndarray,
        item: np.ndarray,
        eligible: np.ndarray,
        weight: Mapping[str, np.ndarray] | None = None,
    ) -> Wanted:
        """Pairs `row [M], item [M]`, looked up among the funnel's candidates `items`."""
        size = 1 + max(items.values.max(initial=0), item.max(initial=0))
        keys, own = items.rows * size + items.values, row * size + item
        order = keys.argsort(kind="stable")
        near = np.append(keys[order], -1)[(at := np.searchsorted(keys[order], own))]
        return cls(row, item, eligible, np.where(near == own, np.append(order, -1)[at], -1), weight or {})

    def of(self, pairs: np.ndarray) -> Wanted:
        """Some of the pairs, bool `[M]`."""
        weight = {task: values[pairs] for task, values in self.weight.items()}
        return Wanted(self.row[pairs], self.item[pairs], self.eligible[pairs], self.place[pairs], weight)

    def passed(self, stages: Mapping[str, Tensor]) -> np.ndarray:
        """How far each came, int64 `[M]`: 0 outside, 1 lost by the first stage, …, len(stages) + 1 through all.

        `stages`: head -> its survivors among the candidates, bool `[N]`, each among those of the head before.
        """
        survived = sum(alive.cpu().numpy().astype(np.int64) for alive in stages.values())
        found = np.append(survived, 0)[self.place]
        return np.where(self.eligible, 1 + found, 0)


@dataclass(frozen=True)
class Entrants:
    """What enters the funnel of R requests: N candidates, what every head says of them, and what is wanted of them."""

    requests: Requests
    items: Ragged  # item indices
    offsets: Tensor  # [R + 1]
    group: Tensor  # [R] of users
    logits: dict[str, Tensor]  # head -> [N, T]
    scores: dict[str, Tensor]  # head -> its fused scores [N]
    orders: dict[str, Tensor]  # whose -> their order [N]: "ranking" (the teacher), "reference", "truth", "logged"
    wanted: dict[str, Wanted]  # kind -> pairs: "positives", "teacher_favourites", "true_favourites"


def best_columns(scores: Tensor, k: int) -> Tensor:
    """True for the K best of each row of `[R, C]`; among equal scores the earlier column."""
    bar = scores.topk(k, dim=1).values[:, -1:]
    above, tied = scores > bar, scores == bar
    return above | tied & (tied.cumsum(1) <= k - above.sum(1, keepdim=True))


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


def served(stages: Mapping[str, Tensor], scores: Mapping[str, Tensor], offsets: Tensor) -> Tensor:
    """The ten that the funnel serves, bool `[N]`: the best of what the last stage left, in its own order."""
    last, alive = list(stages.items())[-1]
    return alive & top_k(scores[last].where(alive, -torch.inf), offsets, LIST)


def funnel_metrics(entrants: Entrants, quotas: Mapping[str, int]) -> dict[str, PerRequest]:
    """What survives each stage, who lost the rest, what is served is worth, and how heads order what entered."""
    scores, offsets = entrants.scores, entrants.offsets
    stages = dict(funnel(scores, quotas, offsets))
    found: dict[str, PerRequest] = {}
    if "truth" in entrants.orders:
        lists = {head: top_k(score, offsets, LIST) for head, score in scores.items()}
        if stages:
            lists["funnel"] = served(stages, scores, offsets)
        found |= dict(true_rewards(entrants.orders["truth"], offsets, lists))
    for kind, wanted in entrants.wanted.items() if stages else ():
        found |= dict(survival(kind, wanted, stages, quotas, len(entrants.requests)))
    for whose, order in entrants.orders.items() if "retrieval" in quotas else ():
        for head in (head for head in scores if head != whose):
            quota = quotas["retrieval"]
            name = f"alignment/nktd@{quota}/" if whose == "ranking" else f"alignment/{whose}/nktd@{quota}/"
            found[name + head] = kendall_by_request(scores[head].double(), order.double(), offsets)
    return found


def survival(
    kind: str, wanted: Wanted, stages: Mapping[str, Tensor], quotas: Mapping[str, int], requests: int
) -> Iterator[tuple[str, PerRequest]]:
    """`funnel/HEAD/recall@QUOTA` of positives and `funnel/HEAD/KIND` of others: the share left after each stage.

    Of positives also `funnel/HEAD/weighted_recall@QUOTA/TASK`, each weighing its value of a weighted task (RRA).

    And which share each stage lost: `funnel/lost/HEAD` of positives, `funnel/lost/HEAD/KIND` of others. What is lost
    and what the last stage left sum to 1; of positives, `funnel/lost/outside` are those that could not be served.
    """
    passed = wanted.passed(stages)

    def share(which: np.ndarray, weight: np.ndarray | None = None) -> PerRequest:
        own = np.ones(len(which)) if weight is None else weight
        totals = (np.bincount(wanted.row[mask], own[mask], minlength=requests) for mask in (which, passed >= 0))
        return PerRequest.of(*map(torch.from_numpy, totals))

    of = "" if kind == "positives" else f"/{kind}"
    if not of:
        yield f"funnel/lost/{OUTSIDE}", share(passed == 0)
    for place, head in enumerate(stages, 1):
        yield f"funnel/lost/{head}{of}", share(passed == place)
        yield f"funnel/{head}{of or f'/recall@{quotas[head]}'}", share(passed > place)
        for task, weight in wanted.weight.items():
            yield f"funnel/{head}/weighted_recall@{quotas[head]}/{task}", share(passed > place, weight)


def true_rewards(worth: Tensor, offsets: Tensor, lists: Mapping[str, Tensor]) -> Iterator[tuple[str, PerRequest]]:
    """What the lists served to fresh requests of a planted world are worth: `NAME/true_reward@10`.

    The expected true reward per place of the list, an empty place being worth nothing: the primary endpoint.

    Args:
        worth: the true reward of each candidate, `[N]`.
        lists: name -> the candidates (at most ten a request) that are served, bool `[N]`.
    """
    for name, shown in lists.items():
        total = request_sums(worth.where(shown, 0), offsets)
        one = torch.ones_like(total)
        yield f"{name}/true_reward@{LIST}", PerRequest.of(total / LIST, one)
