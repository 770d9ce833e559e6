"""Discovery minutes of the requests of a log, and again of those that an older dataset holds unripe."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from joint.data.flat.append import Matured, StateFile, mature
from joint.data.flat.columns import MICRO
from joint.data.flat.dwm import Pairs, discovery_minutes
from joint.data.flat.job import Job
from joint.data.flat.map import seconds
from joint.data.requests import Column, Requests, concatenate_requests
from joint.schema import Stage

_EXPOSURES = {"user": np.int64, "item": np.int64, "time": np.int64, "request": np.int64}
_PLAYBACKS = {"user": np.int64, "item": np.int64, "time": np.int64, "minutes": np.float64, "exploring": np.bool_}


class Discoveries:
    """One label: its minutes bucket by bucket, and what an append needs of the playbacks."""

    def __init__(self, job: Job, name: str, end: int, state: Path) -> None:
        self.job, self.name, self.end = job, name, end
        self.of = job.m.discoveries[name]
        self.state = StateFile(state, f"playbacks.{name}")
        self.found = [_none({"request": np.int64, "item": np.int64, "minutes": np.float32})]
        self.words = {key: job.vocabularies[f"{key}_id"].arrow() for key in ("user", "item")}

    def minutes(self, bucket: int, rows: Requests | None) -> np.ndarray:
        """The label of a bucket's rows, float32: NaN where not exposed. Minutes of old exposures are noted."""
        exposures = _none(_EXPOSURES) if rows is None else _exposures(rows)
        old = self.job.exposures[self.name].read(bucket) or _none(_EXPOSURES)
        both = concatenate_requests([exposures, old])
        played = self._playbacks(bucket, rows)
        found = discovery_minutes(
            _pairs(both),
            both.scalars("request"),
            _pairs(played),
            played.scalars("minutes"),
            played.scalars("exploring"),
            window=seconds(self.of.window),
            within=seconds(self.of.within),
        ).astype(np.float32)
        new = len(exposures)
        self._keep(played)
        noted = Requests({"request": old.scalars("request"), "item": old.scalars("item"), "minutes": found[new:]})
        self.found.append(noted.take(np.flatnonzero(found[new:])))
        label = np.full(0 if rows is None else len(rows), np.nan, np.float32)
        if rows is not None:
            label[_exposed(rows)] = found[:new]
        return label

    def finish(self) -> Matured:
        """The minutes of old exposures."""
        self.state.close()
        old = self.job.old
        return Matured(mature(self.name, self.job.m, old.end) if old else np.inf, concatenate_requests(self.found))

    def _playbacks(self, bucket: int, rows: Requests | None) -> Requests:
        """Those of the watch log and of the old dataset, and where there is no watch log those of these rows."""
        parts = [_none(_PLAYBACKS)]
        if (found := self.job.playbacks[self.name].read(bucket)) is not None:
            parts.append(found)
        if rows is not None and not self.of.watch_log:
            played = rows.take(np.flatnonzero(rows.scalars(f"{self.name}.minutes") > 0))
            keys = {key: played.scalars(f"log.{key}") for key in ("user", "item")}
            watched = {key: played.scalars(f"{self.name}.{key}") for key in ("minutes", "exploring")}
            parts.append(Requests({**keys, "time": played.scalars("log.time") // MICRO, **watched}))
        return concatenate_requests(parts)

    def _keep(self, played: Requests) -> None:
        """Put down the first playbacks, and those that may still count for an exposure that is not mature.

        By words, not ids: a watch log also holds items that no request has shown yet, and that have no id. What it
        holds of later days the next append reads again; the log's own rows after midnight are read but once.
        """
        by = [played.scalars(key) for key in ("exploring", "minutes", "time", "item", "user")]
        played = played.take(np.lexsort(by))
        user, item, time = (played.scalars(key) for key in ("user", "item", "time"))
        place = np.arange(len(time))
        first = (place == 0) | (user != np.roll(user, 1)) | (item != np.roll(item, 1))
        kept = time == time[np.maximum.accumulate(np.where(first, place, 0))]
        kept |= time > mature(self.name, self.job.m, self.end)
        if self.of.watch_log:
            kept &= time < self.end
        played = played.take(np.flatnonzero(kept))
        words = {key: self.words[key].take(played.scalars(key)) for key in ("user", "item")}
        self.state.write(played, **words)


def _exposed(rows: Requests) -> np.ndarray:
    return np.flatnonzero((rows.scalars("log.stages") & Stage.EXPOSED) != 0)


def _exposures(rows: Requests) -> Requests:
    shown = rows.take(_exposed(rows))
    keys: dict[str, Column] = {key: shown.scalars(f"log.{key}") for key in ("user", "item", "request")}
    return Requests({**keys, "time": shown.scalars("log.start") // MICRO})


def _pairs(rows: Requests) -> Pairs:
    return Pairs(rows.scalars("user"), rows.scalars("item"), rows.scalars("time"))


def _none(columns: Mapping[str, type]) -> Requests:
    return Requests({name: np.zeros(0, kind) for name, kind in columns.items()})
