"""The metrics of a model on a split: its heads on logged candidates, on the catalogue, and as a funnel.

A metric's name is `HEAD/METRIC[/TASK]`, `alignment/…` or `funnel/…`; without a task it is of the fused scores.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchrec.distributed import DistributedModelParallel

from joint import checkpoint, metrics
from joint.batch import Batch
from joint.cascade import funnel
from joint.config import check_against
from joint.data.assemble import Assembler, logged, positives
from joint.data.dataset import Dataset
from joint.data.loader import NO_POOL
from joint.data.order import Position
from joint.data.ragged import Ragged
from joint.data.requests import Requests
from joint.data.sampling import Candidates, unlabelled
from joint.distributed import gather_objects, process_group, rank, world_size
from joint.errors import CheckpointError, ConfigError
from joint.experiment import heads_of
from joint.features import Plan
from joint.fusion import fuse, fusion_weights
from joint.logged_metrics import STUDENTS, State, logged_metrics
from joint.outputs import HeadOutput, Outputs
from joint.ranks import pool_ranks
from joint.reference import baseline_metrics
from joint.run import RunDirectory, write_metrics
from joint.summary import table
from joint.task import build_task
from towers.retrieval import RetrievalHead

Forward = Callable[[Batch], Outputs]
States = dict[str, list[Any]]  # metric -> its states so far, all of one kind


class Evaluator:
    """Measures one model on splits of one dataset; every rank takes part and gets all results."""

    def __init__(self, forward: Forward, assembler: Assembler, device: torch.device) -> None:
        self.forward = forward
        self.assembler = assembler
        self.device = device
        self.config = assembler.plan.config
        self.heads = heads_of(self.config)
        self.tasks = list(self.config.tasks)
        self.items = assembler.dataset.schema.items
        self.eligibility = assembler.eligibility

    @torch.no_grad()
    def __call__(self, split: str, *, whole_catalogue: bool) -> dict[str, float]:
        """Every metric of the split; those of heads that score the whole catalogue cost most, and can be left out."""
        states: States = {}
        corpus: Tensor | None = None
        for requests in self._chunks(split):
            candidates = logged(requests, self.assembler.dataset)
            batch, outputs = self._run(requests, candidates, self.heads, with_corpus=corpus is None)
            if len(requests):
                self._add(states, logged_metrics(self.config, self.assembler.dataset.schema, batch, outputs))
            if "retrieval" in self.heads:
                corpus = outputs["retrieval"].corpus[: len(self.eligibility.corpus)] if corpus is None else corpus  # type: ignore[index]
                self._add(states, self._retrieval(requests, candidates, outputs["retrieval"], corpus))
            if whole_catalogue:
                self._add(states, self._whole_catalogue(requests, candidates))
        merged: States = {}
        for part in gather_objects(states):
            self._add(merged, {name: metrics.merge_all(found) for name, found in part.items()})
        return {name: metrics.merge_all(found).value for name, found in merged.items()}

    def full(self, split: str) -> dict[str, float]:
        """Every metric, those that cost most too: the whole catalogue scored by all heads that the config names for
        it, and the baselines."""
        found = self(split, whole_catalogue=True)
        if self.config.evaluation.baselines and split not in self.config.data.train:
            found |= baseline_metrics(self.config, self.assembler.dataset, split)
        return found

    def _chunks(self, split: str) -> Iterator[Requests]:
        """This rank's requests in pieces; every rank gets as many pieces, the last of them maybe without requests."""
        size = self.config.data.requests_per_batch
        for parts in self.assembler.dataset.parts([split]).values():
            for part in parts:
                requests = self.assembler.dataset.read(part)
                for start in range(0, len(requests), size):
                    mine = np.arange(start, min(start + size, len(requests)))[rank() :: world_size()]
                    yield requests.take(mine)

    def _run(
        self, requests: Requests, candidates: Candidates, scoring: Collection[str], *, with_corpus: bool = False
    ) -> tuple[Batch, Outputs]:
        """The outputs of the `scoring` heads on every candidate, and of the pool where it is wanted."""
        pool = self.eligibility.slice(rank(), world_size()) if with_corpus else NO_POOL
        if len(requests):
            batch = self.assembler(requests, candidates, pool, position=Position(), scoring=scoring)
        else:
            batch = self.assembler.empty(pool, position=Position())
        batch = batch.to(self.device)
        return batch, self.forward(batch)

    def _fused(self, head: str, output: HeadOutput) -> Tensor:
        return fuse(self.heads[head], self.tasks, output.logits)

    def _retrieval(
        self, requests: Requests, candidates: Candidates, output: HeadOutput, corpus: Tensor
    ) -> dict[str, State]:
        """Recall over the whole corpus by one matrix product, and the funnel below what retrieval keeps."""
        assert output.user is not None
        free = self.eligibility.mask(requests)
        eligible = torch.from_numpy(free).to(self.device)
        # A rank without requests has run one empty one, which counts for nothing.
        weights = torch.tensor(fusion_weights(self.heads["retrieval"], self.tasks), device=self.device)
        user = RetrievalHead.fused_vectors(output.user, weights)[: len(requests)]
        scores = (user @ corpus.T).where(eligible, -torch.inf)
        row, item = self._relevant(candidates)
        column = torch.from_numpy(self.eligibility.columns(item)).to(self.device)
        ranks = pool_ranks(scores, torch.from_numpy(row).to(self.device), column, mask=eligible)
        found: dict[str, State] = {
            f"retrieval/recall@{k}": metrics.recall_of_ranks(ranks, k) for k in self.config.evaluation.k
        }
        quotas = self.config.evaluation.quotas
        if "retrieval" in quotas:
            kept = scores.topk(min(quotas["retrieval"], corpus.shape[0]), dim=1).indices.cpu().numpy()
            found |= self._funnel(requests, candidates, kept, free)
        return found

    def _funnel(
        self, requests: Requests, candidates: Candidates, kept: np.ndarray, free: np.ndarray
    ) -> dict[str, State]:
        """What survives each stage, of all that was relevant; and the students' order of what was retrieved."""
        kept = np.sort(kept, axis=1)
        items = Ragged(kept.reshape(-1), np.arange(len(kept) + 1) * kept.shape[1])
        items = items.keep(free[items.rows, items.values])  # where fewer than the quota are eligible
        items = items.with_values(self.eligibility.corpus[items.values])
        batch, outputs = self._run(requests, unlabelled(items, self.assembler.dataset.schema.labels), self.heads)
        scores = {head: self._fused(head, output) for head, output in outputs.items()}
        relevant = torch.from_numpy(self._is_relevant(items, candidates)).to(self.device)
        total = float(len(self._relevant(candidates)[0]))
        found: dict[str, State] = {}
        for head, alive in funnel(scores, self.config.evaluation.quotas, batch.offsets):
            quota = self.config.evaluation.quotas[head]
            found[f"funnel/{head}/recall@{quota}"] = metrics.Ratio(float((alive & relevant).sum()), total)
        if "ranking" in outputs:
            quota = self.config.evaluation.quotas["retrieval"]
            for student in (head for head in STUDENTS if head in outputs):
                distance = metrics.kendall_distance(scores[student], scores["ranking"], batch.offsets)
                found[f"alignment/nktd@{quota}/{student}"] = distance
        return found

    def _whole_catalogue(self, requests: Requests, candidates: Candidates) -> dict[str, State]:
        """Recall of the other heads, each scoring every eligible item for every request."""
        heads = self.config.evaluation.whole_catalogue
        if not heads:
            return {}
        step = max(1, self.config.evaluation.candidates_per_batch // max(1, len(self.eligibility.corpus)))
        share = -(-self.config.data.requests_per_batch // world_size())
        states: States = {}
        for start in range(0, share, step):
            rows = np.arange(start, min(start + step, len(requests)))
            if world_size() == 1 and not len(rows):
                break
            chosen, known = requests.take(rows), _take(candidates, rows)
            items = self.eligibility.eligible(chosen)
            batch, outputs = self._run(chosen, unlabelled(items, self.assembler.dataset.schema.labels), heads)
            relevant = torch.from_numpy(self._is_relevant(items, known)).to(self.device)
            total = float(len(self._relevant(known)[0]))
            for head in heads:
                scores = self._fused(head, outputs[head])
                for k in self.config.evaluation.k:
                    hits = metrics.recall_at_k(scores, relevant, batch.offsets, k)
                    self._add(states, {f"{head}/recall@{k}": metrics.Ratio(hits.total, total)})
        return {name: metrics.merge_all(parts) for name, parts in states.items()}

    def _relevant(self, candidates: Candidates) -> tuple[np.ndarray, np.ndarray]:
        """(request, item) of every positive of the task that evaluation asks for."""
        positive = positives(candidates, self.config.tasks[self.config.evaluation.task])
        return candidates.items.rows[positive], candidates.items.values[positive].astype(np.int64)

    def _is_relevant(self, items: Ragged, candidates: Candidates) -> np.ndarray:
        row, target = self._relevant(candidates)
        return np.isin(items.rows * self.items + items.values, row * self.items + target)

    @staticmethod
    def _add(states: States, more: Mapping[str, State]) -> None:
        for name, state in more.items():
            states.setdefault(name, []).append(state)


def _take(candidates: Candidates, rows: np.ndarray) -> Candidates:
    index = Ragged(np.arange(len(candidates.stages)), candidates.items.offsets).take(rows).values
    labels = {name: values[index] for name, values in candidates.labels.items()}
    return Candidates(candidates.items.take(rows), candidates.stages[index], labels)


@contextmanager
def open_model(path: Path, overrides: Sequence[str]) -> Iterator[tuple[RunDirectory, Evaluator, int]]:
    """A run's newest checkpoint, ready to be measured, and its step.

    Raises:
        ConfigError: an override is of something that training depends on.
        CheckpointError: there is no complete checkpoint, or the dataset is another one.
    """
    run = RunDirectory(path)
    config, tree = run.load_config(overrides)
    dataset = Dataset(config.data.path)
    check_against(config, tree, dataset.schema)
    run.check_dataset(dataset.schema)
    plan = Plan(config, dataset.schema)
    with process_group() as device:
        model = build_task(plan, device)
        progress = checkpoint.load_latest(run.checkpoints, model)
        if not progress.step:
            raise CheckpointError(f"{run.checkpoints}: no complete checkpoint in it; train the run first")
        yield run, evaluator_of(model, Assembler(plan, dataset), device), progress.step


def evaluate_run(path: Path, split: str | None, overrides: Sequence[str] = ()) -> None:
    """Measure a run's newest checkpoint on a split (None: the config's test part) and print the table.

    The test part writes eval.json, unless something was overridden.
    """
    with open_model(path, overrides) as (run, evaluator, step):
        config = evaluator.config
        split = split or config.evaluation.test
        found = evaluator.full(split)
        if rank() == 0:
            if split == config.evaluation.test and not overrides:
                write_metrics(run, found)
            seen = " (which it was trained on)" if split in config.data.train else ""
            print(f"{run.path}, step {step}, on {split}{seen}:\n{table(config, found)}")


def choose_fusion(path: Path, head: str, split: str | None, overrides: Sequence[str] = ()) -> None:
    """Measure a head under a grid of its tasks' weights, and print what each gives, the best last (RRA's w_serve).

    Judged by the head's recall at the smallest k: over the catalogue, in its input space, or in the funnel.

    Raises:
        ConfigError: there is no such head, or one task only, or no recall is measured of it.
    """
    with open_model(path, overrides) as (run, evaluator, _):
        config = evaluator.config
        if head not in evaluator.heads or len(config.tasks) < 2:
            raise ConfigError(f"--choose-fusion {head}: expected a head of {', '.join(evaluator.heads)}, and two tasks")
        tried = []
        for weights in fusion_grid(len(config.tasks)):
            fusion = dict(zip(config.tasks, weights, strict=True))
            evaluator.heads[head] = replace(evaluator.heads[head], fusion=fusion)
            found = evaluator(split or config.evaluation.valid, whole_catalogue=head != "retrieval")
            goals = [name for name in found if name.startswith((f"{head}/recall@", f"funnel/{head}/recall@"))]
            if not goals:
                raise ConfigError(f"--choose-fusion {head}: name it in evaluation.whole_catalogue or evaluation.quotas")
            tried.append((found[goals[0]], goals[0], fusion))
        if rank() == 0:
            for value, name, fusion in sorted(tried, key=lambda trial: trial[0]):
                said = ", ".join(f"{task}: {weight:g}" for task, weight in fusion.items())
                print(f"{name} {value:.4f}  heads.{head}.fusion={{{said}}}")


def fusion_grid(tasks: int) -> list[tuple[float, ...]]:
    """Weights that sum to 1, in tenths for two tasks and in quarters for more."""
    steps = 10 if tasks == 2 else 4
    whole = [parts for parts in itertools.product(range(steps + 1), repeat=tasks) if sum(parts) == steps]
    return [tuple(part / steps for part in parts) for parts in whole]


def evaluator_of(model: DistributedModelParallel, assembler: Assembler, device: torch.device) -> Evaluator:
    """Measures a model, which it puts in evaluation mode."""
    model.eval()
    return Evaluator(lambda batch: model(batch)[1].outputs, assembler, device)
