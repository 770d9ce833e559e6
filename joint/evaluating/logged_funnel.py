"""The funnel over logged candidates: of heads that stand below a retrieval which is not ours (SDCL's two stages)."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from joint.batch import Batch
from joint.data.planted.truth import LIST
from joint.data.ragged import Ragged
from joint.data.requests import Requests
from joint.evaluating.funnel_metrics import Entrants, Wanted, funnel_metrics
from joint.experiment import Config
from joint.metrics import PerRequest
from joint.outputs import Outputs
from joint.ranks import top_k

CANDIDATES = "logged/candidates"  # the metric that says how many a request has


def logged_entrants(
    config: Config,
    requests: Requests,
    batch: Batch,
    outputs: Outputs,
    scores: dict[str, Tensor],
    orders: dict[str, Tensor],
) -> Entrants:
    """All that the log holds, as what enters the funnel; nothing of it is outside, whatever is eligible.

    Favourites are the ten that are best among the logged candidates: no head could have found others.

    Args:
        scores: head -> its fused scores `[N]`; orders: whose -> an order of the candidates `[N]`.
    """
    tasks = list(config.tasks)
    chosen = {"positives": batch.positive[:, tasks.index(config.evaluation.task)]}
    if "ranking" in scores:
        chosen["teacher_favourites"] = top_k(scores["ranking"], batch.offsets, LIST)
    if "truth" in orders:
        chosen["true_favourites"] = top_k(orders["truth"], batch.offsets, LIST)
    items = Ragged(batch.item.cpu().numpy(), batch.offsets.cpu().numpy())
    worth = batch.weight.where(batch.positive, 0).cpu().numpy()
    weight = {task: worth[:, index] for index, task in enumerate(tasks) if config.tasks[task].kind == "weighted"}
    wanted = {
        kind: _wanted(items, mask.cpu().numpy(), weight if kind == "positives" else {}) for kind, mask in chosen.items()
    }
    logits = {head: output.logits for head, output in outputs.items()}
    return Entrants(requests, items, batch.offsets, batch.group, logits, scores, orders, wanted)


def _wanted(items: Ragged, mask: np.ndarray, weight: Mapping[str, np.ndarray]) -> Wanted:
    """Some of the candidates themselves, bool `[N]`."""
    place = np.flatnonzero(mask)
    of = {task: values[place] for task, values in weight.items()}
    return Wanted(items.rows[place], items.values[place], np.ones(len(place), bool), place, of)


def logged_funnel(entrants: Entrants, quotas: Mapping[str, int]) -> dict[str, PerRequest]:
    """`funnel_metrics` of logged candidates, and how many a request has."""
    sizes = entrants.offsets.diff()
    return {CANDIDATES: PerRequest.of(sizes, torch.ones_like(sizes))} | funnel_metrics(entrants, quotas)
