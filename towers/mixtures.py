"""Multi-task trunks: from one input to one representation per task.

Every trunk begins with a linear map of its input. That map belongs to the head, which can factor it over
request and candidate (`FactoredLinear`). A trunk says how many columns of pre-activations it needs, its
`width`: all first layers and gates side by side, one matrix product. From there it goes on:
`pre [M, width] -> [M, T, out_dim]`.
"""

import math
import zlib
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from towers.checks import check_choice, check_counts, check_dropout, check_widths
from towers.mlp import GroupedLinear, GroupedMlp, Mlp

# Hard-concrete distribution (Louizos et al., ICLR'18): temperature, and (0, 1) stretched to (gamma, zeta).
BETA, GAMMA, ZETA = 2.0 / 3.0, -0.1, 1.1


@dataclass(frozen=True, kw_only=True)
class SharedBottom:
    """One stack of `hidden` layers that all tasks share."""

    kind: Literal["shared_bottom"] = "shared_bottom"
    hidden: tuple[int, ...] = (128, 64)
    dropout: float = 0.0  # share of activations set to 0 in training

    def __post_init__(self) -> None:
        check_widths(hidden=self.hidden)
        check_dropout(self.dropout)


@dataclass(frozen=True, kw_only=True)
class WideAndDeep:
    """One stack of `hidden` layers that all tasks share, beside it a linear term per task (Cheng et al., 2016)."""

    kind: Literal["wide_and_deep"] = "wide_and_deep"
    hidden: tuple[int, ...] = (128, 64)
    dropout: float = 0.0  # share of activations set to 0 in training

    def __post_init__(self) -> None:
        check_widths(hidden=self.hidden)
        check_dropout(self.dropout)


@dataclass(frozen=True, kw_only=True)
class Mmoe:
    """Multi-gate mixture of experts (Ma et al., KDD'18): stacks of `hidden` layers, and one gate per task."""

    kind: Literal["mmoe"] = "mmoe"
    experts: int = 4  # number of experts
    hidden: tuple[int, ...] = (128, 64)
    dropout: float = 0.0  # share of activations set to 0 in training

    def __post_init__(self) -> None:
        check_counts(experts=self.experts)
        check_widths(hidden=self.hidden)
        check_dropout(self.dropout)


@dataclass(frozen=True, kw_only=True)
class Ple:
    """Progressive layered extraction (Tang et al., RecSys'20): experts of each task, and shared ones.

    `hidden` are the layers inside an expert, `layers` how often experts and gates are stacked. One layer
    without task experts is MMoE.
    """

    kind: Literal["ple"] = "ple"
    task_experts: int = 2  # experts of each task
    shared_experts: int = 2  # experts that all tasks have
    hidden: tuple[int, ...] = (128, 64)
    layers: int = 1
    dropout: float = 0.0  # share of activations set to 0 in training

    def __post_init__(self) -> None:
        if self.task_experts < 0:
            raise ValueError(f"task_experts must not be negative, got {self.task_experts}")
        check_counts(shared_experts=self.shared_experts, layers=self.layers)
        check_widths(hidden=self.hidden)
        check_dropout(self.dropout)


@dataclass(frozen=True, kw_only=True)
class Snr:
    """Sub-network routing (Ma et al., AAAI'19): `subnetworks` per level, one level per width of `hidden`.

    `mode` is what an edge carries: `trans` its own linear map of the source, `aver` the source itself.
    `initial_log_alpha` is where every edge's log-alpha starts: 0 is a gate of 0.5 in evaluation.
    """

    kind: Literal["snr"] = "snr"
    mode: Literal["trans", "aver"] = "trans"
    subnetworks: int = 4
    hidden: tuple[int, ...] = (128, 64)
    initial_log_alpha: float = 0.0
    dropout: float = 0.0  # share of activations set to 0 in training

    def __post_init__(self) -> None:
        check_choice("mode", self.mode, "trans", "aver")
        check_counts(subnetworks=self.subnetworks)
        if not math.isfinite(self.initial_log_alpha):
            raise ValueError(f"initial_log_alpha must be finite, got {self.initial_log_alpha}")
        check_widths(hidden=self.hidden)
        check_dropout(self.dropout)


Trunk = SharedBottom | WideAndDeep | Mmoe | Ple | Snr


