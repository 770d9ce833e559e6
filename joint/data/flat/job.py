"""What the passes of `joint.prepare parquet` over a log share."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from joint.data.flat.append import Old
from joint.data.flat.histories import day_keys
from joint.data.flat.map import LogMap
from joint.data.flat.rows import Vocabularies
from joint.data.flat.spill import Spill
from joint.data.ragged import Ragged
from joint.data.requests import Column, Requests
from joint.progress import progress


@dataclass
class Job:
    """The map, the words, the rows put aside so far, and what was noted about them."""

    m: LogMap
    vocabularies: Vocabularies
    old: Old | None  # the dataset that is appended to
    rows: Spill  # by request, or by user where requests are derived
    users: Spill  # rows of gathered requests, by user
    active: Spill  # user and day of the old dataset, by user
    events: Mapping[str, Spill]  # history -> events of its own file, by user
    past: Mapping[str, Spill]  # history -> events of the old dataset, features prepared, by user
    playbacks: Mapping[str, Spill]  # label -> playbacks of watch logs and of the old dataset, by user
    exposures: Mapping[str, Spill]  # label -> exposures of the old dataset that were not mature, by user
    days_folder: Path  # where the requests of each day are put aside
    exposed: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int32))  # first day of each item's code
    firsts: Requests | None = None  # the first row of every item, where the log has item features
    days: set[int] = field(default_factory=set)
    statistics: dict[str, list[float]] = field(default_factory=dict)


def see(vocabularies: Vocabularies, space: str, codes: Column, days: np.ndarray) -> None:
    """Words were seen on these days, one for each row."""
    if isinstance(codes, Ragged):
        vocabularies[space].seen(codes.values, days[codes.rows])
    else:
        vocabularies[space].seen(codes, days)


def starts_of(rows: Requests) -> np.ndarray:
    """Where a request begins, int64."""
    request = rows.scalars("log.request")
    return np.flatnonzero(np.append(True, request[1:] != request[:-1]))


def in_buckets(job: Job, what: str) -> Iterator[tuple[int, Requests | None]]:
    """Every bucket of users, its requests in order of (start, request)."""
    for bucket in progress(range(job.users.buckets), what, unit="bucket"):
        rows = job.users.read(bucket)
        if rows is not None:
            by = [rows.scalars(name) for name in ("log.tie", "log.time", "log.request", "log.start")]
            rows = rows.take(np.lexsort(by))
        yield bucket, rows


def active_pairs(job: Job, bucket: int, rows: Requests | None) -> np.ndarray:
    """The (user, day) pairs of a bucket with a row, ascending."""
    keys = [np.zeros(0, np.int64)]
    for pairs, user, day in ((rows, "log.user", "log.day"), (job.active.read(bucket), "user", "day")):
        if pairs is not None:
            keys.append(day_keys(pairs.scalars(user), pairs.scalars(day)))
    return np.unique(np.concatenate(keys))
