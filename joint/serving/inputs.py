"""Requests and items to the padded inputs of a graph, by the trainer's own look-up of columns and truncation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from joint.data.columns import Columns
from joint.data.ragged import Ragged, offsets_of
from joint.data.requests import Column, Requests
from joint.keys import Key, Reads

Arrays = dict[str, np.ndarray]
NOBODY = Requests({"nobody": np.zeros(1, np.int64)})  # whose candidates are any items at all


def request_inputs(reads: Reads, catalogue: Mapping[str, Column], requests: Requests) -> Arrays:
    """The inputs of the user tower: request features `[B, …]` and histories `[B, L, …]`, oldest event first.

    L is the longest history of these requests, at least 1; ids of a multi-valued feature likewise.
    """
    none = Ragged(np.zeros(0, np.int64), np.zeros(len(requests) + 1, np.int64))
    columns = Columns(reads, catalogue, requests, none, none.values)
    found: Arrays = {}
    for key in reads.keys:
        match key.side:
            case "request":
                found |= _flat(key, columns)
            case "history" | "competitors":
                found |= _of_events(key, columns)
    return found


def item_inputs(reads: Reads, catalogue: Mapping[str, Column], items: np.ndarray) -> Arrays:
    """The inputs of the item tower for these rows of the catalogue, `[N, …]`."""
    keys = tuple(key for key in reads.keys if key.side == "candidate")
    columns = Columns(Reads(keys, {}, {}, {}), catalogue, NOBODY, _of_one(items), items[:0])
    return _merged(_flat(key, columns) for key in keys)


def candidate_inputs(reads: Reads, catalogue: Mapping[str, Column], request: Requests, items: np.ndarray) -> Arrays:
    """All inputs of the ranking graph: one request and its candidates `[N, …]`, cross features with them."""
    columns = Columns(reads, catalogue, request, _of_one(items), items[:0])
    cross = {key.name: columns.numbers(key) for key in reads.keys if key.side == "cross"}
    return request_inputs(reads, catalogue, request) | item_inputs(reads, catalogue, items) | cross


def _of_one(items: np.ndarray) -> Ragged:
    return Ragged(items, np.array([0, len(items)]))


def _merged(parts: object) -> Arrays:
    return {name: array for part in parts for name, array in part.items()}  # type: ignore[attr-defined]


def _flat(key: Key, columns: Columns) -> Arrays:
    """A feature of requests or of candidates, row by row."""
    if not key.embedded:
        return {key.name: columns.numbers(key)}
    ids, lengths = columns.ids(key)
    values = ids.values.astype(np.int64)
    if lengths is None:
        return {key.name: values}
    return {key.name: padded(values, lengths), f"{key.name}.length": lengths}


def _of_events(key: Key, columns: Columns) -> Arrays:
    """A feature of past items, of what happened to them, or of what they won against."""
    events = columns.histories[key.history].lengths
    found: Arrays = {f"{key.history}.length": events}
    arrays = _flat(key, columns)
    if key.side == "competitors":
        others = columns.competitors[key.history].values.reshape(-1, columns.reads.competitors[key.history])
        arrays = {name: array.reshape(*others.shape, *array.shape[1:]) for name, array in arrays.items()}
        arrays[f"{key.history}.competitors"] = others >= 0
    return found | {name: padded(array, events) for name, array in arrays.items()}


def padded(values: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """`[rows, longest, …]` of consecutive rows' `values [sum of lengths, …]`; zeros behind; longest is at least 1."""
    longest = max(1, int(lengths.max(initial=0)))
    whole = np.zeros((len(lengths), longest, *values.shape[1:]), values.dtype)
    row = np.repeat(np.arange(len(lengths)), lengths)
    whole[row, np.arange(len(row)) - offsets_of(lengths)[:-1][row]] = values
    return whole


def blocks(count: int, size: int) -> Sequence[np.ndarray]:
    """0 .. count - 1 in blocks of at most `size`."""
    return [np.arange(begin, min(begin + size, count)) for begin in range(0, count, size)]
