"""What training reads of a dataset: the columns that its config uses. Reading is the most of a light step's data."""

from __future__ import annotations

import copy
from dataclasses import replace

from joint.data.dataset import Dataset
from joint.features import Plan
from joint.schema import History


def narrowed(dataset: Dataset, plan: Plan) -> Dataset:
    """The same dataset, its requests without the features, histories and labels that training by this plan ignores."""
    config, schema = plan.config, dataset.schema
    features = {key.feature.name for key in plan.keys if key.side == "request"}
    wanted = {key.history for key in plan.keys} | {cross.history for cross in plan.crosses.values()}
    wanted |= set(config.data.not_eligible)
    labels = {task.label for task in config.tasks.values()}
    narrow = copy.copy(dataset)
    narrow.schema = replace(
        schema,
        features=tuple(f for f in schema.features if f.level == "item" or f.name in features),
        histories=tuple(_narrowed(history, plan) for history in schema.histories if history.name in wanted),
        labels=tuple(label for label in schema.labels if label in labels),
    )
    return narrow


def _narrowed(history: History, plan: Plan) -> History:
    keys = [key for key in plan.keys if key.history == history.name]
    events = {key.feature.name for key in keys if key.side == "history"}
    competed = any(key.side == "competitors" for key in keys)
    return replace(
        history,
        events=tuple(event for event in history.events if event in events),
        competitors=history.competitors if competed else 0,
    )
