"""Columns of a batch of log rows as arrays; rows with a bad value are found here, by file, column and row."""

from __future__ import annotations

from functools import reduce
from operator import or_

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from joint.data.flat.map import LogFeature, Stages, Time
from joint.data.flat.vocabulary import Vocabulary
from joint.data.problems import Problems
from joint.data.ragged import Ragged, offsets_of
from joint.data.requests import Column
from joint.schema import STAGES, Stage

PER_SECOND = {"s": 1, "ms": 1_000, "us": 1_000_000, "ns": 1_000_000_000}
BAD_ID = ("what is no id", "expected a whole number below 2^63 or UTF-8 text")  # found, expected
MICRO = 1_000_000  # times are int64 microseconds since 1970 UTC
EARLIEST, LATEST = (int(np.datetime64(day, "us").astype(np.int64)) for day in ("1990-01-01", "2100-01-01"))
_AFTER_COARSE = reduce(or_, (stage for stage in Stage if stage >= Stage.RANKED))
CONTRADICTIONS = (  # flags, others that no row has beside them, what is expected
    (Stage.PRERANK_NEG, _AFTER_COARSE | Stage.COARSE_NEG, "expected no other stage beside prerank_neg, the first cut"),
    (Stage.COARSE_NEG, _AFTER_COARSE, "expected no later stage beside coarse_neg"),
    (Stage.RANK_NEG, Stage.RANK_POS, "expected rank_neg or rank_pos, not both"),
    (Stage.RERANK_NEG, Stage.RERANK_POS, "expected rerank_neg or rerank_pos, not both"),
)


class Rows:
    """A batch of rows of one file; `keep` says which of them are still good."""

    def __init__(self, file: str, first: int, table: pa.Table, problems: Problems) -> None:
        self.file, self.first, self.table, self.problems = file, first, table, problems
        self.keep = np.ones(len(table), bool)

    def column(self, name: str) -> pa.Array:
        """A column, of which dictionaries are written out."""
        array = self.table.column(name).combine_chunks()
        return array.dictionary_decode() if pa.types.is_dictionary(array.type) else array

    def reject(self, bad: np.ndarray, column: str, found: str, expected: str) -> None:
        """Leave out the rows where `bad`. Those that are skipped add up by what is `found` in them, in general words.

        The message that ends the command has the value of the first of them instead.
        """
        bad = bad & self.keep
        if bad.any():
            row = int(bad.argmax())
            found = found if self.problems.skip else shown(self.column(column)[row])
            where, kind = f"{self.file}: row {self.first + row + 1}", f"column {column}: found {found}; {expected}"
            self.keep &= ~bad
            self.problems.found(where, kind, int(bad.sum()))


def shown(value: pa.Scalar) -> str:
    """A value as a message shows it."""
    try:
        found = value.as_py()
        text = repr(found) if isinstance(found, str | bytes) else str(found)  # of a time its digits
    except UnicodeDecodeError:
        is_list = pa.types.is_nested(value.type)
        text = "bytes that are no text" if is_list else repr(value.cast(pa.large_binary()).as_py())
    except (OverflowError, ValueError):  # a timestamp beyond what Python counts
        text = f"{value.type} {value.value}"
    return "null" if text == "None" else text if len(text) <= 60 else f"{text[:57]}..."


def _mask(array: pa.Array) -> np.ndarray:
    return array.fill_null(False).to_numpy(zero_copy_only=False).astype(bool)


def _nulls(array: pa.Array) -> np.ndarray:
    return array.is_null().to_numpy(zero_copy_only=False)


def ids(rows: Rows, name: str, vocabulary: Vocabulary, *, required: bool = False) -> np.ndarray:
    """Codes of a column of ids, int32; null is -1, or a bad row where an id is required."""
    array, bad = plain_ids(rows.column(name))
    rows.reject(bad, name, *BAD_ID)
    if required:
        rows.reject(_nulls(array), name, "null", "expected an id")
    return vocabulary.encode(array)


