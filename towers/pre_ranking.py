"""The pre-ranking head: a light student on pruned features (SDCL Eq 4), behind a gate (SDCL Eq 6)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from towers.gate import Gate, GateUnit
from towers.mixtures import SharedBottom, Trunk, build_trunk, check_counts
from towers.mlp import TaskTower, check_fusion


@dataclass(frozen=True, kw_only=True)
class PreRanking:
    """Which of the features the student keeps, and how user and item meet.

    `vector_product`: a gate and a trunk on each side, a vector per task and side, their product is the logit: both
    sides can be cached. `mlp`: one gate and one trunk over the concatenation (SDCL to the letter).
    """

    features: tuple[str, ...]
    kind: Literal["vector_product", "mlp"] = "vector_product"
    gate: Gate | None = Gate()
    trunk: Trunk = SharedBottom()
    dim: int = 32  # of the vectors of a vector product
    fusion: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_counts(dim=self.dim)
        check_fusion(self.fusion)


class _Side(nn.Module):
    """Gate and trunk of one side: `[M, in_dim] -> ([M, T, out_dim], gated input [M, in_dim])`."""

    def __init__(self, config: PreRanking, *, in_dim: int, out_dim: int, tasks: int, seed: int) -> None:
        super().__init__()
        self.gate = GateUnit(config.gate, in_dim=in_dim) if config.gate else nn.Identity()
        self.trunk = build_trunk(config.trunk, tasks=tasks, seed=seed)
        self.first = nn.Linear(in_dim, self.trunk.width)
        self.last = TaskTower(tasks, self.trunk.out_dim, out_dim=out_dim)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        gated = self.gate(x)
        return self.last(self.trunk(self.first(gated))), gated


class VectorProductHead(nn.Module):
    """logit_t = <user_t, item_t> + bias_t."""

    def __init__(self, config: PreRanking, *, request_dim: int, item_dim: int, tasks: int, seed: int) -> None:
        super().__init__()
        self.user = _Side(config, in_dim=request_dim, out_dim=config.dim, tasks=tasks, seed=seed)
        self.item = _Side(config, in_dim=item_dim, out_dim=config.dim, tasks=tasks, seed=seed)
        self.bias = nn.Parameter(torch.zeros(tasks))

    def forward(self, request: Tensor, item: Tensor, row: Tensor) -> tuple[Tensor, Tensor]:
        """Logits `[N, T]` and the gated item side `[N, item_dim]`, of `[R, request_dim]`, `[N, item_dim]`, `[N]`."""
        user, _ = self.user(request)
        vectors, gated = self.item(item)
        return (user.index_select(0, row) * vectors).sum(-1) + self.bias, gated


class MlpHead(nn.Module):
    """One gate and one trunk over user and item together; nothing of it can be cached per user or item."""

    def __init__(self, config: PreRanking, *, request_dim: int, item_dim: int, tasks: int, seed: int) -> None:
        super().__init__()
        self.request_dim = request_dim
        self.both = _Side(config, in_dim=request_dim + item_dim, out_dim=1, tasks=tasks, seed=seed)

    def forward(self, request: Tensor, item: Tensor, row: Tensor) -> tuple[Tensor, Tensor]:
        """Logits `[N, T]` and the item side of the gated input `[N, item_dim]`."""
        logits, gated = self.both(torch.cat([request.index_select(0, row), item], dim=1))
        return logits.squeeze(2), gated[:, self.request_dim :]


def build_pre_ranking(
    config: PreRanking, *, request_dim: int, item_dim: int, tasks: int, seed: int
) -> VectorProductHead | MlpHead:
    """The head of a config."""
    kind = VectorProductHead if config.kind == "vector_product" else MlpHead
    return kind(config, request_dim=request_dim, item_dim=item_dim, tasks=tasks, seed=seed)
