"""Requests as JSON, in the words of the log, to `Requests` as the dataset holds them. Mistakes are named by field."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import date
from difflib import get_close_matches
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from joint.data.columns import width_of
from joint.data.ragged import Ragged, offsets_of
from joint.data.requests import Column, Requests
from joint.schema import Feature, History, day_number
from joint.serving.errors import RequestError
from joint.serving.items import Items
from joint.serving.manifest import Manifest, inside, reading
from joint.serving.words import NOTHING, Words, integer

OPTIONAL = ("day", "group")  # a day decides which items are there yet, a group which weights the tasks have
MOST_VALUES = 10_000  # of a list of a request
MOST_ITEMS = 100_000  # k, quotas and given candidates
LARGEST = float(np.finfo(np.float32).max)
ALL_DAYS = int(np.iinfo(np.int32).max - 1)  # without a day, all items that ever join a pool are there

Request = Mapping[str, object]


class RequestReader:
    """Reads requests by a manifest.

    A request has every field of `fields`, and may have those of `OPTIONAL`. Items and ids come as in the log, where
    prepare kept a vocabulary, otherwise as the dataset's own ids; null, and words that no training day knew, become the
    unknown. Past items that the export does not know are left out together with what happened to them.
    """

    def __init__(self, manifest: Manifest, items: Items) -> None:
        self.items = items
        self.features = manifest.request_features
        self.histories = manifest.histories
        self.events: dict[str, Feature] = {
            f"{said['history']}.{said['feature']}": _feature(said)
            for said in manifest.json["features"]
            if said["level"] == "event"
        }
        self.words = {
            space: _words(inside(manifest.folder, said["file"]))
            for space, said in manifest.json["vocabularies"].items()
        }
        read = [name for name in self.events if name.partition(".")[0] in self.histories]
        competed = [f"{name}.competitors" for name, history in self.histories.items() if history.competitors]
        self.fields = (*self.features, *self.histories, *read, *competed)

    def __call__(self, requests: Sequence[Request]) -> Requests:
        """The requests, one a row.

        Raises:
            RequestError: a field is missing, unknown or of another kind.
        """
        for request in requests:
            self._check_fields(request)
        columns: dict[str, Column] = {
            "day": np.array([_day(request.get("day")) for request in requests], np.int32),
            "group": np.array([integer(request.get("group", -1), "group") for request in requests]),
        }
        for name, feature in self.features.items():
            columns[name] = self.feature(name, feature, [request[name] for request in requests])
        for name, history in self.histories.items():
            columns |= self._history(name, history, requests)
        return Requests(columns)

    def candidates(self, items: object) -> np.ndarray:
        """The rows of a list of candidates, -1 for unknown ones."""
        return self.items.words.places(_list(items, "candidates", MOST_ITEMS), "candidates")

    def _check_fields(self, request: Request) -> None:
        if not isinstance(request, Mapping):
            raise RequestError(f"a request: expected an object of named fields, found {type(request).__name__}")
        if missing := [name for name in self.fields if name not in request]:
            raise RequestError(f"{missing[0]}: missing; a request has {', '.join(self.fields)}")
        for name in request:
            if name not in self.fields and name not in OPTIONAL:
                near = get_close_matches(str(name), self.fields, n=1)
                raise RequestError(f"{name}: no such field" + (f"; did you mean {near[0]}?" if near else ""))

    def feature(self, name: str, feature: Feature, values: Sequence[object]) -> Column:
        """A feature's column as the dataset holds it, from values as the log has them; RequestError names the field."""
        match feature.kind:
            case "id":
                return self._ids(name, feature.space, values)
            case "ids":
                lists = [_list(value, name) for value in values]
                return _ragged(self._ids(name, feature.space, [word for words in lists for word in words]), lists)
            case _:
                width = width_of(feature)
                rows = [_numbers(value, name, width) for value in values]
                flat = np.array(rows, np.float32).reshape(-1)
                return flat if feature.kind == "float" else Ragged(flat, np.arange(len(rows) + 1) * width)

    def _ids(self, field: str, space: str, words: Sequence[object]) -> np.ndarray:
        if space in self.words:
            return self.words[space].places(words, field) + 1
        ids = np.array([integer(word, field) for word in words], np.int64)
        return np.where(ids == NOTHING, 0, ids)

    def _history(self, name: str, history: History, requests: Sequence[Request]) -> dict[str, Column]:
        lists = [_list(request[name], name) for request in requests]
        past = _ragged(self.items.words.places([item for items in lists for item in items], name), lists)
        known = past.values >= 0
        columns: dict[str, Column] = {name: past.keep(known)}
        for field, feature in self.events.items():
            if field.partition(".")[0] == name:
                happened = self._events(field, feature, lists, requests)
                columns[field] = Ragged(happened, past.offsets).keep(known)
        if history.competitors:
            others = self._competitors(name, history.competitors, lists, requests)[known]
            events = past.keep(known).lengths * history.competitors
            columns[f"{name}.competitors"] = Ragged(others.reshape(-1), offsets_of(events))
        return columns

    def _events(
        self, field: str, feature: Feature, lists: Sequence[Sequence[object]], requests: Sequence[Request]
    ) -> np.ndarray:
        values = [_parallel(request[field], field, events) for request, events in zip(requests, lists, strict=True)]
        flat = [value for event in values for value in event]
        if feature.kind == "id":
            return self._ids(field, feature.space, flat)
        return np.array([_numbers(value, field, 1)[0] for value in flat], np.float32)

    def _competitors(
        self, name: str, each: int, lists: Sequence[Sequence[object]], requests: Sequence[Request]
    ) -> np.ndarray:
        """`[events, each]` rows of items, -1 for none."""
        field = f"{name}.competitors"
        values = [_parallel(request[field], field, events) for request, events in zip(requests, lists, strict=True)]
        others = [_list(event, field) for of in values for event in of]
        if long := [len(event) for event in others if len(event) > each]:
            raise RequestError(f"{field}: {long[0]} competitors of an event; expected at most {each}")
        flat = [word for event in others for word in (*event, *[None] * (each - len(event)))]
        return self.items.words.places(flat, field).reshape(-1, each)