def plain_ids(array: pa.Array) -> tuple[pa.Array, np.ndarray]:
    """Ids as int64 or text, and where they were neither; those are null."""
    kind = array.type
    if pa.types.is_null(kind):
        return array, np.zeros(len(array), bool)
    if pa.types.is_floating(kind):  # what pandas makes of integers with gaps
        values = array.fill_null(0).to_numpy(zero_copy_only=False).astype(np.float64)
        bad = ~((values == np.floor(values)) & (np.abs(values) < 2**63)) & ~np.isnan(values)
        whole = np.where(bad | np.isnan(values), 0, values).astype(np.int64)
        return pa.array(whole, mask=bad | np.isnan(values) | _nulls(array)), bad
    if pa.types.is_uint64(kind):
        bad = _mask(pc.greater(array, pa.scalar(2**63 - 1, pa.uint64())))
        array = pc.if_else(pa.array(bad), pa.scalar(None, pa.uint64()), array)
        return array.cast(pa.int64()), bad
    if pa.types.is_integer(kind) or pa.types.is_boolean(kind):
        return array.cast(pa.int64()), np.zeros(len(array), bool)
    array = array.cast(pa.string()) if _is_valid(array) else array
    bad = np.zeros(len(array), bool)
    if not _is_valid(array):
        bad = np.array([value is not None and not _is_text(value) for value in array.cast(pa.binary()).to_pylist()])
        array = pc.if_else(pa.array(bad), pa.scalar(None, array.type), array).cast(pa.string())
    return array, bad


def _is_valid(array: pa.Array) -> bool:
    try:
        array.validate(full=True)
    except pa.ArrowInvalid:
        return False
    return True


def _is_text(value: bytes) -> bool:
    try:
        value.decode()
    except UnicodeDecodeError:
        return False
    return True


def numbers(rows: Rows, name: str, *, missing: bool, scale: float = 1) -> np.ndarray:
    """A column of numbers times `scale`, float64 that fit into float32; null is NaN.

    Args:
        missing: whether NaN means the same as null, as for features; a label that is NaN is a bad row.
    """
    array = rows.column(name)
    with np.errstate(over="ignore", invalid="ignore"):  # what becomes infinite or NaN is bad
        values = array.cast(pa.float64(), safe=False).to_numpy(zero_copy_only=False) * scale
    bad = (np.abs(values) > np.finfo(np.float32).max) | (False if missing else np.isnan(values) & ~_nulls(array))
    found = "infinity or too large a number" if missing else "NaN, infinity or too large a number"
    rows.reject(bad, name, found, "expected a finite number" + ("" if missing else " or null"))
    return np.where(bad, np.nan, values)


def flags(rows: Rows, name: str) -> np.ndarray:
    """A column of true / false or 1 / 0, bool."""
    array = rows.column(name).cast(pa.int64(), safe=False)  # of uint64 what is too large becomes negative
    values = array.fill_null(-1).to_numpy(zero_copy_only=False)
    rows.reject((values != 0) & (values != 1), name, "another value", "expected true or false (1 or 0)")
    return values == 1


def times(rows: Rows, time: Time, zone: str, *, required: bool = True) -> np.ndarray:
    """A column of times, int64 microseconds since 1970 UTC; 0 where there is none and none is required."""
    array = rows.column(time.column)
    if pa.types.is_null(array.type):
        micro = np.zeros(len(array), np.int64)
    elif time.unit:
        micro = _micro(array, PER_SECOND[time.unit])
    else:
        micro = _from_timestamps(array, zone)
    absent = _nulls(array)
    wrong = (micro < EARLIEST) | (micro >= LATEST)
    expected = "expected a time from 1990 to 2099" + (f"; is its unit {time.unit}?" if time.unit else "")
    rows.reject(wrong & ~absent, time.column, "another time", expected)
    rows.reject(absent & required, time.column, "null", expected)
    return np.where(wrong, 0, micro)


