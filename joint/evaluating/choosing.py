"""A head under a grid of its tasks' weights (RRA's w_serve), chosen for all requests or for each user group.

The model runs once: what it says of a piece of the split is kept while all weights are applied to it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from joint.distributed import gather_objects, rank
from joint.errors import ConfigError
from joint.evaluating.evaluator import Block, Chunk, Evaluator
from joint.evaluating.finished_run import open_model
from joint.evaluating.funnel_metrics import Entrants, funnel, survival
from joint.evaluating.logged_metrics import in_space
from joint.metrics import PerRequest, merge_all
from joint.ranks import request_of
from joint.spaces import stage_mask

Weights = dict[str, float]  # task -> weight


class Trial(NamedTuple):
    """A head's weights, and its goal under them, request by request."""

    fusion: Weights
    found: PerRequest

    def of(self, requests: Tensor) -> Trial:
        """Of some requests alone, bool `[R]`."""
        return Trial(self.fusion, PerRequest(self.found.total[requests], self.found.count[requests]))

    @property
    def yaml(self) -> str:
        """The weights as a config says them."""
        return "{" + ", ".join(f"{task}: {weight:g}" for task, weight in self.fusion.items()) + "}"


Judge = Callable[[], PerRequest]  # the goal, under the weights that the evaluator's head has now


def fusion_grid(tasks: int) -> list[tuple[float, ...]]:
    """Weights that sum to 1, in tenths for two tasks and in quarters for more."""
    steps = 10 if tasks == 2 else 4
    whole = [parts for parts in itertools.product(range(steps + 1), repeat=tasks) if sum(parts) == steps]
    return [tuple(part / steps for part in parts) for parts in whole]


def try_fusions(evaluator: Evaluator, head: str, split: str) -> tuple[str, list[Trial], Tensor]:
    """The metric that a head is judged by, what it is under all weights of the grid, and the requests' groups `[R]`.

    The head's recall at the smallest k, over the catalogue or in its input space; or else what it leaves in the funnel.

    Raises:
        ConfigError: there is no such head, or one task only, or no recall is measured of it.
    """
    config, settings = evaluator.config, evaluator.heads.get(head)
    if settings is None or len(config.tasks) < 2:
        raise ConfigError(f"--choose-fusion {head}: expected a head of {', '.join(evaluator.heads)}, and two tasks")
    goal = _goal(evaluator, head)
    grid = [dict(zip(config.tasks, weights, strict=True)) for weights in fusion_grid(len(config.tasks))]
    groups: list[Tensor] = []
    tried: list[list[PerRequest]] = [[] for _ in grid]
    for group, judge in _judges(evaluator, head, goal, split):
        groups.append(group.cpu())
        for fusion, found in zip(grid, tried, strict=True):
            evaluator.heads[head] = replace(settings, fusion=fusion, fusion_by_group={})
            found.append(judge())
        evaluator.heads[head] = settings
    parts = [part for part in gather_objects((groups, tried)) if part[0]]
    values = [merge_all(found for _, tried in parts for found in tried[index]) for index in range(len(grid))]
    return goal, list(map(Trial, grid, values)), torch.cat([group for groups, _ in parts for group in groups])


def _goal(evaluator: Evaluator, head: str) -> str:
    measured = evaluator.config.evaluation
    in_its_space = head in evaluator.assembler.dataset.schema.input_space
    if head == "retrieval" or head in measured.whole_catalogue or in_its_space:
        return f"{head}/recall@{min(measured.k)}"
    if head in measured.quotas:
        return f"funnel/{head}/recall@{measured.quotas[head]}"
    raise ConfigError(f"--choose-fusion {head}: name it in evaluation.whole_catalogue or evaluation.quotas")


def _judges(evaluator: Evaluator, head: str, goal: str, split: str) -> Iterator[tuple[Tensor, Judge]]:
    """Some requests at a time: their groups, and what the goal is for them."""
    measured = evaluator.config.evaluation
    if goal.startswith("funnel/"):
        for entrants in evaluator.entrants(split, measured.quotas.get("retrieval")):
            yield entrants.group, partial(_in_funnel, evaluator, head, goal, entrants)
        return
    for chunk in evaluator.on_logged(split):
        if head == "retrieval":
            judge = partial(_in_pool, evaluator, goal, chunk)
        elif head in measured.whole_catalogue:
            for block in evaluator.on_catalogue(chunk.requests, chunk.candidates):
                if len(block.wanted):
                    yield block.batch.group, partial(_in_catalogue, evaluator, head, goal, block)
            continue
        else:
            judge = partial(_in_space, evaluator, head, goal, chunk)
        if len(chunk.requests):
            yield chunk.batch.group, judge


