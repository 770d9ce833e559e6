"""The fixed-length records that lie on disk between the passes over RecFlow, appended and memory-mapped."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from joint.data.recflow.files import CONTEXT, FEEDBACK, VIDEO

BITS = FEEDBACK[1:]  # feedback that is 0 or 1: one bit each
# `row` is the place of a run's first row in the file, which an error names: exact where no row was left out before it.
RUN = np.dtype(
    [("request_id", "<i8"), ("time", "<i8"), ("row", "<i8"), ("rows", "<i4"), ("context", "<i4", (len(CONTEXT),))]
)
REQUEST = np.dtype([("request_id", "<i8"), ("time", "<i8"), ("context", "<i4", (len(CONTEXT),)), ("rows", "<i4")])
CANDIDATE = np.dtype(
    [("video", "<i4"), ("stages", "<u2"), ("orders", "<i2", (2,)), ("playing_time", "<i4"), ("feedback", "u1")]
)
ROW = np.dtype([("candidate", CANDIDATE), ("features", "<i4", (len(VIDEO),))])
ACTIVE = np.dtype([("user", "<i4"), ("days", "<i4")])
VIDEO_RECORD = np.dtype(
    [
        ("id", "<i4"),
        ("features", "<i4", (len(VIDEO),)),
        ("first_day", "<i4"),  # days since 1970-01-01: first seen at any stage, first exposed
        ("exposed", "<i4"),
        ("changed", "?"),  # some later row has other features
    ]
)


def event_record(competitors: int) -> np.dtype:
    """An effective view: by whom, when (UNIX seconds), of what, and the videos of rank_pos in its request."""
    return np.dtype([("user", "<i4"), ("time", "<i8"), ("video", "<i4"), ("competitors", "<i4", (competitors,))])


def append(path: Path, records: np.ndarray) -> None:
    """Append records to a file, as they lie in memory."""
    with path.open("ab") as file:
        file.write(records.data if records.flags.c_contiguous else records.tobytes())


def count(path: Path, record: np.dtype) -> int:
    """How many records a file has; none if there is no such file."""
    return path.stat().st_size // record.itemsize if path.exists() else 0


def load(path: Path, record: np.dtype) -> np.ndarray:
    """The records of a file, memory-mapped."""
    return np.memmap(path, record, "r") if count(path, record) else np.zeros(0, record)


def read(path: Path, record: np.dtype, begin: int, end: int) -> np.ndarray:
    """Records `begin` to `end`, or to that of the file, in memory: for long files, whose pages should not stay."""
    end = min(end, count(path, record))
    return (
        np.fromfile(path, record, end - begin, offset=begin * record.itemsize) if begin < end else np.zeros(0, record)
    )
