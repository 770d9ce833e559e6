"""The files of a log: opened, checked against the map before the first row is read, then read batch by batch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from zoneinfo import ZoneInfo

import pyarrow as pa
import pyarrow.parquet as pq

from joint.configuring.settings import Tree, near_miss, raise_at
from joint.data.flat.columns import Rows
from joint.data.flat.map import LogHistory, LogMap, Stages, Table, Time, time_of
from joint.data.problems import Problems
from joint.errors import DataError, first_line
from joint.progress import progress

Role = Literal["id", "ids", "number", "vector", "flag", "time", "stamp", "word", "date or flag"]
BATCH = 131_072  # rows read at a time
EXPECTED: Mapping[Role, str] = {
    "id": "integers or strings",
    "ids": "lists of integers or of strings",
    "number": "numbers",
    "vector": "lists of numbers",
    "flag": "booleans or integers",
    "time": "numbers, as the map gives a unit",
    "stamp": "timestamps or dates; numbers need a unit (s, ms or us)",
    "word": "strings or integers",
    "date or flag": "booleans, timestamps or dates",
}


@dataclass(frozen=True)
class Wanted:
    """A column that the map asks for."""

    path: str  # where in the map
    column: str
    role: Role


@dataclass(frozen=True)
class Source:
    """Files with the same columns, which were found to be what the map says."""

    files: tuple[Path, ...]
    wanted: tuple[Wanted, ...]
    rows: int
    families: Mapping[str, str]  # column of ids -> integer or string

    def batches(self, problems: Problems, *, what: str) -> Iterator[tuple[int, Rows]]:
        """The rows of all files in turn, with the number of their file, under a progress bar called `what`."""
        columns = list(dict.fromkeys(wanted.column for wanted in self.wanted))
        with progress(None, what, unit="row", total=self.rows) as bar:
            for number, path in enumerate(self.files):
                first = 0
                for table in _tables(path, columns):
                    yield number, Rows(str(path), first, table, problems)
                    first += len(table)
                    bar.update(len(table))


def _tables(path: Path, columns: Sequence[str]) -> Iterator[pa.Table]:
    try:
        for batch in pq.ParquetFile(path).iter_batches(BATCH, columns=columns):
            yield pa.Table.from_batches([batch])
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read ({first_line(error)}); expected a whole Parquet file") from error


def open_source(files: Sequence[str | Path], wanted: Sequence[Wanted], tree: Tree) -> Source:
    """Check that every file has every wanted column, of a type that it can be, and the same in all files.

    Raises:
        ConfigError: columns that are missing or of a wrong type, each at its line of the map.
        DataError: a file cannot be read, or has other types than the first.
    """
    paths = tuple(Path(file) for file in files)
    rows = 0
    first: dict[tuple[str, Role], tuple[str, Path]] = {}
    families: dict[str, str] = {}
    wrong: dict[tuple[str, str], None] = {}
    for path in paths:
        file = _opened(path)
        rows += file.metadata.num_rows
        schema = file.schema_arrow
        for want in wanted:
            if schema.names.count(want.column) != 1:
                missing = f"no column {want.column}{near_miss(want.column, schema.names)}"
                found = f"two columns {want.column}" if want.column in schema.names else missing
                wrong[want.path, f"{path} has {found}"] = None
                continue
            kind = schema.field(want.column).type
            family = _family(kind, want.role)
            if family is None:
                message = f"{path}: column {want.column} has {kind}; expected {EXPECTED[want.role]}"
                wrong[want.path, message] = None
                continue
            before, where = first.setdefault((want.column, want.role), (family, path)) if family else ("", path)
            if family and family != before:
                raise DataError(
                    f"{path}: column {want.column} has {family} values ({kind}); {where} has {before} values"
                )
            if family:
                families[want.column] = family
    raise_at(tree, wrong)
    return Source(paths, tuple(wanted), rows, families)


def _opened(path: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(path)
    except FileNotFoundError as error:
        raise DataError(f"{path}: not found; expected a Parquet file") from error
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not a whole Parquet file ({first_line(error)})") from error


def _family(kind: pa.DataType, role: Role) -> str | None:
    """What values of a type are in a role; None if they cannot play it, '' if there are none."""
    t = pa.types
    if t.is_dictionary(kind):
        return _family(kind.value_type, role)
    if t.is_null(kind):
        return ""
    is_list = t.is_list(kind) or t.is_large_list(kind) or t.is_fixed_size_list(kind)
    number = t.is_integer(kind) or t.is_floating(kind)
    dated = t.is_timestamp(kind) or t.is_date(kind)
    match role:
        case "id" | "word" if number or t.is_boolean(kind):
            return "integer"
        case "id" | "word" if t.is_string(kind) or t.is_large_string(kind) or t.is_string_view(kind):
            return "string"
        case "ids" if is_list:
            return _family(kind.value_type, "id")
        case "vector" if is_list and _family(kind.value_type, "number") is not None:
            return "vector"
        case "number" if number or t.is_boolean(kind) or t.is_decimal(kind):
            return "number"
        case "flag" if t.is_integer(kind) or t.is_boolean(kind):
            return "flag"
        case "time" if number:
            return "time"
        case "stamp" if dated:
            return "stamp"
        case "date or flag" if dated or t.is_boolean(kind):
            return "date" if dated else "flag"
    return None


def log_columns(m: LogMap) -> list[Wanted]:
    """The columns of the log."""
    wanted = [Wanted("user", m.user, "id"), Wanted("item", m.item, "id"), _time("time", m.time)]
    wanted += [Wanted("request", m.request, "id")] if m.request else []
    if isinstance(m.stages, Stages):
        wanted += [Wanted(f"stages.flags.{stage}", column, "flag") for stage, column in m.stages.flags.items()]
        wanted += [Wanted("stages.column", m.stages.column, "word")] if m.stages.column else []
    for name, label in m.columns.items():
        if label.column:
            path = f"labels.{name}" if isinstance(m.labels[name], str) else f"labels.{name}.column"
            wanted.append(Wanted(path, label.column, "number"))
        elif label.discovery and not label.discovery.watch_log:
            wanted += _watched(name, m)
    wanted += [Wanted(f"orders.{name}", column, "number") for name, column in m.orders.items()]
    wanted += [Wanted(f"scores.{name}.column", score.column, "number") for name, score in m.scores.items()]
    levels = ("request", "event") if m.items else ("request", "event", "item")
    wanted += feature_columns(m, *levels)
    return wanted + ([] if isinstance(m.group, str) else [Wanted("group.column", m.group.column, "id")])


def feature_columns(m: LogMap, *levels: str) -> list[Wanted]:
    """The columns of the features of these levels."""
    roles: dict[str, Role] = {"id": "id", "ids": "ids", "vector": "vector"}
    return [
        Wanted(f"features.{name}", feature.column or name, roles.get(feature.kind, "number"))
        for name, feature in m.features_of(*levels).items()
    ]


def _time(path: str, time: Time | str) -> Wanted:
    of = time_of(time)
    return Wanted(path if isinstance(time, str) else f"{path}.column", of.column, "time" if of.unit else "stamp")


def _watched(name: str, m: LogMap) -> list[Wanted]:
    of = m.discoveries[name]
    path = f"labels.{name}.discovery"
    return [Wanted(f"{path}.minutes", of.minutes, "number"), Wanted(f"{path}.collection", of.collection, "word")]


def watch_columns(name: str, m: LogMap) -> list[Wanted]:
    """The columns of a watch log."""
    of = m.discoveries[name]
    path = f"labels.{name}.discovery"
    keys = [Wanted(f"{path}.user", of.user or m.user, "id"), Wanted(f"{path}.item", of.item or m.item, "id")]
    return [*keys, _time(f"{path}.time", of.time or m.time), *_watched(name, m)]


def history_columns(name: str, history: LogHistory, m: LogMap) -> list[Wanted]:
    """The columns of a history's own file."""
    path = f"histories.{name}"
    keys = [Wanted(f"{path}.user", history.user or m.user, "id"), Wanted(f"{path}.item", history.item or m.item, "id")]
    events = [wanted for wanted in feature_columns(m, "event") if wanted.path.split(".")[1] in history.events]
    return [*keys, _time(f"{path}.time", history.time or m.time), *events]


def table_columns(section: Literal["items", "users"], table: Table, m: LogMap) -> list[Wanted]:
    """The columns of the items or users file."""
    wanted = [Wanted(f"{section}.key", table.key, "id")]
    if section == "users":
        return wanted + feature_columns(m, "user")
    wanted += [_time("items.first_day", table.first_day)] if table.first_day else []
    pools = [Wanted(f"pools.{name}.column", of.column, "date or flag") for name, of in m.pools.items() if of.column]
    return wanted + pools + feature_columns(m, "item")


def check_zone(m: LogMap, tree: Tree) -> None:
    """ConfigError if there is no such time zone."""
    try:
        ZoneInfo(m.timezone)
    except (ValueError, OSError, LookupError):
        raise_at(tree, [("timezone", f"'{m.timezone}' is not a time zone; expected one such as UTC or Europe/Berlin")])
