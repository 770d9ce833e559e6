"""The metrics of a model on a split: its heads on logged candidates, on the catalogue, and as a funnel.

A metric's name is `HEAD/METRIC[/TASK]`, `alignment/…` or `funnel/…`; without a task it is of the fused scores.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchrec.distributed import DistributedModelParallel

from joint import metrics
from joint.alignment import logged_order
from joint.batch import Batch
from joint.data.assemble import Assembler, logged, positives
from joint.data.order import Position
from joint.data.planted.truth import LIST, open_truth
from joint.data.pool import NO_POOL, PoolItems
from joint.data.ragged import Ragged
from joint.data.requests import Requests
from joint.data.sampling import Candidates, unlabelled
from joint.distributed import gather_objects, rank, world_size
from joint.experiment import heads_of
from joint.funnel_metrics import (
    Wanted,
    funnel,
    orders_of_the_retrieved,
    served,
    survival,
    teacher_favourites,
    top_k,
    true_favourites,
    true_rewards,
)
from joint.fusion import fuse, fusion_weights
from joint.logged_metrics import State, logged_metrics
from joint.metrics import PerRequest
from joint.outputs import HeadOutput, Outputs
from joint.ranks import pool_ranks, ranks, request_sums
from joint.reference import baseline_metrics
from towers.retrieval import RetrievalHead

Forward = Callable[[Batch], Outputs]
States = dict[str, list[Any]]  # metric -> its states so far, all of one kind


KEPT = ("request_id", "user_id", "group")  # what is known of a request beside its metrics


@dataclass(frozen=True)
class Measured:
    """The metrics of a split; and of those that are ratios, `METRIC.total` and `METRIC.count` of every request."""

    numbers: dict[str, float]
    requests: dict[str, np.ndarray]


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
        self.truth = open_truth(assembler.dataset.directory)  # of a planted world only
        self.reference: Evaluator | None = None  # another run, whose ranking head all are held against

    @torch.no_grad()
    def __call__(self, split: str, *, whole_catalogue: bool) -> Measured:
        """Every metric of the split; those of heads that score the whole catalogue cost most, and can be left out."""
        states: States = {}
        seen: dict[str, list[np.ndarray]] = {}
        corpus: Tensor | None = None
        for requests in self._chunks(split):
            candidates = logged(requests, self.assembler.dataset)
            batch, outputs = self._run(requests, candidates, self.heads, with_corpus=corpus is None)
            scores = {head: self._fused(head, output) for head, output in outputs.items()}
            orders = self._orders(requests, candidates)
            found = logged_metrics(self.config, self.assembler.dataset.schema, batch, outputs, scores, orders)
            if "retrieval" in self.heads:
                if corpus is None:
                    pool = outputs["retrieval"].pool
                    assert pool is not None
                    corpus = pool.vectors[: len(self.eligibility.corpus)]
                found |= self._retrieval(requests, candidates, outputs["retrieval"], corpus)
            if whole_catalogue:
                found |= self._whole_catalogue(requests, candidates)
            if len(requests):  # a rank without any has taken part for the sake of the others
                self._add(states, found)
                for name in (name for name in KEPT if name in requests.columns):
                    seen.setdefault(name, []).append(requests.scalars(name))
        measured = _measured(states, seen)
        for name, value in self.truth.ceilings.items() if self.truth else ():
            part, _, whose = name.partition("/")
            if part == split:
                measured.numbers[f"baselines/{whose}/true_reward@{LIST}"] = value
        return measured

    def full(self, split: str) -> Measured:
        """Every metric, those that cost most too: the whole catalogue scored by all heads that the config names for
        it, and the baselines."""
        found = self(split, whole_catalogue=True)
        if self.config.evaluation.baselines and split not in self.config.data.train:
            found.numbers.update(baseline_metrics(self.config, self.assembler.dataset, split))
        return found

    def _chunks(self, split: str) -> Iterator[Requests]:
        """This rank's requests in pieces; every rank gets as many pieces, the last of them maybe without requests."""
        size = self.config.data.requests_per_batch
        for parts in self.assembler.dataset.parts([split]).values():
            for part in parts:
                requests = self.assembler.dataset.read(part, further=self.assembler.dataset.schema.orders)
                for start in range(0, len(requests), size):
                    mine = np.arange(start, min(start + size, len(requests)))[rank() :: world_size()]
                    yield requests.take(mine)

    def _run(
        self, requests: Requests, candidates: Candidates, scoring: Collection[str], *, with_corpus: bool = False
    ) -> tuple[Batch, Outputs]:
        """The outputs of the `scoring` heads on every candidate, and of the pool where it is wanted."""
        pool = PoolItems.corpus(self.eligibility.slice(rank(), world_size())) if with_corpus else NO_POOL
        if len(requests):
            batch = self.assembler(requests, candidates, pool, position=Position(), scoring=scoring)
        else:
            batch = self.assembler.empty(pool, position=Position())
        batch = batch.to(self.device)
        return batch, self.forward(batch)

    def _orders(self, requests: Requests, candidates: Candidates) -> dict[str, Tensor]:
        """Whose order of the logged candidates there is, besides that of the own teacher: whose -> `[N]`."""
        orders = self._others(requests, candidates)
        if len(requests) and self.assembler.dataset.schema.orders:
            places = requests.lists(self.assembler.dataset.schema.orders[0]).values
            orders["logged"] = logged_order(torch.from_numpy(places.astype(np.int64))).to(self.device)
        return orders

    def _others(self, requests: Requests, candidates: Candidates) -> dict[str, Tensor]:
        """What candidates are worth to the reference's teacher and in truth, where there are such: whose -> `[N]`."""
        found: dict[str, Tensor] = {}
        if self.reference is not None:
            _, outputs = self.reference._run(requests, candidates, {"ranking"})
            found["reference"] = self.reference._fused("ranking", outputs["ranking"])
        if len(requests) and self.truth is not None:
            found["truth"] = torch.from_numpy(self.truth.reward(requests, candidates.items)).to(self.device)
        return found

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
        of = torch.from_numpy(row).to(self.device)
        place = pool_ranks(scores, of, column, mask=eligible)
        found: dict[str, State] = {}
        for k in self.config.evaluation.k:
            found[f"retrieval/recall@{k}"] = metrics.recall_by_request(place, of, len(requests), k)
            found[f"retrieval/dcg_per_positive@{k}"] = metrics.dcg_by_request(place, of, len(requests), k)
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
        retrieved = unlabelled(items, self.assembler.dataset.schema.labels)
        batch, outputs = self._run(requests, retrieved, self.heads)
        scores = {head: self._fused(head, output) for head, output in outputs.items()}
        orders = self._others(requests, retrieved) | ({"ranking": scores["ranking"]} if "ranking" in scores else {})
        if not len(requests):
            return {}
        offsets, quotas = batch.offsets, self.config.evaluation.quotas
        stages = dict(funnel(scores, quotas, offsets))
        relevant = torch.from_numpy(self._is_relevant(items, candidates)).to(self.device)
        total = torch.from_numpy(np.bincount(self._relevant(candidates)[0], minlength=len(requests)))
        wanted = {"positives": Wanted(relevant, total)}
        if "ranking" in scores:
            wanted["teacher_favourites"] = teacher_favourites(scores["ranking"], offsets)
        found: dict[str, State] = {}
        if self.truth is not None:
            everything = np.zeros((len(requests), self.items), bool)
            everything[:, self.eligibility.corpus] = free
            wanted["true_favourites"] = true_favourites(self.truth, requests, items, everything)
            lists = {head: top_k(score, offsets, LIST) for head, score in scores.items()}
            lists["funnel"] = served(stages, scores, offsets)
            found |= dict(true_rewards(orders["truth"], offsets, lists))
        found |= dict(survival(stages, quotas, offsets, wanted))
        return found | dict(orders_of_the_retrieved(scores, orders, offsets, quotas["retrieval"]))

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
            wanted = torch.from_numpy(np.bincount(self._relevant(known)[0], minlength=len(chosen)))
            for head in heads:
                scores = self._fused(head, outputs[head])
                rank = ranks(scores, relevant, batch.offsets)
                for k in self.config.evaluation.k:
                    hits = request_sums((rank < k) & relevant, batch.offsets)[: len(chosen)]
                    self._add(states, {f"{head}/recall@{k}": PerRequest.of(hits, wanted)})
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


