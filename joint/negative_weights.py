"""The learned weights of adaptive negatives: by stage of origin, task and user group (SDCL Table 7, Figure 3)."""

from __future__ import annotations

import torch

import losses
from joint.batch import Batch
from joint.experiment import Config
from joint.objectives import AdaptiveContrastive, contrastive_arguments, stage_mask
from joint.outputs import Outputs
from joint.schema import GROUPS


@torch.no_grad()
def negative_weights(config: Config, outputs: Outputs, batch: Batch) -> dict[str, float]:
    """`negative_weights/STAGE/TASK/GROUP`, means over this rank's pairs of a batch; none where there is no pair.

    In place of the group, `similarity` and `confidence` are the two parts of the mean of all groups.
    """
    found: dict[str, float] = {}
    for objective in config.objectives.values():
        if isinstance(objective, AdaptiveContrastive) and objective.adaptive:
            names = list(objective.tasks or config.tasks)
            arguments = contrastive_arguments(objective, outputs, batch, list(config.tasks))
            _, pairs = losses.adaptive_contrastive(*arguments, delta=objective.delta, return_weights=True)
            group = batch.group[batch.row[pairs.negative]]
            for stage in GROUPS:
                of_stage = stage_mask((stage,), batch.stages)[pairs.negative]
                for index, task in enumerate(names):
                    chosen = of_stage & (pairs.task == index)
                    parts = {"similarity": pairs.similarity[chosen], "confidence": pairs.confidence[chosen]}
                    weight = objective.delta * (parts["similarity"] + parts["confidence"])
                    by_group = {str(g): weight[group[chosen] == g] for g in group[chosen].unique().tolist()}
                    found |= {
                        f"negative_weights/{stage}/{task}/{name}": float(values.mean())
                        for name, values in (parts | by_group).items()
                        if len(values)
                    }
    return found
