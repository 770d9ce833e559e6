"""The dataset on disk: a schema, a catalogue and request files; written whole, read by row groups."""

from __future__ import annotations

import dataclasses
import hashlib
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from joint.data.predictions import Predictions, scored
from joint.data.ragged import Ragged
from joint.data.requests import Column, Requests, concatenate_requests, from_arrow, to_arrow
from joint.errors import DataError, first_line
from joint.files import sha256
from joint.schema import SPLITS, Part, Schema, day_number, first_day_column, read_schema

REQUEST_COLUMNS = ("request_id", "timestamp", "group")
CANDIDATE_COLUMNS = ("candidates", "stages")  # lists of int32 item indices and of uint16 flags
GROUP, LARGE = 1024, 32_768  # requests of a row group at most; of a file from which on all are so large
T = TypeVar("T")


class Dataset:
    """A prepared dataset, opened for reading. Everything that can be wrong with its files is said here.

    Args:
        predictions: scores of its candidates, which become columns beside its own.

    Raises:
        DataError: a file is missing, truncated, of another length than `dataset.json` says, or lacks a column.
    """

    def __init__(self, directory: str | Path, *, predictions: Predictions | None = None) -> None:
        self.directory = Path(directory)
        self.predictions = predictions
        self.schema = scored(read_schema(self.directory), predictions)
        self.catalogue, self.first_day = self._read_catalogue()
        self.footers = {part.path: self._checked(part) for part in self.schema.parts}  # each is read once

    def largest_group(self) -> int:
        """The highest user group of any request, from the files' footers alone."""
        blocks = (footer.row_group(n) for footer in self.footers.values() for n in range(footer.num_row_groups))
        columns = (block.column(i) for block in blocks for i in range(block.num_columns))
        return max(int(c.statistics.max) for c in columns if c.path_in_schema == "group" and c.statistics is not None)

    def columns(self) -> tuple[str, ...]:
        """The columns that training reads."""
        schema = self.schema
        events = [f"{history.name}.{event}" for history in schema.histories for event in history.events]
        competitors = [f"{history.name}.competitors" for history in schema.histories if history.competitors]
        names = [feature.name for feature in schema.features if feature.level == "request"]
        histories = [history.name for history in schema.histories]
        return (*REQUEST_COLUMNS, *names, *histories, *events, *competitors, *CANDIDATE_COLUMNS, *schema.labels)

    def further_columns(self) -> tuple[str, ...]:
        """The columns of its files that only an audit, a report or a `teacher: logged` reads."""
        times = [f"{history.name}.timestamp" for history in self.schema.histories if history.timed]
        return (*times, *self.schema.orders, *(name for name in self.schema.scores if name not in self._predicted))

    @property
    def _predicted(self) -> tuple[str, ...]:
        return self.predictions.columns if self.predictions else ()

    def parts(self, splits: Sequence[str]) -> dict[str, list[Part]]:
        """Day -> its request files of these splits; days in time order."""
        chosen = [part for part in self.schema.parts if part.split in splits]
        if not sum(part.rows for part in chosen):
            raise DataError(f"{self.directory}: no request in split {' or '.join(splits)}; nothing to do")
        days = sorted({part.day for part in chosen})
        return {day: [part for part in chosen if part.day == day] for day in days}

    def read(self, part: Part, groups: Sequence[int] | None = None, *, further: Sequence[str] = ()) -> Requests:
        """Row groups of a request file (None: all of them), with the number of the day as one more column, `day`.

        `further` names columns beyond those of all training: some of `further_columns`, or predicted ones.
        """
        path = self.directory / part.path
        groups = range(len(part.groups)) if groups is None else groups
        own = [name for name in further if name not in self._predicted]
        try:
            file = pq.ParquetFile(path, metadata=self.footers[part.path])
            table = file.read_row_groups(list(groups), columns=[*self.columns(), *own])
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{path}: row groups {list(groups)} cannot be read ({first_line(error)})") from error
        requests = from_arrow(table)
        for label in self.schema.labels:
            _check_finite(path, label, table.column(label), requests.lists(label))
        if predicted := [name for name in further if name in self._predicted]:
            assert self.predictions is not None
            scores = self.predictions.read(part, groups, predicted, requests.scalars("request_id"))
            requests = Requests({**requests.columns, **scores})
        self._check_lists(path, requests)
        day = np.full(len(requests), day_number(part.day), np.int32)
        return Requests({**requests.columns, "day": day})

    def _check_lists(self, path: Path, requests: Requests) -> None:
        """Lists that hold items hold items of the catalogue, and parallel lists are equally long."""
        schema = self.schema
        _check_items(path, "candidates", requests.lists("candidates").values, schema.items)
        candidates = requests.lists("candidates").lengths
        scores = [name for name in schema.scores if name in requests.columns]
        for name in ("stages", *schema.labels, *scores):
            _check_lengths(path, name, requests.lists(name).lengths, candidates, "candidates")
        for name in scores:
            if np.isinf(requests.lists(name).values).any():
                raise DataError(f"{path}: column {name} has an infinite score; expected finite logits, or null")
        for history in schema.histories:
            past = requests.lists(history.name)
            _check_items(path, history.name, past.values, schema.items)
            for name in (f"{history.name}.{event}" for event in history.events):
                _check_lengths(path, name, requests.lists(name).lengths, past.lengths, history.name)
            if history.competitors:
                name = f"{history.name}.competitors"
                others = requests.lists(name)
                expected = past.lengths * history.competitors
                _check_lengths(
                    path, name, others.lengths, expected, f"{history.competitors} an event of {history.name}"
                )
                _check_items(path, name, others.values, schema.items, least=-1)
        for feature in schema.features:
            if feature.level == "request" and feature.kind == "vector":
                lengths = requests.lists(feature.name).lengths
                _check_lengths(path, feature.name, lengths, np.full_like(lengths, feature.size), "its size")

    def read_split(self, split: str) -> Requests:
        """All requests of a split at once, in time order: for evaluation and baselines."""
        parts = [part for day in self.parts([split]).values() for part in day]
        return concatenate_requests([self.read(part) for part in parts])

    def vocabularies(self) -> dict[str, pa.Array]:
        """Id space -> its words, that of id i + 1 at place i; a space that kept none is left out."""
        spaces = sorted({feature.space for feature in self.schema.features})
        paths = {space: self.directory / "vocabularies" / f"{space}.parquet" for space in spaces}
        return {
            space: _open(path, pq.read_table).column("value").combine_chunks()
            for space, path in paths.items()
            if path.is_file()
        }

    def _read_catalogue(self) -> tuple[dict[str, Column], dict[str, np.ndarray]]:
        """The item features; and for every pool ('' is the whole catalogue) the day on which each item joins it."""
        path = self.directory / "items.parquet"
        if not self.schema.items:
            raise DataError(f"{path}: the catalogue is empty; expected at least one item")
        table = _open(path, pq.read_table)
        if table.num_rows != self.schema.items:
            raise DataError(f"{path}: {table.num_rows} items; dataset.json says {self.schema.items}")
        names = [feature.name for feature in self.schema.features if feature.level == "item"]
        days = {pool: first_day_column(pool) for pool in ("", *self.schema.pools)}
        _require(path, [*names, *days.values()], table.column_names)
        first_day = {pool: table.column(name).to_numpy().astype(np.int32) for pool, name in days.items()}
        columns = dict(from_arrow(table.select(names)).columns)
        for feature in self.schema.features:
            column = columns.get(feature.name)
            if feature.kind == "vector" and isinstance(column, Ragged):
                expected = np.full_like(column.lengths, feature.size)
                _check_lengths(path, feature.name, column.lengths, expected, "its size")
        return columns, first_day

    def _checked(self, part: Part) -> pq.FileMetaData:
        path = self.directory / part.path
        file = _open(path, pq.ParquetFile)
        _require(path, [*self.columns(), *self.further_columns(), "split"], file.schema_arrow.names)
        groups = [file.metadata.row_group(index).num_rows for index in range(file.num_row_groups)]
        if groups != list(part.groups):
            found, said = (f"{sum(counts)} in {len(counts)} row groups" for counts in (groups, part.groups))
            raise DataError(f"{path}: requests: {found}; dataset.json says {said}")
        return file.metadata


