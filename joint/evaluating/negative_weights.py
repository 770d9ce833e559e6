"""The learned weights of adaptive negatives by user group, task and stage, taken apart (SDCL Table 7, Figure 3).

A weight is delta * (similarity + confidence). Similarity is a softmax over a positive's n negatives, so 1/n of it is
there whatever is learned; confidence is the student's own probability, which for a task of few positives is small
whatever the negatives. Both are logged beside the weight, so that neither passes for something that was learned.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

import losses
from joint.batch import Batch
from joint.experiment import Config
from joint.objectives import AdaptiveContrastive, task_indices
from joint.outputs import Outputs
from joint.schema import GROUPS
from joint.spaces import stage_mask


@torch.no_grad()
def negative_weights(config: Config, outputs: Outputs, batch: Batch) -> dict[str, float]:
    """Means over this rank's pairs of a batch; none where there is no pair, or where weights are fixed.

    `negative_weights/STAGE/TASK/GROUP` is the weight; with `/similarity`, `/confidence` and `/even` behind it are its
    parts and 1/n. `negative_weights/base_rate/TASK/GROUP` is the share of positives among all that the head has scored.
    """
    found: dict[str, float] = {}
    for objective in config.objectives.values():
        if isinstance(objective, AdaptiveContrastive) and objective.adaptive:
            found |= dict(_of_objective(objective, config, outputs, batch))
    return found


def _of_objective(
    objective: AdaptiveContrastive, config: Config, outputs: Outputs, batch: Batch
) -> Iterator[tuple[str, float]]:
    names = objective.tasks or tuple(config.tasks)
    arguments = objective.arguments(outputs, batch, task_indices(objective, batch, list(config.tasks)))
    _, pairs = losses.adaptive_contrastive(*arguments, delta=objective.delta, return_weights=True)
    group, computed = batch.group[batch.row], outputs[objective.head].computed
    _, which, count = (pairs.task * len(group) + pairs.positive).unique(return_inverse=True, return_counts=True)
    parts = {
        "": objective.delta * (pairs.similarity + pairs.confidence),
        "/similarity": pairs.similarity,
        "/confidence": pairs.confidence,
        "/even": 1 / count[which],
    }
    stages = {stage: stage_mask((stage,), batch.stages)[pairs.negative] for stage in GROUPS}
    for index, task in enumerate(names):
        column = list(config.tasks).index(task)
        for of in group.unique().tolist():
            known = batch.observed[:, column] & computed & (group == of)
            yield from _mean(f"base_rate/{task}/{of}", batch.positive[known, column].float())
            mine = (pairs.task == index) & (group[pairs.negative] == of)
            for stage, of_stage in stages.items():
                chosen = (mine & of_stage).nonzero().flatten()
                for part, values in parts.items():
                    yield from _mean(f"{stage}/{task}/{of}{part}", values[chosen])


def _mean(name: str, values: Tensor) -> Iterator[tuple[str, float]]:
    if len(values):
        yield f"negative_weights/{name}", float(values.mean())
