"""A head's tasks as one score: Σ_t w_t f_t(logit_t), w and f from the config, w of all or of a group (RRA Eq 7-8)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from towers.pre_ranking import PreRanking
from towers.ranking import Ranking
from towers.retrieval import Retrieval, RetrievalHead

Head = Retrieval | PreRanking | Ranking


def fusion_weights(head: Head, tasks: Sequence[str], group: str = "") -> list[float]:
    """The weight of each task for a user group; all 1 where the config names none."""
    fusion = head.fusion_by_group.get(group, head.fusion)
    return [fusion.get(task, 0.0) if fusion else 1.0 for task in tasks]


def fuse(head: Head, tasks: Sequence[str], logits: Tensor, group: Tensor | None = None) -> Tensor:
    """Scores `[...]` of logits `[..., T]`. Retrieval fuses logits, so that one vector a user serves all tasks.

    Args:
        group: the user group of every row of logits, `[N]` for `[N, T]`; needed where the head weighs by group.
    """
    if not isinstance(head, Retrieval):
        of = [head.fusion_of.get(task, "logit") for task in tasks]
        parts = [_transformed(logits[..., index], kind) for index, kind in enumerate(of)]
        logits = torch.stack(parts, dim=-1)
    return _by_group(head, tasks, group, logits.device, lambda weights: logits @ weights)


def fuse_users(head: Retrieval, tasks: Sequence[str], user: Tensor, group: Tensor) -> Tensor:
    """One vector a user `[R, D]` of those of its tasks `[R, T, D]`, by the weights of its `group [R]`."""
    fused = _by_group(head, tasks, group, user.device, lambda weights: RetrievalHead.fused_vectors(user, weights).T)
    return fused.T


def _by_group(
    head: Head, tasks: Sequence[str], group: Tensor | None, device: torch.device, weigh: Callable[[Tensor], Tensor]
) -> Tensor:
    """`[..., N]` by the weights `[T]` of each of N rows' own group.

    All rows are weighed by every group's weights, so that a row's score does not depend on which rows are beside it.
    """
    fused = weigh(torch.tensor(fusion_weights(head, tasks), device=device))
    for name in head.fusion_by_group:
        assert group is not None, "the head weighs by group"
        own = weigh(torch.tensor(fusion_weights(head, tasks, name), device=device))
        fused = own.where(group == int(name), fused)
    return fused


def _transformed(logit: Tensor, of: str) -> Tensor:
    match of:
        case "sigmoid":
            return logit.sigmoid()
        case "exp":  # the odds: of a weighted task, the expected value
            return logit.exp()
        case _:
            return logit
