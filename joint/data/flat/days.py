"""Requests put aside by day and bucket of users -> the dataset's files, each day's in time order."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType

import numpy as np
import pyarrow as pa

from joint.data.dataset import DatasetWriter
from joint.data.requests import Requests, from_arrow, to_arrow
from joint.progress import progress

PART = 32_768  # requests a file, at most


class DayFile:
    """The requests of one day and bucket, in order of (timestamp, request_id)."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._writer: pa.ipc.RecordBatchFileWriter | None = None

    def __enter__(self) -> DayFile:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        if self._writer is not None:
            self._writer.close()

    def write(self, requests: Requests) -> None:
        """The next requests. Not compressed: a slice of the mapped file is read without the rest."""
        table = to_arrow(requests)
        if self._writer is None:
            self._writer = pa.ipc.new_file(self.path, table.schema)
        self._writer.write_table(table)


def write_days(folder: Path, writer: DatasetWriter, split_of: Mapping[str, str]) -> None:
    """Merge the files of each day into the dataset's, and remove them."""
    days = sorted(path.name for path in folder.iterdir())
    for day in progress(days, "writing", unit="day"):
        for requests in _merged(sorted((folder / day).iterdir())):
            writer.add(requests, day=day, split=split_of[day])
        for path in (folder / day).iterdir():
            path.unlink()


def _merged(paths: list[Path]) -> Iterator[Requests]:
    """The requests of all files in order of (timestamp, request_id), PART at a time."""
    tables = [pa.ipc.open_file(pa.memory_map(str(path))).read_all() for path in paths]
    keys = [np.concatenate([table[name].to_numpy() for table in tables]) for name in ("request_id", "timestamp")]
    order = np.lexsort(keys)
    ends = np.cumsum([len(table) for table in tables])
    file = np.searchsorted(ends, np.arange(len(order)), side="right")  # of a request; each file is in order
    taken = np.zeros(len(tables), np.int64)
    for begin in range(0, len(order), PART):
        chosen = order[begin : begin + PART]
        counts = np.bincount(file[chosen], minlength=len(tables))
        parts = [table.slice(taken[i], counts[i]) for i, table in enumerate(tables)]
        offset = np.cumsum(counts) - counts
        starts = ends - [len(table) for table in tables]
        place = chosen - (starts + taken)[file[chosen]] + offset[file[chosen]]
        taken += counts
        yield from_arrow(pa.concat_tables(parts).take(place).combine_chunks())
