"""Objectives: which loss, on which head, over which space, how much. They only pick tensors and mask.

A config's `objectives` maps free names to these. One of them is a class: its fields are what a config may say, its
`term` the loss, and a line in `Objective` makes it known (docs/extending.md).
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
from joint.outputs import Outputs
from joint.softmax import softmax_over_pool
from joint.spaces import dealt, priorities, space_mask, stage_mask
from losses import LossTerm
from losses.term import check_positive

Head = Literal["retrieval", "pre_ranking", "ranking"]
Teacher = Head | Literal["logged"]  # logged: the score columns that the tasks name


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

    @property
    def needs(self) -> dict[str, tuple[str, ...]]:
        """Head -> the spaces whose candidates it has to score."""
        return {self.head: self.space}

    def inside(self, outputs: Outputs, batch: Batch, tasks: Tensor) -> Tensor:
        """Where the objective is: candidates of its space that its head has scored, for each task, bool [N, T']."""
        return space_mask(self.space, batch, tasks) & outputs[self.head].computed[:, None]

    def term(self, outputs: Outputs, batch: Batch, tasks: Tensor) -> LossTerm:
        """The loss and its count per task, float32 [T'], for `tasks` (indices [T'])."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class Binary(_Common):
    """Binary cross-entropy on the labels (RRA 1, SDCL 3); an unexposed candidate of the space has label 0."""

    loss: Literal["binary"] = "binary"
    positive_weight: float = 1.0  # factor of the positives

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_not_negative(positive_weight=self.positive_weight)

    def term(self, outputs: Outputs, batch: Batch, tasks: Tensor) -> LossTerm:
        """Of the head's logits and the labels."""
        y, w = batch.labels[:, tasks], self.positive_weight * batch.weight[:, tasks]
        inside = self.inside(outputs, batch, tasks)
        return losses.binary(outputs[self.head].logits[:, tasks], y, positive_weight=w, mask=inside)


@dataclass(frozen=True, kw_only=True)
class ResidualLoss(_Common):
    """Binary cross-entropy of the corrected logits of special users, which trains the head's `residual` alone."""

    loss: Literal["residual"] = "residual"
    shuffle: bool = False  # a placebo: the labels dealt anew among the request's candidates of the space

    def term(self, outputs: Outputs, batch: Batch, tasks: Tensor) -> LossTerm:
        """Of the corrected logits and the labels."""
        head = outputs[self.head]
        assert head.corrected is not None
        assert head.special is not None
        mask = self.inside(outputs, batch, tasks) & head.special[:, None]
        of = dealt(mask.all(1), batch) if self.shuffle else slice(None)
        y, w = batch.labels[of][:, tasks], batch.weight[of][:, tasks]
        return losses.binary(head.corrected[:, tasks], y, positive_weight=w, mask=mask)


class _Taught(_Common):  # no dataclass: its fields stand where those who learn from a teacher have them
    teacher: Teacher
    shuffle: bool

    @property
    def needs(self) -> dict[str, tuple[str, ...]]:
        """The head and its teacher, unless that is the log."""
        heads: list[str] = [self.head, *([] if self.teacher == "logged" else [self.teacher])]
        return dict.fromkeys(heads, self.space)

    def target(self, outputs: Outputs, batch: Batch, tasks: Tensor) -> tuple[Tensor, Tensor]:
        """The teacher's logits and where it has some, both `[N, T']`."""
        if self.teacher == "logged":
            logits = batch.scores[:, tasks]
            known = ~logits.isnan()
            logits = logits.nan_to_num()  # 0 where masked: a NaN there would still reach the gradient
        else:
            teacher = outputs[self.teacher]
            logits = teacher.logits[:, tasks]
            known = teacher.computed[:, None].expand_as(logits)
        if self.shuffle:
            inside = stage_mask(self.space, batch.stages) & outputs[self.head].computed & known.all(1)
            logits = logits[dealt(inside, batch)]
        return logits, known


@dataclass(frozen=True, kw_only=True)
class Distillation(_Taught):
    """Cross-entropy against the teacher's probabilities (RRA 5-6, SDCL 5)."""

    loss: Literal["distillation"] = "distillation"
    teacher: Teacher = "ranking"  # whose logits are the target
    temperature: float = 1.0  # divides the logits of both
    shuffle: bool = False  # a placebo: the teacher's logits dealt anew among the request's candidates of the space

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(temperature=self.temperature)

    def term(self, outputs: Outputs, batch: Batch, tasks: Tensor) -> LossTerm:
        """Of the head's logits and the teacher's, where it has some."""
        target, known = self.target(outputs, batch, tasks)
        mask = self.inside(outputs, batch, tasks) & known
        return losses.distillation(outputs[self.head].logits[:, tasks], target, temperature=self.temperature, mask=mask)


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

    @property
    def needs(self) -> dict[str, tuple[str, ...]]:
        """No candidates: it is over the items of a pool."""
        return {}

    def term(self, outputs: Outputs, batch: Batch, tasks: Tensor) -> LossTerm:
        """Per task every impression is a row, its request's vector the query, against all eligible items.

        A weighted task's positives weigh their value and what was merely shown nothing (RRA Eq 4).
        """
        head = outputs[self.head]
        assert head.user is not None
        assert head.pool is not None
        pool, terms = head.pool, []
        shown = self.shown_weight * ~batch.weighted
        for task in tasks.tolist():
            seen = stage_mask(("exposed",), batch.stages) & batch.observed[:, task] & (pool.target >= 0)
            candidate = seen.nonzero().flatten()
            weight = batch.weight[candidate, task].where(batch.positive[candidate, task], shown[task])
            row, target = batch.row[candidate], pool.target[candidate]
            over = self.space, self.log_q, self.hard
            terms.append(softmax_over_pool(head.user[:, task], pool, row, target, weight, *over))
        return LossTerm(torch.stack([t.total for t in terms]), torch.stack([t.count for t in terms]))


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

    @property
    def needs(self) -> dict[str, tuple[str, ...]]:
        """The winners too."""
        return {self.head: self.space + self.winners}

    def arguments(self, outputs: Outputs, batch: Batch, tasks: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Logits, positives, negatives `[N, T']`, features `[N, F]` and offsets: what the loss is called with."""
        head = outputs[self.head]
        assert head.features is not None
        return (
            head.logits[:, tasks],
            space_mask(self.winners, batch, tasks),
            space_mask(self.space, batch, tasks),
            head.features,
            batch.offsets,
        )

    def term(self, outputs: Outputs, batch: Batch, tasks: Tensor) -> LossTerm:
        """Of the head's logits and the gated item side."""
        return losses.adaptive_contrastive(
            *self.arguments(outputs, batch, tasks),
            temperature=self.temperature,
            delta=self.delta,
            adaptive=self.adaptive,
            weigh_as=dealt(stage_mask(self.space, batch.stages), batch) if self.shuffle else None,
        )


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

    @property
    def needs(self) -> dict[str, tuple[str, ...]]:
        """The winners too."""
        return {self.head: self.space + self.winners}

    def term(self, outputs: Outputs, batch: Batch, tasks: Tensor) -> LossTerm:
        """Of the head's logits and FS-LTR's priorities."""
        head, weight = outputs[self.head], torch.ones_like(batch.weight[:, tasks])
        for token, value in self.winner_weights.items():
            weight = torch.where(space_mask([token], batch, tasks), value, weight)
        return losses.pairwise(
            head.logits[:, tasks],
            priorities(batch, tasks),
            batch.offsets,
            winner=space_mask(self.winners or self.space, batch, tasks) & head.computed[:, None],
            loser=self.inside(outputs, batch, tasks),
            weight=weight,
        )


@dataclass(frozen=True, kw_only=True)
class Imitation(_Taught):
    """The space's candidates in the teacher's order: by its softmax, its order, or its odds for each pair."""

    loss: Literal["list_net", "list_mle", "soft_pairwise"]
    teacher: Teacher = "ranking"  # whose order is the target
    shuffle: bool = False  # as of distillation

    def term(self, outputs: Outputs, batch: Batch, tasks: Tensor) -> LossTerm:
        """Of the head's logits and the teacher's, of the candidates for which it has those of all tasks."""
        head, (target, known) = outputs[self.head], self.target(outputs, batch, tasks)
        inside = stage_mask(self.space, batch.stages) & head.computed & known.all(1)
        offsets = torch.nn.functional.pad(inside.cumsum(0), (1, 0))[batch.offsets]
        loss = {"list_net": losses.list_net, "list_mle": losses.list_mle, "soft_pairwise": losses.soft_pairwise}
        return loss[self.loss](head.logits[inside][:, tasks], target[inside], offsets)


@dataclass(frozen=True, kw_only=True)
class ExpectedL0:
    """The expected number of open gates of a head's SNR trunks, a penalty (Ma et al., AAAI'19; Louizos et al. 2018)."""

    loss: Literal["expected_l0"] = "expected_l0"
    head: Head  # whose gates
    weight: float = 1e-3  # factor of the penalty

    def __post_init__(self) -> None:
        _check_not_negative(weight=self.weight)

    @property
    def needs(self) -> dict[str, tuple[str, ...]]:
        """No candidates: it is over gates."""
        return {}

    def term(self, outputs: Outputs, batch: Batch, tasks: Tensor) -> LossTerm:
        """The penalty once, whatever the tasks: [1]."""
        penalty = outputs[self.head].expected_l0
        assert penalty is not None
        return LossTerm(penalty.reshape(1), penalty.new_ones(1))


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

    @property
    def needs(self) -> dict[str, tuple[str, ...]]:
        """No candidates: it is over the items of a pool."""
        return {}

    def term(self, outputs: Outputs, batch: Batch, tasks: Tensor) -> LossTerm:
        """Each item's first view against all items' second ones, once for all tasks: [1]."""
        views = outputs[self.head].views
        assert views is not None
        target = views.target  # one that is there twice is no negative of itself
        if self.shuffle:  # a permutation of this rank's targets, so none is another's twice
            target = target[torch.randperm(len(target), device=target.device)]
        term = losses.info_nce(views.first, views.second, target, item_ids=views.item, temperature=self.temperature)
        return LossTerm(term.total.reshape(1), term.count.reshape(1))


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
    return objective.needs


def head_spaces(
    objectives: Iterable[Objective], heads: Iterable[str], *, learning: bool = False
) -> dict[str, frozenset[str]]:
    """Head -> all spaces it has to score in training; the loader turns them into rows.

    `learning`: only those that it learns from itself, not those that it scores for its students.
    """
    needed: dict[str, set[str]] = {head: set() for head in heads}
    for objective in objectives:
        for head, spaces in spaces_of(objective).items():
            if head == objective.head or not learning:
                needed[head].update(spaces)
    return {head: frozenset(spaces) for head, spaces in needed.items()}


def compute(objective: Objective, outputs: Outputs, batch: Batch, task_names: Sequence[str]) -> LossTerm:
    """The objective's loss and count per task, float32 [T'], in the order of its tasks (or of all tasks)."""
    return objective.term(outputs, batch, task_indices(objective, batch, task_names))


def task_indices(objective: Objective, batch: Batch, task_names: Sequence[str]) -> Tensor:
    """The places of the objective's tasks (none named: of all) among `task_names`: int64 [T']."""
    names = (objective.tasks if isinstance(objective, _Common) else ()) or tuple(task_names)
    return torch.tensor([list(task_names).index(name) for name in names], device=batch.item.device)
