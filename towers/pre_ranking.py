"""The pre-ranking head: a light student on pruned features (SDCL Eq 4), behind a gate (SDCL Eq 6)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from towers.checks import FusionOf, check_choice, check_counts, check_fusion, check_widths
from towers.fields import Fields, side_by_side, width_of
from towers.gate import Gate, check_prior
from towers.interactions import Interaction
from towers.mixtures import SharedBottom, Trunk
from towers.mlp import GroupedLinear, TaskTower
from towers.tower import Tower


@dataclass(frozen=True, kw_only=True)
class PreRanking:
    """Which of the features the student keeps, and how user and item meet.

    `vector_product`: a gate, an interaction and a trunk on each side, a vector per task and side, their product is
    the logit: both sides can be cached. `interaction`: the same sides, and a small network per task across their
    vectors (`cross_hidden`; COLD: Wang et al., 2020). `mlp`: one gate and one trunk over the concatenation (SDCL to
    the letter). `fusion`, `fusion_by_group` and `fusion_of` are as in the ranking head.
    """

    features: tuple[str, ...]  # of request and item, encoders among them
    kind: Literal["vector_product", "interaction", "mlp"] = "vector_product"  # how user and item meet
    gate: Gate | None = Gate()
    interaction: Interaction | None = None
    trunk: Trunk = SharedBottom()
    dim: int = 32  # of the sides' vectors
    cross_hidden: tuple[int, ...] = (32,)
    fusion: dict[str, float] = field(default_factory=dict)
    fusion_by_group: dict[str, dict[str, float]] = field(default_factory=dict)  # user group -> its own fusion
    fusion_of: dict[str, FusionOf] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_choice("kind", self.kind, *KINDS)
        check_counts(dim=self.dim)
        check_widths(cross_hidden=self.cross_hidden)
        check_fusion(self.fusion, self.fusion_by_group)


def _tower(config: PreRanking, *, fields: Fields, out_dim: int, tasks: int, seed: int) -> Tower:
    return Tower(
        fields=fields,
        gate=config.gate,
        interaction=config.interaction,
        trunk=config.trunk,
        out_dim=out_dim,
        tasks=tasks,
        seed=seed,
    )


class _Cross(nn.Module):
    """Each task's MLP over `[u; v; u ⊙ v]`; the first layer's user part is computed once per request."""

    def __init__(self, config: PreRanking, *, tasks: int) -> None:
        super().__init__()
        first, *rest = config.cross_hidden
        self.split = [config.dim, 2 * config.dim]
        self.first = GroupedLinear(tasks, 3 * config.dim, first)
        self.rest = TaskTower(tasks, first, rest, out_dim=1)

    def forward(self, user: Tensor, item: Tensor, product: Tensor, row: Tensor | None) -> Tensor:
        """`[N, T]` of `user [R, T, D]`, `item [N, T, D]`, their `product [N, T, D]` and requests `row [N]`."""
        on_user, on_rest = self.first.weight.split(self.split, dim=1)
        of_user = torch.baddbmm(self.first.bias.unsqueeze(1), user.transpose(0, 1), on_user)  # [T, R, H]
        of_rest = torch.bmm(torch.cat([item, product], dim=2).transpose(0, 1), on_rest)  # [T, N, H]
        hidden = ((of_user if row is None else of_user.index_select(1, row)) + of_rest).relu()
        return self.rest(hidden.transpose(0, 1)).squeeze(2)


class TwoTowerHead(nn.Module):
    """logit_t = <user_t, item_t> + cross_t + bias_t, without cross_t in a vector product.

    Each side's gate reads the prior fields that are its own. ValueError for a prior that neither side has.
    """

    def __init__(
        self, config: PreRanking, *, request_fields: Fields, item_fields: Fields, tasks: int, seed: int
    ) -> None:
        super().__init__()
        check_prior(side_by_side(request_fields, item_fields), gate=config.gate)
        self.user = _tower(config, fields=request_fields, out_dim=config.dim, tasks=tasks, seed=seed)
        self.item = _tower(config, fields=item_fields, out_dim=config.dim, tasks=tasks, seed=seed)
        self.cross = _Cross(config, tasks=tasks) if config.kind == "interaction" else None
        self.bias = nn.Parameter(torch.zeros(tasks))

    def user_vectors(self, request: Tensor) -> Tensor:
        """`[R, T, D]` of the request side `[R, request_dim]`."""
        return self.user(request)

    def item_vectors(self, item: Tensor) -> Tensor:
        """`[N, T, D]` of the item side `[N, item_dim]`."""
        return self.item(item)

    def logits(self, user: Tensor, item: Tensor, row: Tensor | None) -> Tensor:
        """`[N, T]` of user vectors `[R, T, D]`, item vectors `[N, T, D]` and each candidate's request `[N]`.

        `row` None: there is one request, and all candidates are its own (serving).
        """
        full = torch.promote_types(user.dtype, torch.float32)  # under autocast vectors are less
        user, item = user.to(full), item.to(full)
        if row is None and self.cross is None:  # one matrix product, every task's vector in a column of its own
            columns = user[0].unsqueeze(2) * torch.eye(user.shape[1]).unsqueeze(1)  # [T, D, T]
            return item.flatten(1) @ columns.flatten(0, 1) + self.bias
        product = (user if row is None else user.index_select(0, row)) * item
        logits = product.sum(-1) + self.bias
        return logits if self.cross is None else logits + self.cross(user, item, product, row)

    def forward(self, request: Tensor, item: Tensor, row: Tensor) -> tuple[Tensor, Tensor]:
        """Logits `[N, T]` and the gated item side `[N, item_dim]`, of `[R, request_dim]`, `[N, item_dim]`, `[N]`."""
        gated = self.item.gate(item)
        return self.logits(self.user_vectors(request), self.item.after_gate(gated), row), gated


class MlpHead(nn.Module):
    """One gate and one trunk over user and item together; nothing of it can be cached per user or item."""

    def __init__(
        self, config: PreRanking, *, request_fields: Fields, item_fields: Fields, tasks: int, seed: int
    ) -> None:
        super().__init__()
        fields = side_by_side(request_fields, item_fields)
        check_prior(fields, gate=config.gate)
        self.request_dim = width_of(request_fields)
        self.both = _tower(config, fields=fields, out_dim=1, tasks=tasks, seed=seed)
        self.joint = config.gate is not None or config.interaction is not None  # before the first layer

    def forward(self, request: Tensor, item: Tensor, row: Tensor) -> tuple[Tensor, Tensor]:
        """Logits `[N, T]` and the item side of the gated input `[N, item_dim]`."""
        if not self.joint:  # the request's part of the first layer once a request
            on_request, on_item = self.both.first.weight.split([self.request_dim, item.shape[1]], dim=1)
            first = F.linear(request, on_request, self.both.first.bias).index_select(0, row) + F.linear(item, on_item)
            return self.both.last(self.both.trunk(first)).squeeze(2), item
        gated = self.both.gate(torch.cat([request.index_select(0, row), item], dim=1))
        return self.both.after_gate(gated).squeeze(2), gated[:, self.request_dim :]


KINDS: dict[str, type[TwoTowerHead | MlpHead]] = {
    "vector_product": TwoTowerHead,
    "interaction": TwoTowerHead,
    "mlp": MlpHead,
}


def build_pre_ranking(
    config: PreRanking, *, request_fields: Fields, item_fields: Fields, tasks: int, seed: int
) -> TwoTowerHead | MlpHead:
    """The head of a config. ValueError for a gate's prior that is none of the fields."""
    return KINDS[config.kind](config, request_fields=request_fields, item_fields=item_fields, tasks=tasks, seed=seed)