def _measured(states: States, seen: dict[str, list[np.ndarray]]) -> Measured:
    """What all ranks found, together: numbers, those of every user group, and ratios by request."""
    merged: States = {}
    columns: dict[str, list[np.ndarray]] = {}
    for found, known in gather_objects((states, seen)):
        Evaluator._add(merged, {name: metrics.merge_all(parts) for name, parts in found.items()})
        for name, parts in known.items():
            columns.setdefault(name, []).extend(parts)
    final = {name: metrics.merge_all(parts) for name, parts in merged.items()}
    requests = {name: np.concatenate(parts) for name, parts in columns.items()}
    numbers = {name: state.value for name, state in final.items()}
    ratios = {name: state for name, state in final.items() if isinstance(state, PerRequest)}
    groups = torch.from_numpy(requests["group"]) if requests else torch.zeros(0)
    for group in groups.unique().tolist():
        own = groups == group
        for name, state in ratios.items():
            numbers[f"group/{group}/{name}"] = PerRequest(state.total[own], state.count[own]).value
    for name, state in ratios.items():
        requests |= {f"{name}.total": state.total.numpy(), f"{name}.count": state.count.numpy()}
    return Measured(numbers, requests)


def _take(candidates: Candidates, rows: np.ndarray) -> Candidates:
    index = Ragged(np.arange(len(candidates.stages)), candidates.items.offsets).take(rows).values
    labels = {name: values[index] for name, values in candidates.labels.items()}
    return Candidates(candidates.items.take(rows), candidates.stages[index], labels)


def evaluator_of(model: DistributedModelParallel, assembler: Assembler, device: torch.device) -> Evaluator:
    """Measures a model, which it puts in evaluation mode."""
    model.eval()
    return Evaluator(lambda batch: model(batch)[1].outputs, assembler, device)
