"""One side of a head: its fields to one vector per task."""

from collections.abc import Sequence

from torch import Tensor, nn

from towers.fields import Fields, width_of
from towers.gate import Gate, GateUnit
from towers.interactions import Interaction, build_interaction
from towers.mixtures import Trunk, build_trunk
from towers.mlp import TaskTower


class Tower(nn.Module):
    """Gate, interaction, trunk and each task's own layers: `[M, in_dim] -> [M, T, out_dim]`."""

    def __init__(
        self,
        *,
        fields: Fields,
        gate: Gate | None,
        interaction: Interaction | None,
        trunk: Trunk,
        task_hidden: Sequence[int] = (),
        out_dim: int,
        tasks: int,
        seed: int,
    ) -> None:
        super().__init__()
        # A gate that reads nothing but its prior has nothing to go by where the prior is not.
        reads = gate is not None and (gate.reads_input or any(name in fields for name in gate.prior))
        self.gate = GateUnit(gate, fields=fields) if gate and reads else nn.Identity()
        crossing = build_interaction(interaction, fields=fields) if interaction else None
        self.interaction = crossing or nn.Identity()
        self.trunk = build_trunk(trunk, tasks=tasks, seed=seed)
        self.first = nn.Linear(crossing.out_dim if crossing else width_of(fields), self.trunk.width)
        self.last = TaskTower(tasks, self.trunk.out_dim, task_hidden, out_dim=out_dim)

    def forward(self, x: Tensor) -> Tensor:
        """`[M, T, out_dim]` of the fields `x [M, in_dim]`."""
        return self.after_gate(self.gate(x))

    def after_gate(self, gated: Tensor) -> Tensor:
        """`[M, T, out_dim]` of what the gate gave, `[M, in_dim]`."""
        return self.last(self.trunk(self.first(self.interaction(gated))))
