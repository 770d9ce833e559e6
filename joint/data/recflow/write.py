"""The request files of one RecFlow day, from what the scan of it left: items, histories, time features, user group."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from joint.data.dataset import write_part
from joint.data.ragged import Ragged, offsets_of
from joint.data.recflow.catalogue import Catalogue, time_features
from joint.data.recflow.files import CONTEXT, FEEDBACK, ORDERS
from joint.data.recflow.records import ACTIVE, BITS, CANDIDATE, REQUEST, event_record, load, read
from joint.data.requests import Column, Requests
from joint.schema import Part, Stage

ROWS = 2**21  # candidates a part: about 5,000 requests of the second period, 36,000 of the first
WINDOW = 30  # days in which a user's active ones are counted
BINS = 5


@dataclass(frozen=True)
class DayPlan:
    """A day to write, all by paths: what its scan left, what users did before it, and where parts go."""

    day: str
    split: str
    scan: Path  # holds also `history` (events) and `active` (users' active days) as of the day's beginning
    catalogue: Path
    out: Path
    history: int
    competitors: int
    edges: tuple[int, ...]  # active days at which user groups 1, 2, … begin


def newest_events(events: np.ndarray, most: int) -> np.ndarray:
    """The last `most` events of every user; sorted by user, in the given order within a user."""
    order = np.argsort(events["user"], kind="stable")
    users = events["user"][order]
    after = np.searchsorted(users, users, side="right") - np.arange(len(users))
    return events[order[after <= most]]


def active_days(users: list[np.ndarray]) -> np.ndarray:
    """On how many days each user was active, as ACTIVE by user, from the distinct users of each day."""
    found, days = np.unique(np.concatenate([np.zeros(0, np.int32), *users]), return_counts=True)
    active = np.empty(len(found), ACTIVE)
    active["user"], active["days"] = found, days
    return active


def days_active(active: np.ndarray, users: np.ndarray) -> np.ndarray:
    """The active days of some users, int32, 0 for the unknown."""
    place = np.minimum(np.searchsorted(active["user"], users), max(len(active) - 1, 0))
    if not len(active):
        return np.zeros(len(users), np.int32)
    return np.where(active["user"][place] == users, active["days"][place], 0)


def group_edges(days: np.ndarray) -> tuple[int, ...]:
    """Where the groups 1 .. 4 begin: the quintiles of the active days of some users."""
    if not len(days):
        return ()
    return tuple(int(edge) + 1 for edge in np.sort(days)[np.arange(1, BINS) * (len(days) - 1) // BINS])


def write_day(plan: DayPlan) -> list[Part]:
    """Write the parts of a day, each a run of requests in time order with about ROWS candidates."""
    requests = load(plan.scan / "requests", REQUEST)
    record = event_record(plan.competitors)
    before, today = load(plan.scan / "history", record), load(plan.scan / "events", record)
    events = newest_events(np.concatenate([before, today]), len(before) + len(today))
    active = load(plan.scan / "active", ACTIVE)
    catalogue = Catalogue(plan.catalogue)
    offsets = offsets_of(requests["rows"])
    starts = np.flatnonzero(np.diff(offsets[:-1] // ROWS, prepend=-1))
    parts: list[Part] = []
    for begin, end in itertools.pairwise([*starts.tolist(), len(requests)]):
        candidates = read(plan.scan / "candidates", CANDIDATE, int(offsets[begin]), int(offsets[end]))
        rows = Ragged(candidates, offsets[begin : end + 1] - offsets[begin])
        columns = _request_columns(plan, requests[begin:end], active)
        columns |= _history_columns(plan, requests[begin:end], events, catalogue)
        columns |= _candidate_columns(rows, catalogue)
        parts.append(write_part(plan.out, Requests(columns), day=plan.day, split=plan.split, number=len(parts)))
    return parts


def _request_columns(plan: DayPlan, requests: np.ndarray, active: np.ndarray) -> dict[str, Column]:
    seconds = requests["time"] // 1000
    days = days_active(active, requests["context"][:, 0])
    return {
        "request_id": requests["request_id"].copy(),
        "timestamp": seconds,
        "group": np.searchsorted(plan.edges, days, side="right").astype(np.int8),
        **{name: requests["context"][:, place] + 1 for place, name in enumerate(CONTEXT)},
        **time_features(seconds),
    }


def _history_columns(
    plan: DayPlan, requests: np.ndarray, events: np.ndarray, catalogue: Catalogue
) -> dict[str, Column]:
    """The newest effective views of each request's user in earlier seconds, oldest first."""
    users, seconds = requests["context"][:, 0].astype(np.int64), requests["time"] // 1000
    # One key of user and time to search by; a second is never above 2^33.
    key = events["user"].astype(np.int64) << 33 | events["time"]
    end = np.searchsorted(key, users << 33 | seconds)
    begin = np.searchsorted(key, users << 33)
    lengths = np.minimum(end - begin, plan.history)
    all_events = Ragged(np.arange(len(events)), np.array([0, len(events)]))
    chosen = all_events.slices(end - lengths, lengths)
    items = chosen.with_values(catalogue.index(events["video"][chosen.values]))
    columns: dict[str, Column] = {
        "effective": items,
        "effective.timestamp": chosen.with_values(events["time"][chosen.values]),
    }
    if plan.competitors:
        competitors = catalogue.index(events["competitors"][chosen.values]).ravel()
        columns["effective.competitors"] = Ragged(competitors, chosen.offsets * plan.competitors)
    return columns


def _candidate_columns(rows: Ragged, catalogue: Catalogue) -> dict[str, Column]:
    records = rows.values
    exposed = (records["stages"] & Stage.EXPOSED) != 0
    columns: dict[str, Column] = {
        "candidates": rows.with_values(catalogue.index(records["video"])),
        "stages": rows.with_values(records["stages"].copy()),
        **{name: rows.with_values(records["orders"][:, i].copy()) for i, name in enumerate(ORDERS)},
    }
    for name in FEEDBACK:
        values = np.full(len(records), np.nan, np.float32)
        shown = records[exposed]
        if name == "playing_time":
            values[exposed] = shown["playing_time"] / 60_000  # minutes
        else:
            values[exposed] = shown["feedback"] >> BITS.index(name) & 1
        columns[name] = rows.with_values(values)
    return columns
