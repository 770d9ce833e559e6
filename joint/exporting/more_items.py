"""New items for an export: their vectors by its own item tower, in a version of its own. No torch, no run."""

from __future__ import annotations

import math
import shutil
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from joint.data.ragged import Ragged, concatenate
from joint.data.requests import Column
from joint.errors import DataError, first_line
from joint.exporting.card import FILE as CARD
from joint.exporting.card import card
from joint.exporting.index import write_indices
from joint.exporting.items import items_table, write_items
from joint.exporting.versions import new_version, write_manifest
from joint.files import write_whole
from joint.schema import NEVER, Feature, day_number, first_day_column
from joint.serving.check import check
from joint.serving.inputs import Arrays, item_inputs
from joint.serving.items import FILE
from joint.serving.manifest import Manifest, inside
from joint.serving.recommender import Recommender


class Added(NamedTuple):
    """What became of new items."""

    folder: Path
    items: int
    unknown: int  # of them, whose own id no training day knew: told apart by their other features alone


class NewItems(NamedTuple):
    """New rows of the catalogue."""

    ids: pa.Array
    first_day: dict[str, np.ndarray]
    catalogue: dict[str, Column]
    vectors: Arrays


def add_items(export: Path, path: Path, out: Path) -> Added:
    """Write the next version of an export under OUT, with the items of a Parquet file beside the old ones.

    A row of the file is an item: its id, its features as the log describes them, and if need be the day on which it
    joins each pool (`first_day`, `first_day.POOL`: YYYY-MM-DD; none: today). It joins no sooner than the day after the
    golden requests', whose answers so stay what they are. Indices become exact: there are no users to gate others on.

    Raises:
        UserError: the file lacks a column or holds an item that is there already; nothing is left behind then.
    """
    recommender = Recommender(export)
    said = recommender.manifest.json
    new = _read(path, recommender)
    old = recommender.items
    whole = NewItems(
        pa.concat_arrays([old.ids, new.ids]),
        {pool: np.append(days, new.first_day[pool]) for pool, days in old.first_day.items()},
        {name: _joined(column, new.catalogue[name]) for name, column in old.catalogue.items()},
        {name: np.concatenate([rows, _flat(new.vectors[name])]) for name, rows in old.vectors.items()},
    )
    with new_version(out) as (folder, number):
        _copy_unchanged(recommender.manifest, folder)
        write_items(
            folder / FILE,
            items_table(whole.ids, whole.first_day, whole.catalogue, sorted(whole.catalogue), whole.vectors),
            recommender.manifest.model_hash,
        )
        said["model"] |= {"version": number, "items_added_to": said["model"]["version"]}
        said["items"] |= {"count": len(whole.ids), "index": _indices(folder, whole, recommender.manifest.model_hash)}
        write_whole(folder / CARD, card(said))
        write_manifest(folder, {name: part for name, part in said.items() if name != "files"})
        check(folder)
    key = new.catalogue.get(said["items"]["key"])
    unknown = int(np.count_nonzero(_outside(key, recommender))) if isinstance(key, np.ndarray) else 0
    return Added(out / str(number), len(new.ids), unknown)


def _copy_unchanged(manifest: Manifest, folder: Path) -> None:
    """Copy what new items leave as it is; of strays in the old folder nothing."""
    for name in manifest.json["files"]:
        if name not in (FILE, CARD) and not name.startswith("index/"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(inside(manifest.folder, name), folder / name)


def _read(path: Path, recommender: Recommender) -> NewItems:
    try:
        table = pq.ParquetFile(path).read()
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: not a Parquet file that can be read ({first_line(error)})") from error
    said = recommender.manifest.json["items"]
    features = {f["name"]: Feature(level="item", **f) for f in said["features"]}
    key = said["key"] or "item_id"
    if missing := [name for name in dict.fromkeys([key, *features]) if name not in table.column_names]:
        raise DataError(f"{path}: no column {missing[0]}; expected {', '.join(dict.fromkeys([key, *features]))}")
    pools = [first_day_column(pool) for pool in recommender.items.first_day]
    if strange := [name for name in table.column_names if name.startswith("first_day") and name not in pools]:
        raise DataError(f"{path}: column {strange[0]}: of no pool; expected {', '.join(pools)}")
    if not len(table):
        raise DataError(f"{path}: no rows; expected an item a row")
    names = table.column(key).to_pylist()
    again = recommender.items.words.places(names, key) >= 0
    first = {name: row for row, name in reversed([*enumerate(names)])}
    again |= [name is None or first[name] < row for row, name in enumerate(names)]
    if again.any():
        raise DataError(f"{path}: column {key}: expected new items, each once; found {names[int(again.argmax())]!r}")
    values = {name: table.column(name).to_pylist() for name in features}
    catalogue = {name: recommender.read.feature(name, f, values[name]) for name, f in features.items()}
    days = {pool: _days(path, table, pool, recommender) for pool in recommender.items.first_day}
    inputs = item_inputs(recommender.reads["item_tower"], catalogue, np.arange(len(names)))
    vectors = recommender.run("item_tower", inputs)
    return NewItems(pa.array(names, recommender.items.ids.type), days, catalogue, vectors)


def _days(path: Path, table: pa.Table, pool: str, recommender: Recommender) -> np.ndarray:
    """The day on which each item joins a pool; null is never."""
    column = first_day_column(pool)
    told = column in table.column_names
    known = table.column(column).to_pylist() if told else [date.today().isoformat()] * len(table)
    try:
        days = [NEVER if day is None else day_number(_iso(day)) for day in known]
    except (TypeError, ValueError) as error:
        raise DataError(f"{path}: column {column}: expected days as YYYY-MM-DD ({first_line(error)})") from error
    return np.maximum(days, day_number(recommender.manifest.json["selfcheck"]["day"]) + 1).astype(np.int32)


def _iso(day: str | date) -> str:
    return date.fromisoformat(day.isoformat() if isinstance(day, date) else day).isoformat()


def _joined(old: Column, new: Column) -> Column:
    if isinstance(old, Ragged):
        assert isinstance(new, Ragged)
        return concatenate([old, new])
    return np.concatenate([old, new])


def _flat(values: np.ndarray) -> np.ndarray:
    return values.reshape(len(values), -1)


def _indices(folder: Path, items: NewItems, model_hash: str) -> dict[str, dict[str, Any]]:
    return write_indices(folder, items.vectors["v"], items.first_day, model_hash) if "v" in items.vectors else {}


def _outside(ids: np.ndarray, recommender: Recommender) -> np.ndarray:
    """Which of the items' own ids are row 0 of their table."""
    key = recommender.manifest.json["items"]["key"]
    read = [f for f in recommender.manifest.json["features"] if f["feature"] == key]
    rows = [math.inf if f["hashed"] else f["num_embeddings"] for f in read]
    return (ids <= 0) | (ids >= min(rows, default=0))
