"""What users do besides being served: when they come, what they make of what they are shown, and what they remember."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from joint.data.planted.draw import MOVIE, SERIES, START
from joint.data.planted.truth import Chances, Parameters, zipf_choice
from joint.data.ragged import Ragged, offsets_of
from joint.data.requests import Column
from joint.schema import SECONDS_A_DAY, History

LISTS = ("effective", "series", "movies", "liked")  # the histories; only `effective` has any effect
WATCHED = np.array([0.25, 0.5, 0.75, 1.0, 2.0])  # edges of the event `watched`, in lengths of the item
GROUPS = 5


class Visits(NamedTuple):
    """Requests in time order."""

    user: np.ndarray
    day: np.ndarray  # from 0
    timestamp: np.ndarray  # seconds; no two alike
    nth: np.ndarray  # how many requests its user made before on that day


def draw_visits(p: Parameters, seed: int) -> Visits:
    """Who comes when: as many requests every day, of users by a Zipf law."""
    rng = np.random.default_rng([seed, 3])
    day = np.arange(p.requests) * p.days // p.requests
    people = rng.permutation(p.users)
    user = people[zipf_choice(rng, p.users, p.requests, p.activity)]
    seconds = [np.sort(rng.choice(SECONDS_A_DAY, size, replace=False)) for size in np.bincount(day, minlength=p.days)]
    timestamp = (START + day) * SECONDS_A_DAY + np.concatenate(seconds)
    order = np.lexsort((timestamp, user, day))
    first = np.flatnonzero(np.diff(day[order] * p.users + user[order], prepend=-1))
    nth = np.empty(p.requests, np.int64)
    nth[order] = np.arange(p.requests) - np.repeat(first, np.diff(np.append(first, p.requests)))
    return Visits(user, day, timestamp, nth)


def login_groups(p: Parameters, visits: Visits) -> np.ndarray:
    """Five equal groups of users by the training days on which they came, then by requests; 0 is the least active."""
    training = visits.day < p.days - 2
    pairs = np.unique(visits.user[training] * p.days + visits.day[training])
    days = np.bincount(pairs // p.days, minlength=p.users)
    requests = np.bincount(visits.user[training], minlength=p.users)
    rank = np.empty(p.users, np.int64)
    rank[np.lexsort((requests, days))] = np.arange(p.users)
    return (rank * GROUPS // p.users).astype(np.int8)


class Feedback:
    """Draws what comes of exposures. One stream a kind of draw: ask in one order, in pieces of any size."""

    def __init__(self, p: Parameters, length: np.ndarray, seed: int) -> None:
        self.p, self.length = p, length
        self.chance, self.spread, self.visits = (np.random.default_rng([seed, 4, stream]) for stream in range(3))

    def __call__(self, chances: Chances, items: np.ndarray) -> dict[str, np.ndarray]:
        """Label -> its value, float32 [N]; without an effective view all are 0."""
        p, size = self.p, len(items)
        view, like = (self.chance.random((size, 2)) < np.stack([chances.view, chances.like], axis=1)).T
        noise = np.exp(p.minutes_noise * self.spread.standard_normal((size, 2)) - p.minutes_noise**2 / 2)
        minutes = view * chances.minutes * noise[:, 0]
        later = view * self.visits.poisson(chances.returns) * p.visit_minutes * noise[:, 1]
        labels = {
            "effective_view": view,
            "like": view & like,
            "minutes": minutes,
            "watch_ratio": minutes / self.length[items],
            "dwm": minutes + later,
        }
        return {name: values.astype(np.float32) for name, values in labels.items()}


@dataclass(frozen=True)
class Memory:
    """Every user's newest past items, a list a history: arrays [users, history], newest last, item -1 where empty."""

    lists: Mapping[str, Mapping[str, np.ndarray]]
    kind: np.ndarray  # upload_type of every item

    @classmethod
    def empty(cls, p: Parameters, kind: np.ndarray) -> Memory:
        """Of users who have seen nothing yet."""
        types = {"item": np.int32, "watched": np.int8, "timestamp": np.int64}
        shape = p.users, p.history
        lists = {name: {key: np.full(shape, -1, of) for key, of in types.items()} for name in LISTS}
        if p.competitors:
            lists["effective"]["competitors"] = np.full((*shape, p.competitors), -1, np.int32)
        return cls(lists, kind)

    def recall(self, user: np.ndarray) -> dict[str, Column]:
        """The history columns of requests of these users."""
        columns: dict[str, Column] = {}
        for name, kept in self.lists.items():
            known = kept["item"][user] >= 0
            offsets = offsets_of(known.sum(axis=1))
            for key, values in kept.items():
                each = values.shape[2] if values.ndim == 3 else 1
                column = name if key == "item" else f"{name}.{key}"
                columns[column] = Ragged(values[user][known].ravel(), offsets * each)
        return columns

    def keep(
        self,
        user: np.ndarray,
        timestamp: np.ndarray,
        items: np.ndarray,
        labels: Mapping[str, np.ndarray],
        competitors: np.ndarray,
    ) -> None:
        """Remember what was viewed of `items` [R, E], one request a user, with its labels [R, E].

        `competitors` [R, K] are what the events of a request competed with.
        """
        viewed = labels["effective_view"] > 0
        kind = self.kind[items]
        marks = (viewed, viewed & (kind == SERIES), viewed & (kind == MOVIE), labels["like"] > 0)
        events = {
            "item": items,
            "watched": np.searchsorted(WATCHED, labels["watch_ratio"], side="right") + 1,
            "timestamp": np.broadcast_to(timestamp[:, None], items.shape),
            "competitors": np.broadcast_to(competitors[:, None], (*items.shape, competitors.shape[1])),
        }
        for kept, mark in zip(self.lists.values(), marks, strict=True):
            known = np.hstack([kept["item"][user] >= 0, mark])
            # A stable sort by 'known' moves the gaps to the left and keeps the rest in order.
            order = np.argsort(known, axis=1, kind="stable")[:, -kept["item"].shape[1] :]
            known, row = np.take_along_axis(known, order, axis=1), np.arange(len(order))[:, None]
            for key, values in kept.items():
                newest = np.hstack([values[user], events[key]])[row, order]
                newest[~known] = -1
                values[user] = newest


def histories(p: Parameters) -> tuple[History, ...]:
    """The histories of the log, each with how much of an item was watched, and when."""
    return tuple(
        History(name=name, events=("watched",), timed=True, competitors=p.competitors if name == "effective" else 0)
        for name in LISTS
    )
