"""The map of a flat log: which column means what. `docs/own_logs.md` explains the grammar with examples."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Literal, TypeVar

from joint.configuring.settings import Tree, decode, near_miss, raise_at, read
from joint.configuring.sources import find
from joint.schema import Stage

T = TypeVar("T")
UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86_400}
MOST_DAYS = 36_500
MOST = 1_000_000  # of a list, a run, a vector or buckets
COMPARISONS: dict[str, str] = {">=": "ge", "<=": "le", "==": "eq", ">": "gt", "<": "lt"}
_CONDITION = re.compile(r"(\w+)\s*(>=|<=|==|>|<)\s*(-?\d+(?:\.\d+)?)")
_NAME = re.compile(r"[A-Za-z_]\w*")
_NAMED = "expected a name of letters, digits and _"
_OWN_COLUMNS = (
    *("request_id", "timestamp", "day", "split", "group", "user_id", "candidates", "stages"),
    *("item_id", "first_day"),
)


def seconds(duration: str) -> int:
    """The seconds of a duration such as 30m, 12h or 7d; ValueError for anything else."""
    if not re.fullmatch(r"\d+[smhd]", duration):
        raise ValueError(f"expected a duration such as 0s, 30m, 12h or 7d, found '{duration}'")
    if len(duration) > 12 or (found := int(duration[:-1]) * UNITS[duration[-1]]) > MOST_DAYS * UNITS["d"]:
        raise ValueError(f"expected a duration of at most {MOST_DAYS}d, found '{duration}'")
    return found


@dataclass(frozen=True, kw_only=True)
class Time:
    """A column of times: numbers since 1970 in a unit, or with no unit a timestamp or date column."""

    column: str
    unit: Literal["s", "ms", "us"] | None = None


@dataclass(frozen=True, kw_only=True)
class Stages:
    """How far a row got: a flag column for each stage, or one column whose values stand for stages."""

    flags: dict[str, str] = field(default_factory=dict)  # stage -> column of true / false or 1 / 0
    column: str | None = None
    values: dict[str, tuple[str, ...]] = field(default_factory=dict)  # value of `column` -> stages

    def __post_init__(self) -> None:
        if bool(self.flags) == bool(self.column) or bool(self.column) != bool(self.values):
            raise ValueError("expected either flags, or column and values")


@dataclass(frozen=True, kw_only=True)
class Discovery:
    """RRA's discovery-induced watching minutes (4.1), derived from a watch log; `dwm.py` defines them."""

    minutes: str  # column of minutes watched; `scale` of the label turns other units into minutes
    collection: str  # column that says where it was watched
    exploring: tuple[str, ...]  # its values that count as discovery
    watch_log: str | None = None  # a Parquet file, relative to the map; null: the log itself
    user: str | None = None  # its columns, where they are not called as in the log
    item: str | None = None
    time: Time | str | None = None
    window: str = "7d"  # minutes count so long from the first playback on
    within: str = "1d"  # a playback belongs to an exposure at most so long before it

    def __post_init__(self) -> None:
        _collect([partial(_at, key, seconds, getattr(self, key)) for key in ("window", "within")])


@dataclass(frozen=True, kw_only=True)
class Label:
    """A column of feedback (null: not observed), or minutes that prepare derives."""

    column: str | None = None
    discovery: Discovery | None = None
    scale: float = 1.0  # multiplies the column: 1.66667e-5 makes minutes of milliseconds
    matures_after: float | None = None  # days until it is known; of a discovery by default window + within

    def __post_init__(self) -> None:
        if (self.column is None) == (self.discovery is None):
            raise ValueError("expected either column or discovery")
        if not math.isfinite(self.scale):
            raise ValueError("scale must be a finite number")
        if self.matures_after is not None and not 0 <= self.matures_after <= MOST_DAYS:
            raise ValueError(f"matures_after must be from 0 to {MOST_DAYS}")

    @property
    def days(self) -> float:
        """Days until it is known."""
        if self.matures_after is not None or not self.discovery:
            return self.matures_after or 0
        return (seconds(self.discovery.window) + seconds(self.discovery.within)) / UNITS["d"]


