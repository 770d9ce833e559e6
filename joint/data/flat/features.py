"""What is made of a feature's values: ids, normalised numbers, buckets; what that takes is fixed on training days."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from joint.data.flat.map import LogFeature, LogMap
from joint.data.flat.rows import Vocabularies
from joint.data.ragged import Ragged
from joint.data.requests import Column
from joint.schema import Feature

SAMPLE = 1_000_000  # values that statistics are computed from; of a smaller log all
GROUPS = 5
Statistics = Mapping[str, list[float]]  # feature -> mean and standard deviation, or the edges of its buckets
GROUP = "log.group"  # the edges of the activity groups


class Sample:
    """Some values of a feature: those with the smallest keys, whatever the order in which they came."""

    def __init__(self) -> None:
        self.values, self.keys = np.zeros(0), np.zeros(0, np.uint64)

    def add(self, values: np.ndarray, keys: np.ndarray) -> None:
        """More values (NaN is none) and their keys: hashes of what each belongs to, uint64."""
        known = ~np.isnan(values)
        self.values = np.concatenate([self.values, values[known]])
        self.keys = np.concatenate([self.keys, keys[known]])
        if len(self.values) > 2 * SAMPLE:
            self._keep(SAMPLE)

    def sorted(self) -> np.ndarray:
        """The sample, ascending."""
        self._keep(SAMPLE)
        return np.sort(self.values)

    def _keep(self, count: int) -> None:
        order = np.lexsort((self.values, self.keys))[:count]
        self.values, self.keys = self.values[order], self.keys[order]


def needs_statistics(feature: LogFeature) -> bool:
    """Whether something has to be fixed on training days."""
    return feature.normalise == "standard" or feature.quantiles > 0


def statistics_of(feature: LogFeature, values: np.ndarray) -> list[float]:
    """What `prepared` needs of a feature's values on training days, ascending."""
    if feature.quantiles:
        return quantile_edges(values, feature.quantiles)
    if not len(values):
        return [0.0, 1.0]
    return [float(values.mean()), float(values.std()) or 1.0]


def quantile_edges(values: np.ndarray, count: int) -> list[float]:
    """Edges, each once, of `count` buckets that hold equally many of the values."""
    if not len(values):
        return []
    return np.unique(np.quantile(values, np.arange(1, count) / count)).tolist()


def prepared(name: str, m: LogMap, column: Column, vocabularies: Vocabularies, statistics: Statistics) -> Column:
    """A feature's column as the dataset holds it: ids int64, floats float32 (missing is 0), vectors as they are."""
    feature = m.features[name]
    if isinstance(column, Ragged):
        if feature.kind == "vector":
            return column
        return column.with_values(vocabularies[m.space(name)].id_of(column.values))
    if feature.kind == "id":
        return vocabularies[m.space(name)].id_of(column)
    if feature.kind == "bucket":
        edges = np.array(feature.edges or statistics[name], np.float64)
        return np.where(np.isnan(column), 0, np.searchsorted(edges, column, side="right") + 1)
    if feature.normalise == "standard":
        mean, deviation = statistics[name]
        column = (column - mean) / deviation
    elif feature.normalise == "log":
        column = np.sign(column) * np.log1p(np.abs(column))
    return np.nan_to_num(column, nan=0).astype(np.float32)


def missing(name: str, m: LogMap, rows: int) -> Column:
    """The column of a feature that is known of none."""
    feature = m.features[name]
    if feature.kind == "id":
        return np.full(rows, -1, np.int32)
    if feature.kind == "ids":
        return Ragged(np.zeros(0, np.int32), np.zeros(rows + 1, np.int64))
    if feature.kind == "vector":
        return Ragged(np.zeros(rows * feature.size, np.float32), np.arange(rows + 1) * feature.size)
    return np.full(rows, np.nan)


def described(m: LogMap, vocabularies: Vocabularies, statistics: Statistics) -> tuple[Feature, ...]:
    """The features of the schema; `user_id` and `item_id` are always there."""
    features = [
        Feature(name="user_id", level="request", kind="id", size=vocabularies["user_id"].size),
        Feature(name="item_id", level="item", kind="id", size=vocabularies["item_id"].size),
    ]
    for name, feature in m.features.items():
        space = m.space(name) if feature.kind in ("id", "ids") else ""
        size = vocabularies[space].size if space else feature.size
        if feature.kind == "bucket":
            size = len(feature.edges or statistics[name]) + 2
        features.append(
            Feature(
                name=name,
                level="request" if feature.of == "user" else feature.of,
                kind="id" if feature.kind == "bucket" else feature.kind,
                space=space,
                size=size,
            )
        )
    return tuple(features)
