"""The clean rows of one day of RecFlow: every value within its limits, stage flags without contradiction."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa

from joint.data.problems import Problems
from joint.data.recflow.files import COLUMNS, CONTEXT, FEEDBACK, FLAGS, ORDERS, STAGES, VIDEO, Day, read_batches
from joint.schema import Stage

CHUNK = 262_144  # rows checked at a time: RecFlow's own record batches are smaller
HIGHEST_ID = 2**31 - 3  # raw id + 1 and the size of its table are int32
OUTSIDE = "a number out of range"
BINARY = ("a flag, 0 or 1", 0, 1)
MILLISECONDS = ("milliseconds, 0 or more, in 31 bits", 0, 2**31 - 1)
ID = ("an id, 0 or more, that fits in 31 bits", 0, HIGHEST_ID)

LIMITS: dict[str, tuple[str, int, int]] = {  # what is expected, lowest, highest
    "request_id": ("an id, 0 or more", 0, 2**63 - 1),
    **dict.fromkeys(CONTEXT, ID),
    "video_id": ID,
    **dict.fromkeys(VIDEO, ID),
    "upload_timestamp": ("seconds since 1970, 0 or more, in 31 bits", 0, 2**31 - 1),
    "duration": MILLISECONDS,
    **dict.fromkeys(FLAGS, BINARY),
    **dict.fromkeys(FEEDBACK, BINARY),
    "playing_time": MILLISECONDS,
}
EARLY = Stage.PRERANK_NEG | Stage.COARSE_NEG
PAST = Stage.RANK_NEG | Stage.RERANK_NEG | Stage.RANK_POS | Stage.RERANK_POS | Stage.EXPOSED
EXCLUSIVE = (
    (EARLY, PAST, "a cut before ranking and a later stage"),
    (Stage.PRERANK_NEG, Stage.COARSE_NEG, "prerank_neg and coarse_neg"),
    (Stage.RANK_POS, Stage.RANK_NEG, "rank_pos and rank_neg"),
    (Stage.RERANK_POS, Stage.RERANK_NEG, "rerank_pos and rerank_neg"),
)


@dataclass(frozen=True)
class Rows:
    """Clean rows of a day in file order: integer columns of one length, and the row numbers in the file."""

    row: np.ndarray  # int64
    columns: Mapping[str, np.ndarray]  # by name; those of ORDERS are int16, -1 outside of the stage as logged
    stages: np.ndarray  # uint16


def read_rows(day: Day, problems: Problems) -> Iterator[Rows]:
    """The rows of a day's file in file order, some at a time, without those that are wrong.

    Raises:
        DataError: as `read_batches`; or, if problems are not to be skipped, a row is wrong or there is none.
    """
    first = 0
    for arrays in read_batches(day):
        rows = len(arrays["request_id"])
        for begin in range(0, rows, CHUNK):
            piece = {name: array.slice(begin, CHUNK) for name, array in arrays.items()}
            yield _check(_Chunk(day, first + begin, piece, problems))
        first += rows
    if not first:
        problems.found(str(day.path), "found an empty file; expected the rows of a day")


@dataclass
class _Chunk:
    """Neighbouring rows under check. A row counts as wrong once, for the first thing that is wrong with it."""

    day: Day
    first: int  # row number
    arrays: Mapping[str, pa.Array]
    problems: Problems
    columns: dict[str, np.ndarray] = field(init=False)
    good: np.ndarray = field(init=False)  # bool [rows]

    def __post_init__(self) -> None:
        self.good = np.ones(len(self.arrays["request_id"]), bool)
        # Stage columns may be absent beside exposures alone: those were exposed, and nothing more is known.
        self.columns = {
            name: _integers(self.arrays[name])
            if name in self.arrays
            else np.full(len(self.good), name == "realshow", "i1")
            for name in COLUMNS
        }

    def leave_out(self, bad: np.ndarray, column: str, kind: str, expected: str) -> None:
        """Rows where `bad` are wrong: `kind` says what was found in the column (or in STAGES)."""
        bad = bad & self.good
        at = int(bad.argmax()) if len(bad) else 0
        if not bad[at : at + 1].any():
            return
        flags = ", ".join(name for name in FLAGS if self.columns[name][at]) or "none"
        found = flags if column == STAGES else self.arrays[column][at].as_py()
        found = "null" if found is None else found
        self.day.report(self.problems, (column, self.first + at), found, kind, expected, int(bad.sum()))
        self.good &= ~bad


def _check(chunk: _Chunk) -> Rows:
    columns, period = chunk.columns, chunk.day.period
    _check_limits(chunk)
    stages = _stages(columns, period)
    for these, those, kind in EXCLUSIVE:
        chunk.leave_out(((stages & these) != 0) & ((stages & those) != 0), STAGES, kind, "one of them at most")
    chunk.leave_out(stages == 0, STAGES, "none", "at least one in a row of the first period")
    hidden = (stages & Stage.EXPOSED) == 0
    for name in FEEDBACK:
        chunk.leave_out(hidden & (columns[name] != 0), name, "feedback", "0 where the video was not exposed")
    for name, inside in zip(ORDERS, _order_stages(period), strict=True):
        outside = (stages & inside) == 0
        wrong = (columns[name] < 0) | (columns[name] > np.iinfo(np.int16).max)
        chunk.leave_out(wrong & ~outside, name, OUTSIDE, "a rank, 0 or more, in 15 bits")
        columns[name] = np.where(outside, -1, columns[name].astype(np.int16))
    row, good = np.arange(chunk.first, chunk.first + len(stages)), chunk.good
    if good.all():
        return Rows(row, columns, stages)
    return Rows(row[good], {name: values[good] for name, values in columns.items()}, stages[good])


def _check_limits(chunk: _Chunk) -> None:
    begin = chunk.day.begin
    today = ("milliseconds within the file's day in China", begin, begin + 86_399_999)
    for name, array in chunk.arrays.items():
        if array.null_count:
            chunk.leave_out(array.is_null().to_numpy(zero_copy_only=False), name, "null", "an integer")
        if name in ORDERS:  # they have limits where the stage was entered, and no meaning elsewhere
            continue
        expected, lowest, highest = today if name == "request_timestamp" else LIMITS[name]
        values = chunk.columns[name]
        if len(values) and (values.min() < lowest or values.max() > highest):
            chunk.leave_out((values < lowest) | (values > highest), name, OUTSIDE, expected)


def _integers(array: pa.Array) -> np.ndarray:
    """In the width of the file; null is 0."""
    array = array.cast(pa.int8()) if pa.types.is_boolean(array.type) else array
    return (array.fill_null(0) if array.null_count else array).to_numpy()


def _stages(columns: Mapping[str, np.ndarray], period: int) -> np.ndarray:
    """Stage flags, uint16 [rows]; 0 for a row of which no stage is known.

    Period 2 logs the rank stage whole: all that was not cut before it, and Table 1 counts as many re-ranked as ranked
    videos. Period 1 logs samples: a video was ranked if a later flag says so, re-ranked if one of re-ranking does.
    """
    stages = np.zeros(len(columns["realshow"]), np.uint16)
    for name, flag in FLAGS.items():
        stages |= (columns[name] != 0) * np.uint16(flag)
    if period == 2:
        ranked = reranked = (stages & EARLY) == 0
    else:
        ranked = (stages & PAST) != 0
        reranked = (stages & (Stage.RERANK_POS | Stage.RERANK_NEG | Stage.EXPOSED)) != 0
    return stages | ranked * np.uint16(Stage.RANKED) | reranked * np.uint16(Stage.RERANKED)


def _order_stages(period: int) -> tuple[Stage, Stage]:
    """Flags of the rows whose rank index, and re-rank index, mean something."""
    if period == 2:
        return Stage.RANKED, Stage.RERANKED
    return Stage.RANK_POS | Stage.RANK_NEG, Stage.RERANK_POS | Stage.RERANK_NEG
