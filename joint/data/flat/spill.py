"""Rows put aside on disk by key, so that a log larger than memory is gathered one bucket at a time."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa

from joint.data.ragged import draw
from joint.data.requests import Requests, from_arrow, to_arrow


class Spill:
    """Temporary Arrow files, one for each bucket; rows of a key are all in the bucket that the key hashes to."""

    def __init__(self, folder: Path, buckets: int) -> None:
        folder.mkdir(parents=True)
        self.folder, self.buckets = folder, buckets
        self._writers: dict[int, pa.ipc.RecordBatchFileWriter] = {}

    def write(self, rows: Requests, key: np.ndarray) -> None:
        """Put rows aside by `key`, one integer a row."""
        bucket = (draw(key) % np.uint64(self.buckets)).astype(np.int64)
        order = np.argsort(bucket, kind="stable")
        ends = np.cumsum(np.bincount(bucket, minlength=self.buckets))
        table = to_arrow(rows.take(order))
        for number in np.unique(bucket):
            begin = ends[number - 1] if number else 0
            self._writer(int(number), table.schema).write_table(table.slice(begin, ends[number] - begin))

    def close(self) -> None:
        """End writing."""
        for writer in self._writers.values():
            writer.close()
        self._writers.clear()

    def read(self, bucket: int) -> Requests | None:
        """The rows of a bucket, in the order in which they were written; None if there are none."""
        path = self._path(bucket)
        return from_arrow(pa.ipc.open_file(pa.memory_map(str(path))).read_all()) if path.exists() else None

    def remove(self, bucket: int) -> None:
        """Free the bucket's room on disk."""
        self._path(bucket).unlink(missing_ok=True)

    def _path(self, bucket: int) -> Path:
        return self.folder / f"{bucket}.arrow"

    def _writer(self, bucket: int, schema: pa.Schema) -> pa.ipc.RecordBatchFileWriter:
        if bucket not in self._writers:
            options = pa.ipc.IpcWriteOptions(compression="lz4")
            self._writers[bucket] = pa.ipc.new_file(self._path(bucket), schema, options=options)
        return self._writers[bucket]
