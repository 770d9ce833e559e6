"""The truth of a planted funnel: who would view what, like it, watch it how long and come back; kept beside the log.

Every pair of a user and an item has a chance of an effective view, and given one a chance of a like, an expected
number of minutes and an expected number of later visits. Each of the four follows a taste of its own, a product of a
user's and an item's vector, so that their orders disagree. What a user watched lately adds a cross effect to the first.

Vectors are rounded to 1/128: float32 sums of their products are then exact in any order, so that neither the size of
blocks nor the linear algebra library can change a byte of a log.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np

from joint.data.ragged import Ragged, offsets_of
from joint.data.requests import Requests
from joint.errors import DataError

LABELS = ("effective_view", "like", "minutes", "watch_ratio", "dwm")
TASTES = ("view", "like", "minutes", "returns")
AGES, GENDERS = 8, 2
GRAIN, LARGEST = 128.0, 4.0  # of the vectors' entries
MOST_DIMS = 21  # three products of so many dimensions, as retrieval needs, are still summed exactly
LIST = 10  # items of a served list
BLOCK = 128  # requests that are looked at together: their every item fits the cache
FOLDER = "truth"


@dataclass(frozen=True, kw_only=True)
class Parameters:
    """All that decides a world besides its seed. Log-odds, logarithms and shares are plain numbers."""

    users: Annotated[int, "users"] = 300
    items: Annotated[int, "items of the catalogue, the later ones included"] = 600
    days: Annotated[int, "days of the log; the last is the test part, the one before the validation part"] = 12
    requests: Annotated[int, "requests, as many every day"] = 1800
    history: Annotated[int, "newest past items that a request remembers; none of them is shown again"] = 100
    competitors: Annotated[int, "first items of ranking logged with each past view, as what it competed with"] = 0

    user_clusters: Annotated[int, "clusters of users; a cluster has its ages"] = 8
    own_taste: Annotated[float, "share of the variance of users' tastes that is not their cluster's"] = 0.4
    activity: Annotated[float, "Zipf exponent of requests over users"] = 0.8
    drift: Annotated[float, "radians by which every user's taste in views turns a day"] = 0.03
    categories: Annotated[int, "categories of level one"] = 12
    subcategories: Annotated[int, "categories of level two in each of level one"] = 4
    items_per_author: Annotated[int, "items of an author, on average; authors are of Zipf sizes, of one category"] = 8
    own_style: Annotated[float, "share of the variance of items' vectors that is not category's or author's"] = 0.25
    new_items: Annotated[float, "share of the catalogue that comes out during the log, evenly by day"] = 0.3
    dims: Annotated[int, "dimensions of every taste"] = 6

    view_base: Annotated[float, "log-odds of an effective view of a plain item"] = -4.2
    view_taste: Annotated[float, "deviation of the log-odds of a view over users and items, by taste"] = 1.2
    appeal: Annotated[float, "mean of the exponential distribution of items' appeal, added to those log-odds"] = 0.6
    attribute: Annotated[float, "deviation of the effect of age x gender x category of level one on them"] = 0.5
    window: Annotated[int, "newest past views that the two cross effects count"] = 20
    affinity: Annotated[float, "what each of the first two past views of the same author adds to them"] = 0.6
    patience: Annotated[int, "past views of the same category of level two that do not tire"] = 2
    fatigue: Annotated[float, "what each of the next five such views takes off them"] = 0.5

    like_base: Annotated[float, "log-odds of a like, given a view"] = -3.2
    like_taste: Annotated[float, "deviation of the log-odds of a like by taste"] = 1.0
    minutes_mean: Annotated[float, "minutes of a view of a plain item of two minutes' length"] = 3.0
    minutes_taste: Annotated[float, "deviation of log minutes by taste"] = 0.6
    clickbait: Annotated[float, "log minutes that one unit of appeal costs"] = 0.4
    minutes_noise: Annotated[float, "deviation of log minutes from view to view"] = 0.6
    returns_mean: Annotated[float, "visits to a viewed item in the familiar channel in the next 7 days"] = 0.3
    returns_taste: Annotated[float, "deviation of their logarithm by taste"] = 1.0
    series: Annotated[float, "what being a series (a third of all items) adds to that logarithm"] = 1.0
    visit_minutes: Annotated[float, "minutes of a later visit; their noise is that of views"] = 5.0
    like_reward: Annotated[float, "reward of a like; that of an effective view is 1"] = 3.0
    minute_reward: Annotated[float, "reward of a minute of DWM: of the view or of the later visits"] = 0.1

    retrieved: Annotated[int, "items that retrieval keeps (D1)"] = 120
    coarse: Annotated[int, "items that pre-ranking keeps for coarse ranking"] = 80
    ranked: Annotated[int, "items that coarse ranking keeps for ranking (D2)"] = 40
    reranked: Annotated[int, "items that ranking keeps for re-ranking"] = 20
    exposed: Annotated[int, "items that re-ranking keeps, and that are shown (D4)"] = 8
    sampled: Annotated[int, "items logged on training days of those that each stage before re-ranking cut"] = 10
    retrieval_error: Annotated[float, "deviation of retrieval's error; its target is the log-odds of a view"] = 1.6
    pre_ranking_error: Annotated[float, "deviation of pre-ranking's error; its target is the log reward"] = 1.2
    coarse_error: Annotated[float, "deviation of coarse ranking's error on the same target"] = 1.0
    ranking_error: Annotated[float, "deviation of ranking's error; it knows the cross effects too"] = 0.8
    reranking_error: Annotated[float, "deviation of re-ranking's error on that target"] = 0.8
    systematic: Annotated[float, "share of errors' variance that is a wrong taste: the same pair, the same error"] = 0.4
    shared_error: Annotated[float, "share of the wrong taste's variance that all stages have in common"] = 0.5

    def __post_init__(self) -> None:
        mistakes = list(_mistakes(self))
        if mistakes:
            raise ValueError("\n".join(mistakes))

    @property
    def authors(self) -> int:
        """Authors, at least one."""
        return max(1, self.items // self.items_per_author)

    @property
    def later_items(self) -> int:
        """Items that come out during the log."""
        return int(self.items * self.new_items)


SHARES = ("own_taste", "own_style", "new_items", "systematic", "shared_error")
SIGNED = ("view_base", "like_base", "affinity", "clickbait", "series", "drift")


def _mistakes(p: Parameters) -> Iterator[str]:
    for name, value in dataclasses.asdict(p).items():
        least = 1 if isinstance(value, int) and name not in ("patience", "sampled", "competitors") else 0
        if not np.isfinite(value):
            yield f"{name} must be a number, found {value}"
        elif name not in SIGNED and value < least:
            yield f"{name} must be at least {least}, found {value}"
        if name in SHARES and value > 1:
            yield f"{name} is a share: from 0 to 1, found {value}"
    if p.days < 3:
        yield f"days must be at least 3 (training, validation, test), found {p.days}"
    if not p.days <= p.requests <= p.days * 86_400:
        yield f"requests must be from 1 to 86,400 a day, found {p.requests} in {p.days} days"
    if not p.exposed <= p.reranked <= p.ranked <= p.coarse <= p.retrieved or p.reranked < LIST:
        yield (
            f"exposed must be at most reranked (at least {LIST}), ranked, coarse and retrieved, in this order; found "
            f"{p.exposed}, {p.reranked}, {p.ranked}, {p.coarse}, {p.retrieved}"
        )
    if p.competitors > p.ranked:
        yield f"competitors must be at most ranked, {p.ranked}; found {p.competitors}"
    if p.dims > MOST_DIMS:
        yield f"dims must be at most {MOST_DIMS}, found {p.dims}"
    if p.retrieved + p.history > p.items - p.later_items:
        yield (
            f"items must leave {p.retrieved} to retrieve on the first day besides a history of {p.history}; found "
            f"{p.items}, of which {p.later_items} come later"
        )


class Chances(NamedTuple):
    """What would come of showing an item, float64, for pairs `[N]` or every item `[R, items]`."""

    view: np.ndarray  # chance of an effective view
    like: np.ndarray  # chance of a like, given a view
    minutes: np.ndarray  # expected minutes, given a view
    returns: np.ndarray  # expected later visits within 7 days, given a view


class Pairs(NamedTuple):
    """Pair n is item `items[n]` for request `rows[n]`."""

    rows: np.ndarray
    items: np.ndarray


@dataclass(frozen=True)
class Truth:
    """A world, noise-free.

    The reward of showing an item, counted in effective views: the chance of one, times 1 + like_reward · P(like) +
    minute_reward · E[DWM], both given a view. An item in the request's `effective` history, or not out on its day,
    earns nothing.

    `ceilings` holds the mean reward per item of the lists of ten that random, popularity, incumbent, oracle and
    light_oracle (who knows all but the cross effects) would serve to the requests of a split: 'test/oracle', … .
    """

    parameters: Parameters
    start: int  # first day of the log, days since 1970-01-01
    arrays: Mapping[str, np.ndarray]  # 'user.view' [users, dims], 'item.view' [items, dims], …
    ceilings: Mapping[str, float] = field(default_factory=dict)

    def reward(self, requests: Requests, items: Ragged) -> np.ndarray:
        """The reward of showing `items` [N] to the users of `requests` on their `day`, float64 [N].

        It is read from the columns `user_id`, `day` and the whole history `effective`.
        """
        return self.expected(requests, items)["reward"]

    def expected(self, requests: Requests, items: Ragged) -> dict[str, np.ndarray]:
        """Label -> its expected value, and 'reward', each float64 [N]; 0 where there is nothing to show.

        `watch_ratio` is E[minutes] over the item's length: a view watched twice counts twice.
        """
        assert len(requests) == len(items)
        requests, parts = _asked(requests), []
        for rows in blocks(len(requests)):
            block, lists = requests.take(rows), items.take(rows)
            pairs = Pairs(lists.rows, lists.values)
            free = self.free(block)[pairs]
            values = self.labels(self.chances(block, pairs), pairs.items)
            parts.append({name: np.where(free, value, 0.0) for name, value in values.items()})
        names = (*LABELS, "reward")
        return {name: np.concatenate([np.zeros(0), *(part[name] for part in parts)]) for name in names}

    def best(self, requests: Requests, k: int, eligible: np.ndarray) -> Ragged:
        """The k items of most reward for each request among those `eligible` (bool [R, items]), best first.

        Among equals the earlier item. A request with fewer eligible items gets them all.
        """
        requests = _asked(requests)
        parts = [
            top(np.where(eligible[rows], self.rewards(requests.take(rows)), -np.inf), k)
            for rows in blocks(len(requests))
        ]
        found = np.concatenate([np.zeros((0, min(k, self.parameters.items)), np.int64), *parts])
        kept = np.take_along_axis(eligible, found, axis=1)
        return Ragged(found[kept], offsets_of(kept.sum(axis=1)))

    def rewards(self, requests: Requests, *, crossed: bool = True) -> np.ndarray:
        """The reward of every item for a block of requests, float64 [R, items]; `crossed`: with the cross effects."""
        return np.where(self.free(requests), self.value(self.chances(requests, crossed=crossed)), 0.0)

    def free(self, requests: Requests) -> np.ndarray:
        """What can be shown to a block of requests: out by that day and not in `effective`; bool [R, items]."""
        free = self.arrays["item.first_day"] <= requests.scalars("day")[:, None]
        watched = requests.lists("effective")
        free[watched.rows, watched.values] = False
        return free

    def value(self, chances: Chances) -> np.ndarray:
        """The reward of these chances."""
        p = self.parameters
        dwm = chances.minutes + chances.returns * p.visit_minutes
        return chances.view * (1 + p.like_reward * chances.like + p.minute_reward * dwm)

    def labels(self, chances: Chances, items: np.ndarray) -> dict[str, np.ndarray]:
        """The expected labels and the reward of chances of pairs with these items."""
        view, like, minutes, returns = chances
        return {
            "effective_view": view,
            "like": view * like,
            "minutes": view * minutes,
            "watch_ratio": view * minutes / self.arrays["item.length"][items],
            "dwm": view * (minutes + returns * self.parameters.visit_minutes),
            "reward": self.value(chances),
        }

    def chances(self, requests: Requests, pairs: Pairs | None = None, *, crossed: bool = True) -> Chances:
        """The chances of pairs, or of every request of a block with every item."""
        p, arrays = self.parameters, self.arrays
        user = requests.scalars("user_id") - 1
        like, minutes, returns = (
            _products(arrays[f"user.{task}"][user], arrays[f"item.{task}"], pairs) for task in TASTES[1:]
        )
        length, appeal = (_of_items(v, pairs) for v in (np.sqrt(arrays["item.length"] / 2), arrays["item.appeal"]))
        return Chances(
            view=self.views(requests, pairs, crossed=crossed),
            like=_sigmoid(p.like_base + like),
            minutes=p.minutes_mean * length * np.exp(minutes - p.clickbait * appeal),
            returns=p.returns_mean * np.exp(returns + p.series * _of_items(arrays["item.series"], pairs)),
        )

    def views(self, requests: Requests, pairs: Pairs | None = None, *, crossed: bool = True) -> np.ndarray:
        """Chances of an effective view alone."""
        arrays = self.arrays
        user = requests.scalars("user_id") - 1
        logit = self.parameters.view_base + _of_items(arrays["item.appeal"], pairs)
        logit = logit + _products(self.interests(requests), arrays["item.view"], pairs)
        logit += _entries(arrays["effects"][arrays["user.cell"][user]], arrays["item.category"], pairs)
        if crossed:
            logit += self._cross(requests, pairs)
        return _sigmoid(logit)

    def interests(self, requests: Requests) -> np.ndarray:
        """The users' tastes in views on the requests' days, float32 [R, dims]: turned from the first day's."""
        user = requests.scalars("user_id") - 1
        angle = self.parameters.drift * (requests.scalars("day") - self.start)[:, None]
        first, last = self.arrays["user.view"][user], self.arrays["user.view_later"][user]
        return exact(np.cos(angle) * first + np.sin(angle) * last)

    def _cross(self, requests: Requests, pairs: Pairs | None) -> np.ndarray:
        """Affinity to authors and fatigue of categories watched lately, in log-odds of a view."""
        p = self.parameters
        recent = requests.lists("effective").newest(p.window)
        author, category = self.arrays["item.author"], self.arrays["item.subcategory"]
        known = np.minimum(group_counts(recent, author, p.authors), 2)
        tired = np.clip(group_counts(recent, category, p.categories * p.subcategories) - p.patience, 0, 5)
        return p.affinity * _entries(known, author, pairs) - p.fatigue * _entries(tired, category, pairs)

    def save(self, directory: Path) -> None:
        """Write `DIRECTORY/truth/`: world.json and one .npy an array."""
        folder = directory / FOLDER
        folder.mkdir()
        for name, array in self.arrays.items():
            np.save(folder / f"{name}.npy", array, allow_pickle=False)
        said = {
            "parameters": dataclasses.asdict(self.parameters),
            "start": self.start,
            "arrays": list(self.arrays),
            "ceilings": dict(self.ceilings),
        }
        (folder / "world.json").write_text(json.dumps(said, indent=1))


