"""Objectives: which loss, on which head, over which space, how much. They only pick tensors and mask.

A config's `objectives` maps free names to these. `compute` turns one into a `LossTerm` per task.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

import losses
from joint.batch import Batch
from joint.outputs import HeadOutput, Outputs, Views
from joint.schema import EXPOSED_TOKENS, STAGES, Stage
from joint.softmax import softmax_over_pool
from losses import LossTerm
from losses.term import check_positive

Head = Literal["retrieval", "pre_ranking", "ranking"]
Teacher = Head | Literal["logged"]  # logged: the score columns that the tasks name
# FS-LTR's priorities (RecFlow 3.1.2): 0, 1, … by how far a candidate got; positive feedback comes after the last.
PRIORITY = (
    Stage.RANDOM,
    Stage.PRERANK_NEG,
    Stage.COARSE_NEG,
    Stage.RANKED | Stage.RERANKED | Stage.RANK_NEG | Stage.RERANK_NEG,
    Stage.RANK_POS | Stage.RERANK_POS,
    Stage.EXPOSED,
)


def _check_not_negative(**values: float) -> None:
    for name, value in values.items():
        if not 0 <= value < math.inf:
            raise ValueError(f"{name} is {value}, expected 0 or more")


@dataclass(frozen=True, kw_only=True)
class _Common:
    head: Head  # whom it trains
    space: tuple[str, ...]  # stages whose candidates, taken together, it is over
    tasks: tuple[str, ...] = ()  # none named: all of them
    weight: float = 1.0  # factor of the loss

    def __post_init__(self) -> None:
        _check_not_negative(weight=self.weight)


@dataclass(frozen=True, kw_only=True)
class Binary(_Common):
    """Binary cross-entropy on the labels (RRA 1, SDCL 3); an unexposed candidate of the space has label 0."""

    loss: Literal["binary"] = "binary"
    positive_weight: float = 1.0  # factor of the positives

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_not_negative(positive_weight=self.positive_weight)


@dataclass(frozen=True, kw_only=True)
class ResidualLoss(_Common):
    """Binary cross-entropy of the corrected logits of special users, which trains the head's `residual` alone."""

    loss: Literal["residual"] = "residual"
    shuffle: bool = False  # a placebo: the labels dealt anew among the request's candidates of the space


@dataclass(frozen=True, kw_only=True)
class Distillation(_Common):
    """Cross-entropy against the teacher's probabilities (RRA 5-6, SDCL 5)."""

    loss: Literal["distillation"] = "distillation"
    teacher: Teacher = "ranking"  # whose logits are the target
    temperature: float = 1.0  # divides the logits of both
    shuffle: bool = False  # a placebo: the teacher's logits dealt anew among the request's candidates of the space

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(temperature=self.temperature)


@dataclass(frozen=True, kw_only=True)
class MultiClass(_Common):
    """Softmax over a pool of items for every impression (RRA 3): positives weigh 1, merely shown ones `shown_weight`.

    For a task of kind `weighted` positives weigh their value, and merely shown ones nothing (RRA 4).

    The space is the `corpus`, or of a batch the impressions (`in_batch`), shared `random` items or both. With
    impressions, `log_q` takes the log of an item's chance to be in the batch off its logit (Yi et al., RecSys'19; both:
    Yang et al., WWW'20). `hard` [a, b]: of the corpus only the items that the head itself ranks a .. b - 1 for the
    request, counted from 0 (RRA Table 4).
    """

    loss: Literal["multi_class"] = "multi_class"
    shown_weight: float = 0.5
    log_q: bool = True
    hard: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_not_negative(shown_weight=self.shown_weight)
        if self.hard and not 0 <= self.hard[0] < self.hard[1]:
            raise ValueError(f"hard is {list(self.hard)}, expected two ranks, the first smaller")


@dataclass(frozen=True, kw_only=True)
class AdaptiveContrastive(_Common):
    """Each winner against the space's candidates of its request, weighted by how hard they are (SDCL 7-8)."""

    loss: Literal["adaptive_contrastive"] = "adaptive_contrastive"
    winners: tuple[str, ...] = ("positive",)  # each against all of the space
    temperature: float = 1.0  # divides the logits
    delta: float = 1.0  # factor of all weights
    adaptive: bool = True  # off: every weight is `delta`
    shuffle: bool = False  # a placebo: the weights dealt anew among the request's negatives

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(temperature=self.temperature, delta=self.delta)


