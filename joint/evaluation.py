"""The metrics of a model on a split: its heads on logged candidates, on the catalogue, and as a funnel.

A metric's name is `HEAD/METRIC[/TASK]`, `alignment/…` or `funnel/…`; without a task it is of the fused scores.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchrec.distributed import DistributedModelParallel

from joint import checkpoint, metrics
from joint.batch import Batch
from joint.cascade import funnel
from joint.config import check_against, heads_of
from joint.data.assemble import Assembler, logged, not_eligible, positives
from joint.data.dataset import Dataset
from joint.data.loader import corpus_slice
from joint.data.order import Position
from joint.data.ragged import Ragged
from joint.data.requests import Requests
from joint.data.sampling import Candidates, eligible_items, eligible_mask, unlabelled
from joint.distributed import gather_objects, process_group, rank, world_size
from joint.errors import CheckpointError
from joint.features import Plan
from joint.metrics import AucState, Ratio
from joint.outputs import HeadOutput, Outputs
from joint.ranks import corpus_ranks
from joint.reference import baseline_metrics
from joint.run import RunDirectory, write_metrics
from joint.summary import table
from joint.task import build_task

Forward = Callable[[Batch], Outputs]
State = Ratio | AucState
States = dict[str, list[Any]]  # metric -> its states so far, all of one kind
STUDENTS = ("retrieval", "pre_ranking")


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

    @torch.no_grad()
    def __call__(self, split: str, *, whole_catalogue: bool) -> dict[str, float]:
        """Every metric of the split; those of heads that score the whole catalogue cost most, and can be left out."""
        states: States = {}
        corpus: Tensor | None = None
        for requests in self._chunks(split):
            candidates = logged(requests, self.assembler.dataset)
            batch, outputs = self._run(requests, candidates, self.heads, with_corpus=corpus is None)
            self._add(states, self._logged(batch, outputs))
            if "retrieval" in self.heads:
                corpus = outputs["retrieval"].corpus[: self.items] if corpus is None else corpus  # type: ignore[index]
                self._add(states, self._retrieval(requests, candidates, outputs["retrieval"], corpus))
            if whole_catalogue:
                self._add(states, self._whole_catalogue(requests, candidates))
        merged: States = {}
        for part in gather_objects(states):
            self._add(merged, {name: metrics.merge_all(found) for name, found in part.items()})
        return {name: metrics.merge_all(found).value for name, found in merged.items()}

    def _chunks(self, split: str) -> Iterator[Requests]:
        """This rank's requests in pieces; every rank gets as many pieces, the last of them maybe without requests."""
        size = self.config.data.requests_per_batch
        for parts in self.assembler.dataset.parts([split]).values():
            for part in parts:
                requests = self.assembler.dataset.read(part, range(len(part.groups)))
                for start in range(0, len(requests), size):
                    mine = np.arange(start, min(start + size, len(requests)))[rank() :: world_size()]
                    yield requests.take(mine)

    def _run(
        self, requests: Requests, candidates: Candidates, scoring: Collection[str], *, with_corpus: bool = False
    ) -> tuple[Batch, Outputs]:
        """The outputs of the `scoring` heads on every candidate, and of the pool where it is wanted."""
        pool = corpus_slice(self.items if with_corpus else 0, rank(), world_size())
        if len(requests):
            batch = self.assembler(requests, candidates, pool, position=Position(), scoring=scoring)
        else:
            batch = self.assembler.empty(pool, position=Position())
        batch = batch.to(self.device)
        return batch, self.forward(batch)

    def _fused(self, head: str, output: HeadOutput) -> Tensor:
        return output.logits @ self._fusion(head)

    def _fusion(self, head: str) -> Tensor:
        weights = self.heads[head].fusion
        return torch.tensor([weights.get(t, 0.0) if weights else 1.0 for t in self.tasks], device=self.device)

    def _logged(self, batch: Batch, outputs: Outputs) -> dict[str, State]:
        """On logged candidates: AUC, log loss and calibration per task; order against the teacher's."""
        found: dict[str, State] = {}
        for head, output in outputs.items():
            for index, task in enumerate(self.tasks):
                logits, labels, mask = (
                    output.logits[:, index],
                    batch.labels[:, index],
                    batch.observed[:, index],
                )
                if self.config.tasks[task].kind == "binary":
                    found[f"{head}/auc/{task}"] = metrics.auc(logits, labels, mask=mask)
                if head != "retrieval":  # a softmax's logits are no probabilities
                    found[f"{head}/log_loss/{task}"] = metrics.log_loss(logits, labels, mask=mask)
                    found[f"{head}/calibration/{task}"] = metrics.calibration(logits, labels, mask=mask)
        if "ranking" in outputs:
            for student in (head for head in STUDENTS if head in outputs):
                name = "alignment/reverse_rate" if student == "pre_ranking" else "alignment/retrieval_reverse_rate"
                for index, task in enumerate(self.tasks):
                    pair = outputs[student].logits[:, index], outputs["ranking"].logits[:, index]
                    found[f"{name}/{task}"] = metrics.kendall_distance(*pair, batch.offsets)
                fused = self._fused(student, outputs[student]), self._fused("ranking", outputs["ranking"])
                found[f"{name}/fused"] = metrics.kendall_distance(*fused, batch.offsets)
        return found

    def _retrieval(
        self, requests: Requests, candidates: Candidates, output: HeadOutput, corpus: Tensor
    ) -> dict[str, State]:
        """Recall over the whole catalogue by one matrix product, and the funnel below what retrieval keeps."""
        assert output.user is not None
        free = eligible_mask(not_eligible(requests, self.config), self.items)
        eligible = torch.from_numpy(free).to(self.device)
        # A rank without requests has run one empty one, which counts for nothing.
        user = torch.einsum("rtd,t->rd", output.user, self._fusion("retrieval"))[: len(requests)]
        scores = (user @ corpus.T).where(eligible, -torch.inf)
        row, target = (torch.from_numpy(part).to(self.device) for part in self._relevant(candidates))
        ranks = corpus_ranks(scores, row, target, mask=eligible)
        found: dict[str, State] = {
            f"retrieval/recall@{k}": metrics.recall_of_ranks(ranks, k) for k in self.config.evaluation.k
        }
        quotas = self.config.evaluation.quotas
        if "retrieval" in quotas:
            kept = scores.topk(min(quotas["retrieval"], self.items), dim=1).indices.cpu().numpy()
            found |= self._funnel(requests, candidates, kept, free)
        return found

    def _funnel(
        self, requests: Requests, candidates: Candidates, kept: np.ndarray, free: np.ndarray
    ) -> dict[str, State]:
        """What survives each stage, of all that was relevant; and the students' order of what was retrieved."""
        kept = np.sort(kept, axis=1)
        items = Ragged(kept.reshape(-1), np.arange(len(kept) + 1) * kept.shape[1])
        items = items.keep(free[items.rows, items.values])  # where fewer than the quota are eligible
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
        step = max(1, self.config.evaluation.candidates_per_batch // self.items)
        share = -(-self.config.data.requests_per_batch // world_size())
        states: States = {}
        for start in range(0, share, step):
            rows = np.arange(start, min(start + step, len(requests)))
            if world_size() == 1 and not len(rows):
                break
            chosen, known = requests.take(rows), _take(candidates, rows)
            items = eligible_items(not_eligible(chosen, self.config), self.items)
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


def evaluate_run(path: Path, split: str | None) -> None:
    """Measure a run's newest checkpoint on a split (None: the config's test part) and print the table."""
    run = RunDirectory(path)
    config, tree = run.load_config()
    dataset = Dataset(config.data.path)
    check_against(config, tree, dataset.schema)
    run.check_dataset(dataset.schema)
    plan = Plan(config, dataset.schema)
    split = split or config.evaluation.test
    with process_group() as device:
        model = build_task(plan, device)
        progress = checkpoint.load_latest(run.checkpoints, model)
        if not progress.step:
            raise CheckpointError(f"{run.checkpoints}: no complete checkpoint in it; train the run first")
        found = evaluate(model, Assembler(plan, dataset), device, split)
        if rank() == 0:
            if split == config.evaluation.test:
                write_metrics(run, found)
            seen = " (which it was trained on)" if split in config.data.train else ""
            print(f"{run.path}, step {progress.step}, on {split}{seen}:\n{table(config, found)}")


def evaluate(
    model: DistributedModelParallel, assembler: Assembler, device: torch.device, split: str, *, full: bool = True
) -> dict[str, float]:
    """Every metric of a model on a split; a `full` look adds what the config asks for and costs most.

    That is the whole catalogue scored by heads besides retrieval, and the baselines.
    """
    model.eval()
    found = Evaluator(lambda batch: model(batch)[1].outputs, assembler, device)(split, whole_catalogue=full)
    config = assembler.plan.config
    if full and config.evaluation.baselines and split not in config.data.train:
        found |= baseline_metrics(config, assembler.dataset, split)
    return found