def open_truth(dataset_directory: Path) -> Truth | None:
    """The truth kept with a dataset, or None where there is none; DataError if it is damaged."""
    folder = Path(dataset_directory) / FOLDER
    if not folder.exists():
        return None
    try:
        said = json.loads((folder / "world.json").read_text())
        arrays = {name: np.load(folder / f"{name}.npy", allow_pickle=False) for name in said["arrays"]}
        return Truth(Parameters(**said["parameters"]), said["start"], arrays, said["ceilings"])
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise DataError(f"{folder}: not the truth of a planted funnel ({error}); simulate the dataset again") from error


def exact(values: np.ndarray) -> np.ndarray:
    """Rounded to 1/128 and cut at ±4, float32: sums of up to 64 products of such numbers are exact."""
    return (np.round(np.clip(values, -LARGEST, LARGEST) * GRAIN) / GRAIN).astype(np.float32)


def clustered(rng: np.random.Generator, parents: Sequence[np.ndarray], own: float, dims: int) -> np.ndarray:
    """Standard normal vectors [n, dims]: of their variance a share is `own`, the rest the parents' in equal parts."""
    vectors = np.sqrt(own) * rng.standard_normal((len(parents[0]), dims))
    for parent in parents:
        centres = rng.standard_normal((int(parent.max()) + 1, dims))
        vectors += np.sqrt((1 - own) / len(parents)) * centres[parent]
    return vectors


