"""Requests in memory, column by column: plain arrays for scalars, `Ragged` for lists."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from joint.data.ragged import Ragged, concatenate

Column = np.ndarray | Ragged


@dataclass(frozen=True)
class Requests:
    """Some requests; every column has one entry a request."""

    columns: Mapping[str, Column]

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def scalars(self, name: str) -> np.ndarray:
        """A column with one value a request."""
        column = self.columns[name]
        assert isinstance(column, np.ndarray), name
        return column

    def lists(self, name: str) -> Ragged:
        """A column with one list a request."""
        column = self.columns[name]
        assert isinstance(column, Ragged), name
        return column

    def take(self, rows: np.ndarray) -> Requests:
        """The requests at `rows`, in that order."""
        return Requests({name: c.take(rows) if isinstance(c, Ragged) else c[rows] for name, c in self.columns.items()})

    def between(self, first: int, last: int) -> Requests:
        """The requests `first` .. `last` - 1, not copied."""
        columns = self.columns.items()
        return Requests({n: c.between(first, last) if isinstance(c, Ragged) else c[first:last] for n, c in columns})


def concatenate_requests(parts: Sequence[Requests]) -> Requests:
    """The requests of all parts, one part after another."""
    if len(parts) == 1:
        return parts[0]
    columns: dict[str, Column] = {}
    for name, first in parts[0].columns.items():
        if isinstance(first, Ragged):
            columns[name] = concatenate([part.lists(name) for part in parts])
        else:
            columns[name] = np.concatenate([part.scalars(name) for part in parts])
    return Requests(columns)


def to_arrow(requests: Requests) -> pa.Table:
    """As an Arrow table; NaN in a list of labels becomes null (feedback not observed)."""
    return pa.table({name: _arrow_column(column) for name, column in requests.columns.items()})


def from_arrow(table: pa.Table) -> Requests:
    """From an Arrow table; null in a list of labels becomes NaN."""
    return Requests({name: _numpy_column(table.column(name).combine_chunks()) for name in table.column_names})


def _arrow_column(column: Column) -> pa.Array:
    if not isinstance(column, Ragged):
        return pa.array(column)
    nan = np.isnan(column.values) if column.values.dtype.kind == "f" else None
    return pa.ListArray.from_arrays(pa.array(column.offsets.astype(np.int32)), pa.array(column.values, mask=nan))


def _numpy_column(array: pa.Array) -> Column:
    if not pa.types.is_list(array.type):
        return array.to_numpy(zero_copy_only=False)
    # A slice's offsets need not start at 0; `flatten`, unlike `values`, honours the slice.
    offsets = array.offsets.to_numpy().astype(np.int64)
    return Ragged(array.flatten().to_numpy(zero_copy_only=False), offsets - offsets[0])
