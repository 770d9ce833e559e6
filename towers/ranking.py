"""The ranking head: the teacher, which sees every feature and attends from each candidate."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from towers.checks import FusionOf, check_fusion, check_widths
from towers.fields import Fields, side_by_side, width_of
from towers.gate import Gate, GateUnit, TaskGates, check_prior
from towers.interactions import DcnV2, Interaction, build_interaction
from towers.mixtures import SharedBottom, Trunk, build_trunk
from towers.mlp import FactoredLinear, TaskTower
from towers.residual import Residual, ResidualNet


@dataclass(frozen=True, kw_only=True)
class Ranking:
    """The teacher's features, its trunk, and the hidden layers of each task's own tower.

    `gate` weighs the whole input, `interaction` is between all its fields, `task_gate` weighs the outputs of
    `task_hidden` (PPNet, LHUC). `fusion` weighs the tasks in the served score (none named: all 1), of the logit or of
    what `fusion_of` names: the sigmoid, or the odds (`exp`), which for a weighted task are its expected value.
    A user group that `fusion_by_group` names has weights of its own instead.
    `residual` corrects the logits of special users where the head is measured and served; who learns from the head
    (`distillation`, …) learns from it as it is for all.
    """

    features: tuple[str, ...]  # of request and item, encoders and cross features among them
    gate: Gate | None = None
    interaction: Interaction | None = None
    trunk: Trunk = SharedBottom()
    task_hidden: tuple[int, ...] = ()
    task_gate: Gate | None = None
    fusion: dict[str, float] = field(default_factory=dict)
    fusion_by_group: dict[str, dict[str, float]] = field(default_factory=dict)  # user group -> its own fusion
    fusion_of: dict[str, FusionOf] = field(default_factory=dict)
    residual: Residual | None = None

    def __post_init__(self) -> None:
        check_widths(least=0, task_hidden=self.task_hidden)
        if self.task_gate and not self.task_hidden:
            raise ValueError("task_gate weighs the hidden layers of task_hidden, which has none")
        if self.task_gate and self.task_gate.adds:
            raise ValueError("task_gate adds: only a gate on the input has this placebo")
        check_fusion(self.fusion, self.fusion_by_group)


class RankingHead(nn.Module):
    """A logit per task from everything known of request and candidate. ValueError for a prior that is no field."""

    def __init__(
        self, config: Ranking, *, request_fields: Fields, candidate_fields: Fields, tasks: int, seed: int
    ) -> None:
        super().__init__()
        fields = side_by_side(request_fields, candidate_fields)
        check_prior(fields, gate=config.gate, task_gate=config.task_gate)
        gate = GateUnit(config.gate, fields=fields) if config.gate else None
        crossing = build_interaction(config.interaction, fields=fields) if config.interaction else None
        self.joint = nn.Sequential(*(module for module in (gate, crossing) if module))
        self.trunk = build_trunk(config.trunk, tasks=tasks, seed=seed)
        # The request's columns reach the first layer as they are, so that their part of it is computed per request,
        # unless a gate or a cross network has made them each candidate's own.
        untouched = gate is None and not isinstance(config.interaction, DcnV2)
        self.request_dim = width_of(request_fields) if untouched else 0
        width = crossing.out_dim if crossing else width_of(fields)
        self.first = FactoredLinear(self.request_dim, width - self.request_dim, self.trunk.width)
        self.last = TaskTower(tasks, self.trunk.out_dim, config.task_hidden, out_dim=1)
        self.residual = ResidualNet(config.residual, fields=fields, tasks=tasks) if config.residual else None
        self.task_gates: TaskGates | None = None
        if config.task_gate:
            sides = {"request_fields": request_fields, "candidate_fields": candidate_fields}
            self.task_gates = TaskGates(config.task_gate, **sides, tasks=tasks, widths=config.task_hidden)

    def forward(self, request: Tensor, candidate: Tensor, row: Tensor) -> Tensor:
        """Logits `[N, T]` of `[R, request_dim]`, `[N, candidate_dim]` and each candidate's request `[N]`."""
        weights = self.task_gates(request, candidate, row) if self.task_gates else ()
        if len(self.joint):
            x = self.joint(torch.cat([request.index_select(0, row), candidate], dim=1))
            request, candidate = request[:, : self.request_dim], x[:, self.request_dim :]
        return self.last(self.trunk(self.first(request, candidate, row)), weights).squeeze(2)