def zipf_choice(rng: np.random.Generator, kinds: int, size: int, exponent: float = 1.0) -> np.ndarray:
    """Draws of 0 .. kinds - 1, kind k with weight (k + 5) ** -exponent: a heavy tail, and none that has it all."""
    weight = (np.arange(kinds) + 5.0) ** -exponent
    return rng.choice(kinds, size=size, p=weight / weight.sum())


def top(scores: np.ndarray, k: int) -> np.ndarray:
    """Columns of the k highest scores of each row, highest first; among equals the earlier. int64 [R, min(k, n)]."""
    k = min(k, scores.shape[1])
    if not k:
        return np.zeros((len(scores), 0), np.int64)
    if k == scores.shape[1]:
        return np.argsort(-scores, axis=1, kind="stable")
    threshold = -np.partition(-scores, k - 1, axis=1)[:, k - 1 : k]
    # All above the threshold, and of those at it the first: a partition alone would take any of the tied.
    tied = scores == threshold
    room = k - (scores > threshold).sum(axis=1, keepdims=True)
    kept = (scores > threshold) | (tied & (tied.cumsum(axis=1) <= room))
    columns = np.nonzero(kept)[1].reshape(-1, k)
    order = np.argsort(-np.take_along_axis(scores, columns, axis=1), axis=1, kind="stable")
    return np.take_along_axis(columns, order, axis=1)


