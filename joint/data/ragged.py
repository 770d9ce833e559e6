"""Lists of different lengths as one array of values and one of offsets: no Python loop over rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Ragged:
    """`values[offsets[i]:offsets[i + 1]]` is list i; offsets start at 0 and end at len(values)."""

    values: np.ndarray
    offsets: np.ndarray  # int64 [rows + 1]

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> np.ndarray:
        """Length of every list, int64 [rows]."""
        return self.offsets[1:] - self.offsets[:-1]

    @property
    def rows(self) -> np.ndarray:
        """The list each value belongs to, int64 [values]."""
        return np.repeat(np.arange(len(self)), self.lengths)

    def take(self, rows: np.ndarray) -> Ragged:
        """The lists at `rows`, in that order."""
        return self.slices(self.offsets[:-1][rows], self.lengths[rows])

    def between(self, first: int, last: int) -> Ragged:
        """The lists `first` .. `last` - 1, not copied."""
        offsets = self.offsets[first : last + 1]
        return Ragged(self.values[offsets[0] : offsets[-1]], offsets - offsets[0])

    def slices(self, starts: np.ndarray, lengths: np.ndarray) -> Ragged:
        """Lists cut out of the values: list i is `values[starts[i]:starts[i] + lengths[i]]`."""
        offsets = offsets_of(lengths)
        index = np.arange(offsets[-1]) + np.repeat(starts - offsets[:-1], lengths)
        return Ragged(self.values[index], offsets)

    def newest(self, length: int) -> Ragged:
        """The last `length` values of every list."""
        kept = np.minimum(self.lengths, length)
        return self.slices(self.offsets[1:] - kept, kept)

    def keep(self, mask: np.ndarray) -> Ragged:
        """The lists without the values where `mask` [values] is False."""
        return Ragged(self.values[mask], np.concatenate([[0], np.cumsum(mask)])[self.offsets])

    def with_values(self, values: np.ndarray) -> Ragged:
        """The same lists holding other values."""
        assert len(values) == len(self.values)
        return Ragged(values, self.offsets)


def offsets_of(lengths: np.ndarray) -> np.ndarray:
    """Offsets [rows + 1] of lists of these lengths."""
    offsets = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=offsets[1:])
    return offsets


def concatenate(parts: Sequence[Ragged]) -> Ragged:
    """The lists of all parts, one part after another."""
    lengths = np.concatenate([part.lengths for part in parts])
    return Ragged(np.concatenate([part.values for part in parts]), offsets_of(lengths))


def side_by_side(left: Ragged, right: Ragged) -> tuple[Ragged, np.ndarray]:
    """Append the lists of `right` to those of `left`.

    Returns the joined lists and, for every joined value, its index in `left.values` followed by `right.values`.
    """
    lengths = np.stack([left.lengths, right.lengths], axis=1)
    starts = np.stack([left.offsets[:-1], right.offsets[:-1] + len(left.values)], axis=1)
    both = Ragged(np.arange(len(left.values) + len(right.values)), np.zeros(1, np.int64))
    index = both.slices(starts.ravel(), lengths.ravel()).values
    values = np.concatenate([left.values, right.values])
    return Ragged(values[index], offsets_of(lengths.sum(axis=1))), index


def contains(sorted_values: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Which of `values` are among the ascending `sorted_values`, bool."""
    if not len(sorted_values):
        return np.zeros(len(values), bool)
    place = np.searchsorted(sorted_values, values).clip(max=len(sorted_values) - 1)
    return sorted_values[place] == values


def draw(*keys: np.ndarray | int) -> np.ndarray:
    """A counter-based hash: 64 random bits (uint64) for every combination of keys, which broadcast together.

    splitmix64's finaliser, folded over the keys: the draw of a thing depends on its names alone, never on ranks,
    batches, restarts or the order of draws.
    """
    state: np.ndarray = np.asarray(0x9E3779B97F4A7C15, np.uint64)
    with np.errstate(over="ignore"):
        for key in keys:
            state = state ^ np.asarray(key).astype(np.uint64)
            state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            state = (state ^ (state >> np.uint64(31))) + np.uint64(0x9E3779B97F4A7C15)
    return np.asarray(state)
