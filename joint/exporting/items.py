"""`items.parquet` of an export: every item's id, features and vectors, made by the exported item tower itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnxruntime
import pyarrow as pa
import pyarrow.parquet as pq

from joint.data.ragged import Ragged
from joint.data.requests import Column, Requests, to_arrow
from joint.keys import Reads
from joint.progress import progress
from joint.schema import first_day_column
from joint.serving.inputs import Arrays, blocks, item_inputs
from joint.serving.items import FEATURE

BLOCK = 16_384  # items that go through the tower at a time


def item_vectors(graph: Path, reads: Reads, catalogue: Mapping[str, Column], rows: np.ndarray) -> Arrays:
    """`v [N, D]` and `pi [N, ...]` of these rows of the catalogue, by the exported graph."""
    session = onnxruntime.InferenceSession(str(graph), providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    parts = [
        session.run(names, item_inputs(reads, catalogue, rows[part]))
        for part in progress(blocks(len(rows), BLOCK), "item vectors", unit="block")
    ]
    return {name: np.concatenate([part[place] for part in parts]) for place, name in enumerate(names)}


def items_table(
    ids: pa.Array,
    first_day: Mapping[str, np.ndarray],
    catalogue: Mapping[str, Column],
    features: Sequence[str],
    vectors: Arrays,
) -> pa.Table:
    """The columns of `items.parquet`; lists of vectors are flat."""
    columns: dict[str, Column] = {"row": np.arange(len(ids))}
    columns |= {first_day_column(pool): days for pool, days in first_day.items()}
    columns |= {FEATURE + name: _plain(catalogue[name]) for name in features}
    table = to_arrow(Requests(columns)).add_column(1, "item_id", ids)
    for name, values in vectors.items():
        flat = values.reshape(len(values), -1)
        lists = pa.FixedSizeListArray.from_arrays(pa.array(flat.reshape(-1)), flat.shape[1])
        table = table.append_column(name, lists)
    return table


def _plain(column: Column) -> Column:
    """Lists from offset 0 on, as Arrow's 32-bit offsets need them."""
    return Ragged(column.values, column.offsets) if isinstance(column, Ragged) else column


def write_items(path: Path, table: pa.Table, model_hash: str) -> None:
    """Write the table, and which model its vectors are of."""
    pq.write_table(table.replace_schema_metadata({"model_hash": model_hash}), path, compression="zstd")