def _words(path: Path) -> Words:
    with reading(path):
        return Words(pq.ParquetFile(path).read().column("value").combine_chunks())


def _feature(said: Mapping[str, object]) -> Feature:
    return Feature(name=said["feature"], level="event", kind=said["values"], space=said["space"], size=said["size"])  # type: ignore[arg-type]


def _ragged(values: np.ndarray, lists: Iterable[Sequence[object]]) -> Ragged:
    return Ragged(values, offsets_of(np.array([len(one) for one in lists], np.int64)))


def _list(value: object, field: str, most: int = MOST_VALUES) -> Sequence[object]:
    if not isinstance(value, list | tuple):
        raise RequestError(f"{field}: expected a list, found {value!r}")
    if len(value) > most:
        raise RequestError(f"{field}: {len(value)} values; at most {most} are taken")
    return value


def _parallel(value: object, field: str, events: Sequence[object]) -> Sequence[object]:
    found = _list(value, field)
    if len(found) != len(events):
        raise RequestError(f"{field}: {len(found)} values; its history has {len(events)} events")
    return found


def _numbers(value: object, field: str, width: int) -> Sequence[float]:
    """So many numbers that are finite as float32; null is zeros."""
    if value is None:
        return [0.0] * width
    found = _list(value, field) if width > 1 or isinstance(value, list | tuple) else [value]
    for number in found:
        if isinstance(number, bool) or not isinstance(number, int | float) or not abs(number) <= LARGEST:
            raise RequestError(f"{field}: expected a number that is finite as float32, found {number!r:.40}")
    if len(found) != width:
        raise RequestError(f"{field}: {len(found)} numbers; expected {width}")
    return found  # type: ignore[return-value]


def _day(value: object) -> int:
    if value is None:
        return ALL_DAYS
    try:
        return day_number(date.fromisoformat(value).isoformat())  # type: ignore[arg-type]
    except (TypeError, ValueError) as error:
        raise RequestError(f"day: expected YYYY-MM-DD, found {value!r}") from error