class SharedBottomTrunk(nn.Module):
    """The same representation for every task."""

    def __init__(self, config: SharedBottom | WideAndDeep, *, tasks: int) -> None:
        super().__init__()
        self.tasks = tasks
        self.width, self.out_dim = config.hidden[0], config.hidden[-1]
        self.bottom = nn.Sequential(
            nn.ReLU(),
            nn.Dropout(config.dropout),
            Mlp(config.hidden[0], config.hidden[1:], dropout=config.dropout),
        )

    def forward(self, pre: Tensor) -> Tensor:
        """`[M, T, out_dim]` of `pre [M, width]`; a view, equal for all tasks."""
        return self.bottom(pre).unsqueeze(1).expand(-1, self.tasks, -1)


class WideAndDeepTrunk(nn.Module):
    """`[deep; wide_t]`: what the tasks share, and a column that is linear in the head's input.

    It is the paper's model where the task's own layers are one linear map.
    """

    def __init__(self, config: WideAndDeep, *, tasks: int) -> None:
        super().__init__()
        self.deep = SharedBottomTrunk(config, tasks=tasks)
        self.split = [self.deep.width, tasks]
        self.width, self.out_dim = sum(self.split), self.deep.out_dim + 1

    def forward(self, pre: Tensor) -> Tensor:
        """`[M, T, out_dim]` of `pre [M, width]`, the deep part's first layer, then each task's wide term."""
        deep, wide = pre.split(self.split, dim=1)
        return torch.cat([self.deep(deep), wide.unsqueeze(2)], dim=2)


def _experts(experts: int, hidden: tuple[int, ...], dropout: float) -> nn.Sequential:
    """What follows the first linear layer of each expert: `[M, E, hidden[0]] -> [M, E, hidden[-1]]`."""
    return nn.Sequential(nn.ReLU(), nn.Dropout(dropout), GroupedMlp(experts, hidden[0], hidden[1:], dropout=dropout))


class MmoeTrunk(nn.Module):
    """`y_t = Σ_e softmax(W_t x)_e f_e(x)`; the gates have a bias, as all of the head's linear map has."""

    def __init__(self, config: Mmoe, *, tasks: int) -> None:
        super().__init__()
        self.first = (config.experts, config.hidden[0])
        self.gates = (tasks, config.experts)
        self.width = math.prod(self.first) + math.prod(self.gates)
        self.out_dim = config.hidden[-1]
        self.experts = _experts(config.experts, config.hidden, config.dropout)

    def forward(self, pre: Tensor) -> Tensor:
        """`[M, T, out_dim]` of `pre [M, width]`: the experts' first layers, then the gates, task by task."""
        first, gates = pre.split([math.prod(self.first), math.prod(self.gates)], dim=1)
        weights = gates.unflatten(1, self.gates).softmax(dim=2)
        return weights @ self.experts(first.unflatten(1, self.first))


class _CustomizedGate(nn.Module):
    """One layer of PLE (CGC): a task mixes its own and the shared experts, the shared output mixes all.

    It takes `task_width` columns per task: the first layers of its experts, then its gate over [own; shared].
    And `shared_width` more: the first layers of the shared experts, then the gate over all experts, which the
    last layer has not, as nothing would read it.
    """

    def __init__(self, config: Ple, *, tasks: int, last: bool) -> None:
        super().__init__()
        own, shared, first = config.task_experts, config.shared_experts, config.hidden[0]
        experts = tasks * own + shared
        self.own, self.specific, self.first = (tasks, own), tasks * own, (experts, first)
        self.task_split = [own * first, own + shared]
        self.shared_split = [shared * first, 0 if last else experts]
        self.task_width, self.shared_width = sum(self.task_split), sum(self.shared_split)
        self.last = last
        self.experts = _experts(experts, config.hidden, config.dropout)

    def forward(self, task_pre: Tensor, shared_pre: Tensor) -> tuple[Tensor, Tensor | None]:
        """`[M, T, H]` of the tasks and `[M, H]` shared (None after the last layer)."""
        task_first, task_gate = task_pre.split(self.task_split, dim=2)
        shared_first, shared_gate = shared_pre.split(self.shared_split, dim=1)
        first = torch.cat([task_first.flatten(1), shared_first], dim=1)
        experts = self.experts(first.unflatten(1, self.first))
        own, shared = experts[:, : self.specific].unflatten(1, self.own), experts[:, self.specific :]
        to_own, to_shared = task_gate.softmax(dim=2).split([own.shape[2], shared.shape[1]], dim=2)
        tasks = torch.einsum("mti,mtih->mth", to_own, own) + to_shared @ shared
        if self.last:
            return tasks, None
        return tasks, torch.einsum("me,meh->mh", shared_gate.softmax(dim=1), experts)


