"""The funnel: each head keeps its best candidates and hands them to the next. Ragged, no loop over requests.

`python -m joint.cascade RUN [--split test] [evaluation.quotas={...}]` says what survives each stage, what the ten that
are served are worth where that is known, and at what cost.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from joint.commands import run_command
from joint.data.planted.truth import LIST, Truth
from joint.data.ragged import Ragged
from joint.data.requests import Requests
from joint.metrics import PerRequest
from joint.ranks import order_within, positions, request_sums
from joint.schema import SPLITS
from joint.versions import check_versions


def top_k(scores: Tensor, offsets: Tensor, k: int) -> Tensor:
    """True for the K best of each request, bool `[N]`; among equal scores the earlier candidate."""
    order = order_within(scores, offsets, torch.arange(len(scores), device=scores.device))
    place = torch.empty_like(order).scatter_(0, order, positions(offsets))
    return place < k


def funnel(scores: Mapping[str, Tensor], quotas: Mapping[str, int], offsets: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The stages in the order of `quotas`, each with its survivors, bool `[N]`.

    Args:
        scores: head -> fused scores `[N]` on the same ragged candidates; only survivors' are read.
        quotas: head -> how many it keeps of those the stage before left.
    """
    alive = torch.ones(int(offsets[-1]), dtype=torch.bool, device=offsets.device)
    for head, quota in quotas.items():
        alive = alive & top_k(scores[head].where(alive, -torch.inf), offsets, quota)
        yield head, alive


def true_rewards(worth: Tensor, offsets: Tensor, lists: Mapping[str, Tensor]) -> Iterator[tuple[str, PerRequest]]:
    """What the lists served to fresh requests of a planted world are worth: `NAME/true_reward@10`.

    The expected true reward per place of the list, an empty place being worth nothing: the primary endpoint.

    Args:
        worth: the true reward of each candidate, `[N]`.
        lists: name -> the candidates (at most ten a request) that are served, bool `[N]`.
    """
    for name, served in lists.items():
        total = request_sums(worth.where(served, 0), offsets)
        one = torch.ones_like(total)
        yield f"{name}/true_reward@{LIST}", PerRequest.of(total / LIST, one)


def true_favourites(
    truth: Truth, requests: Requests, items: Ragged, eligible: np.ndarray, stages: Mapping[str, Tensor]
) -> Iterator[tuple[str, PerRequest]]:
    """How many of the ten items of most true worth survive each stage: `funnel/HEAD/true_favourites`.

    Args:
        eligible: bool `[R, items of the catalogue]`.
        stages: head -> its survivors among `items`, bool `[N]`.
    """
    best = truth.best(requests, LIST, eligible)
    size = eligible.shape[1]
    favourite = np.isin(items.rows * size + items.values, best.rows * size + best.values)
    offsets, wanted = torch.from_numpy(items.offsets), torch.from_numpy(best.lengths)
    for head, alive in stages.items():
        left = request_sums(torch.from_numpy(favourite) & alive.cpu(), offsets)
        yield f"funnel/{head}/true_favourites", PerRequest.of(left, wanted)


def main() -> int:
    """Print the funnel of a run; returns the exit code."""
    parser = argparse.ArgumentParser(prog="joint.cascade", description="What survives each stage of a run's funnel.")
    parser.add_argument("run", type=Path, help="run directory")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of evaluation.* and heads.HEAD.fusion only")
    parser.add_argument("--split", choices=SPLITS, help="default: the config's evaluation.test")
    arguments = parser.parse_intermixed_args()
    check_versions()
    # Imported only now: with a wrong combination of versions this import fails, and less clearly.
    from joint.measure import show_funnel

    show_funnel(arguments.run, arguments.split, arguments.overrides)
    return 0


if __name__ == "__main__":
    raise SystemExit(run_command(main))