def _open(path: Path, reader: Callable[[Path], T]) -> T:
    try:
        return reader(path)
    except FileNotFoundError as error:
        raise DataError(f"{path}: not found, though dataset.json names it") from error
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: not a whole Parquet file ({first_line(error)})") from error


def _check_items(path: Path, column: str, items: np.ndarray, count: int, *, least: int = 0) -> None:
    if len(items) and not (items.min() >= least and items.max() < count):
        raise DataError(
            f"{path}: column {column} has items {items.min()} to {items.max()}; the catalogue has 0 to {count - 1}"
        )


def _check_lengths(path: Path, column: str, lengths: np.ndarray, expected: np.ndarray, like: str) -> None:
    wrong = np.flatnonzero(lengths != expected)
    if len(wrong):
        row = wrong[0]
        raise DataError(f"{path}: column {column}, row {row}: {lengths[row]} values; expected {expected[row]} ({like})")


def _check_finite(path: Path, column: str, written: pa.ChunkedArray, values: Ragged) -> None:
    """A label is a number, or null where the feedback was not observed, which in `values` is NaN."""
    if np.isfinite(values.values).all():
        return
    observed = np.concatenate([chunk.flatten().is_valid() for chunk in written.chunks])
    odd = np.flatnonzero(observed & ~np.isfinite(values.values))
    if len(odd):
        row, found = values.rows[odd[0]], values.values[odd[0]]
        raise DataError(f"{path}: column {column}, row {row}: {found}; expected numbers, or null where not observed")