class PleTrunk(nn.Module):
    """Stacked CGC layers: in the first, tasks and shared experts read one input, later each its own."""

    def __init__(self, config: Ple, *, tasks: int) -> None:
        super().__init__()
        gates = [_CustomizedGate(config, tasks=tasks, last=k == config.layers - 1) for k in range(config.layers)]
        self.out_dim = config.hidden[-1]
        self.first = (tasks, gates[0].task_width)
        self.split = [math.prod(self.first), gates[0].shared_width]
        self.width = sum(self.split)
        self.layers = nn.ModuleList(gates)
        self.to_tasks = nn.ModuleList(GroupedLinear(tasks, self.out_dim, gate.task_width) for gate in gates[1:])
        self.to_shared = nn.ModuleList(nn.Linear(self.out_dim, gate.shared_width) for gate in gates[1:])

    def forward(self, pre: Tensor) -> Tensor:
        """`[M, T, out_dim]` of `pre [M, width]`: `task_width` columns per task, then `shared_width`."""
        task_pre, shared_pre = pre.split(self.split, dim=1)
        tasks, shared = self.layers[0](task_pre.unflatten(1, self.first), shared_pre)
        for layer, to_tasks, to_shared in zip(self.layers[1:], self.to_tasks, self.to_shared, strict=True):
            tasks, shared = layer(to_tasks(tasks), to_shared(shared))
        return tasks


def _stretch(logits: Tensor) -> Tensor:
    return (torch.sigmoid(logits) * (ZETA - GAMMA) + GAMMA).clamp(0.0, 1.0)


class HardConcrete(nn.Module):
    """Gates in [0, 1], one per edge, often exactly 0 or 1, each with its log-alpha (Louizos et al., ICLR'18).

    In training each step draws `u ~ U(0, 1)` from (seed, the gate's name, step) on the CPU, so that it is equal on
    all ranks and after a restart, and other for every module:
    `z = clip(sigmoid((logit(u) + log_alpha) / beta)·(zeta - gamma) + gamma, 0, 1)`. In evaluation
    `z = clip(sigmoid(log_alpha)·(zeta - gamma) + gamma, 0, 1)`.
    """

    def __init__(self, shape: tuple[int, int], *, initial_log_alpha: float, seed: int, layer: int) -> None:
        super().__init__()
        self.log_alpha = nn.Parameter(torch.full(shape, float(initial_log_alpha)))
        self.seed, self.layer = seed, layer
        self.step: int | None = None
        self.name = ""

    def _noise(self) -> Tensor:
        """`logit(u)` of this step, shaped as `log_alpha`."""
        assert self.step is not None, "call set_step before a training forward: the gates are drawn per step"
        # The CPU generator reads 32 bits of a seed only, so they must be mixed into that many.
        key = zlib.crc32(f"{self.seed}/{self.name}/{self.layer}/{self.step}".encode())
        uniform = torch.rand(self.log_alpha.shape, generator=torch.Generator().manual_seed(key))
        return torch.logit(uniform).to(self.log_alpha)

    def forward(self) -> Tensor:
        """The gates, shaped as `log_alpha` (destination, source)."""
        return _stretch((self._noise() + self.log_alpha) / BETA) if self.training else self.deterministic()

    def deterministic(self) -> Tensor:
        """The gates of evaluation and serving, shaped as `log_alpha`."""
        return _stretch(self.log_alpha)

    def expected_l0(self) -> Tensor:
        """Expected number of nonzero gates, shape []: `Σ sigmoid(log_alpha - beta·log(-gamma/zeta))`."""
        return torch.sigmoid(self.log_alpha - BETA * math.log(-GAMMA / ZETA)).sum()


