"""A user's past as of each request: lists of events strictly before it, less a lag, and how active the user was."""

from __future__ import annotations

import operator
from collections.abc import Sequence

import numpy as np

from joint.data.flat.columns import MICRO
from joint.data.flat.map import LogHistory, LogMap, condition, seconds
from joint.data.ragged import Ragged, draw
from joint.data.requests import Column, Requests, concatenate_requests
from joint.schema import Stage

_TIME_BITS = 36  # of a key (user, second)
ACTIVE_DAYS = 30


def matching(rows: Requests, history: LogHistory) -> np.ndarray:
    """Where a row is an event of the history: an exposure, with a label as its condition says, bool."""
    exposed = (rows.scalars("log.stages") & Stage.EXPOSED) != 0
    if not history.when:
        return np.zeros(len(rows), bool)
    if (of := condition(history.when)) is None:
        return exposed
    label, comparison, number = of
    with np.errstate(invalid="ignore"):  # what was not observed meets no condition
        return exposed & getattr(operator, comparison)(rows.scalars(label), np.float32(number))


def delay(history: LogHistory, m: LogMap) -> int:
    """Seconds until an event may be in a history: the lag, and until the label that it is chosen by has matured."""
    of = condition(history.when) if history.when else None
    return seconds(m.lag) + (round(m.columns[of[0]].days * 86_400) if of else 0)


def in_order(events: Sequence[Requests], item_hash: np.ndarray) -> Requests:
    """Events (`user`, `item`, `time` and features) by user and time, ties by a hash."""
    joined = concatenate_requests(events)
    tie = draw(joined.scalars("time"), item_hash[joined.scalars("item")])
    return joined.take(np.lexsort((tie, joined.scalars("time"), joined.scalars("user"))))


def _keys(user: np.ndarray, second: np.ndarray | int) -> np.ndarray:
    return (user.astype(np.int64) << _TIME_BITS) + second


class Past:
    """The ordered events of one history, cut for requests."""

    def __init__(self, events: Requests, history: LogHistory, late: int) -> None:
        self.events, self.history, self.late = events, history, late
        self.keys = _keys(events.scalars("user"), events.scalars("time") // MICRO)

    def of(self, user: np.ndarray, second: np.ndarray) -> tuple[Ragged, dict[str, Ragged]]:
        """A request's newest events, oldest first: item codes, and further lists: features and `timestamp`.

        An event is in the past of a request if its second is before the request's by more than the delay.
        """
        ends = np.searchsorted(self.keys, _keys(user, second - self.late))
        lengths = np.minimum(ends - np.searchsorted(self.keys, _keys(user, 0)), self.history.length)

        def cut(values: np.ndarray) -> Ragged:
            return Ragged(values, np.zeros(1, np.int64)).slices(ends - lengths, lengths)

        further = {event: cut(self.events.scalars(event)) for event in self.history.events}
        timestamp = cut(self.events.scalars("time") // MICRO)
        return cut(self.events.scalars("item")), {**further, "timestamp": timestamp}

    def kept(self, end: int) -> Requests:
        """The events that a request from second `end` on may have in its past."""
        user = self.events.scalars("user")
        visible = np.searchsorted(self.keys, _keys(user, end - self.late))
        return self.events.take(np.flatnonzero(np.arange(len(user)) >= visible - self.history.length))


def active_days(active: np.ndarray, user: np.ndarray, day: np.ndarray) -> np.ndarray:
    """Of the ACTIVE_DAYS days before each request's, on how many the user was active, int64.

    Args:
        active: (user, day) pairs, each once, by `day_keys`, ascending.
    """
    before = np.searchsorted(active, day_keys(user, day))
    return before - np.searchsorted(active, day_keys(user, day - ACTIVE_DAYS))


def day_keys(user: np.ndarray, day: np.ndarray | int) -> np.ndarray:
    """(user, day) as one number, which sorts like the pair, int64."""
    return _keys(user, np.asarray(day, np.int64))


def split_keys(keys: np.ndarray) -> dict[str, Column]:
    """`user` and `day` of `day_keys`."""
    return {"user": keys >> _TIME_BITS, "day": keys & ((1 << _TIME_BITS) - 1)}
