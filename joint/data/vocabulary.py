"""Words -> ids, by pandas, whose import takes a fifth of a second: apart from what training imports."""

from __future__ import annotations

import numpy as np
import pandas as pd

from joint.data.ragged import Ragged, offsets_of


def vocabulary_ids(values: pd.Series) -> tuple[np.ndarray, list[object]]:
    """Ids 1 .. V of the sorted distinct values, and those values; a missing value is id 0."""
    codes, words = pd.factorize(values, sort=True)
    return codes.astype(np.int64) + 1, list(words)


def ragged_vocabulary_ids(lists: pd.Series) -> tuple[Ragged, list[object]]:
    """`vocabulary_ids` for a column of lists."""
    lengths = lists.map(len).to_numpy()
    codes, words = vocabulary_ids(lists.explode()[np.repeat(lengths > 0, np.maximum(lengths, 1))])
    return Ragged(codes, offsets_of(lengths)), words
