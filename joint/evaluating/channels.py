"""How retrieval's lists come about where `evaluation` asks for more than the best: with chance, and pool by pool."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from joint.data.dataset import Dataset
from joint.data.ragged import draw
from joint.data.requests import Requests
from joint.evaluating.explore import narrowness, noisy, thinned
from joint.evaluating.item_pools import members, with_reserved
from joint.evaluating.variety import Coverage, variety
from joint.experiment import Config
from joint.metrics import PerRequest


def with_fewer_events(config: Config, dataset: Dataset, requests: Requests) -> Requests | None:
    """The requests with a part of their histories left out, where `evaluation.explore` says so; else None."""
    explore = config.evaluation.explore
    if explore is None or explore.keep_history == 1:
        return None
    keys = _keys(config, requests)
    return thinned(requests, dataset.schema.histories, keys, keep=explore.keep_history, newest=explore.newest)


def with_noise(config: Config, dataset: Dataset, users: Tensor, requests: Requests) -> Tensor:
    """The users' fused vectors `[R, D]` with noise, where `evaluation.explore` says so."""
    explore = config.evaluation.explore
    if explore is None or not explore.noise:
        return users
    events = requests.lists(explore.history)
    narrow = narrowness(events.with_values(_values(config, dataset)[events.values]))
    found = noisy(users.float().cpu().numpy(), _keys(config, requests), narrow, noise=explore.noise)
    return torch.from_numpy(found).to(users)


def with_places(config: Config, scores: Tensor, pools: dict[str, Tensor]) -> Tensor:
    """Scores `[R, C]` by which retrieval keeps items: +inf for what a pool has its places reserved for."""
    return with_reserved(scores, pools, {name: pool.quota for name, pool in config.evaluation.pools.items()})


def list_variety(
    config: Config, dataset: Dataset, corpus: np.ndarray, scores: Tensor
) -> dict[str, PerRequest | Coverage]:
    """How varied the lists of `scores [R, C]` of the items `corpus [C]` are, in what `evaluation.variety` names."""
    found: dict[str, PerRequest | Coverage] = {}
    if config.evaluation.variety:
        own = torch.from_numpy(_values(config, dataset)[corpus].astype(np.int64)).to(scores.device)
        for k in config.evaluation.k:
            found |= variety(scores, own, config.evaluation.variety, k)
    return found


def pool_members(config: Config, dataset: Dataset, corpus: np.ndarray, requests: Requests) -> dict[str, Tensor]:
    """Which items of the corpus are in each of the pools that are measured, name -> bool `[R, C]`."""
    return members(config.evaluation.pools, dataset, corpus, requests.scalars("day"))


def _values(config: Config, dataset: Dataset) -> np.ndarray:
    values = dataset.catalogue[config.evaluation.variety]
    assert isinstance(values, np.ndarray)
    return values


def _keys(config: Config, requests: Requests) -> np.ndarray:
    return draw(config.run.seed, requests.scalars("request_id"))