def _micro(array: pa.Array, per_second: float) -> np.ndarray:
    """Numbers of a unit as int64 microseconds; 0 for null, NaN, and what is beyond LATEST."""
    values = array.cast(pa.float64(), safe=False).to_numpy(zero_copy_only=False)
    far = ~(np.abs(values) < LATEST * per_second / MICRO)
    if pa.types.is_integer(array.type):  # exactly, also above 2^53
        values = array.fill_null(0).to_numpy(zero_copy_only=False).astype(np.int64)
    values = np.where(far, 0, values)
    if per_second > MICRO:
        return (values // (per_second / MICRO)).astype(np.int64)
    return np.round(values * (MICRO / per_second)).astype(np.int64)


def _from_timestamps(array: pa.Array, zone: str) -> np.ndarray:
    """Timestamps and dates as microseconds; those without a zone are of `zone`."""
    kind = array.type
    if pa.types.is_date32(kind):
        micro = _micro(array.cast(pa.int32()), 1 / 86_400)
    else:
        unit = "ms" if pa.types.is_date64(kind) else kind.unit
        micro = _micro(array.cast(pa.int64()), PER_SECOND[unit])
    if pa.types.is_timestamp(kind) and kind.tz:
        return micro
    # The hour that is there twice in autumn is read as the later one.
    local = pd.DatetimeIndex(micro.astype("datetime64[us]"))
    index = local.tz_localize(zone, ambiguous=np.zeros(len(local), bool), nonexistent="shift_forward")
    return index.tz_convert("UTC").tz_localize(None).to_numpy().astype("datetime64[us]").astype(np.int64)


def days_of(micro: np.ndarray, zone: str) -> np.ndarray:
    """The day in `zone` of times in microseconds, as numbers from 1970-01-01, int32."""
    if zone == "UTC":
        return (micro // (86_400 * MICRO)).astype(np.int32)
    quarter, place = np.unique(micro // (900 * MICRO), return_inverse=True)  # zones differ by quarters of an hour
    local = pd.DatetimeIndex((quarter * 900).astype("datetime64[s]"), tz="UTC").tz_convert(zone).tz_localize(None)
    return local.to_numpy().astype("datetime64[D]").astype(np.int32)[place]


def stages_of(rows: Rows, stages: Stages | str) -> np.ndarray:
    """Stage flags of every row, uint16; rows with none, or with some that exclude each other, are bad."""
    if isinstance(stages, str):
        return np.full(len(rows.table), Stage.EXPOSED, np.uint16)
    found = np.zeros(len(rows.table), np.uint16)
    for stage, column in stages.flags.items():
        found |= np.where(flags(rows, column), STAGES[stage], 0).astype(np.uint16)
    column = stages.column or next(iter(stages.flags.values()))
    if stages.column:
        words, bad = plain_ids(rows.column(stages.column))
        place = pc.index_in(words.cast(pa.string()), pa.array(list(stages.values), pa.string()))
        meanings = [reduce(or_, (STAGES[stage] for stage in of), Stage(0)) for of in stages.values.values()]
        known = place.fill_null(len(meanings)).to_numpy(zero_copy_only=False)
        bad |= known == len(meanings)
        rows.reject(bad, column, "another value", f"expected one of {', '.join(stages.values)}")
        found = np.array([*meanings, 0], np.uint16)[known]
    rows.reject(found == 0, column, "no stage", "expected at least one stage to be set in the row")
    for some, others, expected in CONTRADICTIONS:
        rows.reject(((found & some) != 0) & ((found & others) != 0), column, "contradictory stages", expected)
    return found


def feature_values(rows: Rows, name: str, feature: LogFeature, vocabulary: Vocabulary | None) -> Column:
    """A feature's column: codes of ids (-1: none), numbers (NaN: none), or lists of either."""
    column = feature.column or name
    if feature.kind in ("id", "ids"):
        assert vocabulary is not None
    match feature.kind:
        case "id":
            return ids(rows, column, vocabulary)  # type: ignore[arg-type]
        case "ids":
            return _id_lists(rows, column, vocabulary)  # type: ignore[arg-type]
        case "vector":
            return _vectors(rows, column, feature.size)
    return numbers(rows, column, missing=True)


def _lists(rows: Rows, name: str) -> tuple[pa.Array, np.ndarray]:
    """The values of all lists in a row, and how many each has (0 for null)."""
    array = rows.column(name)
    if pa.types.is_null(array.type):
        return pa.array([], pa.int64()), np.zeros(len(array), np.int64)
    lengths = pc.list_value_length(array).fill_null(0).to_numpy(zero_copy_only=False).astype(np.int64)
    return array.drop_null().flatten(), lengths


def _id_lists(rows: Rows, name: str, vocabulary: Vocabulary) -> Ragged:
    values, lengths = _lists(rows, name)
    if pa.types.is_dictionary(values.type):
        values = values.dictionary_decode()
    values, bad = plain_ids(values)
    lists = Ragged(vocabulary.encode(values), offsets_of(lengths))
    wrong = np.bincount(lists.rows, bad, minlength=len(lists)) > 0
    expected = "expected a list of whole numbers below 2^63 or of UTF-8 texts"
    rows.reject(wrong, name, "a list with what is no id", expected)
    return lists.keep(lists.values >= 0)


def _vectors(rows: Rows, name: str, size: int) -> Ragged:
    values, lengths = _lists(rows, name)
    lists = Ragged(values.cast(pa.float32()).to_numpy(zero_copy_only=False), offsets_of(lengths))
    wrong = np.bincount(lists.rows, ~np.isfinite(lists.values), minlength=len(lists)) > 0
    absent = _nulls(rows.column(name))
    bad = wrong | ((lengths != size) & ~absent)
    rows.reject(bad, name, "another list", f"expected a list of {size} finite numbers or null")
    good = lengths == size
    filled = np.zeros((len(lists), size), np.float32)
    filled[good & ~wrong] = lists.take(np.flatnonzero(good & ~wrong)).values.reshape(-1, size)
    return Ragged(filled.ravel(), offsets_of(np.full(len(lists), size)))
