"""A head's tasks as one score: Σ_t w_t f_t(logit_t), its weights and f from the config (RRA Eq 7-8)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from towers.pre_ranking import PreRanking
from towers.ranking import Ranking
from towers.retrieval import Retrieval


def fusion_weights(head: Retrieval | PreRanking | Ranking, tasks: Sequence[str]) -> list[float]:
    """The weight of each task; all 1 where the config names none."""
    return [head.fusion.get(task, 0.0) if head.fusion else 1.0 for task in tasks]


def fuse(head: Retrieval | PreRanking | Ranking, tasks: Sequence[str], logits: Tensor) -> Tensor:
    """Scores `[...]` of logits `[..., T]`. Retrieval fuses logits, so that one vector a user serves all tasks."""
    weights = torch.tensor(fusion_weights(head, tasks), device=logits.device)
    if not isinstance(head, Retrieval):
        of = [head.fusion_of.get(task, "logit") for task in tasks]
        parts = [_transformed(logits[..., index], kind) for index, kind in enumerate(of)]
        logits = torch.stack(parts, dim=-1)
    return logits @ weights


def _transformed(logit: Tensor, of: str) -> Tensor:
    match of:
        case "sigmoid":
            return logit.sigmoid()
        case "exp":  # the odds: of a weighted task, the expected value
            return logit.exp()
        case _:
            return logit
