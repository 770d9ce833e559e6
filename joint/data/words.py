"""What the log calls items and users: the words of vocabularies, or ids where a dataset kept none."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pyarrow as pa

from joint.data.dataset import Dataset


def item_key(dataset: Dataset) -> str:
    """The item feature that tells items apart: the first id that no two items share; '' where there is none."""
    for feature in dataset.schema.features:
        if (feature.level, feature.kind) == ("item", "id"):
            column = dataset.catalogue[feature.name]
            if isinstance(column, np.ndarray) and len(np.unique(column)) == len(column):
                return feature.name
    return ""


def item_words(dataset: Dataset, vocabularies: Mapping[str, pa.Array]) -> pa.Array:
    """What the log calls each item, in order: its word, or its id where there are none; without a key its row."""
    key = item_key(dataset)
    if not key:
        return pa.array(np.arange(dataset.schema.items))
    ids, space = dataset.catalogue[key], dataset.schema.feature(key).space
    assert isinstance(ids, np.ndarray)
    return words_of(vocabularies[space], ids) if space in vocabularies else pa.array(ids.astype(np.int64))


def words_of(vocabulary: pa.Array, ids: np.ndarray) -> pa.Array:
    """The words of ids; null for 0, the unknown."""
    return vocabulary.take(pa.array(ids.astype(np.int64) - 1, mask=ids == 0))
