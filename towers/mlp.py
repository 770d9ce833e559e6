"""Dense layers: a plain stack, a first layer factored over request and candidate, and one layer per group."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional


class Mlp(nn.Sequential):
    """A stack of Linear, ReLU (and dropout), a ReLU after the last too: `[..., in_dim] -> [..., out_dim]`.

    No `hidden` is the identity. A head puts its own linear end behind it.
    """

    def __init__(self, in_dim: int, hidden: Sequence[int], *, dropout: float = 0.0) -> None:
        widths = [in_dim, *hidden]
        layers = [
            layer
            for fan_in, fan_out in zip(widths, hidden, strict=False)
            for layer in (nn.Linear(fan_in, fan_out), nn.ReLU(), nn.Dropout(dropout))
        ]
        super().__init__(*layers)
        self.out_dim = widths[-1]


class FactoredLinear(nn.Module):
    """`Linear([request; candidate])`, its request part computed once per request.

    `W [u; i] + b = (W_u u + b) + W_i i` is exact, and a request's candidates share `W_u u + b`. Parameters
    and initialisation are those of one Linear on the concatenation. Either side may have dim 0.
    """

    def __init__(self, request_dim: int, candidate_dim: int, out_dim: int) -> None:
        super().__init__()
        self.joint = nn.Linear(request_dim + candidate_dim, out_dim)
        self.request_dim = request_dim
        self.out_dim = out_dim

    def request_part(self, request: Tensor) -> Tensor:
        """`W_u request + b`: `[R, request_dim] -> [R, out_dim]`."""
        return functional.linear(request, self.joint.weight[:, : self.request_dim], self.joint.bias)

    def candidate_part(self, candidate: Tensor) -> Tensor:
        """`W_i candidate`: `[N, candidate_dim] -> [N, out_dim]`."""
        return functional.linear(candidate, self.joint.weight[:, self.request_dim :])

    def forward(self, request: Tensor, candidate: Tensor, row: Tensor) -> Tensor:
        """`[N, out_dim]` of `request [R, ·]`, `candidate [N, ·]` and each candidate's request `row [N]`."""
        alone = self.training and len(row) == len(request)  # a graph to export has no such branch
        if alone and torch.equal(row, torch.arange(len(row), device=row.device)):  # a candidate each: nothing to share
            return self.joint(torch.cat([request, candidate], dim=1))
        return self.request_part(request).index_select(0, row) + self.candidate_part(candidate)


class GroupedLinear(nn.Module):
    """One Linear per group (expert, task) in one batched product: `[M, G, in_dim] -> [M, G, out_dim]`."""

    def __init__(self, groups: int, in_dim: int, out_dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(groups, in_dim, out_dim))
        self.bias = nn.Parameter(torch.empty(groups, out_dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Every group as `nn.Linear` starts: uniform in ±1/sqrt(in_dim), whatever the number of groups."""
        bound = 1.0 / math.sqrt(self.weight.shape[1])
        nn.init.uniform_(self.weight, -bound, bound)
        nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        """`[M, G, out_dim]` of `x [M, G, in_dim]`: group g of every row through map g."""
        groups = x.transpose(0, 1)
        if x.dtype == torch.bfloat16:  # whose products' backward would copy a view element by element
            groups = groups.contiguous()
        return torch.baddbmm(self.bias.unsqueeze(1), groups, self.weight).transpose(0, 1)


class GroupedMlp(nn.Sequential):
    """One `Mlp` per group: `[M, G, in_dim] -> [M, G, out_dim]`. No `hidden` is the identity."""

    def __init__(self, groups: int, in_dim: int, hidden: Sequence[int], *, dropout: float = 0.0) -> None:
        widths = [in_dim, *hidden]
        layers = [
            layer
            for fan_in, fan_out in zip(widths, hidden, strict=False)
            for layer in (GroupedLinear(groups, fan_in, fan_out), nn.ReLU(), nn.Dropout(dropout))
        ]
        super().__init__(*layers)
        self.out_dim = widths[-1]


class TaskTower(nn.Sequential):
    """Each task's own `hidden` layers and linear end: `[M, T, in_dim] -> [M, T, out_dim]`.

    `out_dim` 1 for logits, the vector width for one vector per task. No `hidden`: one linear map per task.
    """

    def __init__(
        self, tasks: int, in_dim: int, hidden: Sequence[int] = (), *, out_dim: int, dropout: float = 0.0
    ) -> None:
        body = GroupedMlp(tasks, in_dim, hidden, dropout=dropout)
        super().__init__(body, GroupedLinear(tasks, body.out_dim, out_dim))
        self.out_dim = out_dim

    def forward(self, x: Tensor, weights: Sequence[Tensor] = ()) -> Tensor:
        """`[M, T, out_dim]` of `x [M, T, in_dim]`; `weights [M, T, width]`, one a hidden layer, multiply its output."""
        gates = iter(weights)
        for layer in self[0].children():
            x = layer(x)
            if weights and isinstance(layer, nn.ReLU):
                x = x * next(gates)
        return self[1](x)
