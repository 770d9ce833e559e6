"""The dataset that a log is appended to: what it knows, what it goes on from, and its files, used again.

Inside the dataset lies `state/`, which only an append reads and the hash leaves out:

    statistics.json             what was fixed on the first training days
    history.NAME.parquet        user, item, time and features of events that later requests may still have in their past
    active.parquet              user, day: the last 30 days with a row
    playbacks.LABEL.parquet     user, item, time, minutes, exploring: first playbacks, and those of the last window
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from joint.configuring.settings import differences, plain
from joint.data.dataset import Dataset, DatasetWriter, write_part
from joint.data.flat.map import LogMap, seconds
from joint.data.ragged import draw
from joint.data.requests import Requests, from_arrow, to_arrow
from joint.errors import DataError, first_line
from joint.schema import Part, Schema, Stage, day_number

FILES_OF_THE_MAP = ("file", "watch_log")  # keys that may differ between appends: where files lie


@dataclass(frozen=True)
class Old:
    """A dataset that `joint.prepare parquet` wrote."""

    directory: Path
    schema: Schema
    statistics: dict[str, list[float]]

    @property
    def end(self) -> int:
        """The second in which its last day ends."""
        end = self.schema.provenance["end"]
        assert isinstance(end, int)
        return end

    @property
    def last_day(self) -> int:
        """Its last day, as a number."""
        return max(day_number(part.day) for part in self.schema.parts)

    def words(self, space: str) -> list[object]:
        """The words of an id space."""
        values: list[object] = _read(self.directory / "vocabularies" / f"{space}.parquet")["value"].to_pylist()
        return values

    def catalogue(self) -> Requests:
        """`items.parquet`."""
        return from_arrow(_read(self.directory / "items.parquet"))

    @property
    def rows(self) -> int:
        """Rows in all files of `state/`."""
        paths = sorted((self.directory / "state").glob("*.parquet"))
        return sum(_opened(path).metadata.num_rows for path in paths)

    def state(self, name: str) -> Iterator[Requests]:
        """The rows of `state/NAME.parquet` in batches."""
        with _opened(self.directory / "state" / f"{name}.parquet") as file:
            for batch in file.iter_batches():
                yield from_arrow(pa.Table.from_batches([batch]))

    def requests_since(self, second: float) -> np.ndarray:
        """The ids of the requests in files that reach to this time or beyond, ascending, int64."""
        parts = [self.read(part, ["request_id"]) for part in self.schema.parts if part.end >= second]
        return np.unique(np.concatenate([np.zeros(0, np.int64), *(part.scalars("request_id") for part in parts)]))

    def exposures_since(self, second: float) -> Iterator[Requests]:
        """`user` (a code), `item` (a code), `time` (seconds) and `request` of exposures after this time."""
        columns = ["request_id", "timestamp", "user_id", "candidates", "stages"]
        for part in self.schema.parts:
            if part.end > second:
                requests = self.read(part, columns)
                items = requests.lists("candidates")
                late = requests.scalars("timestamp")[items.rows] > second
                shown = late & ((requests.lists("stages").values & Stage.EXPOSED) != 0)
                row = items.rows[shown]
                yield Requests(
                    {
                        "user": requests.scalars("user_id")[row] - 1,
                        "item": items.values[shown],
                        "time": requests.scalars("timestamp")[row],
                        "request": requests.scalars("request_id")[row],
                    }
                )

    def read(self, part: Part, columns: list[str] | None = None) -> Requests:
        """Columns of a file of requests."""
        return from_arrow(_read(self.directory / part.path, columns))


def _read(path: Path, columns: list[str] | None = None) -> pa.Table:
    with _opened(path) as file:
        return file.read(columns)


def _opened(path: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: cannot be read ({first_line(error)}); the dataset cannot be appended to") from error


def open_old(out: Path, m: LogMap) -> Old:
    """The dataset at OUT, prepared with this map.

    Raises:
        DataError: there is none, it is damaged, of another source, or its map said otherwise.
    """
    schema = Dataset(out).schema
    before = schema.provenance.get("map")
    if not isinstance(before, dict):
        raise DataError(f"{out}: is not of joint.prepare parquet; expected a dataset that a log can be appended to")
    before = {"scores": {}} | before  # a key that older maps lack
    changed = [line for line in differences(before, plain(m)) if _key(line) not in FILES_OF_THE_MAP]
    if changed:
        raise DataError("\n".join(f"{out}: was prepared with another map: {line} (now)" for line in changed))
    path = out / "state" / "statistics.json"
    try:
        return Old(out, schema, json.loads(path.read_text()))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read ({first_line(error)}); the dataset cannot be appended to") from error


def _key(line: str) -> str:
    return line.split(":")[0].split(".")[-1]


@dataclass(frozen=True)
class Matured:
    """Minutes of old exposures, worked out again with the playbacks of the days that are appended."""

    since: float  # exposures after this second
    found: Requests  # `request`, `item`, `minutes`: the exposures that have some


def take_over(old: Old, writer: DatasetWriter, split_of: Mapping[str, str], matured: Mapping[str, Matured]) -> None:
    """Put the old request files into the new dataset.

    A file is a hard link (a copy, where the disk has none) to what it was, except that a file whose split has moved,
    or whose minutes were not mature, is written again: of a daily append that is the files of the last few days.
    """
    for part in old.schema.parts:
        split = split_of[part.day]
        ripe = {name: of for name, of in matured.items() if part.end > of.since}
        if split == part.split and not ripe:
            writer.parts.append(part)
            _link(old.directory / part.path, writer.temporary / part.path)
            continue
        requests = old.read(part)
        columns = {name: column for name, column in requests.columns.items() if name != "split"}
        columns |= {name: requests.lists(name).with_values(_ripe(requests, name, of)) for name, of in ripe.items()}
        number = int(part.path.removesuffix(".parquet").rsplit("-", 1)[1])
        written = write_part(writer.temporary, Requests(columns), day=part.day, split=split, number=number)
        writer.parts.append(written)


def _ripe(requests: Requests, name: str, matured: Matured) -> np.ndarray:
    """The label's values with the minutes found since; what a later exposure has got instead becomes 0."""
    items, found = requests.lists("candidates"), matured.found
    values = requests.lists(name).values.copy()
    values[(values > 0) & (requests.scalars("timestamp")[items.rows] > matured.since)] = 0
    if len(found):
        key = draw(requests.scalars("request_id")[items.rows], items.values)
        known = draw(found.scalars("request"), found.scalars("item"))
        order = np.argsort(known)
        place = order[np.searchsorted(known[order], key).clip(max=len(order) - 1)]
        hit = known[place] == key
        values[hit] = found.scalars("minutes")[place[hit]]
    return values


def _link(old: Path, new: Path) -> None:
    new.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(old, new)
    except OSError:  # another disk, or a file system without links
        shutil.copyfile(old, new)


class StateFile:
    """One file of `state/`, written bucket by bucket."""

    def __init__(self, folder: Path, name: str) -> None:
        self.path = folder / f"{name}.parquet"
        self._writer: pq.ParquetWriter | None = None

    def write(self, rows: Requests, **words: pa.Array) -> None:
        """More rows, some columns as words rather than codes."""
        table = to_arrow(rows)
        for name, column in words.items():
            table = table.set_column(table.schema.get_field_index(name), name, column)
        if self._writer is None:
            self._writer = pq.ParquetWriter(self.path, table.schema, compression="zstd")
        self._writer.write_table(table)

    def close(self) -> None:
        """End writing."""
        if self._writer is not None:
            self._writer.close()


def mature(name: str, m: LogMap, end: int) -> float:
    """The second after which exposures had no final minutes when the log ended at second `end`."""
    of = m.discoveries[name]
    return end - seconds(of.window) - seconds(of.within)
