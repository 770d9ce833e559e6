"""A small net for special users, beside a head that was made for all (industrial methodologies, 5.3)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from towers.checks import check_widths
from towers.fields import Fields, columns
from towers.mlp import Mlp


@dataclass(frozen=True, kw_only=True)
class Residual:
    """Fits what the head leaves of users of some groups, y - p, and is added to its logits for them alone.

    `features` are some of the head's own (none named: all of them); they are read as they are: nothing that the head
    learns from is changed by it.
    """

    groups: tuple[int, ...]  # user groups of the dataset
    features: tuple[str, ...] = ()
    hidden: tuple[int, ...] = (32,)  # layers of the net

    def __post_init__(self) -> None:
        check_widths(least=0, hidden=self.hidden)
        if not self.groups or len(set(self.groups)) < len(self.groups):
            raise ValueError(f"groups is {list(self.groups)}, expected one user group or more, each once")


class ResidualNet(nn.Module):
    """An MLP that ends in a number per task, at first 0. ValueError for a feature that the fields lack."""

    groups: Tensor

    def __init__(self, config: Residual, *, fields: Fields, tasks: int) -> None:
        super().__init__()
        if missing := sorted(set(config.features) - fields.keys()):
            raise ValueError(f"residual: no field {', '.join(missing)}")
        self.columns = columns(fields, config.features or fields)
        self.register_buffer("groups", torch.tensor(config.groups), persistent=False)
        self.body = Mlp(sum(part.stop - part.start for part in self.columns), config.hidden)
        self.last = nn.Linear(self.body.out_dim, tasks)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def forward(self, logits: Tensor, request: Tensor, candidate: Tensor, row: Tensor, group: Tensor) -> Tensor:
        """`logits [N, T]` without a gradient, and with the residual where the user `group [R]` is one of its own.

        Of `[R, request_dim]`, `[N, candidate_dim]` and each candidate's request `row [N]`.
        """
        special = torch.isin(group[row], self.groups).nonzero().flatten()
        x = torch.cat([request[row[special]], candidate[special]], dim=1).detach()
        chosen = torch.cat([x[:, part] for part in self.columns], dim=1)
        return logits.detach().index_add(0, special, self.last(self.body(chosen)).to(logits.dtype))
