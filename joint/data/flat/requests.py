"""Rows -> requests: gathered by the log's request id, or cut out of what a user saw; then checked one by one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from joint.data.flat.columns import MICRO, days_of
from joint.data.flat.job import Job, see
from joint.data.flat.map import LogMap, seconds, time_of
from joint.data.flat.rows import ROW_BITS
from joint.data.problems import Problems
from joint.data.ragged import Ragged, draw
from joint.data.requests import Requests, concatenate_requests
from joint.progress import progress
from joint.schema import NEVER, Stage


@dataclass(frozen=True)
class Gather:
    """What gathering needs to know besides the rows."""

    m: LogMap
    files: Sequence[Path]
    problems: Problems
    user_hash: np.ndarray  # uint64, of every user code
    item_hash: np.ndarray
    known: np.ndarray  # request ids that an older dataset holds, sorted

    def __call__(self, rows: Requests) -> Requests:
        """The good rows of whole requests, in order of (start, request), a request's by time with ties by a hash.

        `log.start` is the time of the request's first row, `log.day` becomes the day of it, and `log.request` its id
        (where the log has none, a hash of user, start and first item).
        """
        tie = draw(rows.scalars("log.time"), self.item_hash[rows.scalars("log.item")])
        rows = Requests({**rows.columns, "log.tie": tie})
        rows = self._logged(rows) if self.m.request else self._derived(rows)
        if not len(rows):
            return rows
        request, start = rows.scalars("log.request"), rows.scalars("log.start")
        rows = rows.take(np.lexsort((rows.scalars("log.tie"), rows.scalars("log.time"), request, start)))
        return Requests({**rows.columns, "log.day": days_of(rows.scalars("log.start"), self.m.timezone)})

    def _logged(self, rows: Requests) -> Requests:
        """Requests as the log names them; one whose rows contradict each other is left out whole."""
        m = self.m
        rows = rows.take(self._order(rows, "log.request", "log.item", "log.time"))
        rows = self._drop(
            rows,
            _repeats(rows, "log.request", "log.item"),
            m.item,
            "a second row of this item in its request",
            "expected an item once a request",
        )
        rows = rows.take(self._order(rows, "log.request", "log.time", "log.tie"))
        rows = self._drop_requests(
            rows, self._differs(rows, "log.user"), m.user, "a second user in its request", "expected one user a request"
        )
        late = rows.scalars("log.time") - _of_first(rows, "log.time") > seconds(m.spread) * MICRO
        rows = self._drop_requests(
            rows,
            late,
            time_of(m.time).column,
            "a time far from the others of its request",
            f"expected the rows of a request within {m.spread} (spread)",
        )
        for name, feature in m.features_of("request").items():
            rows = self._drop_requests(
                rows,
                self._differs(rows, name),
                feature.column or name,
                "another value than in its request's first row",
                "expected one value a request",
            )
        again = np.isin(rows.scalars("log.request"), self.known)
        rows = self._drop(
            rows,
            again,
            str(m.request),
            "a request that the dataset holds already",
            "expected new requests; append whole ones",
        )
        return Requests({**rows.columns, "log.start": _of_first(rows, "log.time")})

    def _derived(self, rows: Requests) -> Requests:
        """Runs of a user's consecutive rows of a day; one also ends before an item that it holds already."""
        m = self.m
        rows = rows.take(self._order(rows, "log.user", "log.time", "log.tie"))
        rows = self._drop(
            rows,
            _repeats(rows, "log.user", "log.time", "log.item"),
            m.item,
            "a second row of this user, item and time",
            "expected it once",
        )
        starts = _changes(rows, "log.user", "log.day")
        if m.gap:
            starts[1:] |= np.diff(rows.scalars("log.time")) > seconds(m.gap) * MICRO
        else:
            place = np.arange(len(rows))
            starts |= (place - np.maximum.accumulate(np.where(starts, place, 0))) % (m.run or 10) == 0
        starts = _split_at_repeats(starts, rows.scalars("log.item"))
        first = rows.take(np.flatnonzero(starts))
        user, item = self.user_hash[first.scalars("log.user")], self.item_hash[first.scalars("log.item")]
        request = draw(user, first.scalars("log.time"), item).view(np.int64)
        number = np.cumsum(starts) - 1
        start = first.scalars("log.time")[number]
        return Requests({**rows.columns, "log.request": request[number], "log.start": start})

    def _order(self, rows: Requests, *by: str) -> np.ndarray:
        """The order by these columns; what else is the same in them, by more stages and higher labels first."""
        labels = [np.nan_to_num(-rows.scalars(name), nan=np.inf) for name, of in self.m.columns.items() if of.column]
        stages = -rows.scalars("log.stages").astype(np.int64)
        return np.lexsort((*labels[::-1], stages, *(rows.scalars(name) for name in by[::-1])))

    def _differs(self, rows: Requests, name: str) -> np.ndarray:
        """Where a row has another value than the first row of its request."""
        column, first = rows.columns[name], _first(rows)
        if not isinstance(column, Ragged):
            found = column != column[first]
            return found & ~(np.isnan(column) & np.isnan(column[first])) if column.dtype.kind == "f" else found
        differs = column.lengths != column.lengths[first]
        same = np.flatnonzero(~differs)
        mine, its = column.take(same), column.take(first[same])
        differs[same[np.unique(mine.rows[mine.values != its.values])]] = True
        return differs

    def _drop_requests(self, rows: Requests, bad: np.ndarray, column: str, found: str, expected: str) -> Requests:
        """Without the requests of bad rows."""
        request = rows.scalars("log.request")
        return self._drop(rows, np.isin(request, request[bad]), column, found, expected, at=bad)

    def _drop(
        self, rows: Requests, bad: np.ndarray, column: str, found: str, expected: str, *, at: np.ndarray | None = None
    ) -> Requests:
        """Without the bad rows; the message is about the first of them in the log (or of the rows `at`)."""
        if not bad.any():
            return rows
        source = int(rows.scalars("log.source")[bad if at is None else at].min())
        file, row = self.files[source >> ROW_BITS], source & ((1 << ROW_BITS) - 1)
        self.problems.found(f"{file}: row {row + 1}", f"column {column}: found {found}; {expected}", int(bad.sum()))
        return rows.take(np.flatnonzero(~bad))


