"""RecFlow's files as downloaded: which days there are, and the record batches of one day."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from joint.data.problems import Problems
from joint.errors import DataError, first_line
from joint.schema import Stage, day_number

PERIOD_2 = "2024-02-05"  # from this day on the ranking and re-ranking stages are logged whole (RecFlow 2.1)
UTC_OFFSET = 8 * 3600  # files are days in China
FOLDERS = ("all_stage", "realshow")

FLAGS = {
    "prerank_neg": Stage.PRERANK_NEG,
    "coarse_neg": Stage.COARSE_NEG,
    "rank_neg": Stage.RANK_NEG,
    "rerank_neg": Stage.RERANK_NEG,
    "rank_pos": Stage.RANK_POS,
    "rerank_pos": Stage.RERANK_POS,
    "realshow": Stage.EXPOSED,
}
CONTEXT = ("user_id", "device_id", "age", "gender", "province")
VIDEO = ("author_id", "category_level_one", "category_level_two", "upload_type", "upload_timestamp", "duration")
ORDERS = ("rank_index", "rerank_index")
FEEDBACK = ("playing_time", "effective_view", "long_view", "like", "follow", "forward", "comment")
COLUMNS = ("request_id", "request_timestamp", *CONTEXT, "video_id", *VIDEO, *FLAGS, *FEEDBACK, *ORDERS)
STAGES = "stage flags"
RENAMED = {"pre_rank_neg": "prerank_neg"}  # the paper's name for it


@dataclass(frozen=True)
class Day:
    """A day of the log and the file to read for it."""

    day: str
    path: Path
    logged: bool  # all stages; else the day has its exposures only, and makes no requests

    @property
    def number(self) -> int:
        """Days since 1970-01-01."""
        return day_number(self.day)

    @property
    def begin(self) -> int:
        """The first millisecond of the day, UNIX time."""
        return (self.number * 86_400 - UTC_OFFSET) * 1000

    @property
    def period(self) -> int:
        """RecFlow's sampling period."""
        return 2 if self.day >= PERIOD_2 else 1

    @property
    def identity(self) -> list[object]:
        """What tells an unchanged file: its place, size and time of change; DataError if it cannot be looked at."""
        try:
            stat = self.path.stat()
        except OSError as error:  # a link to nowhere, or to itself
            raise DataError(f"{self.path}: cannot be read ({error.strerror})") from error
        return [str(self.path.absolute()), stat.st_size, stat.st_mtime_ns]

    def report(
        self, problems: Problems, place: tuple[str, int], value: object, kind: str, expected: str, rows: int
    ) -> None:
        """Tell of `rows` wrong rows: of the first what stands there, or if they are skipped the kind alone.

        Args:
            place: column (or `STAGES`), and row (from 0; told from 1) of the first.
            value, kind: what was found there, and in words without numbers, so that rows of a kind add up.
        """
        name, row = place
        column = name if name == STAGES else f"column {name}"
        if problems.skip:
            problems.found(str(self.path), f"{column}: found {kind}; expected {expected}", rows)
        else:
            problems.found(f"{self.path}: {column}, row {row + 1}", f"found {value}; expected {expected}", rows)


def find_days(root: Path, chosen: str = "") -> tuple[list[Day], list[str]]:
    """The days of a RecFlow folder in time order, and warnings of files that are missing.

    Args:
        chosen: days and ranges A..B, separated by commas; '' is all of them.

    Raises:
        DataError: `root` is not RecFlow, a file is not named by a day, or a chosen day is not there.
    """
    files = {folder: _files(root / folder) for folder in FOLDERS}
    there = sorted({*files["all_stage"], *files["realshow"]})
    if not there:
        inside = (
            ", ".join(sorted(path.name for path in root.iterdir())[:5]) if root.is_dir() else "no folder of that name"
        )
        raise DataError(f"{root}: not RecFlow: expected all_stage/YYYY-MM-DD.feather; found: {inside or 'nothing'}")
    wanted = _choose(there, chosen) if chosen else there
    days = [
        Day(day, files[folder][day], folder == "all_stage")
        for day in wanted
        for folder in FOLDERS
        if day in files[folder] and (folder == "all_stage" or day not in files["all_stage"])
    ]
    warnings = [
        f"{root}: no all_stage/{day.day}.feather: the day makes no requests; its realshow feeds histories and pools"
        for day in days
        if not day.logged
    ]
    calendar = np.arange(np.datetime64(wanted[0]), np.datetime64(wanted[-1])).astype(str)
    gaps = [str(day) for day in calendar if day not in there]
    if gaps:
        warnings.append(f"{root}: no file at all for {', '.join(gaps)}: histories and activity have a gap")
    return days, warnings


