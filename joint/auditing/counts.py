"""What an audit counts in its one pass over the requests."""

from __future__ import annotations

from collections.abc import Iterator
from functools import reduce
from operator import or_

import numpy as np

from joint.auditing.chunks import Chunk, user_count
from joint.data.dataset import Dataset
from joint.data.ragged import Ragged, draw
from joint.data.requests import Column
from joint.schema import STAGES, Feature, Stage, table_rows

BINS = 20  # of a float feature, by its quantiles
SEED = 0  # of the hash that samples requests
CUT = Stage.RANDOM | Stage.PRERANK_NEG | Stage.COARSE_NEG  # such a candidate never came as far as ranking
LABEL_COUNTS = ("exposures", "observed", "positive", "sum")


class Counts:
    """Counts by name, each an array that is as long as what it counts has kinds.

    `rows[day, split]` [requests, candidates, then one entry a logged stage], `labels[day, split]` [labels, 4] (as in
    LABEL_COUNTS), `oddities` [repeated, contradictory] and `reach[split, pool]` [exposures in the pool on their day,
    exposures] are of every row, as are in `of` the kinds `shown` and `logged` (per item), `users` and `exposures`
    (per user) and `missing` ([missing, all]). The kinds `space`, `head` (per item), `feature` (per code) and
    `history` ([lists, empty ones, events]) are of the sampled requests.

    Args:
        sample: about so many requests of a file are sampled, by a seeded hash of their ids; None: all.
    """

    def __init__(self, dataset: Dataset, sample: int | None) -> None:
        self.dataset = dataset
        self.sample = sample
        schema = dataset.schema
        self.features = [feature for feature in schema.features if feature.level == "request"]
        self.events = [(h.name, schema.feature(event)) for h in schema.histories for event in h.events]
        self.codes = Codes()
        self.rows: dict[tuple[str, str], np.ndarray] = {}
        self.labels: dict[tuple[str, str], np.ndarray] = {}
        self.reach: dict[tuple[str, str], np.ndarray] = {}
        self.oddities = np.zeros(2, np.int64)
        self.of: dict[tuple[str, str, str], np.ndarray] = {}  # kind, split, name

    def get(self, kind: str, split: str, name: str = "") -> np.ndarray | None:
        """Those counts, or None where nothing was counted."""
        return self.of.get((kind, split, name))

    def all(self, kind: str) -> Iterator[tuple[str, str, np.ndarray]]:
        """Split, name and counts of everything of that kind."""
        yield from ((split, name, some) for (other, split, name), some in self.of.items() if other == kind)

    def set_bins(self, chunk: Chunk) -> None:
        """Bin the floats by these requests."""
        for name, feature, column in self._columns(chunk):
            self.codes(name, feature, column)

    def add(self, chunk: Chunk) -> None:
        """Count some requests."""
        self._rows(chunk)
        self._labels(chunk)
        self._long_tail(chunk)
        for name, feature, column in self._columns(chunk):
            absent = missing(feature, column)
            self._sum("missing", chunk.part.split, name, np.array([absent.sum(), len(absent)]))
        if self.sample is not None:
            chance = min(self.sample / chunk.part.rows, 1.0)
            kept = np.flatnonzero(draw(SEED, chunk.ids) <= np.uint64(chance * (2**64 - 2**11)))
            chunk = Chunk(chunk.dataset, chunk.part, chunk.requests.take(kept))
        self._spaces(chunk)
        self._distributions(chunk)

    def _rows(self, chunk: Chunk) -> None:
        stages = [np.count_nonzero(chunk.stages & STAGES[name]) for name in self.dataset.schema.stages]
        new = np.array([len(chunk.requests), len(chunk.stages), *stages])
        key = chunk.part.day, chunk.part.split
        self.rows[key] = self.rows.get(key, 0) + new
        pairs = np.sort(chunk.rows * self.dataset.schema.items + chunk.items.values)
        both = chunk.exposed & ((chunk.stages & int(CUT)) != 0)
        self.oddities += [np.count_nonzero(pairs[1:] == pairs[:-1]), np.count_nonzero(both)]

    def _labels(self, chunk: Chunk) -> None:
        new = np.zeros((len(self.dataset.schema.labels), len(LABEL_COUNTS)))
        for place, name in enumerate(self.dataset.schema.labels):
            shown = chunk.label(name)[chunk.exposed].astype(np.float64)
            known = shown[~np.isnan(shown)]
            new[place] = len(shown), len(known), np.count_nonzero(known > 0), known.sum()
        key = chunk.part.day, chunk.part.split
        self.labels[key] = self.labels.get(key, 0) + new

    def _long_tail(self, chunk: Chunk) -> None:
        split, items, shown = chunk.part.split, self.dataset.schema.items, chunk.items.values[chunk.exposed]
        self._tally("shown", split, "", items, shown)
        self._tally("logged", split, "", items, chunk.items.values)
        if chunk.users is not None:
            users = user_count(self.dataset)
            self._tally("users", split, "", users, chunk.users)
            self._tally("exposures", split, "", users, chunk.users[chunk.rows[chunk.exposed]])
        for pool in self.dataset.schema.pools:
            inside = np.count_nonzero(self.dataset.first_day[pool][shown] <= chunk.day)
            self.reach[split, pool] = self.reach.get((split, pool), 0) + np.array([inside, len(shown)])

    def _spaces(self, chunk: Chunk) -> None:
        split, items, schema = chunk.part.split, chunk.items.values, self.dataset.schema
        for name in schema.stages:
            member = chunk.exposed if name == "exposed" else ((chunk.stages & STAGES[name]) != 0) & ~chunk.exposed
            self._tally("space", split, name, schema.items, items[member])
        for head, stages in schema.input_space.items():
            flags = reduce(or_, (STAGES[name] for name in stages), Stage(0))
            self._tally("head", split, head, schema.items, items[(chunk.stages & int(flags)) != 0])

    def _distributions(self, chunk: Chunk) -> None:
        for name, feature, column in self._columns(chunk):
            codes = self.codes(name, feature, column).values
            self._tally("feature", chunk.part.split, name, self.codes.size(feature), codes)
        for history in self.dataset.schema.histories:
            lengths = chunk.requests.lists(history.name).lengths
            new = np.array([len(lengths), np.count_nonzero(lengths == 0), lengths.sum()])
            self._sum("history", chunk.part.split, history.name, new)

    def _columns(self, chunk: Chunk) -> Iterator[tuple[str, Feature, Column]]:
        """The request features, then the event features, those as plain arrays of one value an event."""
        for feature in self.features:
            yield feature.name, feature, chunk.requests.columns[feature.name]
        for history, feature in self.events:
            name = f"{history}.{feature.name}"
            yield name, feature, chunk.requests.lists(name).values

    def _tally(self, kind: str, split: str, name: str, size: int, values: np.ndarray) -> None:
        key = kind, split, name
        if key not in self.of:
            self.of[key] = np.zeros(size, np.int32)
        np.add.at(self.of[key], values, 1)  # in place: a catalogue may have many millions of items

    def _sum(self, kind: str, split: str, name: str, new: np.ndarray) -> None:
        self.of[kind, split, name] = self.of.get((kind, split, name), 0) + new


