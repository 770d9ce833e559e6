"""The retrieval head: two towers that meet in a similarity, so that one index of item vectors serves all tasks."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from towers.mixtures import SharedBottom, Trunk, build_trunk, check_counts
from towers.mlp import Mlp, TaskTower, check_fusion, check_layers


@dataclass(frozen=True, kw_only=True)
class Retrieval:
    """A user tower with a vector per task, and one item tower; logit = similarity / temperature.

    `fusion` weighs the tasks' logits in the served score, which is one vector a user (RRA Eq 8); none named: all 1.
    """

    features: tuple[str, ...]
    trunk: Trunk = SharedBottom()
    item_hidden: tuple[int, ...] = ()
    dim: int = 32
    similarity: Literal["dot", "cosine"] = "dot"
    temperature: float = 1.0
    fusion: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_counts(dim=self.dim)
        check_layers(self.item_hidden or (1,), 0.0)
        check_fusion(self.fusion)
        if self.temperature <= 0:
            raise ValueError(f"temperature is {self.temperature}; expected more than 0")


class RetrievalHead(nn.Module):
    """Vectors of users (per task) and items in one space of width D."""

    def __init__(self, config: Retrieval, *, request_dim: int, item_dim: int, tasks: int, seed: int) -> None:
        super().__init__()
        self.config = config
        self.trunk = build_trunk(config.trunk, tasks=tasks, seed=seed)
        self.user_first = nn.Linear(request_dim, self.trunk.width)
        self.user_last = TaskTower(tasks, self.trunk.out_dim, out_dim=config.dim)
        body = Mlp(item_dim, config.item_hidden)
        self.item = nn.Sequential(body, nn.Linear(body.out_dim, config.dim))

    def user_vectors(self, request: Tensor) -> Tensor:
        """`[R, T, D]` of the request side `[R, request_dim]`; the temperature is folded in."""
        vectors = self.user_last(self.trunk(self.user_first(request)))
        if self.config.similarity == "cosine":
            vectors = F.normalize(vectors, dim=-1)
        return vectors / self.config.temperature

    def item_vectors(self, item: Tensor) -> Tensor:
        """`[N, D]` of the item side `[N, item_dim]`."""
        vectors = self.item(item)
        return F.normalize(vectors, dim=-1) if self.config.similarity == "cosine" else vectors

    @staticmethod
    def logits(user: Tensor, item: Tensor, row: Tensor) -> Tensor:
        """`[N, T]` of user vectors `[R, T, D]`, item vectors `[N, D]` and each candidate's request `[N]`."""
        return (user.index_select(0, row) * item.unsqueeze(1)).sum(-1)
