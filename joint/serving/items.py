"""`items.parquet`: ids, features and vectors of all items; row number = row of the vectors and of the indices."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from joint.data.requests import Column, from_arrow
from joint.schema import NEVER, first_day_column
from joint.serving.manifest import Manifest, inside, reading
from joint.serving.words import Words

FILE = "items.parquet"
FEATURE = "feature."  # before the names of the columns that hold features, as ids
VECTORS = ("v", "pi")  # of the retrieval and the pre-ranking head


class Items:
    """The catalogue of an export.

    Raises:
        ExportError: it cannot be read, or its vectors are of another model.
    """

    def __init__(self, manifest: Manifest) -> None:
        said = manifest.json["items"]
        path = inside(manifest.folder, said["file"])
        with reading(path):
            table = pq.ParquetFile(path).read()
        manifest.check_model((table.schema.metadata or {}).get(b"model_hash", b"").decode(), path)
        self.ids = table.column("item_id").combine_chunks()
        self.words = Words(self.ids)
        names = [name for name in table.column_names if name.startswith(FEATURE)]
        columns = from_arrow(table.select(names)).columns
        self.catalogue: Mapping[str, Column] = {name.removeprefix(FEATURE): columns[name] for name in names}
        pools = [name.removeprefix("first_day").removeprefix(".") for name in table.column_names if _is_day(name)]
        self.first_day = {pool: table.column(first_day_column(pool)).to_numpy() for pool in pools}
        self.vectors = {name: _matrix(table.column(name)) for name in VECTORS if name in table.column_names}

    def __len__(self) -> int:
        return len(self.ids)

    def names(self, rows: np.ndarray) -> list[object]:
        """The ids of rows, as logs and requests write them."""
        names: list[object] = self.ids.take(pa.array(rows)).to_pylist()
        return names

    def of_pool(self, pool: str) -> np.ndarray:
        """The rows that are ever in a pool, ascending: what its index holds. int64."""
        return np.flatnonzero(self.first_day[pool] < NEVER)


def _is_day(name: str) -> bool:
    return name == "first_day" or name.startswith("first_day.")


def _matrix(column: pa.ChunkedArray) -> np.ndarray:
    """`[rows, width]` of a column of lists of one length; its vectors lie side by side."""
    width = column.type.list_size
    flat = [chunk.flatten().to_numpy(zero_copy_only=False) for chunk in column.chunks]
    values = flat[0] if len(flat) == 1 else np.concatenate([np.zeros(0, np.float32), *flat])
    return np.ascontiguousarray(values, np.float32).reshape(-1, width)
