"""Requests and their candidates -> a `Batch`: catalogue look-ups, table rows and label masks, all vectorised."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import cached_property

import numpy as np
import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from joint.batch import Batch
from joint.config import Config, Task
from joint.data.dataset import Dataset
from joint.data.order import Position
from joint.data.ragged import Ragged, concatenate, offsets_of
from joint.data.requests import Requests
from joint.data.sampling import Candidates
from joint.features import Key, Plan
from joint.objectives import head_spaces, stage_mask
from joint.schema import Stage, table_rows


class Assembler:
    """Builds batches of one config over one dataset."""

    def __init__(self, plan: Plan, dataset: Dataset) -> None:
        self.plan = plan
        self.dataset = dataset
        self.rows = {table.name: table.rows for table in plan.tables}
        self.head_spaces = head_spaces(plan.config.objectives.values(), plan.config.heads.__dict__)

    def __call__(
        self,
        requests: Requests,
        candidates: Candidates,
        pool: np.ndarray,
        *,
        position: Position,
        scoring: Collection[str] | None = None,
    ) -> Batch:
        """The batch of these requests.

        Args:
            pool: item indices of this rank's slice of the corpus, -1 for padding.
            position: of the batch that follows.
            scoring: heads that score every candidate while the others score none (evaluation); None: every head
                scores those that its objectives need.
        """
        histories = {name: requests.lists(name).newest(n) for name, n in self.plan.history_lengths.items()}
        unknown = 0
        values: dict[Key, Ragged] = {}
        inner: dict[str, Tensor] = {}
        floats: dict[str, Tensor] = {}
        for key in self.plan.keys:
            column = self._column(key, requests, candidates, pool, histories)
            if key.feature.kind == "float":
                floats[key.name] = torch.from_numpy(column.values.astype(np.float32)[:, None])
                continue
            if key.feature.kind == "ids":
                column, lengths = _flatten(column, self.dataset.catalogue[key.feature.name])
                inner[key.name] = torch.from_numpy(lengths)
            ids, missed = table_rows(column.values, self.rows[key.feature.space])
            unknown += missed
            values[key] = column.with_values(ids)
        offsets = torch.from_numpy(candidates.items.offsets)
        stages = torch.from_numpy(candidates.stages.astype(np.int64))
        labels, positive, observed = _labels(candidates, list(self.plan.config.tasks.values()))
        return Batch(
            sparse={name: _jagged(keys, values) for name, keys in self.plan.keys_by_width.items()},
            inner=inner,
            floats=floats,
            lengths={name: torch.from_numpy(history.lengths) for name, history in histories.items()},
            offsets=offsets,
            row=torch.from_numpy(candidates.items.rows),
            item=torch.from_numpy(candidates.items.values.astype(np.int64)),
            stages=stages,
            labels=labels,
            positive=positive,
            observed=observed,
            request_id=torch.from_numpy(requests.scalars("request_id").copy()),
            group=torch.from_numpy(requests.scalars("group").astype(np.int64)),
            head_rows=self._head_rows(stages, scoring),
            pool_item=torch.from_numpy(pool),
            excluded=_pairs(not_eligible(requests, self.plan.config)),
            requests=len(requests),
            unknown=unknown,
            position=position,
        )

    def empty(self, pool: np.ndarray, *, position: Position) -> Batch:
        """The batch of a rank that has no requests left: one request, all of its lists empty."""
        batch = self(self._blank, logged(self._blank, self.dataset), pool, position=position)
        batch.requests = 0
        return batch

    @cached_property
    def _blank(self) -> Requests:
        """A request of the dataset with all of its lists emptied."""
        none = np.zeros(1, np.int64)
        request = self.dataset.read(self.dataset.schema.parts[0], [0]).take(none)
        columns = {
            name: column.slices(none, none) if isinstance(column, Ragged) else column
            for name, column in request.columns.items()
        }
        return Requests(columns)

    def _column(
        self,
        key: Key,
        requests: Requests,
        candidates: Candidates,
        pool: np.ndarray,
        histories: dict[str, Ragged],
    ) -> Ragged:
        """The key's values per request; for 'ids' features of items, the item indices."""
        if key.side == "request":
            return Ragged(requests.scalars(key.feature.name), np.arange(len(requests) + 1))
        if key.feature.level == "event":
            return requests.lists(f"{key.history}.{key.feature.name}").newest(self.plan.history_lengths[key.history])
        if key.side == "history":
            items = histories[key.history]
        else:
            items = candidates.items if key.side == "candidate" else _in_first(pool, len(requests))
        if key.feature.kind == "ids":
            return items
        column = self.dataset.catalogue[key.feature.name]
        assert isinstance(column, np.ndarray)
        return items.with_values(np.where(items.values >= 0, column[items.values], 0))

    def _head_rows(self, stages: Tensor, scoring: Collection[str] | None) -> dict[str, Tensor]:
        if scoring is not None:
            return {head: torch.arange(len(stages) if head in scoring else 0) for head in self.head_spaces}
        return {head: stage_mask(space, stages).nonzero().flatten() for head, space in self.head_spaces.items()}