@dataclass(frozen=True, kw_only=True)
class Score:
    """A column of the scores that another model, such as the production's, gave to candidates (null: none)."""

    column: str
    of: Literal["logit", "probability"] = "logit"


@dataclass(frozen=True, kw_only=True)
class LogFeature:
    """A feature: where its column is, and what is made of it."""

    kind: Literal["id", "ids", "float", "vector", "bucket"]
    of: Literal["request", "user", "item", "event"] = "request"
    column: str | None = None  # by default the feature's own name
    space: str | None = None  # ids that share a table share a space; by default the feature's own name
    normalise: Literal["none", "log", "standard"] = "none"  # floats: as they are; sign(x) log(1 + |x|); z-scores
    edges: tuple[float, ...] = ()  # buckets: a value goes to the bucket after the last edge that is <= it
    quantiles: int = 0  # buckets: so many of equal size on the training days
    size: int = 0  # the length of a vector

    def __post_init__(self) -> None:
        if (self.kind == "bucket") != (bool(self.edges) != (self.quantiles > 1)) or (self.edges and self.quantiles):
            raise ValueError("edges or quantiles (2 or more): exactly a bucket has one of them")
        if not all(map(math.isfinite, self.edges)) or list(self.edges) != sorted(set(self.edges)):
            raise ValueError("edges must be finite and ascend")
        if max(self.quantiles, self.size) > MOST:
            raise ValueError(f"quantiles and size must be at most {MOST}")
        if (self.kind == "vector") != (self.size > 0):
            raise ValueError("size: exactly a vector has a length, 1 or more")
        if self.normalise != "none" and self.kind != "float":
            raise ValueError("normalise: only a float has it")
        if self.space and self.kind not in ("id", "ids"):
            raise ValueError("space: only id and ids have it")
        if self.space and not _NAME.fullmatch(self.space):  # it becomes the name of a file
            raise ValueError(f"space: {_NAMED}")
        if self.of == "event" and self.kind not in ("id", "float", "bucket"):
            raise ValueError("kind: of an event id, float or bucket")


@dataclass(frozen=True, kw_only=True)
class Table:
    """A Parquet file of items or users, one row each."""

    file: str  # relative to the map
    key: str
    first_day: Time | str | None = None  # when an item became available; by default when the log first shows it


@dataclass(frozen=True, kw_only=True)
class LogHistory:
    """A list of past items a request: rows of the log that meet a condition, rows of a file, or both."""

    when: str | None = None  # exposed, or 'LABEL >= NUMBER' (an exposure with such a label)
    file: str | None = None  # a Parquet file of earlier events, relative to the map
    user: str | None = None  # its columns, where they are not called as in the log
    item: str | None = None
    time: Time | str | None = None
    length: int = 200  # the newest so many
    events: tuple[str, ...] = ()  # features of: event

    def __post_init__(self) -> None:
        if not (self.when or self.file):
            raise ValueError("expected when, file or both")
        if not 1 <= self.length <= MOST:
            raise ValueError(f"length must be from 1 to {MOST}")


@dataclass(frozen=True, kw_only=True)
class Pool:
    """A part of the catalogue: the items that were exposed, or those that a column of the items file marks."""

    when: Literal["exposed"] | None = None
    column: str | None = None  # true / false, or the date on which the item joins the pool

    def __post_init__(self) -> None:
        if bool(self.when) == bool(self.column):
            raise ValueError("expected either when or column")


@dataclass(frozen=True, kw_only=True)
class Group:
    """A column of the log that names the user's group."""

    column: str


@dataclass(frozen=True, kw_only=True)
class Splits:
    """The last days with requests are the test, those before them the valid part, the rest trains."""

    valid_days: int = 1
    test_days: int = 1

    def __post_init__(self) -> None:
        if min(self.valid_days, self.test_days) < 0:
            raise ValueError("valid_days and test_days must be at least 0")


