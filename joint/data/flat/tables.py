"""The catalogue, and the tables of items and users that features are looked up in."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from joint.data.flat.append import Old
from joint.data.flat.features import missing, prepared
from joint.data.flat.job import Job, see
from joint.data.flat.map import LogMap
from joint.data.requests import Column, Requests, concatenate_requests
from joint.schema import NEVER, first_day_column


class Lookup:
    """Feature columns by code of a user or item; those of a code without a row are missing."""

    def __init__(self, m: LogMap, names: Sequence[str], rows: Sequence[Requests], key: str, codes: int) -> None:
        self.known = concatenate_requests(rows) if rows else Requests({key: np.zeros(0, np.int64)})
        self.row = np.full(codes, -1)
        self.row[self.known.scalars(key)] = np.arange(len(self.known))
        parts = [Requests({name: of.columns[name] for name in names}) for of in rows]
        last = Requests({name: missing(name, m, 1) for name in names})
        self.table = concatenate_requests([*parts, last]) if names else last

    def take(self, name: str, codes: np.ndarray) -> Column:
        """The values of a feature for codes."""
        row = self.row[codes]
        return Requests({name: self.table.columns[name]}).take(np.where(row < 0, len(self.known), row)).columns[name]

    def column(self, name: str) -> np.ndarray:
        """A column of days, of every code; NEVER without a row."""
        if name not in self.known.columns:
            return np.full(len(self.row), NEVER, np.int32)
        return np.append(self.known.scalars(name), np.int32(NEVER))[self.row]


def note_tables(job: Job, items: Lookup, users: Lookup, last_day: int) -> None:
    """Items that were there by the log's last day join the catalogue, and the words of their and users' features."""
    m, vocabularies = job.m, job.vocabularies
    item, user = vocabularies["item_id"], vocabularies["user_id"]
    first_day = items.column("first_day")
    there = np.flatnonzero(first_day <= last_day)
    item.seen(there, first_day[there])
    for level, table, space, first in (("item", items, item, item.known), ("user", users, user, 0)):
        codes = first + np.flatnonzero(space.first_day[first:] < NEVER)  # old items stay as they are
        for name, feature in m.features_of(level).items():
            if feature.kind in ("id", "ids") and m.space(name) not in ("user_id", "item_id"):
                see(vocabularies, m.space(name), table.take(name, codes), space.first_day[codes])


def catalogue(job: Job, items: Lookup, old: Old | None) -> dict[str, Column]:
    """The columns of `items.parquet`: the old items as they are, then the new ones in the order of their ids."""
    m, item = job.m, job.vocabularies["item_id"]
    codes = item.of_ids(np.arange(len(item.ids)))
    exposed = np.append(job.exposed, np.full(len(item.ids) - len(job.exposed), NEVER, np.int32))
    new = codes[item.known :]
    first_day = item.first_day[new]
    columns: dict[str, Column] = {"item_id": np.arange(item.known + 1, len(codes) + 1), "first_day": first_day}
    for name, pool in m.pools.items():
        joins = exposed[new] if pool.when else items.column(first_day_column(name))[new]
        columns[first_day_column(name)] = np.maximum(joins, first_day).astype(np.int32)
    for name in m.features_of("item"):
        columns[name] = prepared(name, m, items.take(name, new), job.vocabularies, job.statistics)
    if not old:
        return columns
    before = old.catalogue()
    joined = {first_day_column(name): exposed[: item.known] for name, pool in m.pools.items() if pool.when}
    earlier = {name: np.minimum(before.scalars(name), days) for name, days in joined.items()}
    kept = Requests({name: earlier.get(name, before.columns[name]) for name in columns})
    return dict(concatenate_requests([kept, Requests(columns)]).columns)