@dataclass(frozen=True, kw_only=True)
class Pairwise(_Common):
    """Of two candidates of a request that of higher priority should score higher (FS-LTR: RecFlow Eq 1).

    Winners are drawn from `winners` (none named: from the space too), losers from the space; what decides is how far a
    candidate got, then its feedback. `winner_weights` weighs pairs by a space of the winner; others weigh 1.
    PositiveRank: winners [positive]. Auxiliary ranking: winners [positive], the space of stage samples. BPR: [random].
    """

    loss: Literal["pairwise"] = "pairwise"
    winners: tuple[str, ...] = ()
    winner_weights: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_not_negative(**{f"winner_weights.{name}": value for name, value in self.winner_weights.items()})


@dataclass(frozen=True, kw_only=True)
class Imitation(_Common):
    """The space's candidates in the teacher's order: by its softmax, its order, or its odds for each pair."""

    loss: Literal["list_net", "list_mle", "soft_pairwise"]
    teacher: Teacher = "ranking"  # whose order is the target
    shuffle: bool = False  # as of distillation


@dataclass(frozen=True, kw_only=True)
class ExpectedL0:
    """The expected number of open gates of a head's SNR trunks, a penalty (Ma et al., AAAI'19; Louizos et al. 2018)."""

    loss: Literal["expected_l0"] = "expected_l0"
    head: Head  # whose gates
    weight: float = 1e-3  # factor of the penalty

    def __post_init__(self) -> None:
        _check_not_negative(weight=self.weight)


@dataclass(frozen=True, kw_only=True)
class ItemViews:
    """Two views of an item, each with half of its features, should be alike: for rare items (Yao et al., CIKM'21).

    The items are drawn uniformly, so that rare ones count as much as popular ones: a `share` of the corpus, or of the
    `random` items of a batch; the cost grows with its square. The features are dealt anew for each step, for all items
    alike. The softmax is over the items of all ranks.
    """

    loss: Literal["item_views"] = "item_views"
    head: Head = "retrieval"  # whose item tower
    space: tuple[str, ...]  # `corpus`, or `random` for data.shared_random
    share: float = 1.0
    temperature: float = 0.1  # divides the cosines
    shuffle: bool = False  # a placebo: the view that should be alike is another item's
    weight: float = 1.0  # factor of the loss

    def __post_init__(self) -> None:
        _check_not_negative(weight=self.weight)
        check_positive(temperature=self.temperature, share=self.share)


Objective = (
    Binary
    | ResidualLoss
    | Distillation
    | MultiClass
    | AdaptiveContrastive
    | Pairwise
    | Imitation
    | ExpectedL0
    | ItemViews
)


def spaces_of(objective: Objective) -> dict[str, tuple[str, ...]]:
    """Head -> the spaces whose candidates the objective needs that head to score."""
    if isinstance(objective, MultiClass | ExpectedL0 | ItemViews):
        return {}  # these are of pool items, or of gates
    spaces = objective.space
    if isinstance(objective, AdaptiveContrastive | Pairwise):
        spaces += objective.winners
    heads: list[str] = [objective.head]
    if isinstance(objective, Distillation | Imitation) and objective.teacher != "logged":
        heads.append(objective.teacher)
    return dict.fromkeys(heads, spaces)


def head_spaces(objectives: Iterable[Objective], heads: Iterable[str]) -> dict[str, frozenset[str]]:
    """Head -> all spaces it has to score in training; the loader turns them into rows."""
    needed: dict[str, set[str]] = {head: set() for head in heads}
    for objective in objectives:
        for head, spaces in spaces_of(objective).items():
            needed[head].update(spaces)
    return {head: frozenset(spaces) for head, spaces in needed.items()}


