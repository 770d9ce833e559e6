"""A model's logits of logged candidates and its best items, request by request; every rank takes part."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from joint.data.assemble import logged
from joint.data.ragged import Ragged
from joint.data.requests import Column, Requests, concatenate_requests, to_arrow
from joint.data.words import item_key, item_words, words_of
from joint.distributed import gather_objects, rank, world_size
from joint.errors import CheckpointError
from joint.evaluating.evaluator import Chunk, Evaluator
from joint.evaluating.funnel_metrics import best_columns, funnel
from joint.ranks import order_within, positions


@dataclass(frozen=True)
class Predicted:
    """What is said of some requests, in their order."""

    scores: pa.Table  # request_id, and for each head and task a list of logits
    top: pa.Table  # request_id, user_id, head, items, ids, scores; no row where no lists are wanted


class Predictor:
    """Predicts with the model of an evaluator.

    Args:
        heads: whose scores and lists.
        k: items of a list at most; 0: no lists. Those of `retrieval` are its best of the eligible corpus, those of
            `funnel` what all stages let pass, by the last one's scores.
    """

    def __init__(self, evaluator: Evaluator, heads: Sequence[str], k: int) -> None:
        self.evaluator, self.heads, self.k = evaluator, heads, k
        self.dataset = evaluator.assembler.dataset
        self.quotas = evaluator.config.evaluation.quotas
        self.columns = [f"{head}.{task}" for head in heads for task in evaluator.tasks]
        wanted = {"retrieval": {"retrieval"}, "funnel": set(self.quotas)}
        self.lists = [name for name, of in wanted.items() if k and of and of <= set(heads)]
        vocabularies = self.dataset.vocabularies()
        self.id_feature, self.ids = item_key(self.dataset), item_words(self.dataset, vocabularies)
        self.users = vocabularies.get("user_id")
        self.unknown = 0  # ids so far that the model's tables do not have
        self._corpus: Tensor | None = None

    @torch.no_grad()
    def __call__(self, requests: Requests) -> Predicted:
        """The predictions for requests of one file, the same on every rank.

        Raises:
            CheckpointError: a logit is NaN; as a teacher's it would be taken for one that was never logged.
        """
        size = self.evaluator.config.data.requests_per_batch
        rows = [np.arange(len(requests))[start : start + size] for start in range(0, len(requests), size)]
        pieces = [self._batch(requests.take(mine), mine) for mine in (some[rank() :: world_size()] for some in rows)]
        everyone = gather_objects(pieces)
        scores = concatenate_requests([scores for found in everyone for scores, _ in found])
        for column in self.columns:
            if np.isnan(scores.lists(column).values).any():
                raise CheckpointError(f"{column}: the model says NaN of a logged candidate; its run has diverged")
        tops = [top for found in everyone for _, tops in found for top in tops]
        return Predicted(
            _in_order(scores), self._named(_in_order(concatenate_requests(tops))) if tops else pa.table({})
        )

    def _batch(self, requests: Requests, place: np.ndarray) -> tuple[Requests, list[Requests]]:
        """The scores of these requests, which are at `place` among all; and their lists, a row each."""
        candidates = logged(requests, self.dataset)
        with_corpus = bool(self.lists) and self._corpus is None
        batch, outputs = self.evaluator.run(requests, candidates, self.heads, with_corpus=with_corpus)
        if with_corpus:
            self._corpus = self.evaluator.corpus_of(outputs)
        self.unknown += batch.unknown
        columns: dict[str, Column] = {"place": place, "request_id": requests.scalars("request_id")}
        for head in self.heads:
            logits = outputs[head].logits.cpu().numpy()
            for index, task in enumerate(self.evaluator.tasks):
                columns[f"{head}.{task}"] = candidates.items.with_values(logits[:, index])
        lists = self._lists(Chunk(requests, candidates, batch, outputs, self._corpus)) if self.lists else []
        users = requests.columns.get("user_id", np.zeros(len(requests), np.int64))
        known: dict[str, Column] = {"request_id": columns["request_id"], "user_id": users}
        return Requests(columns), [
            Requests(
                {"place": place * len(lists) + number, **known}
                | {"head": np.full(len(place), number), "items": items, "scores": items.with_values(scores)}
            )
            for number, (items, scores) in enumerate(lists)
        ]

    def _lists(self, chunk: Chunk) -> list[tuple[Ragged, np.ndarray]]:
        """The items of each wanted list, best first, and their scores."""
        eligibility = self.evaluator.eligibility
        free = eligibility.mask(chunk.requests)
        scores = self.evaluator.corpus_scores(chunk, free)
        found = []
        if "retrieval" in self.lists:
            kept = best_columns(scores, min(self.k, scores.shape[1])).cpu().numpy() & free
            found.append(best(eligibility.marked(kept), scores.cpu()[torch.from_numpy(kept)], self.k))
        if "funnel" in self.lists:
            found.append(self._served(chunk, scores, free))
        return found

    def _served(self, chunk: Chunk, scores: Tensor, free: np.ndarray) -> tuple[Ragged, np.ndarray]:
        """What all stages let pass, best first by the scores of the last one."""
        entrants = self.evaluator.retrieved(chunk, scores, free, self.quotas["retrieval"])
        if entrants is None:
            return Ragged(np.zeros(0, np.int64), np.zeros(1, np.int64)), np.zeros(0, np.float32)
        last, alive = list(funnel(entrants.scores, self.quotas, entrants.offsets))[-1]
        return best(entrants.items.keep(alive.cpu().numpy()), entrants.scores[last][alive], self.k)

    def _named(self, table: pa.Table) -> pa.Table:
        """The lists with the names of heads, and the ids of users and items as the log had them."""
        items = table["items"].combine_chunks()
        ids = pa.ListArray.from_arrays(items.offsets, self.ids.take(items.values))
        users = table["user_id"].combine_chunks()
        return pa.table(
            {
                "request_id": table["request_id"],
                "user_id": users if self.users is None else words_of(self.users, users.to_numpy()),
                "head": pa.array(self.lists).take(table["head"]),
                "items": items,
                "ids": ids,
                "scores": table["scores"],
            }
        )


def best(items: Ragged, scores: Tensor, k: int) -> tuple[Ragged, np.ndarray]:
    """The K best items of each request, best first, and their scores; among equal scores the earlier item."""
    offsets = torch.from_numpy(items.offsets)
    scores = scores.cpu()
    order = order_within(scores, offsets, torch.arange(len(scores)))
    first = positions(offsets) < k
    chosen = items.with_values(items.values[order.numpy()]).keep(first.numpy())
    return chosen, scores[order][first].numpy()


def _in_order(requests: Requests) -> pa.Table:
    """As a table in the order of `place`, which is left out."""
    return to_arrow(requests.take(np.argsort(requests.scalars("place")))).drop_columns("place")
