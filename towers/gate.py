"""Gates: learned weights in [0, alpha] on input features (SDCL, EPNet) or on the tasks' hidden layers (PPNet, LHUC).

No gate may ever read the stage a candidate came from: serving does not know it, and in training it gives the
answer away. Gates read a head's fields alone, and the stage is none of them.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from towers.checks import check_counts, check_positive
from towers.fields import Fields, columns, width_of
from towers.mlp import FactoredLinear, GroupedLinear


@dataclass(frozen=True, kw_only=True)
class Gate:
    """How a gate's weights come about.

    `alpha` is the largest weight, `hidden` the width of the hidden layer (null: as wide as what it weighs).
    Without `prior` the weights are read off the input (SDCL Eq 6). `prior` names fields that decide instead, beside
    them the input without gradient (PEPNet) unless `reads_input` is off (LHUC). In a head with a gate per side, a
    side that has none of the prior fields reads its own input, or with `reads_input` off has no gate. `adds` is a
    placebo of equal parameters and cost: what the two layers give is added to the input, and weighs nothing.
    """

    alpha: float = 2.0
    hidden: int | None = None
    prior: tuple[str, ...] = ()
    reads_input: bool = True
    adds: bool = False

    def __post_init__(self) -> None:
        check_positive(alpha=self.alpha)
        if self.hidden is not None:
            check_counts(hidden=self.hidden)
        if not (self.reads_input or self.prior):
            raise ValueError("reads_input is off and prior is empty: nothing is left to read")


def check_prior(fields: Fields, **gates: Gate | None) -> None:
    """Raise ValueError for a gate whose prior is not among the fields it can read."""
    for name, gate in gates.items():
        if unknown := [field for field in gate.prior if field not in fields] if gate else []:
            raise ValueError(f"{name}: prior {', '.join(unknown)} is none of the fields {', '.join(fields)}")


class _Seen(nn.Module):
    """`[prior fields; x without gradient]`, or the prior fields alone: `[..., in_dim] -> [..., out_dim]`."""

    def __init__(self, config: Gate, *, fields: Fields) -> None:
        super().__init__()
        self.prior = columns(fields, config.prior)
        self.reads_input = config.reads_input
        prior = sum(part.stop - part.start for part in self.prior)
        self.out_dim = prior + (width_of(fields) if config.reads_input else 0)

    def forward(self, x: Tensor) -> Tensor:
        rest = x.detach() if self.reads_input else x[..., :0]
        return torch.cat([*(x[..., part] for part in self.prior), rest], dim=-1)


class GateUnit(nn.Module):
    """`x ⊙ alpha·sigmoid(W2 relu(W1 s + b1) + b2)`: `[..., in_dim] -> [..., in_dim]`.

    s is x itself (the Negative Sample Gate Unit, SDCL Eq 6), or where the fields have some of the prior, `[prior; x
    without gradient]` (EPNet: Chang et al., KDD'23), or the prior alone.
    """

    def __init__(self, config: Gate, *, fields: Fields) -> None:
        super().__init__()
        in_dim = width_of(fields)
        hidden = config.hidden or in_dim
        self.alpha, self.adds = config.alpha, config.adds
        self.seen = _Seen(config, fields=fields) if any(name in fields for name in config.prior) else None
        seen_dim = self.seen.out_dim if self.seen else in_dim
        self.weights = nn.Sequential(nn.Linear(seen_dim, hidden), nn.ReLU(), nn.Linear(hidden, in_dim))

    def forward(self, x: Tensor) -> Tensor:
        """`[..., in_dim]` of `x [..., in_dim]`: each column times its weight in [0, alpha], or the placebo's sum."""
        logits = self.weights(self.seen(x) if self.seen else x)
        return x + logits if self.adds else x * (self.alpha * logits.sigmoid())


class TaskGates(nn.Module):
    """Weights of every hidden unit of every task's tower (PPNet: Chang et al., KDD'23).

    Each layer and task has its own `alpha·sigmoid(W2 relu(W1 s + b1) + b2)` of s = `[prior; x without gradient]`, x
    being the head's input, or the prior alone (LHUC: Swietojanski et al., 2016). All the W1 are one product, its
    request part computed once per request.
    """

    def __init__(
        self, config: Gate, *, request_fields: Fields, candidate_fields: Fields, tasks: int, widths: Sequence[int]
    ) -> None:
        super().__init__()
        hidden = [config.hidden or width for width in widths]
        self.alpha, self.tasks = config.alpha, tasks
        self.request = _Seen(config, fields=request_fields)
        self.candidate = _Seen(config, fields=candidate_fields)
        self.split = [tasks * width for width in hidden]
        self.first = FactoredLinear(self.request.out_dim, self.candidate.out_dim, sum(self.split))
        self.last = nn.ModuleList(GroupedLinear(tasks, *layer) for layer in zip(hidden, widths, strict=True))

    def forward(self, request: Tensor, candidate: Tensor, row: Tensor) -> list[Tensor]:
        """Per hidden layer `[N, T, width]`, of `[R, request]`, `[N, candidate]` and each candidate's request `[N]`."""
        first = self.first(self.request(request), self.candidate(candidate), row).relu().split(self.split, dim=1)
        parts = (part.unflatten(1, (self.tasks, -1)) for part in first)
        return [self.alpha * layer(part).sigmoid() for layer, part in zip(self.last, parts, strict=True)]
