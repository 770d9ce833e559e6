"""The words of an id space, as logs and requests write them, to ids: what prepare gave them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from joint.serving.errors import RequestError


class Words:
    """Looks up words: integers, or strings and the like."""

    def __init__(self, words: pa.Array) -> None:
        self.integers = pa.types.is_integer(words.type) and not pa.types.is_uint64(words.type)  # int64 holds not all
        if self.integers:
            values = words.to_numpy(zero_copy_only=False).astype(np.int64)
            self._order = np.argsort(values, kind="stable")
            self._sorted = values[self._order]
        else:
            self._places = {word: place for place, word in enumerate(words.to_pylist())}
            self.strings = pa.types.is_string(words.type) or pa.types.is_large_string(words.type)

    def places(self, words: Sequence[object], where: str) -> np.ndarray:
        """The place of every word among those known, int64; -1 for an unknown one and for None.

        Raises:
            RequestError: a word is not of the kind of those known; `where` names the field.
        """
        if self.integers:
            return self._search(np.array([integer(word, where) for word in words], np.int64))
        for word in words:
            if word is not None and (isinstance(word, bool) or isinstance(word, str) != self.strings):
                raise RequestError(f"{where}: expected {'text' if self.strings else 'a number'}, found {word!r}")
        return np.array([self._places.get(word, -1) for word in words], np.int64)

    def _search(self, values: np.ndarray) -> np.ndarray:
        if not len(self._sorted):
            return np.full(len(values), -1)
        place = np.searchsorted(self._sorted, values).clip(max=len(self._sorted) - 1)
        return np.where(self._sorted[place] == values, self._order[place], -1)


NOTHING = np.iinfo(np.int64).min  # stands for None: no id is that


def integer(word: object, where: str) -> int:
    """An integer id; RequestError for anything else. None is `NOTHING`."""
    if word is None:
        return NOTHING
    if isinstance(word, bool) or not isinstance(word, int | np.integer):
        raise RequestError(f"{where}: expected an integer, found {word!r}")
    if not -(2**63) < word < 2**63:
        raise RequestError(f"{where}: {word} is no 64-bit integer")
    return int(word)
