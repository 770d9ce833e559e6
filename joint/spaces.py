"""Spaces: which of a batch's candidates a name such as `exposed` or `ranking_ns` stands for, and how far they got."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from joint.batch import Batch
from joint.schema import EXPOSED_TOKENS, STAGES, Stage

# FS-LTR's priorities (RecFlow 3.1.2): 0, 1, … by how far a candidate got; positive feedback comes after the last.
PRIORITY = (
    Stage.RANDOM,
    Stage.PRERANK_NEG,
    Stage.COARSE_NEG,
    Stage.RANKED | Stage.RERANKED | Stage.RANK_NEG | Stage.RERANK_NEG,
    Stage.RANK_POS | Stage.RERANK_POS,
    Stage.EXPOSED,
)


def stage_mask(tokens: Iterable[str], stages: Tensor) -> Tensor:
    """Candidates that may belong to a space by their stage alone: bool [N]."""
    mask = torch.zeros_like(stages, dtype=torch.bool)
    exposed = (stages & int(Stage.EXPOSED)) != 0
    for token in tokens:
        mask |= exposed if token in EXPOSED_TOKENS else ((stages & int(STAGES[token])) != 0) & ~exposed
    return mask


def space_mask(tokens: Sequence[str], batch: Batch, tasks: Tensor) -> Tensor:
    """Candidates of a space, for each of the `tasks` (indices): bool [N, T]."""
    mask = torch.zeros_like(batch.positive[:, tasks])
    for token in tokens:
        member = stage_mask([token], batch.stages)[:, None] & batch.observed[:, tasks]
        if token == "positive":
            member = member & batch.positive[:, tasks]
        elif token == "exposed_neg":
            member = member & ~batch.positive[:, tasks]
        mask = mask | member
    return mask


def priorities(batch: Batch, tasks: Tensor) -> Tensor:
    """FS-LTR's order of candidates for each of the `tasks` (indices), the highest that applies: int64 [N, T]."""
    found = torch.zeros_like(batch.stages)
    for level, flags in enumerate(PRIORITY):
        found = torch.where((batch.stages & int(flags)) != 0, level, found)
    return torch.where(batch.positive[:, tasks], len(PRIORITY), found[:, None])


def dealt(member: Tensor, batch: Batch) -> Tensor:
    """A random permutation of the members (bool [N]) of each request, everyone else in place: int64 [N]."""
    index = member.nonzero().flatten()
    order = index[torch.rand(len(index), device=index.device).argsort()]
    order = order[batch.row[order].argsort(stable=True)]
    return torch.arange(len(member), device=index.device).index_put((index,), order)
