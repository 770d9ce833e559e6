"""The retrieval head: two towers that meet in a similarity, so that one index of item vectors serves all tasks."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from towers.checks import check_choice, check_counts, check_fusion, check_positive, check_widths
from towers.fields import Fields, width_of
from towers.gate import Gate, check_prior
from towers.interactions import Interaction
from towers.mixtures import SharedBottom, Trunk
from towers.mlp import Mlp
from towers.tower import Tower


@dataclass(frozen=True, kw_only=True)
class Retrieval:
    """A user tower with a vector per task, and one item tower; logit = similarity / temperature.

    The user tower may begin with a `gate` and an `interaction` and end in layers of each task (`task_hidden`, RRA
    4.2.4). `trunk` null: no towers; the user's columns are the vector of every task and the item's columns that of the
    item, both `dim` wide (SASRec: the newest state and the item's own row). `fusion` weighs the tasks' logits in the
    served score, which is one vector a user (RRA Eq 8); none named: all 1; a user group that `fusion_by_group` names
    has weights of its own. `bias` learns a number per task that is added to the logits in training only, so that one
    similarity can serve a softmax, which it leaves alone, and a binary loss.
    """

    features: tuple[str, ...]  # of request and item, encoders among them
    gate: Gate | None = None
    interaction: Interaction | None = None
    trunk: Trunk | None = SharedBottom()
    task_hidden: tuple[int, ...] = ()
    item_hidden: tuple[int, ...] = ()  # layers of the item tower before its last one
    dim: int = 32
    similarity: Literal["dot", "cosine"] = "dot"  # of user and item vector
    temperature: float = 1.0  # divides the similarity
    bias: bool = False
    fusion: dict[str, float] = field(default_factory=dict)
    fusion_by_group: dict[str, dict[str, float]] = field(default_factory=dict)  # user group -> its own fusion

    def __post_init__(self) -> None:
        check_widths(least=0, task_hidden=self.task_hidden, item_hidden=self.item_hidden)
        check_counts(dim=self.dim)
        check_choice("similarity", self.similarity, "dot", "cosine")
        check_positive(temperature=self.temperature)
        check_fusion(self.fusion, self.fusion_by_group)
        layers = (self.gate, self.interaction, self.task_hidden, self.item_hidden)
        if self.trunk is None and any(layers):
            raise ValueError("trunk null leaves no towers for gate, interaction, task_hidden or item_hidden")


class RetrievalHead(nn.Module):
    """Vectors of users (per task) and items in one space of width D. ValueError for a prior that users have not."""

    def __init__(
        self, config: Retrieval, *, request_fields: Fields, item_fields: Fields, tasks: int, seed: int
    ) -> None:
        super().__init__()
        check_prior(request_fields, gate=config.gate)
        self.config = config
        self.tasks = tasks
        self.bias = nn.Parameter(torch.zeros(tasks)) if config.bias else None
        if config.trunk is None:
            assert width_of(request_fields) == width_of(item_fields) == config.dim
            self.user: Tower | None = None
            self.item: nn.Module = nn.Identity()
            return
        self.user = Tower(
            fields=request_fields,
            gate=config.gate,
            interaction=config.interaction,
            trunk=config.trunk,
            task_hidden=config.task_hidden,
            out_dim=config.dim,
            tasks=tasks,
            seed=seed,
        )
        body = Mlp(width_of(item_fields), config.item_hidden)
        self.item = nn.Sequential(body, nn.Linear(body.out_dim, config.dim))

    def user_vectors(self, request: Tensor) -> Tensor:
        """`[R, T, D]` of the request side `[R, request_dim]`; the temperature is folded in."""
        vectors = request.unsqueeze(1).expand(-1, self.tasks, -1) if self.user is None else self.user(request)
        if self.config.similarity == "cosine":
            vectors = F.normalize(vectors, dim=-1)
        return vectors / self.config.temperature

    def item_vectors(self, item: Tensor) -> Tensor:
        """`[N, D]` of the item side `[N, item_dim]`."""
        vectors = self.item(item)
        return F.normalize(vectors, dim=-1) if self.config.similarity == "cosine" else vectors

    def logits(self, user: Tensor, item: Tensor, row: Tensor) -> Tensor:
        """`[N, T]` of user vectors `[R, T, D]`, item vectors `[N, D]` and each candidate's request `[N]`."""
        logits = (user.index_select(0, row) * item.unsqueeze(1)).sum(-1)
        return logits + self.bias if self.bias is not None and self.training else logits

    @staticmethod
    def fused_vectors(user: Tensor, weights: Tensor) -> Tensor:
        """`[R, D]` of `[R, T, D]` and `[T]`: `Σ_t w_t u_t`, whose logit of an item is `Σ_t w_t logit_t` (RRA Eq 8)."""
        return weights.to(user) @ user
