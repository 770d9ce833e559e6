"""A run's funnel: what survives, who lost the rest, for which users and items; and other quotas on the same scores."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from torch import Tensor

from joint.cost import Cost, funnel_costs
from joint.data.assemble import logged, positives
from joint.data.dataset import Dataset
from joint.data.planted.truth import LIST
from joint.data.requests import Requests
from joint.distributed import gather_objects
from joint.errors import UserError
from joint.evaluating.evaluator import Evaluator
from joint.evaluating.funnel_metrics import Entrants, funnel, funnel_metrics, served, survival
from joint.evaluating.logged_funnel import CANDIDATES, logged_funnel
from joint.experiment import HEADS, Config
from joint.metrics import PerRequest, Ratio, merge_all
from joint.ranks import request_sums

THIRDS = ("rare", "middling", "popular")  # items of the pool by their positives in training; equal counts stay together
REWARD = f"true_reward@{LIST}"

Quotas = dict[str, int]  # head -> how many it keeps, in the funnel's order


@dataclass(frozen=True)
class Point:
    """A funnel of some quotas: what a request costs, in multiply-adds, and what comes out at its end."""

    quotas: Quotas
    cost: int
    values: Mapping[str, float]  # "positives", "teacher_favourites", "true_favourites", "true_reward@10": those known


class Thirds(NamedTuple):
    """Items by popularity: `third [items]` is 0, 1 or 2, and the highest count of the first two."""

    third: np.ndarray
    bounds: tuple[int, int]


def funnel_numbers(evaluator: Evaluator, split: str, thirds: Thirds) -> dict[str, float]:
    """The funnel's metrics under the config's quotas: `funnel/…`, `group/G/funnel/…`, `popularity/THIRD/funnel/…`."""
    quotas = evaluator.config.evaluation.quotas

    def measured() -> Iterator[tuple[Requests, dict[str, PerRequest]]]:
        for entrants in evaluator.entrants(split, quotas.get("retrieval")):
            by_popularity = dict(_by_popularity(entrants, quotas, thirds.third))
            found = funnel_metrics if "retrieval" in quotas else logged_funnel
            yield entrants.requests, found(entrants, quotas) | by_popularity

    return evaluator.collect(split, measured()).numbers


def first_scores(evaluator: Evaluator, numbers: Mapping[str, float]) -> int:
    """How many items the first stage scores a request: the pool, or the logged candidates (their mean)."""
    return len(evaluator.eligibility.corpus) if "retrieval" in evaluator.heads else round(numbers[CANDIDATES])


def _by_popularity(entrants: Entrants, quotas: Quotas, third: np.ndarray) -> Iterator[tuple[str, PerRequest]]:
    stages = dict(funnel(entrants.scores, quotas, entrants.offsets))
    for index, name in enumerate(THIRDS):
        for kind, wanted in entrants.wanted.items():
            own = wanted.of(third[wanted.item] == index)
            for metric, state in survival(kind, own, stages, quotas, len(entrants.requests)):
                yield f"popularity/{name}/{metric}", state


def popularity_thirds(config: Config, dataset: Dataset, corpus: np.ndarray) -> Thirds:
    """The items of the pool in three parts of about the same size, by how many positives training has of each."""
    counts = np.zeros(dataset.schema.items, np.int64)
    for parts in dataset.parts(config.data.train).values():
        for part in parts:
            candidates = logged(dataset.read(part), dataset)
            positive = positives(candidates, config.tasks[config.evaluation.task])
            counts += np.bincount(candidates.items.values[positive], minlength=len(counts))
    low, high = np.sort(counts[corpus])[[(len(corpus) - 1) // 3, 2 * (len(corpus) - 1) // 3]]
    return Thirds((counts > low).astype(np.int64) + (counts > high), (int(low), int(high)))


def read_grid(sweep: Sequence[str], config: Config) -> list[Quotas]:
    """Every combination of quotas such as `retrieval=50,100`; heads that are not named keep the config's.

    Combinations in which a head would keep more than the one before it left are left out.

    Raises:
        UserError: it is not written so, names no head of the run, no combination is left, or a pool of retrieval has
            places of its own, which would depend on the quota.
    """
    for name, pool in config.evaluation.pools.items():
        if pool.quota:
            raise UserError(
                f"--sweep: evaluation.pools.{name}.quota reserves {pool.quota} places; set it to 0 to sweep"
            )
    known = config.evaluation.quotas
    tried = {head: [quota] for head, quota in known.items()}
    for text in sweep:
        head, _, numbers = text.partition("=")
        if head not in known:
            raise UserError(f"--sweep {text}: no stage {head!r} in evaluation.quotas; expected {', '.join(known)}")
        if not all(number.isdecimal() and int(number) for number in numbers.split(",")):
            raise UserError(f"--sweep {text}: expected numbers of 1 or more, such as {head}=50,100,200")
        tried[head] = sorted({int(number) for number in numbers.split(",")})
    heads = [head for head in HEADS if head in tried]
    grid = [dict(zip(heads, quotas, strict=True)) for quotas in itertools.product(*(tried[head] for head in heads))]
    grid = [quotas for quotas in grid if list(quotas.values()) == sorted(quotas.values(), reverse=True)]
    if not grid:
        raise UserError("--sweep: in every combination a head would keep more than the one before it left")
    return grid


def sweep_quotas(
    evaluator: Evaluator, split: str, grid: Sequence[Quotas], costs: Mapping[str, Cost], *, scored: int
) -> list[Point]:
    """Every funnel of the grid, by rising cost; the model scores the widest retrieval once, for all of them.

    The teacher's favourites are its ten of the widest retrieval, so that all funnels are measured by the same ten.

    Args:
        scored: how many items the first stage scores a request.
    """
    widest = max((quotas["retrieval"] for quotas in grid if "retrieval" in quotas), default=None)
    found: list[list[dict[str, Ratio]]] = [[] for _ in grid]
    for entrants in evaluator.entrants(split, widest):
        for quotas, pieces in zip(grid, found, strict=True):
            pieces.append(dict(_outcome(entrants, quotas)))
    everywhere = [[*itertools.chain(*pieces)] for pieces in zip(*gather_objects(found), strict=True)]
    points = [
        Point(
            quotas,
            sum(funnel_costs(costs, quotas, scored).values()),
            {name: merge_all(piece[name] for piece in pieces).value for name in pieces[0]},
        )
        for quotas, pieces in zip(grid, everywhere, strict=True)
    ]
    return sorted(points, key=lambda point: point.cost)


def _outcome(entrants: Entrants, quotas: Quotas) -> Iterator[tuple[str, Ratio]]:
    """What comes out at the end of a funnel."""
    stages = dict(funnel(entrants.scores, quotas, entrants.offsets))
    for kind, wanted in entrants.wanted.items():
        passed = wanted.passed(stages)
        yield kind, Ratio(float((passed > len(stages)).sum()), float(len(passed)))
    if "truth" in entrants.orders:
        shown: Tensor = served(stages, entrants.scores, entrants.offsets)
        total = request_sums(entrants.orders["truth"].where(shown, 0), entrants.offsets)
        yield REWARD, Ratio(float(total.sum()) / LIST, float(len(total)))


def efficient(points: Sequence[Point], measure: str) -> list[bool]:
    """Which points no other beats: none costs as little and gives more, or costs less and gives as much."""
    cost = np.array([point.cost for point in points])
    value = np.array([point.values[measure] for point in points])
    no_worse = (cost[None] <= cost[:, None]) & (value[None] >= value[:, None])
    better = (cost[None] < cost[:, None]) | (value[None] > value[:, None])
    return [bool(known) for known in ~(no_worse & better).any(axis=1) & ~np.isnan(value)]
