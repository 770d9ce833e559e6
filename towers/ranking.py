"""The ranking head: the teacher, which sees every feature and attends from each candidate."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor, nn

from towers.mixtures import SharedBottom, Trunk, build_trunk
from towers.mlp import FactoredLinear, TaskTower, check_fusion, check_layers


@dataclass(frozen=True, kw_only=True)
class Ranking:
    """The teacher's features, its trunk, and the hidden layers of each task's own tower."""

    features: tuple[str, ...]
    trunk: Trunk = SharedBottom()
    task_hidden: tuple[int, ...] = ()
    fusion: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_layers(self.task_hidden or (1,), 0.0)
        check_fusion(self.fusion)


class RankingHead(nn.Module):
    """A logit per task from everything known of request and candidate."""

    def __init__(self, config: Ranking, *, request_dim: int, candidate_dim: int, tasks: int, seed: int) -> None:
        super().__init__()
        self.trunk = build_trunk(config.trunk, tasks=tasks, seed=seed)
        self.first = FactoredLinear(request_dim, candidate_dim, self.trunk.width)
        self.last = TaskTower(tasks, self.trunk.out_dim, config.task_hidden, out_dim=1)

    def forward(self, request: Tensor, candidate: Tensor, row: Tensor) -> Tensor:
        """Logits `[N, T]` of `[R, request_dim]`, `[N, candidate_dim]` and each candidate's request `[N]`."""
        return self.last(self.trunk(self.first(request, candidate, row))).squeeze(2)
