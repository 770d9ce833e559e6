"""The incumbent: a funnel of five stages, each of which sees the truth through its own error.

A stage's score is its target plus an error of a fixed variance. A share of the error is noise, drawn anew for every
request. The rest is a *wrong taste*: a product of vectors in clusters like the true ones, so that the same pair always
gets the same error, and similar pairs similar ones. A part of it all stages have in common: no later stage can mend
that. A model that learns to rank as the incumbent does averages its noise away, but learns its wrong taste.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from joint.data.planted.truth import LIST, Chances, Pairs, Parameters, Truth, clustered, exact
from joint.data.requests import Requests

STAGES = ("retrieval", "pre_ranking", "coarse", "ranking", "reranking")


@dataclass(frozen=True)
class Logged:
    """What the funnel did with the items that it retrieved, each array [R, retrieved], items in catalogue order."""

    items: np.ndarray
    passed: np.ndarray  # stages passed after retrieval: 0 was cut by pre-ranking, 4 is exposed
    rank_index: np.ndarray  # place in the order of ranking and of re-ranking, from 0; -1 where it did not enter
    rerank_index: np.ndarray
    chances: Chances  # the truth of these pairs
    reward: np.ndarray  # true reward of the first ten by re-ranking, mean per item [R]

    def best_ranked(self, count: int) -> np.ndarray:
        """The first items of each request in the order of ranking, shown or not, [R, count]."""
        place = np.where(self.rank_index < 0, self.items.shape[1], self.rank_index)
        return np.take_along_axis(self.items, np.argsort(place, axis=1, kind="stable")[:, :count], axis=1)


class Incumbent:
    """The funnel of a world. Its noise is one stream a stage: serve requests in one order, in pieces of any size."""

    def __init__(self, truth: Truth, seed: int) -> None:
        p = truth.parameters
        self.truth = truth
        self.noise = [np.random.default_rng([seed, 1, stage]) for stage in range(len(STAGES))]
        self.user, self.item = _wrong_tastes(p, truth, np.random.default_rng([seed, 2]))
        self.spread = [np.float32(error * np.sqrt(1 - p.systematic)) for error in _errors(p)]
        one_hot = np.eye(p.categories, dtype=np.float32)[truth.arrays["item.category"]]
        self.catalogue = np.hstack([truth.arrays["item.view"], one_hot, self.item[0]])

    def serve(self, requests: Requests) -> Logged:
        """Take requests through the funnel."""
        p = self.truth.parameters
        items = np.sort(self._retrieve(requests), axis=1)
        pairs = Pairs(np.repeat(np.arange(len(items)), p.retrieved), items.ravel())
        # The light stages know neither what an item's author nor its category did to this user lately.
        apart = self.truth.chances(requests, pairs, crossed=False)
        whole = apart._replace(view=self.truth.views(requests, pairs))
        reward = self.truth.value(whole).reshape(items.shape)
        light, heavy = np.log(self.truth.value(apart)).reshape(items.shape), np.log(reward)
        user = requests.scalars("user_id") - 1
        alive = np.broadcast_to(np.arange(p.retrieved), items.shape)
        passed = np.zeros(items.shape, np.int8)
        place = {}
        steps = ((light, p.coarse), (light, p.ranked), (heavy, p.reranked), (heavy, p.exposed))
        for stage, (target, kept) in enumerate(steps, start=1):
            here = np.take_along_axis(items, alive, axis=1)
            wrong = np.einsum("rd,rnd->rn", self.user[stage][user], self.item[stage][here])
            score = np.take_along_axis(target, alive, axis=1) + wrong + self._noise(stage, here.shape)
            alive = np.take_along_axis(alive, np.argsort(-score, axis=1, kind="stable"), axis=1)
            place[STAGES[stage]] = _places(alive, items.shape)
            if stage == len(steps):
                served = np.take_along_axis(reward, alive[:, :LIST], axis=1).mean(axis=1)
            alive = alive[:, :kept]
            np.put_along_axis(passed, alive, np.int8(stage), axis=1)
        return Logged(items, passed, place["ranking"], place["reranking"], whole, served)

    def _retrieve(self, requests: Requests) -> np.ndarray:
        """The items of D1, in no order, by the log-odds of a view without cross effects: one matrix product."""
        truth, user = self.truth, requests.scalars("user_id") - 1
        arrays = truth.arrays
        effect = arrays["effects"][arrays["user.cell"][user]]
        left = np.hstack([truth.interests(requests), effect, self.user[0][user]])
        scores = left @ self.catalogue.T
        scores += arrays["item.appeal"].astype(np.float32)
        scores += self._noise(0, scores.shape)
        scores[~truth.free(requests)] = -np.inf
        return np.argpartition(-scores, truth.parameters.retrieved - 1, axis=1)[:, : truth.parameters.retrieved]

    def _noise(self, stage: int, shape: tuple[int, ...]) -> np.ndarray:
        return self.spread[stage] * self.noise[stage].standard_normal(shape, dtype=np.float32)


def _wrong_tastes(p: Parameters, truth: Truth, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Vectors of users and of items, float32 [stages, ., 2 dims], whose products are the errors.

    The first half is common to all stages. The stage's deviation lies on the items' side.
    """
    items = [truth.arrays[f"item.{name}"] for name in ("category", "subcategory", "author")]
    user = [clustered(rng, [truth.arrays["user.cluster"]], p.own_taste, p.dims) for _ in range(len(STAGES) + 1)]
    item = [clustered(rng, items, p.own_style, p.dims) for _ in range(len(STAGES) + 1)]
    halves = np.sqrt([p.shared_error, 1 - p.shared_error])
    users, weights = [], []
    for stage, error in enumerate(_errors(p), start=1):
        scale = error * np.sqrt(p.systematic / p.dims)
        users.append(np.hstack([user[0], user[stage]]))
        weights.append(scale * np.hstack([halves[0] * item[0], halves[1] * item[stage]]))
    return exact(np.stack(users)), exact(np.stack(weights))


def _errors(p: Parameters) -> tuple[float, ...]:
    return p.retrieval_error, p.pre_ranking_error, p.coarse_error, p.ranking_error, p.reranking_error


def _places(order: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Of every column its place in `order` [R, n], whose entries are columns; -1 where it is not in it. int16."""
    places = np.full(shape, -1, np.int16)
    np.put_along_axis(places, order, np.arange(order.shape[1], dtype=np.int16)[None, :], axis=1)
    return places
