"""Words of a log and their ids: codes while a log is read, ids once it is known which words came when."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
import pyarrow as pa

from joint.schema import NEVER


class Vocabulary:
    """The words (integers or strings) of one id space, held in memory.

    While a log is read a word has a *code*, in order of appearance. Its *id* is fixed by `finish`: the words of an
    older dataset keep theirs, new ones follow in the order of (first day, word). Ids hence depend neither on the order
    of rows nor on whether days came at once or one by one.
    """

    def __init__(self, known: Sequence[object] = ()) -> None:
        self.known = len(known)
        self.codes: dict[object, int] = {word: code for code, word in enumerate(known)}
        self.first_day = np.full(self.known, NEVER, np.int32)  # of every code, NEVER until it is seen
        self.ids = np.arange(1, self.known + 1)  # of every code, 0 for words that were never seen

    def encode(self, words: pa.Array) -> np.ndarray:
        """The code of every word, int32; -1 for null. New words get codes, but count only once they are `seen`."""
        if pa.types.is_null(words.type):
            return np.full(len(words), -1, np.int32)
        encoded = words.dictionary_encode()
        codes = self.codes
        found = [codes.setdefault(word, len(codes)) for word in encoded.dictionary.to_pylist()]
        new = len(codes) - len(self.first_day)
        self.first_day = np.append(self.first_day, np.full(new, NEVER, np.int32))
        code_of = np.array([*found, -1], np.int32)  # the last one is for null
        return code_of[encoded.indices.fill_null(len(found)).to_numpy(zero_copy_only=False)]

    def seen(self, codes: np.ndarray, days: np.ndarray) -> None:
        """Words occurred on these days (numbers from 1970-01-01); negative codes are no words."""
        word = codes >= 0
        np.minimum.at(self.first_day, codes[word], days[word].astype(np.int32))

    def hashes(self) -> np.ndarray:
        """64 bits for every code that depend on the word alone, uint64."""
        words = list(self.codes)
        if words and isinstance(words[0], str):
            return pd.util.hash_array(np.array(words, object), categorize=False)
        return np.array(words, np.int64).view(np.uint64)

    def arrow(self) -> pa.Array:
        """The word of every code."""
        return pa.array(list(self.codes))

    def finish(self, last_day: int) -> None:
        """Give ids to the new words that were seen up to this day."""
        words = list(self.codes)
        new = np.flatnonzero(self.first_day[self.known :] <= last_day) + self.known
        order = sorted(new.tolist(), key=lambda code: (self.first_day[code], words[code]))
        self.ids = np.zeros(len(words), np.int64)
        self.ids[: self.known] = np.arange(1, self.known + 1)
        self.ids[order] = np.arange(self.known + 1, self.known + 1 + len(order))

    def id_of(self, codes: np.ndarray) -> np.ndarray:
        """The ids of codes, int64; 0 for -1 and for words that were never seen."""
        return np.append(self.ids, 0)[codes]

    def of_ids(self, values: np.ndarray) -> np.ndarray:
        """`values`, one for each code, in the order of ids 1, 2, …: [words]."""
        used = np.flatnonzero(self.ids)
        found = np.empty(len(used), values.dtype)
        found[self.ids[used] - 1] = values[used]
        return found

    def words(self) -> list[object]:
        """The word of id i + 1 is `words()[i]`."""
        return list(self.of_ids(np.fromiter(self.codes, object, len(self.codes))))

    @property
    def size(self) -> int:
        """Ids are 1 .. size - 1."""
        return int(self.ids.max(initial=0)) + 1
