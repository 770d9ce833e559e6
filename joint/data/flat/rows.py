"""The rows of a log, of its items and users and of further event files: read into arrays, bad rows left out.

A row's own columns are called `log.user`, `log.item` (codes), `log.time` (microseconds), `log.day`, `log.source` (file
and row), `log.request`, `log.stages` and `log.group`; labels, orders and features have the names of the map.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Literal

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from joint.data.flat.columns import (
    BAD_ID,
    Rows,
    days_of,
    feature_values,
    flags,
    ids,
    numbers,
    plain_ids,
    stages_of,
    times,
)
from joint.data.flat.files import Source
from joint.data.flat.map import Discovery, LogHistory, LogMap, Score, Table, time_of
from joint.data.flat.vocabulary import Vocabulary
from joint.data.problems import Problems
from joint.data.requests import Column, Requests
from joint.schema import NEVER, day_name

ROW_BITS = 40  # of log.source: row within its file
Vocabularies = Mapping[str, Vocabulary]  # id space -> its words


def spaces(m: LogMap) -> list[str]:
    """The id spaces of a map, in order."""
    of_features = [m.space(name) for name, feature in m.features.items() if feature.kind in ("id", "ids")]
    group = [] if isinstance(m.group, str) else ["group"]
    return list(dict.fromkeys(["user_id", "item_id", *of_features, *group]))


def read_log(
    source: Source, m: LogMap, vocabularies: Vocabularies, problems: Problems, *, last_day: int | None
) -> Iterator[Requests]:
    """Batches of good rows.

    Args:
        last_day: of the dataset that is appended to; rows have to be of later days.
    """
    levels = ("request", "event") if m.items else ("request", "event", "item")
    for number, rows in source.batches(problems, what="reading"):
        keys = _keys(rows, m, vocabularies)
        columns: dict[str, Column] = {**keys}
        if last_day is not None:
            name = time_of(m.time).column
            rows.reject(
                keys["log.day"] <= last_day,
                name,
                "an earlier time",
                f"expected a time after {day_name(last_day)}, the last day that the dataset holds",
            )
        columns["log.source"] = (number << ROW_BITS) + rows.first + np.arange(len(rows.table))
        if m.request:
            columns["log.request"] = request_ids(rows, m.request)
        columns["log.stages"] = stages_of(rows, m.stages)
        columns |= _labels(rows, m)
        columns |= {name: _places(rows, column) for name, column in m.orders.items()}
        columns |= {name: _logits(rows, score) for name, score in m.scores.items()}
        columns |= _features(rows, m, vocabularies, *levels)
        if not isinstance(m.group, str):
            columns["log.group"] = ids(rows, m.group.column, vocabularies["group"])
        yield _good(rows, columns)


def read_history(
    source: Source, name: str, m: LogMap, vocabularies: Vocabularies, problems: Problems, *, last_day: int | None
) -> Iterator[Requests]:
    """Batches of the events of a history's own file; those up to `last_day` are left out, as the dataset has them."""
    history = m.histories[name]
    for _, rows in source.batches(problems, what=f"history {name}"):
        keys = _keys(rows, m, vocabularies, history)
        columns: dict[str, Column] = {**keys}
        rows.keep &= keys["log.day"] > (-NEVER if last_day is None else last_day)
        of = {event: m.features[event] for event in history.events}
        columns |= {e: feature_values(rows, e, f, vocabularies.get(m.space(e))) for e, f in of.items()}
        yield _good(rows, columns)


def read_watch_log(
    source: Source, name: str, m: LogMap, vocabularies: Vocabularies, problems: Problems, *, last_day: int | None
) -> Iterator[Requests]:
    """Batches of playbacks: `minutes` above 0 and whether they were `exploring`; those up to `last_day` left out."""
    of = m.discoveries[name]
    for _, rows in source.batches(problems, what=f"watch log of {name}"):
        keys = _keys(rows, m, vocabularies, of)
        rows.keep &= keys["log.day"] > (-NEVER if last_day is None else last_day)
        watched = _watched(rows, of, m.columns[name].scale)
        rows.keep &= watched["minutes"] > 0
        yield _good(rows, {**keys, **watched})


def read_table(
    source: Source | None,
    section: Literal["items", "users"],
    table: Table | None,
    m: LogMap,
    vocabularies: Vocabularies,
    problems: Problems,
) -> list[Requests]:
    """The rows of the items or users file: `key` (codes, each once) and features; of items also days.

    `first_day`, and `first_day.POOL` for each pool with a column: NEVER where the file knows none.
    """
    if source is None or table is None:
        return []
    space, level = ("item_id", "item") if section == "items" else ("user_id", "user")
    batches: list[Requests] = []
    seen = np.zeros(0, bool)
    for _, rows in source.batches(problems, what=section):
        key = ids(rows, table.key, vocabularies[space], required=True)
        columns: dict[str, Column] = {"key": key, **_features(rows, m, vocabularies, level)}
        if section == "items":
            columns |= _days(rows, table, m)
        seen = np.append(seen, np.zeros(max(0, key.max(initial=0) + 1 - len(seen)), bool))
        good = np.flatnonzero(rows.keep)
        twice = seen[key]
        twice[good] |= pd.Series(key[good]).duplicated().to_numpy()
        rows.reject(twice, table.key, "an id for the second time", f"expected each of the {section} once")
        seen[key[rows.keep]] = True
        batches.append(_good(rows, columns))
    return batches


