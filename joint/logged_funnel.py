"""The funnel over logged candidates: of heads that stand below a retrieval which is not ours (SDCL's two stages)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from joint.data.planted.truth import LIST
from joint.funnel_metrics import funnel, served, top_k, true_rewards
from joint.metrics import PerRequest
from joint.ranks import request_sums

CANDIDATES = "logged/candidates"  # the metric that says how many a request has


def logged_funnel(
    scores: Mapping[str, Tensor],
    quotas: Mapping[str, int],
    positive: Tensor,
    offsets: Tensor,
    truth: Tensor | None,
) -> dict[str, PerRequest]:
    """What each stage leaves of all that the log holds, and what the ten are truly worth; names as over a corpus.

    Favourites are the ten that are best among the logged candidates: no head could have found others.

    Args:
        scores: head -> its fused scores `[N]`; quotas: head -> how many it keeps, in the funnel's order.
        positive: bool `[N]`; truth: true rewards `[N]`, None where unknown.
    """
    stages = dict(funnel(scores, quotas, offsets))
    wanted = {"positives": positive}
    if "ranking" in scores:
        wanted["teacher_favourites"] = top_k(scores["ranking"], offsets, LIST)
    sizes = offsets.diff()
    found = {CANDIDATES: PerRequest.of(sizes, torch.ones_like(sizes))}
    if truth is not None:
        wanted["true_favourites"] = top_k(truth, offsets, LIST)
        lists = {head: top_k(score, offsets, LIST) for head, score in scores.items()}
        if stages:
            lists["funnel"] = served(stages, scores, offsets)
        found |= dict(true_rewards(truth, offsets, lists))
    for what, mask in wanted.items():
        total = request_sums(mask, offsets)
        for head, alive in stages.items():
            name = f"recall@{quotas[head]}" if what == "positives" else what
            found[f"funnel/{head}/{name}"] = PerRequest.of(request_sums(alive & mask, offsets), total)
    return found