def stage_mask(tokens: Iterable[str], stages: Tensor) -> Tensor:
    """Candidates that may belong to a space by their stage alone: bool [N]."""
    mask = torch.zeros_like(stages, dtype=torch.bool)
    exposed = (stages & int(Stage.EXPOSED)) != 0
    for token in tokens:
        mask |= exposed if token in EXPOSED_TOKENS else ((stages & int(STAGES[token])) != 0) & ~exposed
    return mask


def space_mask(tokens: Sequence[str], batch: Batch, tasks: Tensor) -> Tensor:
    """Candidates of a space, for each of the `tasks` (indices): bool [N, T]."""
    mask = torch.zeros_like(batch.positive[:, tasks])
    for token in tokens:
        member = stage_mask([token], batch.stages)[:, None] & batch.observed[:, tasks]
        if token == "positive":
            member = member & batch.positive[:, tasks]
        elif token == "exposed_neg":
            member = member & ~batch.positive[:, tasks]
        mask = mask | member
    return mask


def priorities(batch: Batch, tasks: Tensor) -> Tensor:
    """FS-LTR's order of candidates for each of the `tasks` (indices), the highest that applies: int64 [N, T]."""
    found = torch.zeros_like(batch.stages)
    for level, flags in enumerate(PRIORITY):
        found = torch.where((batch.stages & int(flags)) != 0, level, found)
    return torch.where(batch.positive[:, tasks], len(PRIORITY), found[:, None])


def compute(objective: Objective, outputs: Outputs, batch: Batch, task_names: Sequence[str]) -> LossTerm:
    """The objective's loss and count per task, float32 [T'], in the order of its tasks (or of all tasks)."""
    head = outputs[objective.head]
    if isinstance(objective, ExpectedL0):
        assert head.expected_l0 is not None
        return LossTerm(head.expected_l0.reshape(1), batch.labels.new_ones(1))
    if isinstance(objective, ItemViews):
        assert head.views is not None
        return _item_views(objective, head.views)
    tasks = _task_indices(objective, batch, task_names)
    match objective:
        case MultiClass():
            return _multi_class(objective, head, batch, tasks)
        case Binary():
            mask = space_mask(objective.space, batch, tasks) & head.computed[:, None]
            weight = objective.positive_weight * batch.weight[:, tasks]
            return losses.binary(head.logits[:, tasks], batch.labels[:, tasks], positive_weight=weight, mask=mask)
        case ResidualLoss():
            assert head.corrected is not None
            assert head.special is not None
            mask = space_mask(objective.space, batch, tasks) & (head.computed & head.special)[:, None]
            of = _dealt(mask.all(1), batch) if objective.shuffle else slice(None)
            y, w = batch.labels[of][:, tasks], batch.weight[of][:, tasks]
            return losses.binary(head.corrected[:, tasks], y, positive_weight=w, mask=mask)
        case Distillation():
            target, known = _teacher(objective, outputs, batch, tasks)
            mask = space_mask(objective.space, batch, tasks) & head.computed[:, None] & known
            return losses.distillation(head.logits[:, tasks], target, temperature=objective.temperature, mask=mask)
        case Pairwise():
            return _pairwise(objective, head, batch, tasks)
        case Imitation():
            return _imitation(objective, outputs, batch, tasks)
        case AdaptiveContrastive():
            return losses.adaptive_contrastive(
                *contrastive_arguments(objective, outputs, batch, task_names),
                temperature=objective.temperature,
                delta=objective.delta,
                adaptive=objective.adaptive,
                weigh_as=_dealt(stage_mask(objective.space, batch.stages), batch) if objective.shuffle else None,
            )


