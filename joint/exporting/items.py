"""`items.parquet` of an export: every item's id, features and vectors, made by the exported item tower itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnxruntime
import pyarrow as pa
import pyarrow.parquet as pq

from joint.data.dataset import Dataset
from joint.data.ragged import Ragged
from joint.data.requests import Column, Requests, to_arrow
from joint.keys import Reads
from joint.schema import first_day_column
from joint.serving.inputs import Arrays, blocks, item_inputs
from joint.serving.items import FEATURE

BLOCK = 16_384  # items that go through the tower at a time


def item_key(dataset: Dataset) -> str:
    """The item feature that tells items apart, by which requests name them: the first id that no two items share.

    '' where there is none: then items are named by their row.
    """
    for feature in dataset.schema.features:
        column = dataset.catalogue.get(feature.name)
        distinct = isinstance(column, np.ndarray) and len(np.unique(column)) == len(column)
        if distinct and feature.level == "item" and feature.kind == "id":
            return feature.name
    return ""


def item_words(dataset: Dataset, words: Mapping[str, pa.Array]) -> pa.Array:
    """What requests call the items, in order: words of the vocabulary, or where there is none the ids themselves."""
    key = item_key(dataset)
    if not key:
        return pa.array(np.arange(dataset.schema.items))
    ids, space = dataset.catalogue[key], dataset.schema.feature(key).space
    assert isinstance(ids, np.ndarray)
    return words[space].take(pa.array(ids - 1)) if space in words else pa.array(ids.astype(np.int64))


def item_vectors(graph: Path, reads: Reads, catalogue: Mapping[str, Column], rows: np.ndarray) -> Arrays:
    """`v [N, D]` and `pi [N, ...]` of these rows of the catalogue, by the exported graph."""
    session = onnxruntime.InferenceSession(str(graph), providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    parts = [session.run(names, item_inputs(reads, catalogue, rows[part])) for part in blocks(len(rows), BLOCK)]
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