def _changes(rows: Requests, *columns: str) -> np.ndarray:
    """Where a row differs from the one before in some of the columns; the first row does."""
    found = np.ones(len(rows), bool)
    found[1:] = np.any([rows.scalars(name)[1:] != rows.scalars(name)[:-1] for name in columns], axis=0)
    return found


def _repeats(rows: Requests, *columns: str) -> np.ndarray:
    return ~_changes(rows, *columns)


def _first(rows: Requests) -> np.ndarray:
    """The place of the first row of each row's request; rows of a request lie together."""
    return np.maximum.accumulate(np.where(_changes(rows, "log.request"), np.arange(len(rows)), 0))


def _of_first(rows: Requests, name: str) -> np.ndarray:
    return rows.scalars(name)[_first(rows)]


def _split_at_repeats(starts: np.ndarray, items: np.ndarray) -> np.ndarray:
    """`starts` and, within every run, further starts such that no run holds an item twice, from its begin on."""
    starts = starts.copy()
    while True:
        run = np.cumsum(starts)
        order = np.lexsort((items, run))  # stable: the same item's rows stay in order
        again = np.flatnonzero((run[order][1:] == run[order][:-1]) & (items[order][1:] == items[order][:-1])) + 1
        if not len(again):
            return starts
        places = np.sort(order[again])
        _, first = np.unique(run[places], return_index=True)
        starts[places[first]] = True


def gather_requests(job: Job, gather: Gather) -> None:
    """Rows by request -> checked requests by user; notes what was seen when."""
    job.exposed = np.full(len(gather.item_hash), NEVER, np.int32)
    for bucket in progress(range(job.rows.buckets), "requests", unit="bucket"):
        rows = job.rows.read(bucket)
        if rows is not None and len(rows := gather(rows)):
            _note(job, rows)
            job.users.write(rows, rows.scalars("log.user"))
        job.rows.remove(bucket)
    job.users.close()


def _note(job: Job, rows: Requests) -> None:
    m, day, item = job.m, rows.scalars("log.day"), rows.scalars("log.item")
    job.days.update(np.unique(day).tolist())
    see(job.vocabularies, "user_id", rows.scalars("log.user"), day)
    see(job.vocabularies, "item_id", item, day)
    if not isinstance(m.group, str):
        see(job.vocabularies, "group", rows.scalars("log.group"), day)
    for name, feature in m.features_of("request", "event").items():
        if feature.kind in ("id", "ids") and m.space(name) not in ("user_id", "item_id"):
            see(job.vocabularies, m.space(name), rows.columns[name], day)
    exposed = (rows.scalars("log.stages") & Stage.EXPOSED) != 0
    np.minimum.at(job.exposed, item[exposed], day[exposed])
    names = [] if m.items else list(m.features_of("item"))
    if names:
        found = Requests(
            {name: rows.columns[name] for name in ("log.item", "log.start", "log.tie", "log.request", *names)}
        )
        job.firsts = _firsts(found if job.firsts is None else concatenate_requests([job.firsts, found]))


def _firsts(rows: Requests) -> Requests:
    """The first row of every item."""
    by = [rows.scalars(name) for name in ("log.request", "log.tie", "log.start", "log.item")]
    rows = rows.take(np.lexsort(by))
    item = rows.scalars("log.item")
    return rows.take(np.flatnonzero(np.append(True, item[1:] != item[:-1])))
