"""Requests and their candidates -> a `Batch`: catalogue look-ups, table rows and label masks, all vectorised."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from functools import cached_property, partial

import numpy as np
import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from joint.batch import Batch
from joint.data.columns import Columns
from joint.data.dataset import Dataset
from joint.data.eligibility import Eligibility
from joint.data.order import Position
from joint.data.ragged import Ragged
from joint.data.requests import Requests
from joint.data.sampling import Candidates
from joint.data.softmax_pool import PoolItems
from joint.experiment import Task
from joint.features import Plan
from joint.keys import Key
from joint.objectives import head_spaces
from joint.schema import Stage, table_rows
from joint.spaces import stage_mask

NO_LIMIT: Mapping[str, float] = {}


class Assembler:
    """Builds batches of one config over one dataset."""

    def __init__(self, plan: Plan, dataset: Dataset) -> None:
        self.plan = plan
        self.dataset = dataset
        self.eligibility = Eligibility(dataset, plan.config.data)
        self.rows = {table.name: table.rows for table in plan.tables}
        objectives, heads = plan.config.objectives.values(), plan.config.heads.__dict__
        self.head_spaces = head_spaces(objectives, heads)
        self.learning = head_spaces(objectives, heads, learning=True)

    def __call__(
        self,
        requests: Requests,
        candidates: Candidates,
        pool: PoolItems,
        *,
        position: Position,
        scoring: Collection[str] | None = None,
        latest: Mapping[str, float] = NO_LIMIT,
    ) -> Batch:
        """The batch of these requests.

        Args:
            pool: what a softmax is over: this rank's slice of the corpus, or a sample.
            position: of the batch that follows.
            scoring: heads that score every candidate while the others score none (evaluation); None: every head
                scores those that its objectives need.
            latest: task -> the latest request (UNIX seconds) whose feedback was known in time (training).
        """
        columns = Columns(self.plan.reads, self.dataset.catalogue, requests, candidates.items, pool.items)
        unknown = 0
        values: dict[Key, Ragged] = {}
        inner: dict[str, Tensor] = {}
        floats: dict[str, Tensor] = {}
        for key in self.plan.keys:
            if not key.embedded:
                floats[key.name] = torch.from_numpy(columns.numbers(key))
                continue
            ids, lengths = columns.ids(key)
            if key.side == "history" and (key.history, key.owner) in self.plan.averaged:
                lengths = ids.lengths
            if lengths is not None:
                inner[key.name] = torch.from_numpy(lengths)
            rows, missed = table_rows(ids.values, self.rows[key.table])
            unknown += missed
            values[key] = ids.with_values(rows)
        offsets = torch.from_numpy(candidates.items.offsets)
        stages = torch.from_numpy(candidates.stages.astype(np.int64))
        items = candidates.items.values.astype(np.int64)
        # A batch is of one day.
        day = requests.scalars("day")
        assert (day == day[0]).all()
        is_open = partial(self.eligibility.is_open, day=int(day[0]))
        known = known_in_time(requests, self.plan.config.tasks, latest)[candidates.items.rows]
        head_rows, teaching_rows = self._head_rows(stages, scoring)
        labels, weight, positive, observed = _labels(candidates, list(self.plan.config.tasks.values()), known)
        return Batch(
            sparse={name: _jagged(keys, values) for name, keys in self.plan.keys_by_width.items()},
            inner=inner,
            floats=floats,
            competitors={
                name: torch.from_numpy((items.values >= 0).reshape(-1, self.plan.schema.history(name).competitors))
                for name, items in columns.competitors.items()
            },
            lengths={name: torch.from_numpy(history.lengths) for name, history in columns.histories.items()},
            offsets=offsets,
            row=torch.from_numpy(candidates.items.rows),
            item=torch.from_numpy(items),
            stages=stages,
            labels=labels,
            weight=weight,
            weighted=torch.tensor([task.kind == "weighted" for task in self.plan.config.tasks.values()]),
            positive=positive,
            scores=_scores(candidates, self.plan.config.tasks),
            observed=observed,
            request_id=torch.from_numpy(requests.scalars("request_id").copy()),
            group=torch.from_numpy(requests.scalars("group").astype(np.int64)),
            head_rows=head_rows,
            teaching_rows=teaching_rows,
            pool_item=torch.from_numpy(pool.items),
            pool_open=torch.from_numpy(is_open(pool.items)),
            pool_in_batch=torch.from_numpy(pool.in_batch),
            pool_sampled=pool.sampled,
            pool_available=self.eligibility.available(int(day[0])),
            column=torch.from_numpy(np.where(is_open(items), self.eligibility.columns(items), -1)),
            excluded=self._excluded(requests, pool),
            requests=len(requests),
            unknown=unknown,
            position=position,
        )

    def empty(self, pool: PoolItems, *, position: Position, day: int = 0) -> Batch:
        """The batch of a rank that has no requests left: one request of that day, all of its lists empty."""
        blank = Requests({**self._blank.columns, "day": np.full(1, day, np.int32)})
        batch = self(blank, logged(blank, self.dataset), pool, position=position)
        batch.requests = 0
        return batch

    @cached_property
    def _blank(self) -> Requests:
        """A request of the dataset with all of its lists emptied."""
        none = np.zeros(1, np.int64)
        request = self.dataset.read(self.dataset.schema.parts[0], [0]).take(none)
        vectors = {feature.name for feature in self.plan.schema.features if feature.kind == "vector"}
        columns = {
            name: column.slices(none, none) if isinstance(column, Ragged) and name not in vectors else column
            for name, column in request.columns.items()
        }
        return Requests(columns)

    def _excluded(self, requests: Requests, pool: PoolItems) -> Tensor:
        taken = self.eligibility.taken(requests)
        what = taken.values if pool.sampled else self.eligibility.columns(taken.values)
        pairs = np.stack([taken.rows, what], axis=1)
        return torch.from_numpy(pairs[what >= 0])

    def _head_rows(
        self, stages: Tensor, scoring: Collection[str] | None
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The candidates that each head learns from (or scores), and those that it scores for its students alone."""
        if scoring is not None:
            return {head: torch.arange(len(stages) if head in scoring else 0) for head in self.head_spaces}, {}
        learning = {head: stage_mask(space, stages) for head, space in self.learning.items()}
        teaching = {
            head: stage_mask(space, stages) & ~learning[head]
            for head, space in self.head_spaces.items()
            if space != self.learning[head]
        }
        head_rows, teaching_rows = (
            {head: mask.nonzero().flatten() for head, mask in masks.items()} for masks in (learning, teaching)
        )
        return head_rows, teaching_rows