@dataclass(frozen=True, kw_only=True)
class LogMap:
    """What the columns of a flat log mean, one row for each (request, item)."""

    user: str
    item: str
    time: Time | str
    labels: dict[str, Label | str]  # `click: is_click` is short for `click: {column: is_click}`
    name: str = "log"
    request: str | None = None  # null: a request is a run of a user's consecutive rows of one day
    run: int | None = None  # so many rows at most (10)
    gap: str | None = None  # or until the user pauses for longer
    spread: str = "1h"  # the rows of a logged request lie at most so far apart
    lag: str = "0s"  # a history holds what happened more than so long before the request
    timezone: str = "UTC"  # days are cut here, and times without a zone are of here
    stages: Stages | Literal["exposed"] = "exposed"
    input_space: dict[str, tuple[str, ...]] = field(default_factory=dict)  # head -> logged stages that enter it
    orders: dict[str, str] = field(default_factory=dict)  # name -> column of a candidate's place in a logged order
    scores: dict[str, Score] = field(default_factory=dict)
    features: dict[str, LogFeature] = field(default_factory=dict)
    items: Table | None = None
    users: Table | None = None
    pools: dict[str, Pool] = field(default_factory=dict)
    histories: dict[str, LogHistory] = field(default_factory=dict)
    group: Group | Literal["activity"] = "activity"  # by default days of the last 30 with a row, in five bins
    splits: Splits = field(default_factory=Splits)

    def __post_init__(self) -> None:
        durations = {"spread": self.spread, "lag": self.lag, "gap": self.gap or "0s"}
        _collect([partial(_at, key, seconds, value) for key, value in durations.items()])
        if self.request and (self.run or self.gap):
            raise ValueError("request: has its own column; run and gap are for logs without one")
        if (self.run and self.gap) or (self.run is not None and not 1 <= self.run <= MOST):
            raise ValueError(f"run: from 1 to {MOST}, and not together with gap")

    @property
    def columns(self) -> dict[str, Label]:
        """Label -> its settings, short forms written out."""
        return {name: Label(column=of) if isinstance(of, str) else of for name, of in self.labels.items()}

    @property
    def discoveries(self) -> dict[str, Discovery]:
        """The labels that prepare derives."""
        return {name: label.discovery for name, label in self.columns.items() if label.discovery}

    def space(self, name: str) -> str:
        """The id space of a feature."""
        return self.features[name].space or name

    def features_of(self, *levels: str) -> dict[str, LogFeature]:
        """The features of these levels."""
        return {name: feature for name, feature in self.features.items() if feature.of in levels}


def condition(when: str) -> tuple[str, str, float] | None:
    """'click >= 1' as (label, name of the operator, number); None for 'exposed'."""
    if when == "exposed":
        return None
    match = _CONDITION.fullmatch(when.strip())
    if not match:
        raise ValueError(f"expected exposed or LABEL >= NUMBER (or >, <, <=, ==), found '{when}'")
    return match[1], COMPARISONS[match[2]], float(match[3])


def time_of(time: Time | str) -> Time:
    """`time: when` is short for `time: {column: when}`."""
    return Time(column=time) if isinstance(time, str) else time