def _files(folder: Path) -> dict[str, Path]:
    # Hidden ones are no days: macOS leaves a `._NAME` beside a NAME on other systems' disks.
    files = {path.stem: path for path in sorted(folder.glob("*.feather")) if not path.name.startswith(".")}
    for stem, path in files.items():
        _check_day(stem, f"{path}: ")
    return files


def _check_day(day: str, where: str) -> None:
    try:
        if re.fullmatch(r"\d{4}-\d\d-\d\d", day):
            day_number(day)
            return
    except ValueError:
        pass
    raise DataError(f"{where}{day!r} is not a day; expected YYYY-MM-DD")


def _choose(there: Sequence[str], chosen: str) -> list[str]:
    days: set[str] = set()
    for word in chosen.split(","):
        first, dots, last = (part.strip() for part in word.partition(".."))
        for day in (first, last) if dots else (first,):
            _check_day(day, "--days: ")
        found = {day for day in there if first <= day <= (last or first)}
        if not found:
            raise DataError(f"--days {word}: no such file; there are {there[0]} to {there[-1]}")
        days |= found
    return sorted(days)


def read_batches(day: Day) -> Iterator[dict[str, pa.Array]]:
    """The columns we need of a day's file under their plain names, one record batch after another.

    Memory is bounded by the largest batch of the file (pandas and pyarrow write 65,536 rows each).

    Raises:
        DataError: the file is not whole, lacks a column or has it twice, or a column holds no integers.
    """
    with _open(day.path) as source:
        reader, places = _reader(day, source)
        for number in range(reader.num_record_batches):
            batch = _batch(day.path, reader, number)
            yield {name: batch.column(place) for name, place in places.items()}


def _open(path: Path) -> pa.NativeFile:
    try:
        with path.open("rb") as file:
            start = file.read(6)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error
    if start[:4] == b"FEA1":
        raise DataError(f"{path}: Feather version 1; expected version 2 (pandas.read_feather, then to_feather)")
    if start != b"ARROW1":
        raise DataError(f"{path}: not a Feather file: it starts with {start!r}; expected b'ARROW1'")
    # Not memory-mapped: the pages of a 27 GB day would count as resident, and a shrinking file would kill us.
    return pa.OSFile(str(path))


def _reader(day: Day, source: pa.NativeFile) -> tuple[pa.ipc.RecordBatchFileReader, dict[str, int]]:
    """A reader of the columns we need, and the place of each of them in what it reads."""
    try:
        schema = pa.ipc.open_file(source).schema
        places = _places(day, schema)
        needed = sorted(places.values())
        options = pa.ipc.IpcReadOptions(included_fields=needed, use_threads=False)
        return pa.ipc.open_file(source, options=options), {name: needed.index(i) for name, i in places.items()}
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{day.path}: not a whole Feather file ({first_line(error)})") from error


def _places(day: Day, schema: pa.Schema) -> dict[str, int]:
    """Our columns' places in the file. Names may carry spaces; exposures alone may come without stage columns."""
    names = [RENAMED.get(name.strip(), name.strip()) for name in schema.names]
    may_lack = () if day.logged else (*FLAGS, *ORDERS)
    missing = [name for name in COLUMNS if name not in names and name not in may_lack]
    if missing:
        raise DataError(f"{day.path}: no column {', '.join(missing)}; found: {', '.join(schema.names)}")
    twice = [name for name in COLUMNS if names.count(name) > 1]
    if twice:
        raise DataError(f"{day.path}: column {', '.join(twice)}: found twice (spaces stripped); expected once")
    places = {name: names.index(name) for name in COLUMNS if name in names}
    for name, place in places.items():
        kind = schema.field(place).type
        if not (pa.types.is_integer(kind) or pa.types.is_boolean(kind)):
            raise DataError(f"{day.path}: column {name}: found type {kind}; expected integers")
    return places


def _batch(path: Path, reader: pa.ipc.RecordBatchFileReader, number: int) -> pa.RecordBatch:
    try:
        batch = reader.get_batch(number)
        batch.validate(full=True)
    except (pa.ArrowException, OSError) as error:
        raise DataError(
            f"{path}: record batch {number + 1} cannot be read ({first_line(error)}); is the file whole?"
        ) from error
    return batch