def contrastive_arguments(
    objective: AdaptiveContrastive, outputs: Outputs, batch: Batch, task_names: Sequence[str]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Logits, positives, negatives `[N, T]`, features `[N, F]` and offsets: what the loss is called with."""
    tasks, head = _task_indices(objective, batch, task_names), outputs[objective.head]
    assert head.features is not None
    return (
        head.logits[:, tasks],
        space_mask(objective.winners, batch, tasks),
        space_mask(objective.space, batch, tasks),
        head.features,
        batch.offsets,
    )


def _task_indices(objective: _Common, batch: Batch, task_names: Sequence[str]) -> Tensor:
    names = objective.tasks or tuple(task_names)
    return torch.tensor([list(task_names).index(name) for name in names], device=batch.item.device)


def _pairwise(objective: Pairwise, head: HeadOutput, batch: Batch, tasks: Tensor) -> LossTerm:
    known = head.computed[:, None]
    weight = torch.ones_like(batch.weight[:, tasks])
    for token, value in objective.winner_weights.items():
        weight = torch.where(space_mask([token], batch, tasks), value, weight)
    return losses.pairwise(
        head.logits[:, tasks],
        priorities(batch, tasks),
        batch.offsets,
        winner=space_mask(objective.winners or objective.space, batch, tasks) & known,
        loser=space_mask(objective.space, batch, tasks) & known,
        weight=weight,
    )


def _imitation(objective: Imitation, outputs: Outputs, batch: Batch, tasks: Tensor) -> LossTerm:
    head = outputs[objective.head]
    target, known = _teacher(objective, outputs, batch, tasks)
    inside = stage_mask(objective.space, batch.stages) & head.computed & known.all(1)
    offsets = torch.nn.functional.pad(inside.cumsum(0), (1, 0))[batch.offsets]
    loss = {"list_net": losses.list_net, "list_mle": losses.list_mle, "soft_pairwise": losses.soft_pairwise}
    return loss[objective.loss](head.logits[inside][:, tasks], target[inside], offsets)


def _teacher(
    objective: Distillation | Imitation, outputs: Outputs, batch: Batch, tasks: Tensor
) -> tuple[Tensor, Tensor]:
    """The teacher's logits and where it has some, both `[N, T']`."""
    if objective.teacher == "logged":
        logits = batch.scores[:, tasks]
        known = ~logits.isnan()
        logits = logits.nan_to_num()  # 0 where masked: a NaN there would still reach the gradient
    else:
        teacher = outputs[objective.teacher]
        logits = teacher.logits[:, tasks]
        known = teacher.computed[:, None].expand_as(logits)
    if objective.shuffle:
        inside = stage_mask(objective.space, batch.stages) & outputs[objective.head].computed & known.all(1)
        logits = logits[_dealt(inside, batch)]
    return logits, known


def _dealt(member: Tensor, batch: Batch) -> Tensor:
    """A random permutation of the members `[N]` of each request, everyone else in place: int64 [N]."""
    index = member.nonzero().flatten()
    order = index[torch.rand(len(index), device=index.device).argsort()]
    order = order[batch.row[order].argsort(stable=True)]
    return torch.arange(len(member), device=index.device).index_put((index,), order)


def _multi_class(objective: MultiClass, head: HeadOutput, batch: Batch, tasks: Tensor) -> LossTerm:
    """Per task every impression is a row, its request's vector the query, against all eligible items.

    A weighted task's positives weigh their value and what was merely shown nothing (RRA Eq 4).
    """
    assert head.user is not None
    assert head.pool is not None
    pool, terms = head.pool, []
    shown = objective.shown_weight * ~batch.weighted
    for task in tasks.tolist():
        seen = stage_mask(("exposed",), batch.stages) & batch.observed[:, task] & (pool.target >= 0)
        candidate = seen.nonzero().flatten()
        weight = batch.weight[candidate, task].where(batch.positive[candidate, task], shown[task])
        row, target = batch.row[candidate], pool.target[candidate]
        over = objective.space, objective.log_q, objective.hard
        terms.append(softmax_over_pool(head.user[:, task], pool, row, target, weight, *over))
    return LossTerm(torch.stack([t.total for t in terms]), torch.stack([t.count for t in terms]))


def _item_views(objective: ItemViews, views: Views) -> LossTerm:
    """Each item's first view against all items' second ones; one that is there twice is no negative of itself."""
    target = views.target
    if objective.shuffle:  # a permutation of this rank's targets, so none is another's twice
        target = target[torch.randperm(len(target), device=target.device)]
    term = losses.info_nce(views.first, views.second, target, item_ids=views.item, temperature=objective.temperature)
    return LossTerm(term.total.reshape(1), term.count.reshape(1))