def _keys(
    rows: Rows, m: LogMap, vocabularies: Vocabularies, own: LogHistory | Discovery | None = None
) -> dict[str, np.ndarray]:
    """User, item and time, from columns called as in the log or as `own` says."""
    user, item, time = (own and own.user) or m.user, (own and own.item) or m.item, (own and own.time) or m.time
    micro = times(rows, time_of(time), m.timezone)
    return {
        "log.user": ids(rows, user, vocabularies["user_id"], required=True),
        "log.item": ids(rows, item, vocabularies["item_id"], required=True),
        "log.time": micro,
        "log.day": days_of(micro, m.timezone),
    }


def request_ids(rows: Rows, name: str) -> np.ndarray:
    """Request ids as int64: integers as they are, strings as a hash of 64 bits."""
    array, bad = plain_ids(rows.column(name))
    rows.reject(bad, name, *BAD_ID)
    rows.reject(array.is_null().to_numpy(zero_copy_only=False), name, "null", "expected a request id")
    if pa.types.is_integer(array.type):
        return array.fill_null(0).to_numpy(zero_copy_only=False)
    words = array.cast(pa.string()).fill_null("").dictionary_encode()
    hashes = pd.util.hash_array(np.array(words.dictionary.to_pylist(), object), categorize=False).view(np.int64)
    return hashes[words.indices.to_numpy(zero_copy_only=False)]


def _labels(rows: Rows, m: LogMap) -> dict[str, Column]:
    columns: dict[str, Column] = {}
    for name, label in m.columns.items():
        if label.column:
            columns[name] = numbers(rows, label.column, missing=False, scale=label.scale).astype(np.float32)
        elif label.discovery and not label.discovery.watch_log:
            watched = _watched(rows, label.discovery, label.scale)
            columns |= {f"{name}.{part}": values for part, values in watched.items()}
    return columns


def _watched(rows: Rows, of: Discovery, scale: float) -> dict[str, np.ndarray]:
    minutes = numbers(rows, of.minutes, missing=False, scale=scale)
    rows.reject(minutes < 0, of.minutes, "less than 0", "expected minutes of at least 0")
    words, bad = plain_ids(rows.column(of.collection))
    rows.reject(bad, of.collection, *BAD_ID)
    exploring = pc.is_in(words.cast(pa.string()), pa.array(of.exploring, pa.string()))
    return {"minutes": np.nan_to_num(minutes), "exploring": exploring.to_numpy(zero_copy_only=False)}


def _places(rows: Rows, name: str) -> np.ndarray:
    values = np.nan_to_num(numbers(rows, name, missing=True), nan=-1)
    bad = (values % 1 != 0) | (values < -1) | (values >= 2**15)
    rows.reject(bad, name, "another number", "expected a place from 0 to 32767, or null")
    return values.clip(-1, 2**15 - 1).astype(np.int16)


def _logits(rows: Rows, score: Score) -> np.ndarray:
    """Scores as logits, float32, NaN where there is none; probabilities are kept 1e-6 away from 0 and 1."""
    values = numbers(rows, score.column, missing=True)
    if score.of == "probability":
        rows.reject(
            (values < 0) | (values > 1), score.column, "no probability", "expected a number from 0 to 1, or null"
        )
        values = values.clip(1e-6, 1 - 1e-6)
        values = np.log(values / (1 - values))
    return values.astype(np.float32)


def _features(rows: Rows, m: LogMap, vocabularies: Vocabularies, *levels: str) -> dict[str, Column]:
    return {
        name: feature_values(rows, name, feature, vocabularies.get(m.space(name)))
        for name, feature in m.features_of(*levels).items()
    }


def _days(rows: Rows, table: Table, m: LogMap) -> dict[str, Column]:
    """The first day of items, and the days on which they join the pools that have a column."""
    columns: dict[str, Column] = {}
    if table.first_day:
        columns["first_day"] = _day_or_never(rows, m, table.first_day)
    for name, pool in m.pools.items():
        if pool.column and pa.types.is_boolean(rows.column(pool.column).type):
            columns[f"first_day.{name}"] = np.where(flags(rows, pool.column), 0, NEVER).astype(np.int32)
        elif pool.column:
            columns[f"first_day.{name}"] = _day_or_never(rows, m, pool.column)
    return columns


def _day_or_never(rows: Rows, m: LogMap, time: object) -> np.ndarray:
    of = time_of(time)  # type: ignore[arg-type]
    day = days_of(times(rows, of, m.timezone, required=False), m.timezone)
    return np.where(rows.column(of.column).is_null().to_numpy(zero_copy_only=False), NEVER, day).astype(np.int32)


def _good(rows: Rows, columns: Mapping[str, Column]) -> Requests:
    return Requests(columns).take(np.flatnonzero(rows.keep))