class Codes:
    """Values of features as small integers that can be counted; 0 is a missing value.

    Ids are their own codes. A float's code is its bin between quantiles of the first column that was seen under its
    name; a vector's components have their own bins each, so that a distance between two counts of a vector is the
    mean over its components (of the divergence, or of the total variation).
    """

    def __init__(self) -> None:
        self._edges: dict[str, np.ndarray] = {}  # name -> [components, BINS - 1]

    def __call__(self, name: str, feature: Feature, column: Column) -> Ragged:
        """The codes of every row, as lists: one code for an id or a float, one a value otherwise."""
        values = column if isinstance(column, Ragged) else Ragged(column, np.arange(len(column) + 1))
        if feature.kind in ("id", "ids"):
            return values.with_values(table_rows(values.values, feature.size)[0])
        place = np.arange(len(values.values)) - values.offsets[:-1][values.rows] if feature.kind == "vector" else 0
        place = np.broadcast_to(place, values.values.shape)
        numbers = values.values.astype(np.float64)
        if name not in self._edges and len(numbers):
            self._edges[name] = _quantiles(numbers, place, _components(feature))
        codes = np.zeros(len(numbers), np.int64)
        for component, edges in enumerate(self._edges.get(name, ())):
            here = place == component
            binned = 1 + np.searchsorted(edges, numbers[here], side="right")
            codes[here] = component * (BINS + 1) + np.where(np.isnan(numbers[here]), 0, binned)
        return values.with_values(codes)

    def size(self, feature: Feature) -> int:
        """How many codes there are."""
        return feature.size if feature.kind in ("id", "ids") else _components(feature) * (BINS + 1)


def missing(feature: Feature, column: Column) -> np.ndarray:
    """Rows without a single known value, bool [rows]: unknown ids (0, or outside of the vocabulary), NaN, no list."""
    values = column.values if isinstance(column, Ragged) else column
    known = table_rows(values, feature.size)[0] > 0 if feature.kind in ("id", "ids") else ~np.isnan(values)
    return np.bincount(column.rows[known], minlength=len(column)) == 0 if isinstance(column, Ragged) else ~known


def _components(feature: Feature) -> int:
    return feature.size if feature.kind == "vector" else 1


def _quantiles(numbers: np.ndarray, place: np.ndarray, components: int) -> np.ndarray:
    shares = np.linspace(0, 1, BINS + 1)[1:-1]
    edges = np.zeros((components, BINS - 1))
    for component in range(components):
        known = numbers[(place == component) & ~np.isnan(numbers)]
        edges[component] = np.quantile(known, shares) if len(known) else 0
    return edges