def _asked(requests: Requests) -> Requests:
    """The columns that the truth depends on."""
    return Requests({name: requests.columns[name] for name in ("user_id", "day", "effective")})


def blocks(count: int, size: int = BLOCK) -> Iterator[np.ndarray]:
    """0 .. count - 1 in pieces of `size`."""
    for start in range(0, count, size):
        yield np.arange(start, min(start + size, count))


def _sigmoid(logit: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-logit))


def group_counts(lists: Ragged, group: np.ndarray, groups: int) -> np.ndarray:
    """How many items of each list are of each group, [R, groups]."""
    flat = lists.rows * groups + group[lists.values]
    return np.bincount(flat, minlength=len(lists) * groups).reshape(len(lists), groups)


def _products(left: np.ndarray, right: np.ndarray, pairs: Pairs | None) -> np.ndarray:
    """Products of rows of `left` [R, dims] and `right` [items, dims], summed exactly, as float64."""
    if pairs is None:
        return (left @ right.T).astype(np.float64)
    return np.einsum("nd,nd->n", left[pairs.rows], right[pairs.items]).astype(np.float64)


def _entries(table: np.ndarray, group: np.ndarray, pairs: Pairs | None) -> np.ndarray:
    """Entries of `table` [R, groups] at the groups of items."""
    return table[:, group] if pairs is None else table[pairs.rows, group[pairs.items]]


def _of_items(values: np.ndarray, pairs: Pairs | None) -> np.ndarray:
    return values if pairs is None else values[pairs.items]