def logged(requests: Requests, dataset: Dataset) -> Candidates:
    """The candidates as logged."""
    labels = {name: requests.lists(name).values for name in dataset.schema.labels}
    return Candidates(requests.lists("candidates"), requests.lists("stages").values, labels)


def not_eligible(requests: Requests, config: Config) -> Ragged:
    """Items that must not be recommended to each request: those in the histories that the config names."""
    names = config.data.not_eligible
    if not names:
        return Ragged(np.zeros(0, np.int64), np.zeros(len(requests) + 1, np.int64))
    joined = concatenate([requests.lists(name) for name in names])
    count = len(requests)
    order = np.arange(len(names) * count).reshape(len(names), count).T.ravel()
    taken = joined.take(order)
    return Ragged(taken.values.astype(np.int64), taken.offsets[:: len(names)])


def _flatten(items: Ragged, lists: object) -> tuple[Ragged, np.ndarray]:
    """Ids of a multi-valued feature of items: the ids per request, and how many each item has."""
    assert isinstance(lists, Ragged)
    known = items.values >= 0
    starts = np.where(known, lists.offsets[:-1][items.values], 0)
    lengths = np.where(known, lists.lengths[items.values], 0)
    flat = lists.slices(starts, lengths)
    return Ragged(flat.values, flat.offsets[items.offsets]), lengths


def _in_first(pool: np.ndarray, requests: int) -> Ragged:
    """The pool rides in the first request's list, so that one look-up serves it too."""
    return Ragged(pool, offsets_of(np.where(np.arange(requests) == 0, len(pool), 0)))


def _jagged(keys: Sequence[Key], values: dict[Key, Ragged]) -> KeyedJaggedTensor:
    return KeyedJaggedTensor(
        keys=[key.name for key in keys],
        values=torch.from_numpy(np.concatenate([values[key].values for key in keys])),
        lengths=torch.from_numpy(np.concatenate([values[key].lengths for key in keys])),
    )


def positives(candidates: Candidates, task: Task) -> np.ndarray:
    """Exposures with the task's feedback, bool [N]: what counts as positive everywhere."""
    exposed = (candidates.stages & Stage.EXPOSED) != 0
    with np.errstate(invalid="ignore"):  # not observed is NaN, which is no positive
        return exposed & (candidates.labels[task.label] >= task.at_least)


def _labels(candidates: Candidates, tasks: Sequence[Task]) -> tuple[Tensor, Tensor, Tensor]:
    """Labels in [0, 1], positives and observed, each `[N, T]`."""
    exposed = (candidates.stages & Stage.EXPOSED) != 0
    raw = np.stack([candidates.labels[task.label] for task in tasks], axis=1)
    known = ~np.isnan(raw) & exposed[:, None]
    value = np.where(known, raw, 0)
    positive = known & (value >= np.array([task.at_least for task in tasks], np.float32))
    ratio = np.array([task.kind == "ratio" for task in tasks])
    labels = np.where(ratio, value.clip(0, 1), positive).astype(np.float32)
    return torch.from_numpy(labels), torch.from_numpy(positive), torch.from_numpy(known | ~exposed[:, None])


def _pairs(lists: Ragged) -> Tensor:
    return torch.from_numpy(np.stack([lists.rows, lists.values], axis=1).astype(np.int64))