def _in_pool(evaluator: Evaluator, goal: str, chunk: Chunk) -> PerRequest:
    free = evaluator.eligibility.mask(chunk.requests)
    return evaluator.corpus_recall(chunk, evaluator.corpus_scores(chunk, free), free)[goal]


def _in_catalogue(evaluator: Evaluator, head: str, goal: str, block: Block) -> PerRequest:
    return evaluator.catalogue_recall(head, block)[goal]


def _in_space(evaluator: Evaluator, head: str, goal: str, chunk: Chunk) -> PerRequest:
    scores = evaluator.fused(head, chunk.outputs[head].logits, chunk.batch.group[chunk.batch.row])
    inside = stage_mask(("exposed", *evaluator.assembler.dataset.schema.input_space[head]), chunk.batch.stages)
    return dict(in_space(evaluator.config, head, scores, inside, chunk.batch))[goal]


def _in_funnel(evaluator: Evaluator, head: str, goal: str, entrants: Entrants) -> PerRequest:
    group = entrants.group[request_of(entrants.offsets)]
    scores = entrants.scores | {head: evaluator.fused(head, entrants.logits[head], group)}
    quotas = evaluator.config.evaluation.quotas
    stages = dict(funnel(scores, quotas, entrants.offsets))
    return dict(survival("positives", entrants.wanted["positives"], stages, quotas, len(entrants.requests)))[goal]


def best(trials: Sequence[Trial], of: Tensor | None = None) -> Trial:
    """The trial of the highest value, over the requests `of [R]` (bool; None: all); the last among equals."""
    own = [trial if of is None else trial.of(of) for trial in trials]
    return sorted(own, key=lambda trial: trial.found.value)[-1]


def best_by_group(trials: Sequence[Trial], groups: Tensor) -> dict[int, tuple[Trial, Trial]]:
    """Group -> the best trial of its own requests, and what the best of all is for them; where the first is better."""
    everyone = best(trials)
    masks = {group: groups == group for group in groups.unique().tolist()}
    found = {group: (best(trials, mask), everyone.of(mask)) for group, mask in masks.items()}
    return {group: pair for group, pair in found.items() if pair[0].found.value > pair[1].found.value}


def choose_fusion(
    path: Path, head: str, split: str | None, overrides: Sequence[str] = (), *, by_group: bool = False
) -> None:
    """Measure a head under a grid of its tasks' weights, and print what each gives, the best last.

    `by_group` prints the best weights of every user group too, as YAML to be pasted into a config.

    Raises:
        ConfigError: there is no such head, or one task only, or no recall is measured of it.
    """
    with open_model(path, overrides) as (_, evaluator, *_):
        config, part = evaluator.config, split or evaluator.config.evaluation.valid
        goal, trials, groups = try_fusions(evaluator, head, part)
        if rank() == 0:
            if part in config.data.train:
                print(f"on {part}, which the run was trained on: choose with a run that was not")
            for trial in sorted(trials, key=lambda trial: trial.found.value):
                print(f"{goal} {trial.found.value:.4f}  heads.{head}.fusion={trial.yaml}")
            if by_group:
                print("\n".join(_yaml(head, goal, trials, groups)))


def _yaml(head: str, goal: str, trials: Sequence[Trial], groups: Tensor) -> Iterator[str]:
    """The best weights of all, and of every group that gains from weights of its own on this split."""
    yield f"\nheads:\n  {head}:\n    fusion: {best(trials).yaml}"
    found = best_by_group(trials, groups)
    if not found:
        yield "    # no user group gains from weights of its own"
        return
    yield "    fusion_by_group:"
    for group, (own, everyone) in found.items():
        said = f"{goal} {own.found.value:.4f}, {everyone.found.value:.4f} with those of all"
        yield f'      "{group}": {own.yaml}  # {said}'
