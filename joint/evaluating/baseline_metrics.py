"""The classic baselines on the same split, candidates and positives as the heads: what a trained funnel has to beat."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from joint import metrics
from joint.data.assemble import known_in_time, logged, positives
from joint.data.dataset import Dataset
from joint.data.eligibility import Eligibility
from joint.data.loader import latest_known
from joint.data.ragged import Ragged
from joint.data.requests import Requests, concatenate_requests
from joint.evaluating import baselines
from joint.experiment import Config
from joint.ranks import pool_ranks

USER = "user_id"
SMOOTHING = 5.0  # pseudo-labels of the user and item means


def baseline_metrics(config: Config, dataset: Dataset, split: str) -> dict[str, float]:
    """`baselines/NAME/recall@K` and `baselines/means/auc/TASK`, fitted on what the heads were trained on."""
    before = concatenate_requests([dataset.read_split(part) for part in config.data.train])
    requests = dataset.read_split(split)
    task = config.evaluation.task
    in_time = known_in_time(before, config.tasks, latest_known(config, dataset.schema))
    before = before.take(np.flatnonzero(in_time[:, list(config.tasks).index(task)]))
    row, item, positive = _impressions(before, config, dataset)
    user = torch.tensor(before.scalars(USER))[row]
    fitted = user[positive], item[positive], dataset.schema.items
    histories = _histories(requests, user[positive], item[positive])
    everyone = baselines.popularity(*fitted).expand(len(requests), -1)
    scores = {
        "popularity": everyone,
        "item_knn": baselines.history_scores(baselines.item_knn(*fitted), *histories),
        "ease": baselines.history_scores(baselines.ease(*fitted), *histories),
    }
    row, target, wanted = _impressions(requests, config, dataset)
    eligibility = Eligibility(dataset, config.data)
    eligible = torch.from_numpy(eligibility.mask(requests))
    corpus = torch.from_numpy(eligibility.corpus)
    column = torch.from_numpy(eligibility.columns(target.numpy()))
    found: dict[str, float] = {}
    for name, matrix in scores.items():
        ranks = pool_ranks(matrix[:, corpus], row[wanted], column[wanted], mask=eligible)
        found |= {f"baselines/{name}/recall@{k}": metrics.recall_of_ranks(ranks, k).value for k in config.evaluation.k}
    means = baselines.smoothed_means(user, item, positive, smoothing=SMOOTHING)
    shown = torch.tensor(requests.scalars(USER))[row]
    return found | {f"baselines/means/auc/{task}": metrics.auc(means.score(shown, target), wanted.long()).value}


def _impressions(requests: Requests, config: Config, dataset: Dataset) -> tuple[Tensor, Tensor, Tensor]:
    """Request, item and whether it is positive, of every candidate whose feedback is known."""
    rule = config.tasks[config.evaluation.task]
    candidates = logged(requests, dataset)
    known = ~np.isnan(candidates.labels[rule.label])
    row, item = candidates.items.rows[known], candidates.items.values[known].astype(np.int64)
    return torch.from_numpy(row), torch.from_numpy(item), torch.from_numpy(positives(candidates, rule)[known])


def _histories(requests: Requests, user: Tensor, item: Tensor) -> tuple[Tensor, Tensor]:
    """The positives of each request's user, ragged: items and offsets."""
    order = user.argsort(stable=True)
    counts = torch.bincount(user, minlength=int(requests.scalars(USER).max()) + 1).numpy()
    by_user = Ragged(item[order].numpy(), np.concatenate([[0], np.cumsum(counts)]))
    taken = by_user.take(requests.scalars(USER))
    return torch.from_numpy(taken.values), torch.from_numpy(taken.offsets)