def read_map(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> tuple[LogMap, Tree]:
    """Read and check a map. Paths in it are relative to it, those of overrides to the working folder.

    Raises:
        ConfigError: with every mistake, a line each: file, line, what was found and what was expected.
    """
    tree = read(path, overrides)
    log_map = decode(tree, LogMap)
    raise_at(tree, _mistakes(log_map))
    return _placed(log_map, tree, Path(path).parent), tree


def _mistakes(m: LogMap) -> list[tuple[str, str]]:
    found: list[tuple[str, str]] = []
    sections: dict[str, Iterable[str]] = {
        "labels": m.labels,
        "features": m.features,
        "histories": m.histories,
        "orders": m.orders,
        "scores": m.scores,
        "pools": m.pools,
    }
    taken = dict.fromkeys(_OWN_COLUMNS, "")
    for section, entries in sections.items():
        for name in entries:
            if not _NAME.fullmatch(name):
                found.append((f"{section}.{name}", _NAMED))
            elif section != "pools" and name in taken:
                clash = f"also in {taken[name]}" if taken[name] else "the dataset has a column of that name"
                found.append((f"{section}.{name}", f"{clash}; choose another name"))
            elif section != "pools":
                taken[name] = section
    if not m.labels:
        found.append(("labels", "expected at least one"))
    return found + _stage_mistakes(m) + _history_mistakes(m) + _table_mistakes(m)


def _stage_mistakes(m: LogMap) -> list[tuple[str, str]]:
    known = [name for name in (stage.name.lower() for stage in Stage if stage.name) if name != "random"]
    used: list[tuple[str, str]] = []
    if isinstance(m.stages, Stages):
        used += [(f"stages.flags.{stage}", stage) for stage in m.stages.flags]
        used += [(f"stages.values.{value}", stage) for value, of in m.stages.values.items() for stage in of]
    used += [(f"input_space.{head}", stage) for head, of in m.input_space.items() for stage in of]
    found = [
        (path, f"{stage} is not a logged stage{near_miss(stage, known)}") for path, stage in used if stage not in known
    ]
    heads = ("retrieval", "pre_ranking", "ranking")
    found += [(f"input_space.{h}", f"no such head{near_miss(h, heads)}") for h in m.input_space if h not in heads]
    return found


def _history_mistakes(m: LogMap) -> list[tuple[str, str]]:
    found: list[tuple[str, str]] = []
    events = m.features_of("event")
    for name, history in m.histories.items():
        try:
            of = condition(history.when) if history.when else None
        except ValueError as error:
            found.append((f"histories.{name}.when", str(error)))
            continue
        labels = [label for label in m.columns if label not in m.discoveries]
        if of and of[0] not in labels:
            found.append((f"histories.{name}.when", f"no label {of[0]} with a column{near_miss(of[0], labels)}"))
        wrong = [event for event in history.events if event not in events]
        found += [(f"histories.{name}.events", f"no feature {e} of: event{near_miss(e, events)}") for e in wrong]
    return found


def _table_mistakes(m: LogMap) -> list[tuple[str, str]]:
    found: list[tuple[str, str]] = []
    if m.users is None:
        found += [
            (f"features.{name}.of", "users: missing; a feature of the user is in its file")
            for name in m.features_of("user")
        ]
    elif m.users.first_day:
        found.append(("users.first_day", "only items have it"))
    marked = [name for name, pool in m.pools.items() if pool.column]
    if m.items is None:
        found += [(f"pools.{name}.column", "items: missing; the column is in its file") for name in marked]
    in_log = [name for name, of in m.discoveries.items() if of.watch_log is None]
    for name in in_log:
        of = m.discoveries[name]
        found += [
            (f"labels.{name}.discovery.{key}", "is for a watch_log; the log has its own")
            for key in ("user", "item", "time")
            if getattr(of, key)
        ]
    return found


def _placed(m: LogMap, tree: Tree, folder: Path) -> LogMap:
    def at(key: str, path: str | None) -> str | None:
        return path if path is None or find(tree, key).place.layer > 0 else os.path.normpath(folder / path)

    def table(key: str, of: Table | None) -> Table | None:
        return of and replace(of, file=str(at(f"{key}.file", of.file)))

    labels: dict[str, Label | str] = dict(m.labels)
    for name, of in m.discoveries.items():
        watch_log = at(f"labels.{name}.discovery.watch_log", of.watch_log)
        labels[name] = replace(m.columns[name], discovery=replace(of, watch_log=watch_log))
    histories = {name: replace(of, file=at(f"histories.{name}.file", of.file)) for name, of in m.histories.items()}
    return replace(m, items=table("items", m.items), users=table("users", m.users), labels=labels, histories=histories)


def _at(key: str, check: Callable[[str], T], value: str) -> T:
    try:
        return check(value)
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from error


def _collect(checks: Sequence[Callable[[], object]]) -> None:
    """Run all checks; one ValueError with a line for each that failed."""
    wrong = []
    for check in checks:
        try:
            check()
        except ValueError as error:
            wrong.append(str(error))
    if wrong:
        raise ValueError("\n".join(wrong))