def logged(requests: Requests, dataset: Dataset) -> Candidates:
    """The candidates as logged; logged scores, where they were read, are with the labels."""
    read = [name for name in dataset.schema.scores if name in requests.columns]
    labels = {name: requests.lists(name).values for name in (*dataset.schema.labels, *read)}
    return Candidates(requests.lists("candidates"), requests.lists("stages").values, labels)


def _jagged(keys: Sequence[Key], values: dict[Key, Ragged]) -> KeyedJaggedTensor:
    return KeyedJaggedTensor(
        keys=[key.name for key in keys],
        values=torch.from_numpy(np.concatenate([values[key].values for key in keys])),
        lengths=torch.from_numpy(np.concatenate([values[key].lengths for key in keys])),
    )


def known_in_time(requests: Requests, tasks: Mapping[str, Task], latest: Mapping[str, float]) -> np.ndarray:
    """Whether each task's feedback on a request was known in time: bool [R, T]."""
    limits = np.array([latest.get(name, np.inf) for name in tasks])
    return requests.scalars("timestamp")[:, None] <= limits


def positives(candidates: Candidates, task: Task) -> np.ndarray:
    """Exposures with the task's feedback, bool [N]: what counts as positive everywhere."""
    exposed = (candidates.stages & Stage.EXPOSED) != 0
    with np.errstate(invalid="ignore"):  # not observed is NaN, which is no positive
        return exposed & (candidates.labels[task.label] >= task.at_least)


def _scores(candidates: Candidates, tasks: Mapping[str, Task]) -> Tensor:
    """The logged teacher's logits `[N, T]`, NaN where it has none or they were not read."""
    scores = np.full((len(candidates.stages), len(tasks)), np.nan, np.float32)
    for index, task in enumerate(tasks.values()):
        if task.score in candidates.labels:
            scores[:, index] = candidates.labels[task.score]
    return torch.from_numpy(scores)


def _labels(
    candidates: Candidates, tasks: Sequence[Task], in_time: np.ndarray
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Labels in [0, 1], weights of positives, positives and observed, each `[N, T]`.

    Of what was not known `in_time` [N, T] nothing is observed, not even that an unexposed candidate got no feedback:
    negatives alone would lower a slow task's rate on the last days.
    """
    exposed = (candidates.stages & Stage.EXPOSED) != 0
    raw = np.stack([candidates.labels[task.label] for task in tasks], axis=1)
    known = ~np.isnan(raw) & exposed[:, None] & in_time
    value = np.where(known, raw, 0)
    positive = known & (value >= np.array([task.at_least for task in tasks], np.float32))
    ratio = np.array([task.kind == "ratio" for task in tasks])
    labels = np.where(ratio, value.clip(0, 1), positive).astype(np.float32)
    weighted = np.array([task.kind == "weighted" for task in tasks])
    weight = np.where(weighted & positive, value, 1).astype(np.float32)
    observed = known | (~exposed[:, None] & in_time)
    return torch.from_numpy(labels), torch.from_numpy(weight), torch.from_numpy(positive), torch.from_numpy(observed)