class _Routing(nn.Module):
    """Edges from every sub-network to every sub-network (or task) of the next level.

    `v_i = Σ_j z_ij W_ij u_j` (SNR-Trans: the gates scale the weights, so it is one matrix product) or
    `v_i = Σ_j z_ij u_j` (SNR-Aver). A sub-network (not a task, `last`) begins with a linear layer of
    `v_i`; in SNR-Trans `W_ij` absorbs it, but for its bias.
    """

    def __init__(
        self, config: Snr, *, destinations: int, in_dim: int, out_dim: int, seed: int, layer: int, last: bool
    ) -> None:
        super().__init__()
        sources = config.subnetworks
        self.shape = (destinations, out_dim, sources, in_dim)
        self.gates = HardConcrete(
            (destinations, sources), initial_log_alpha=config.initial_log_alpha, seed=seed, layer=layer
        )
        self.transform: nn.Linear | None = None
        self.following: nn.Module = nn.Identity()
        if config.mode == "trans":
            self.transform = nn.Linear(sources * in_dim, destinations * out_dim, bias=not last)
        elif not last:
            self.following = GroupedLinear(destinations, in_dim, out_dim)

    def forward(self, x: Tensor) -> Tensor:
        """`[M, destinations, out_dim]` of `x [M, S, in_dim]`; no activation."""
        gates = self.gates()
        if self.transform is None:
            return self.following(torch.einsum("ds,msh->mdh", gates, x))
        weight = self.transform.weight.view(self.shape) * gates[:, None, :, None]
        routed = functional.linear(x.flatten(1), weight.view_as(self.transform.weight), self.transform.bias)
        return routed.unflatten(1, self.shape[:2])


class SnrTrunk(nn.Module):
    """Levels of sub-networks joined by hard-concrete gates; the last routing goes to the tasks."""

    def __init__(self, config: Snr, *, tasks: int, seed: int) -> None:
        super().__init__()
        hidden, subnetworks = config.hidden, config.subnetworks
        self.first = (subnetworks, hidden[0])
        self.width, self.out_dim = math.prod(self.first), hidden[-1]
        ends = [*((subnetworks, width) for width in hidden[1:]), (tasks, self.out_dim)]
        self.routing = nn.ModuleList(
            _Routing(
                config,
                destinations=destinations,
                in_dim=in_dim,
                out_dim=out_dim,
                seed=seed,
                layer=layer,
                last=layer == len(hidden) - 1,
            )
            for layer, (in_dim, (destinations, out_dim)) in enumerate(zip(hidden, ends, strict=True))
        )
        self.activation = nn.Sequential(nn.ReLU(), nn.Dropout(config.dropout))

    def forward(self, pre: Tensor) -> Tensor:
        """`[M, T, out_dim]` of `pre [M, width]`, the sub-networks' first layers; no activation at the end."""
        x = pre.unflatten(1, self.first)
        for routing in self.routing:
            x = routing(self.activation(x))
        return x


def build_trunk(
    config: Trunk, *, tasks: int, seed: int = 0
) -> SharedBottomTrunk | WideAndDeepTrunk | MmoeTrunk | PleTrunk | SnrTrunk:
    """The trunk of a config: it has `width`, `out_dim` and `forward(pre [M, width]) -> [M, T, out_dim]`.

    `seed` seeds the gates of SNR. ValueError without a task.
    """
    check_counts(tasks=tasks)
    match config:
        case SharedBottom():
            return SharedBottomTrunk(config, tasks=tasks)
        case WideAndDeep():
            return WideAndDeepTrunk(config, tasks=tasks)
        case Mmoe():
            return MmoeTrunk(config, tasks=tasks)
        case Ple():
            return PleTrunk(config, tasks=tasks)
        case Snr():
            return SnrTrunk(config, tasks=tasks, seed=seed)


def _gates(module: nn.Module) -> dict[str, HardConcrete]:
    return {name: gate for name, gate in module.named_modules() if isinstance(gate, HardConcrete)}


def set_step(module: nn.Module, step: int) -> None:
    """Tell every module inside `module` that goes by steps (it has a `step`) which one the next forward is of.

    A hard-concrete gate also learns its name, from which it draws.
    """
    for name, part in module.named_modules():
        if hasattr(part, "step"):
            part.step = step
        if isinstance(part, HardConcrete):
            part.name = name


def expected_l0(module: nn.Module) -> Tensor:
    """The penalty of SNR: the expected number of open edges over all gates inside `module`, shape [].

    ValueError where there is none.
    """
    gates = _gates(module)
    if not gates:
        raise ValueError("expected_l0 needs a trunk of kind snr: there is no hard-concrete gate")
    return torch.stack([gate.expected_l0() for gate in gates.values()]).sum()


@torch.no_grad()
def routing(module: nn.Module) -> dict[str, Tensor]:
    """Evaluation's gate values `[destinations, sources]` by the gate's name; empty without an SNR trunk."""
    return {name: gate.deterministic() for name, gate in _gates(module).items()}
