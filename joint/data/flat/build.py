"""Whole requests of users -> the dataset's columns, put aside by day; and what a later append needs of the users."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from joint.data.flat.append import Matured, StateFile
from joint.data.flat.columns import MICRO
from joint.data.flat.days import DayFile
from joint.data.flat.discoveries import Discoveries
from joint.data.flat.features import GROUP, missing, prepared
from joint.data.flat.histories import ACTIVE_DAYS, Past, active_days, delay, in_order, matching, split_keys
from joint.data.flat.job import Job, active_pairs, in_buckets, starts_of
from joint.data.flat.tables import Lookup
from joint.data.ragged import Ragged, offsets_of
from joint.data.requests import Column, Requests
from joint.schema import day_name

CHUNK = 16_384  # requests in memory with their histories
KEYS = ("user", "item", "time")  # of an event


class Builder:
    """Builds the requests of one bucket of users after another.

    Args:
        item_hash: of every item code.
        last_day: of the log; requests of an append are of later days.
        end: the second in which that day ends.
        state: where the files lie that an append needs, `state/`.
    """

    def __init__(self, job: Job, users: Lookup, item_hash: np.ndarray, *, last_day: int, end: int, state: Path) -> None:
        self.job, self.users, self.item_hash = job, users, item_hash
        self.last_day, self.end = last_day, end
        self.discoveries = {name: Discoveries(job, name, end, state) for name in job.m.discoveries}
        self.history_state = {name: StateFile(state, f"history.{name}") for name in job.m.histories}
        self.active_state = StateFile(state, "active")

    def run(self) -> dict[str, Matured]:
        """All buckets; returns the minutes of the old dataset's exposures, worked out again."""
        for bucket, rows in in_buckets(self.job, "histories"):
            self._bucket(bucket, rows)
            self.job.users.remove(bucket)
        for state in (*self.history_state.values(), self.active_state):
            state.close()
        return {name: of.finish() for name, of in self.discoveries.items()}

    def _bucket(self, bucket: int, rows: Requests | None) -> None:
        pasts = {name: self._past(bucket, name, rows) for name in self.job.m.histories}
        active = active_pairs(self.job, bucket, rows)
        self._keep(pasts, active)
        minutes = {name: of.minutes(bucket, rows) for name, of in self.discoveries.items()}
        if rows is None:
            return
        rows = Requests({**rows.columns, **minutes})
        bounds = np.append(starts_of(rows), len(rows))
        day = rows.scalars("log.day")[bounds[:-1]]
        for number in np.unique(day).tolist():
            begin, end = np.searchsorted(day, [number, number + 1])
            with DayFile(self.job.days_folder / day_name(number) / f"{bucket}.arrow") as file:
                for low in range(begin, end, CHUNK):
                    high = min(low + CHUNK, end)
                    file.write(self._requests(rows.take(np.arange(bounds[low], bounds[high])), pasts, active))

    def _past(self, bucket: int, name: str, rows: Requests | None) -> Past:
        """The events of a history: of the old dataset, of its own file, and those of these rows."""
        job, history = self.job, self.job.m.histories[name]
        nothing = {event: missing(event, job.m, 0) for event in history.events}
        parts = [self._events(name, Requests(dict.fromkeys(KEYS, np.zeros(0, np.int64)) | nothing))]
        if (past := job.past[name].read(bucket)) is not None:
            parts.append(past)
        if (events := job.events[name].read(bucket)) is not None:
            events = events.take(np.flatnonzero(events.scalars("time") < self.end * MICRO))
            parts.append(self._events(name, events))  # later ones the next append reads again
        if rows is not None:
            chosen = rows.take(np.flatnonzero(matching(rows, history)))
            keys = {key: chosen.scalars(f"log.{key}") for key in KEYS}
            parts.append(self._events(name, Requests({**chosen.columns, **keys})))
        return Past(in_order(parts, self.item_hash), history, delay(history, job.m))

    def _events(self, name: str, rows: Requests) -> Requests:
        """Events of a history with their features as the dataset has them."""
        job = self.job
        columns: dict[str, Column] = {key: rows.scalars(key) for key in KEYS}
        for event in job.m.histories[name].events:
            columns[event] = prepared(event, job.m, rows.columns[event], job.vocabularies, job.statistics)
        return Requests(columns)

    def _keep(self, pasts: Mapping[str, Past], active: np.ndarray) -> None:
        """Put down what a later append needs, users and items as the codes that it will start with: ids - 1."""
        vocabularies = self.job.vocabularies
        recent = Requests(split_keys(active))
        recent = recent.take(np.flatnonzero(recent.scalars("day") > self.last_day - ACTIVE_DAYS))
        kept = {name: past.kept(self.end) for name, past in pasts.items()}
        for state, rows in ((self.active_state, recent), *((self.history_state[n], of) for n, of in kept.items())):
            columns = {**rows.columns, "user": vocabularies["user_id"].id_of(rows.scalars("user")) - 1}
            if "item" in columns:
                columns["item"] = vocabularies["item_id"].id_of(rows.scalars("item")) - 1
            state.write(Requests(columns))

    def _requests(self, rows: Requests, pasts: Mapping[str, Past], active: np.ndarray) -> Requests:
        """Whole requests as the dataset has them."""
        job, m = self.job, self.job.m
        starts = starts_of(rows)
        first = rows.take(starts)
        user, second = first.scalars("log.user"), first.scalars("log.start") // MICRO
        offsets = offsets_of(np.diff(np.append(starts, len(rows))))
        columns: dict[str, Column] = {
            "request_id": first.scalars("log.request"),
            "timestamp": second,
            "group": self._group(first, active),
            "user_id": job.vocabularies["user_id"].id_of(user),
        }
        for name, feature in m.features_of("request", "user").items():
            raw = self.users.take(name, user) if feature.of == "user" else first.columns[name]
            columns[name] = prepared(name, m, raw, job.vocabularies, job.statistics)
        for name, past in pasts.items():
            items, further = past.of(user, second)
            columns[name] = items.with_values(self._index(items.values))
            columns |= {f"{name}.{column}": lists for column, lists in further.items()}
        columns["candidates"] = Ragged(self._index(rows.scalars("log.item")), offsets)
        columns["stages"] = Ragged(rows.scalars("log.stages"), offsets)
        return Requests(
            columns | {name: Ragged(rows.scalars(name), offsets) for name in (*m.orders, *m.scores, *m.columns)}
        )

    def _index(self, codes: np.ndarray) -> np.ndarray:
        """Rows of the catalogue."""
        return (self.job.vocabularies["item_id"].id_of(codes) - 1).astype(np.int32)

    def _group(self, first: Requests, active: np.ndarray) -> np.ndarray:
        if not isinstance(self.job.m.group, str):
            return self.job.vocabularies["group"].id_of(first.scalars("log.group")).astype(np.int8)
        counts = active_days(active, first.scalars("log.user"), first.scalars("log.day"))
        return np.searchsorted(self.job.statistics[GROUP], counts).astype(np.int8)
