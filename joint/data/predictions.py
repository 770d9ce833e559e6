"""What `joint.predict` wrote of a dataset, read again: score columns beside the dataset's own.

OUT/predict.json    what was predicted by which run, and of which dataset
OUT/scores/         a file for each of the dataset's request files, of the same rows in the same row groups
OUT/top/            the best items of every request
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from joint.data.requests import Column, from_arrow
from joint.errors import DataError, first_line
from joint.schema import Part, Schema, read_schema

VERSION = 1


@dataclass(frozen=True)
class Predictions:
    """Scores of a dataset's logged candidates, opened for reading."""

    directory: Path
    columns: tuple[str, ...]  # HEAD.TASK: logits
    splits: tuple[str, ...]
    hash: str

    def path(self, part: Part) -> Path:
        """The file of scores of a request file."""
        return self.directory / "scores" / part.path

    def read(
        self, part: Part, groups: Sequence[int], names: Sequence[str], request_id: np.ndarray
    ) -> dict[str, Column]:
        """Score columns of row groups of a request file, whose requests are `request_id`.

        Raises:
            DataError: the file cannot be read, or is not of these requests.
        """
        path = self.path(part)
        try:
            table = pq.ParquetFile(path).read_row_groups(list(groups), columns=["request_id", *names])
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{path}: cannot be read ({first_line(error)}); run joint.predict again") from error
        found = from_arrow(table)
        if not np.array_equal(found.scalars("request_id"), request_id):
            raise DataError(f"{path}: is not of the requests of {part.path}; run joint.predict again")
        return {name: found.columns[name] for name in names}


def open_predictions(directory: Path, dataset: Path, splits: Sequence[str]) -> Predictions:
    """The predictions in a folder, which have to be of these splits of this dataset.

    Raises:
        DataError: there are none, or of another version or dataset, or not of all of these splits.
    """
    path = directory / "predict.json"
    if not path.is_file():
        raise DataError(f"{path}: not found; expected what joint.predict RUN {dataset} OUT writes (data.scores)")
    try:
        found = json.loads(path.read_text())
        version, of = found["version"], found["dataset"]
        predictions = Predictions(directory, tuple(found["columns"]), tuple(found["splits"]), str(found["hash"]))
    except (ValueError, LookupError, TypeError) as error:
        raise DataError(f"{path}: not a description of predictions ({error!r})") from error
    if version != VERSION:
        raise DataError(f"{path}: format version {version}; this program reads {VERSION}: predict again")
    if of != (expected := read_schema(dataset).hash):
        raise DataError(f"{path}: of a dataset of hash {of}; that of {dataset} is {expected}")
    if missing := [split for split in splits if split not in predictions.splits]:
        raise DataError(f"{path}: of {', '.join(predictions.splits)}; expected {', '.join(missing)} too (data.train)")
    return predictions


def scored(schema: Schema, predictions: Predictions | None) -> Schema:
    """The schema of a dataset with the columns of its predictions beside its own."""
    return dataclasses.replace(schema, scores=(*schema.scores, *predictions.columns)) if predictions else schema