def _require(path: Path, wanted: Sequence[str], found: Sequence[str]) -> None:
    missing = [name for name in wanted if name not in found]
    if missing:
        raise DataError(f"{path}: no column {', '.join(missing)}; found: {', '.join(found)}")


class DatasetWriter:
    """Writes a dataset into a temporary folder beside OUT, which `finish` renames; a failure leaves nothing.

    Use as a context manager: `add` requests of one day and split at a time, in time order, then `finish`. Days may be
    written by other processes with `write_part`; then `parts` has to name theirs.

    Args:
        keep: leave the temporary folder after a failure, and take it up as it was left: for sources that resume.

    Raises:
        DataError: OUT exists and may not be overwritten, or cannot be made.
    """

    def __init__(self, out: str | Path, *, overwrite: bool = False, keep: bool = False) -> None:
        self.out = Path(out)
        if self.out.exists() and not overwrite:
            raise DataError(f"{self.out}: exists already; choose another folder or say --overwrite")
        if self.out.exists() and not (self.out / "dataset.json").is_file():
            raise DataError(f"{self.out}: is not a dataset, and will not be overwritten")
        whole = self.out.absolute()
        self.temporary = whole.with_name(f".{whole.name}.unfinished")
        self.keep = keep
        self.parts: list[Part] = []
        self._hashes: dict[str, str] = {}

    def __enter__(self) -> DatasetWriter:
        if not self.keep:
            shutil.rmtree(self.temporary, ignore_errors=True)
        try:
            self.temporary.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DataError(f"{self.out}: cannot be made ({error})") from error
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if not (self.keep and kind):
            shutil.rmtree(self.temporary, ignore_errors=True)

    def items(self, columns: Mapping[str, Column]) -> None:
        """Write the catalogue: row number = item index. Without `first_day` all items were there from the start."""
        count = len(next(iter(columns.values())))
        always = {first_day_column(""): np.zeros(count, np.int32)}
        self._write("items.parquet", to_arrow(Requests(always | dict(columns))))

    def vocabulary(self, space: str, values: Sequence[object]) -> None:
        """Keep the words of an id space: the word of id i + 1 is `values[i]`."""
        self._write(f"vocabularies/{space}.parquet", pa.table({"value": pa.array(list(values))}))

    def add(self, requests: Requests, *, day: str, split: str) -> None:
        """Write requests of one day and split as one more file; nothing is written for none."""
        number = sum((part.day, part.split) == (day, split) for part in self.parts)
        if len(requests):
            self.parts.append(write_part(self.temporary, requests, day=day, split=split, number=number))

    def finish(self, schema: Schema) -> Schema:
        """Write `dataset.json` (with the parts and the hash filled in) and move everything into place."""
        parts = tuple(sorted(self.parts, key=lambda part: (part.day, SPLITS.index(part.split))))
        schema = dataclasses.replace(schema, parts=parts)
        said = dataclasses.replace(schema, provenance={}, hash="").to_json()
        schema = dataclasses.replace(schema, hash=_digest(said, *sorted(self._hashes.items())))
        (self.temporary / "dataset.json").write_text(schema.to_json())
        old = self.temporary.with_name(f".{self.out.absolute().name}.old")
        if self.out.exists():  # one of the two is there at every moment
            shutil.rmtree(old, ignore_errors=True)
            self.out.rename(old)
        self.temporary.rename(self.out)
        shutil.rmtree(old, ignore_errors=True)
        return schema

    def _write(self, name: str, table: pa.Table) -> None:
        path = self.temporary / name
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(table, path, row_group_size=65_536, compression="zstd")
        self._hashes[name] = file_hash(path)


def write_part(folder: Path, requests: Requests, *, day: str, split: str, number: int) -> Part:
    """Write requests, at least one and in time order, as part `number` of a day and split under `folder`."""
    table = to_arrow(requests).append_column("split", pa.array([split] * len(requests)).dictionary_encode())
    name = f"requests/day={day}/part-{split}-{number}.parquet"
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    # Many small row groups let a day be dealt evenly to the virtual shards; large ones read faster.
    group = GROUP if len(requests) >= LARGE else int(np.clip(len(requests) // 128, 16, GROUP))
    pq.write_table(table, path, row_group_size=group, compression="lz4")  # read every epoch: zstd takes twice the time
    times = requests.scalars("timestamp")
    return Part(
        path=name,
        day=day,
        split=split,
        groups=tuple(min(group, len(requests) - start) for start in range(0, len(requests), group)),
        begin=int(times.min()),
        end=int(times.max()),
        hash=file_hash(path),
    )


def file_hash(path: Path) -> str:
    """The start of a file's SHA-256."""
    return sha256(path)[:16]


def _digest(*things: object) -> str:
    return hashlib.sha256(repr(things).encode()).hexdigest()[:16]
