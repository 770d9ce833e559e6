"""The metrics of a model on a split: its heads on logged candidates, on the catalogue, and as a funnel.

A metric's name is `HEAD/METRIC[/TASK]`, `alignment/…` or `funnel/…`; without a task it is of the fused scores.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torchrec.distributed import DistributedModelParallel

from joint import metrics
from joint.batch import Batch
from joint.data.assemble import Assembler, logged, positives
from joint.data.order import Position
from joint.data.planted.truth import LIST, open_truth
from joint.data.ragged import Ragged, draw
from joint.data.requests import Requests
from joint.data.sampling import Candidates, unlabelled
from joint.data.softmax_pool import NO_POOL, PoolItems
from joint.distributed import gather_objects, rank, world_size
from joint.evaluating.alignment import logged_order
from joint.evaluating.baseline_metrics import baseline_metrics
from joint.evaluating.channels import list_variety, pool_members, with_fewer_events, with_noise, with_places
from joint.evaluating.funnel_metrics import Entrants, Wanted, best_columns, funnel_metrics, top_k
from joint.evaluating.item_pools import recall_by_pool
from joint.evaluating.logged_funnel import logged_entrants, logged_funnel
from joint.evaluating.logged_metrics import State, against_negatives, logged_metrics
from joint.experiment import heads_of
from joint.fusion import fuse, fuse_users
from joint.metrics import PerRequest
from joint.outputs import Outputs
from joint.progress import progress
from joint.ranks import pool_ranks, ranks, request_sums
from towers.retrieval import Retrieval

Forward = Callable[[Batch], Outputs]
States = dict[str, list[Any]]  # metric -> its states so far, all of one kind

RANDOM = 10  # random items a request that positives are held against
KEPT = ("request_id", "user_id", "group")  # what is known of a request beside its metrics


@dataclass(frozen=True)
class Measured:
    """The metrics of a split; and of those that are ratios, `METRIC.total` and `METRIC.count` of every request."""

    numbers: dict[str, float]
    requests: dict[str, np.ndarray]


class Chunk(NamedTuple):
    """Some requests, and what the heads say of their logged candidates."""

    requests: Requests
    candidates: Candidates
    batch: Batch
    outputs: Outputs
    corpus: Tensor | None  # [C, D] retrieval's vectors of the pool


class Block(NamedTuple):
    """Some requests, and what heads say of every item that is eligible for them."""

    batch: Batch
    outputs: Outputs
    relevant: Tensor  # bool [N]
    wanted: Tensor  # [R] how many positives there are, eligible or not


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
        chunks = self.on_logged(split)
        return self.collect(split, ((chunk.requests, self._found(chunk, whole_catalogue)) for chunk in chunks))

    def _found(self, chunk: Chunk, whole_catalogue: bool) -> dict[str, State]:
        requests, candidates, batch, outputs, corpus = chunk
        scores = self._scores(batch, outputs)
        orders = self._orders(requests, candidates)
        found = logged_metrics(self.config, self.assembler.dataset.schema, batch, outputs, scores, orders)
        if corpus is not None:
            found |= self._retrieval(chunk)
        else:
            entrants = logged_entrants(self.config, requests, batch, outputs, scores, orders)
            found |= logged_funnel(entrants, self.config.evaluation.quotas)
        found |= dict(against_negatives(self.config, batch, outputs, *self._random(requests, candidates)))
        if whole_catalogue:
            found |= self._whole_catalogue(requests, candidates)
        return found

    def collect(self, split: str, found: Iterable[tuple[Requests, Mapping[str, State]]]) -> Measured:
        """The metrics of all pieces of a split, of all ranks, together; what others would earn on it beside them."""
        states: States = {}
        seen: dict[str, list[np.ndarray]] = {}
        for requests, more in found:
            if len(requests):  # a rank without any has taken part for the sake of the others
                self._add(states, more)
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

    @torch.no_grad()
    def on_logged(self, split: str) -> Iterator[Chunk]:
        """This rank's requests in pieces, their logged candidates scored by all heads; as many pieces on every rank."""
        corpus: Tensor | None = None
        for requests in self._chunks(split):
            candidates = logged(requests, self.assembler.dataset)
            batch, outputs = self.run(requests, candidates, self.heads, with_corpus=corpus is None)
            if "retrieval" in self.heads and corpus is None:
                corpus = self.corpus_of(outputs)
            yield Chunk(requests, candidates, batch, outputs, corpus)

    def corpus_of(self, outputs: Outputs) -> Tensor:
        """Retrieval's vectors of the pool `[C, D]`, from outputs `with_corpus`."""
        pool = outputs["retrieval"].pool
        assert pool is not None
        return pool.vectors[: len(self.eligibility.corpus)]

    @torch.no_grad()
    def entrants(self, split: str, quota: int | None) -> Iterator[Entrants]:
        """What enters funnels in which retrieval keeps up to `quota` (None: the logged candidates), scored once."""
        for chunk in self.on_logged(split):
            requests, candidates, batch, outputs, _ = chunk
            if quota is not None:
                free = self.eligibility.mask(requests)
                found = self.retrieved(chunk, self.corpus_scores(chunk, free), free, quota)
            else:
                scores, orders = self._scores(batch, outputs), self._others(requests, candidates)
                found = logged_entrants(self.config, requests, batch, outputs, scores, orders)
            if found is not None and len(requests):
                yield found

    def _chunks(self, split: str) -> Iterator[Requests]:
        """This rank's requests in pieces; every rank gets as many pieces, the last of them maybe without requests."""
        size, dataset = self.config.data.requests_per_batch, self.assembler.dataset
        with progress(None, f"measuring {split}", unit="request", total=dataset.schema.requests(split)) as bar:
            for part in (part for parts in dataset.parts([split]).values() for part in parts):
                requests = dataset.read(part, further=dataset.schema.orders)
                for start in range(0, len(requests), size):
                    mine = np.arange(start, min(start + size, len(requests)))
                    yield requests.take(mine[rank() :: world_size()])
                    bar.update(len(mine))

    def run(
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

    def _random(self, requests: Requests, candidates: Candidates) -> tuple[Batch, Outputs]:
        """Random items that no stage of the log holds, the same for every model: SDCL's Matching NS."""
        keys = draw(0, requests.scalars("request_id"))
        drawn = self.eligibility.random(requests, RANDOM, keys, but=candidates.items, uniform=True)
        return self.run(requests, unlabelled(drawn, self.assembler.dataset.schema.labels), self.heads)

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
            batch, outputs = self.reference.run(requests, candidates, {"ranking"})
            found["reference"] = self.reference.fused("ranking", outputs["ranking"].logits, batch.group[batch.row])
        if len(requests) and self.truth is not None:
            found["truth"] = torch.from_numpy(self.truth.reward(requests, candidates.items)).to(self.device)
        return found

    def fused(self, head: str, logits: Tensor, group: Tensor) -> Tensor:
        """A head's scores `[N]` of its logits `[N, T]` and the user group `[N]` of each."""
        return fuse(self.heads[head], self.tasks, logits, group)

    def _scores(self, batch: Batch, outputs: Outputs) -> dict[str, Tensor]:
        return {head: self.fused(head, output.logits, batch.group[batch.row]) for head, output in outputs.items()}

    def _retrieval(self, chunk: Chunk) -> dict[str, State]:
        """Recall over the whole corpus by one matrix product, and the funnel below what retrieval keeps."""
        free = self.eligibility.mask(chunk.requests)
        scores = self.corpus_scores(chunk, free)
        found: dict[str, State] = dict(self.corpus_recall(chunk, scores, free))
        found |= list_variety(self.config, self.assembler.dataset, self.eligibility.corpus, scores)
        quotas = self.config.evaluation.quotas
        if "retrieval" in quotas:
            entrants = self.retrieved(chunk, scores, free, quotas["retrieval"])
            found |= funnel_metrics(entrants, quotas) if entrants else {}
        return found

    def corpus_recall(self, chunk: Chunk, scores: Tensor, free: np.ndarray) -> dict[str, PerRequest]:
        """`retrieval/recall@K`, `dcg_per_positive@K` and `weighted_recall@K/TASK` of a pool's scores `[R, C]`.

        `free [R, C]` is eligible.
        """
        row, item = self._relevant(chunk.candidates)
        column = torch.from_numpy(self.eligibility.columns(item)).to(self.device)
        of = torch.from_numpy(row).to(self.device)
        eligible, count = torch.from_numpy(free).to(self.device), len(chunk.requests)
        place = pool_ranks(scores, of, column, mask=eligible)
        found = dict(recall_by_pool(scores, self._pools(chunk.requests), of, column, self.config.evaluation.k))
        for k in self.config.evaluation.k:
            found[f"retrieval/recall@{k}"] = metrics.recall_by_request(place, of, count, k)
            found[f"retrieval/dcg_per_positive@{k}"] = metrics.dcg_by_request(place, of, count, k)
        for task, values in self._weights(chunk.candidates).items():
            weight = torch.from_numpy(values).to(self.device)
            place = pool_ranks(scores, of, column, mask=eligible, weight=weight)
            for k in self.config.evaluation.k:
                recall = metrics.recall_by_request(place, of, count, k, weight=weight)
                found[f"retrieval/weighted_recall@{k}/{task}"] = recall
        return found

    def corpus_scores(self, chunk: Chunk, free: np.ndarray) -> Tensor:
        """Retrieval's fused scores `[R, C]` of the pool, -inf for what is not `free [R, C]`, eligible."""
        settings, users = self.heads["retrieval"], chunk.outputs["retrieval"].user
        dataset = self.assembler.dataset
        if (fewer := with_fewer_events(self.config, dataset, chunk.requests)) is not None:
            _, outputs = self.run(fewer, chunk.candidates, {"retrieval"})
            users = outputs["retrieval"].user
        assert isinstance(settings, Retrieval)
        assert users is not None
        assert chunk.corpus is not None
        fused = fuse_users(settings, self.tasks, users, chunk.batch.group)
        fused = fused[: len(chunk.requests)]  # a rank without requests has run one empty one, which counts for nothing
        fused = with_noise(self.config, dataset, fused, chunk.requests)
        return (fused @ chunk.corpus.T).where(torch.from_numpy(free).to(self.device), -torch.inf)

    def retrieved(self, chunk: Chunk, scores: Tensor, free: np.ndarray, quota: int) -> Entrants | None:
        """The `quota` eligible items that retrieval likes best, scored by all heads; None on a rank without requests.

        Fewer where fewer are eligible. Retrieval's own scores are those that retrieved them.
        """
        requests, candidates = chunk.requests, chunk.candidates
        places = with_places(self.config, scores, self._pools(requests))
        kept = best_columns(places, min(quota, scores.shape[1])).cpu().numpy() & free
        items = self.eligibility.marked(kept)
        retrieved = unlabelled(items, self.assembler.dataset.schema.labels)
        batch, outputs = self.run(requests, retrieved, self.heads)
        found = self._scores(batch, outputs)
        orders = self._others(requests, retrieved) | ({"ranking": found["ranking"]} if "ranking" in found else {})
        if not len(requests):
            return None
        found["retrieval"] = scores[torch.from_numpy(kept).to(self.device)]
        logits = {head: output.logits for head, output in outputs.items()}
        wanted = self._wanted(requests, candidates, items, free, found)
        return Entrants(requests, items, batch.offsets, batch.group, logits, found, orders, wanted)

    def _pools(self, requests: Requests) -> dict[str, Tensor]:
        found = pool_members(self.config, self.assembler.dataset, self.eligibility.corpus, requests)
        return {name: inside.to(self.device) for name, inside in found.items()}

    def _wanted(
        self, requests: Requests, candidates: Candidates, items: Ragged, free: np.ndarray, scores: Mapping[str, Tensor]
    ) -> dict[str, Wanted]:
        """What the funnel over `items` should let through: positives, the teacher's ten of them, the ten truly best."""
        everything = np.zeros((len(requests), self.items), bool)
        everything[:, self.eligibility.corpus] = free
        row, item = self._relevant(candidates)
        weight = self._weights(candidates)
        found = {"positives": Wanted.among(items, row, item, everything[row, item], weight)}
        if "ranking" in scores:
            place = top_k(scores["ranking"], torch.from_numpy(items.offsets).to(self.device), LIST).cpu().numpy()
            row, item = items.rows[place], items.values[place]
            found["teacher_favourites"] = Wanted.among(items, row, item, everything[row, item])
        if self.truth is not None:
            best = self.truth.best(requests, LIST, everything)
            found["true_favourites"] = Wanted.among(items, best.rows, best.values, everything[best.rows, best.values])
        return found

    def _whole_catalogue(self, requests: Requests, candidates: Candidates) -> dict[str, State]:
        """Recall of the other heads, each scoring every eligible item for every request."""
        states: States = {}
        for block in self.on_catalogue(requests, candidates):
            for head in self.config.evaluation.whole_catalogue:
                self._add(states, self.catalogue_recall(head, block))
        return {name: metrics.merge_all(parts) for name, parts in states.items()}

    def on_catalogue(self, requests: Requests, candidates: Candidates) -> Iterator[Block]:
        """Requests in small pieces, every eligible item scored by the heads that score the whole catalogue."""
        heads = self.config.evaluation.whole_catalogue
        if not heads:
            return
        step = max(1, self.config.evaluation.candidates_per_batch // max(1, len(self.eligibility.corpus)))
        share = -(-self.config.data.requests_per_batch // world_size())
        for start in range(0, share, step):
            rows = np.arange(start, min(start + step, len(requests)))
            if world_size() == 1 and not len(rows):
                break
            chosen, known = requests.take(rows), candidates.take(rows)
            items = self.eligibility.eligible(chosen)
            batch, outputs = self.run(chosen, unlabelled(items, self.assembler.dataset.schema.labels), heads)
            relevant = torch.from_numpy(self._is_relevant(items, known)).to(self.device)
            wanted = torch.from_numpy(np.bincount(self._relevant(known)[0], minlength=len(chosen)))
            yield Block(batch, outputs, relevant, wanted)

    def catalogue_recall(self, head: str, block: Block) -> dict[str, PerRequest]:
        """`HEAD/recall@K` of the requests of a block."""
        scores = self.fused(head, block.outputs[head].logits, block.batch.group[block.batch.row])
        rank = ranks(scores, block.relevant, block.batch.offsets)
        found = {}
        for k in self.config.evaluation.k:
            hits = request_sums((rank < k) & block.relevant, block.batch.offsets)[: len(block.wanted)]
            found[f"{head}/recall@{k}"] = PerRequest.of(hits, block.wanted)
        return found

    def _relevant(self, candidates: Candidates) -> tuple[np.ndarray, np.ndarray]:
        """(request, item) of every positive of the task that evaluation asks for."""
        positive = positives(candidates, self.config.tasks[self.config.evaluation.task])
        return candidates.items.rows[positive], candidates.items.values[positive].astype(np.int64)

    def _weights(self, candidates: Candidates) -> dict[str, np.ndarray]:
        """Weighted task -> what each of the `_relevant` weighs: its value, 0 where that is no positive (RRA 5.1.2)."""
        relevant = positives(candidates, self.config.tasks[self.config.evaluation.task])
        weighted = {name: task for name, task in self.config.tasks.items() if task.kind == "weighted"}
        values = {n: np.where(positives(candidates, of), candidates.labels[of.label], 0) for n, of in weighted.items()}
        return {name: of[relevant] for name, of in values.items()}

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


def evaluator_of(model: DistributedModelParallel, assembler: Assembler, device: torch.device) -> Evaluator:
    """Measures a model, which it puts in evaluation mode."""
    model.eval()
    return Evaluator(lambda batch: model(batch)[1].outputs, assembler, device)
