"""The words every part shares: stages, spaces, features, tasks and the schema of a dataset. No torch here."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import IntFlag
from pathlib import Path
from typing import Any, Literal

import numpy as np

from joint.errors import DataError

FORMAT_VERSION = 2
SPLITS = ("train", "valid", "test")
SECONDS_A_DAY = 86_400
NEVER = np.iinfo(np.int32).max  # the first day of an item that never joins a pool


class Stage(IntFlag):
    """How far a candidate got in the logged funnel; a candidate carries several flags (RecFlow 2.1)."""

    RANDOM = 1  # sampled, not logged
    PRERANK_NEG = 2
    COARSE_NEG = 4
    RANKED = 8  # entered ranking
    RERANKED = 16
    RANK_NEG = 32
    RERANK_NEG = 64
    RANK_POS = 128
    RERANK_POS = 256
    EXPOSED = 512


# SDCL's three kinds of negatives, in RecFlow's flags.
GROUPS = {
    "matching_ns": Stage.RANDOM,
    "pre_ranking_ns": Stage.PRERANK_NEG | Stage.COARSE_NEG,
    "ranking_ns": Stage.RANKED,
}
STAGES = {stage.name.lower(): stage for stage in Stage if stage.name} | GROUPS
EXPOSED_TOKENS = ("exposed", "positive", "exposed_neg")
POOL_TOKENS = ("corpus", "in_batch")  # `random` is one too, where a softmax is over it
SPACE_TOKENS = (*EXPOSED_TOKENS, *POOL_TOKENS, *(name for name in STAGES if name != "exposed"))


@dataclass(frozen=True, kw_only=True)
class Feature:
    """A declared feature: where it lives, what it is, and the id space (the table) its ids belong to."""

    name: str
    level: Literal["request", "item", "event"]  # event: one value per past item of a history
    kind: Literal["id", "ids", "float", "vector"]
    space: str = ""  # id space; by default the feature's own name
    size: int = 0  # ids are 1 .. size - 1, and 0 is unknown; the length of a vector; 0 for floats

    def __post_init__(self) -> None:
        if not self.space:
            object.__setattr__(self, "space", self.name)


@dataclass(frozen=True, kw_only=True)
class History:
    """A list of past items per request, oldest first, with parallel lists of event features (`NAME.EVENT`).

    `timed`: there is a parallel list `NAME.timestamp`, which audits read and training does not. `competitors`: a list
    `NAME.competitors` holds so many items for each event, those that it won against in its own request, -1 for none.
    """

    name: str
    events: tuple[str, ...] = ()
    timed: bool = False
    competitors: int = 0


@dataclass(frozen=True, kw_only=True)
class Part:
    """One Parquet file of requests of one day and one split, in time order and in row groups of known lengths."""

    path: str
    day: str
    split: str
    groups: tuple[int, ...]
    begin: int  # timestamps of its first and last request
    end: int
    hash: str

    @property
    def rows(self) -> int:
        """Requests in the file."""
        return sum(self.groups)


@dataclass(frozen=True, kw_only=True)
class Schema:
    """`dataset.json`: everything a reader must know before it opens the first Parquet file."""

    name: str
    items: int
    features: tuple[Feature, ...]
    histories: tuple[History, ...]
    labels: tuple[str, ...]
    stages: tuple[str, ...]  # the stages this log holds
    input_space: dict[str, tuple[str, ...]]  # head -> logged stages that enter it
    pools: tuple[str, ...] = ()  # named parts of the catalogue, each with the day on which an item joins it
    orders: tuple[str, ...] = ()  # list<int16> columns: a candidate's place in a logged order, -1 outside of it
    scores: tuple[str, ...] = ()  # list<float32> columns: a candidate's logit by another model, null where it has none
    matures_after: dict[str, float] = field(default_factory=dict)  # label -> days until it is known
    parts: tuple[Part, ...] = ()
    provenance: dict[str, object] = field(default_factory=dict)
    hash: str = ""

    def feature(self, name: str) -> Feature:
        """The feature of that name; KeyError if there is none."""
        return {feature.name: feature for feature in self.features}[name]

    def history(self, name: str) -> History:
        """The history of that name; KeyError if there is none."""
        return {history.name: history for history in self.histories}[name]

    def requests(self, split: str) -> int:
        """Requests of a split."""
        return sum(part.rows for part in self.parts if part.split == split)

    def days(self, splits: Sequence[str], within: tuple[str, str] | None = None) -> list[str]:
        """The days of requests of these splits, in time order; `within` a first and a last day, if given."""
        days = {part.day for part in self.parts if part.split in splits and part.rows}
        return sorted(day for day in days if within is None or within[0] <= day <= within[1])

    @property
    def grown_from(self) -> list[str]:
        """The hashes of the datasets that were appended to on the way to this one: their ids mean the same here."""
        found = self.provenance.get("grown_from", [])
        assert isinstance(found, list)
        return found

    def to_json(self) -> str:
        """The text of `dataset.json`."""
        return json.dumps({"version": FORMAT_VERSION} | dataclasses.asdict(self), indent=1)


def day_number(day: str) -> int:
    """Days from 1970-01-01 to `day` (YYYY-MM-DD): how the catalogue and `Requests` count days."""
    return int(np.datetime64(day, "D").astype(np.int64))


def day_name(day: int) -> str:
    """YYYY-MM-DD of a number of days from 1970-01-01."""
    return str(np.datetime64(int(day), "D"))


def first_day_column(pool: str) -> str:
    """The catalogue's column of the day on which an item joins a pool; '' is the whole catalogue."""
    return f"first_day.{pool}" if pool else "first_day"


def read_schema(directory: Path) -> Schema:
    """Read `DIRECTORY/dataset.json`; DataError if it is absent, of another version or not in this form."""
    path = directory / "dataset.json"
    if not path.is_file():
        raise DataError(f"{path}: not found; expected a prepared dataset (python -m joint.prepare SOURCE ... OUT)")
    try:
        raw = json.loads(path.read_text())
        version = raw.pop("version")
        if version == FORMAT_VERSION:
            return _from_json(raw)
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise DataError(f"{path}: not a dataset description ({error!r})") from error
    raise DataError(f"{path}: format version {version}; this program reads {FORMAT_VERSION}: prepare it again")


def _from_json(raw: dict[str, Any]) -> Schema:
    return Schema(
        **raw
        | {
            "features": tuple(Feature(**f) for f in raw["features"]),
            "histories": tuple(History(**h | {"events": tuple(h["events"])}) for h in raw["histories"]),
            "parts": tuple(Part(**p | {"groups": tuple(p["groups"])}) for p in raw["parts"]),
            "labels": tuple(raw["labels"]),
            "stages": tuple(raw["stages"]),
            "pools": tuple(raw["pools"]),
            "orders": tuple(raw["orders"]),
            "scores": tuple(raw.get("scores", ())),
            "input_space": {k: tuple(v) for k, v in raw["input_space"].items()},
        }
    )


def table_rows(ids: np.ndarray, rows: int) -> tuple[np.ndarray, int]:
    """Map vocabulary ids to table rows: ids outside 0 .. rows - 1 become 0, the row of the unknown.

    Returns the rows (int64, the shape of `ids`) and how many ids were mapped away.
    """
    if not len(ids) or (ids.min() >= 0 and ids.max() < rows):
        return ids.astype(np.int64, copy=False), 0
    outside = (ids < 0) | (ids >= rows)
    return np.where(outside, 0, ids).astype(np.int64, copy=False), int(outside.sum())
