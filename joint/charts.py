"""What TensorBoard shows of a run in its tab Custom Scalars: the charts to look at first, several lines in each."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any

from joint.data.planted.truth import LIST
from joint.evaluating.alignment import STUDENTS
from joint.experiment import Config, heads_of
from joint.objectives import AdaptiveContrastive
from joint.schema import GROUPS, STAGES

Charts = dict[str, list[str]]  # title -> expressions for the names of its lines
Layout = dict[str, dict[str, list[Any]]]  # category -> title -> what `SummaryWriter.add_custom_scalars` takes
OF_TRAINING: Charts = {"by objective": ["loss/(?!total$)"], "all objectives, weighted": ["loss/total$"]}
OF_SPEED: Charts = {
    "requests a second": ["speed/requests_per_second$"],
    "candidates a second": ["speed/candidates_per_second$"],
    "share of time waiting for data": ["speed/data_wait_fraction$"],
    "seconds left": ["speed/seconds_left$"],
    "peak memory, MB": ["memory/peak_mb$"],
}


def charts(config: Config, *, planted: bool) -> Layout:
    """The charts of a run. `planted`: the truth of the dataset is known."""
    found = {"loss": OF_TRAINING}
    if config.train.evaluate_every_epochs:
        found[f"by epoch, on {config.evaluation.valid}"] = _measured(config, "", planted)
    found[f"at the end, on {config.evaluation.test}"] = _measured(config, "test/", planted)
    if weights := dict(_negative_weights(config)):
        found["weights of negatives, by user group"] = weights
    found["speed"] = OF_SPEED
    return {category: {title: ["Multiline", names] for title, names in own.items()} for category, own in found.items()}


def drawn(layout: Layout, names: Iterable[str]) -> set[str]:
    """Those of some names that a chart has a line of."""
    expressions = [name for own in layout.values() for _, lines in own.values() for name in lines]
    return {name for name in names if any(re.match(expression, name) for expression in expressions)}


def _measured(config: Config, prefix: str, planted: bool) -> Charts:
    """Every head in one chart a metric."""
    heads, first = heads_of(config), min(config.evaluation.k)
    any_head = f"({'|'.join(heads)})"
    found = {f"recall@{first}": [f"{any_head}/recall@{first}$"]}
    found |= {f"AUC of {task}": [f"{any_head}/auc/{re.escape(task)}$"] for task in config.tasks}
    if students := [rate for student, rate in STUDENTS.items() if student in heads and "ranking" in heads]:
        found["reverse rate against the teacher"] = [f"{rate}/fused$" for rate in students]
    if config.evaluation.quotas:
        found["positives left in the funnel"] = [
            f"funnel/{head}/recall@{n}$" for head, n in config.evaluation.quotas.items()
        ]
    if planted:
        found[f"true reward of the first {LIST}"] = [f"({'|'.join([*heads, 'funnel'])})/true_reward@{LIST}$"]
    return {title: [prefix + name for name in names] for title, names in found.items()}


def _negative_weights(config: Config) -> Iterator[tuple[str, list[str]]]:
    """A chart for every task and kind of negatives whose weights are learned, with a line a user group."""
    for objective in config.objectives.values():
        if isinstance(objective, AdaptiveContrastive) and objective.adaptive:
            space = [STAGES[token] for token in objective.space if token in STAGES]
            kinds = [kind for kind, flags in GROUPS.items() if any(flags & stage for stage in space)]
            for task in objective.tasks or config.tasks:
                for kind in kinds:
                    yield f"{task}, {kind}", [rf"negative_weights/{kind}/{re.escape(task)}/\d+$"]
