"""Leakage: what training must not know, and what contradicts itself. Every row is checked, none is sampled."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np

from joint.auditing.chunks import USER, Chunk, user_count
from joint.data.dataset import Dataset
from joint.data.ragged import contains, draw
from joint.schema import NEVER, SECONDS_A_DAY, SPLITS, Schema, day_name, day_number, first_day_column

LEFT_OUT = ("immature_label",)  # training leaves these out by itself: noted, no leaks
# Check -> what it counts.
CHECKS = {
    "exposed_among_negatives": "exposed items are also among the negatives of their own request",
    "exposure_before_first_day": "exposures of an item before its first day",
    "candidate_before_first_day": "unexposed candidates before their first day",
    "history_before_first_day": "items in a history before their first day",
    "pool_before_first_day": "items join a pool before their first day in the catalogue",
    "history_after_request": "events of a history are not earlier than their request",
    "immature_label": "training labels are known only after evaluation begins (joint.train leaves them out)",
    "feedback_on_unexposed": "labels are observed on candidates that were not exposed",
    "request_in_two_splits": "requests are in another split too",
    "exposure_in_two_splits": "exposures (user, item, time) are in an evaluation split too",
    "later_than_evaluation": "requests are later than the first request of a later split",
    "duplicate_request_id": "requests repeat an id of the same split",
    "split_column": "requests have another split in their column `split` than in dataset.json",
}


PER_USER = "splits are per user or otherwise not by day, so their order was not checked"


@dataclass(frozen=True)
class Found:
    """What one check found in a chunk."""

    check: str
    count: int
    first: str  # the first of them, in words


def found(check: str, where: np.ndarray, tell: Callable[[int], str]) -> Found:
    """A finding at each place of `where`; `tell` puts a place in words."""
    return Found(check, len(where), tell(int(where[0])) if len(where) else "")


@dataclass(frozen=True)
class Leak:
    """All that one check found in one file."""

    check: str
    file: str
    count: int
    first: str

    def __str__(self) -> str:
        return f"{self.file}: {self.count:,} {CHECKS[self.check]}; first: {self.first}"


class Leaks:
    """Adds up what the checks find, by check and file."""

    def __init__(self) -> None:
        self._leaks: dict[tuple[str, str], Leak] = {}

    def add(self, file: str, found: Found) -> None:
        """Count what was found; its first place is told if the file had none before."""
        old = self._leaks.get((found.check, file), Leak(found.check, file, 0, found.first))
        if found.count:
            self._leaks[found.check, file] = replace(old, count=old.count + found.count)

    def all(self) -> list[Leak]:
        """In the order of CHECKS, then of files."""
        order = list(CHECKS)
        return sorted(self._leaks.values(), key=lambda leak: (order.index(leak.check), leak.file))

    def leaks(self) -> list[Leak]:
        """All but those of LEFT_OUT, in the same order."""
        return [leak for leak in self.all() if leak.check not in LEFT_OUT]

    def notes(self) -> list[Leak]:
        """What checks of LEFT_OUT found, over all files: one entry a check, with the first file's first."""
        by_check = {name: [leak for leak in self.all() if leak.check == name] for name in LEFT_OUT}
        return [_over_files(found) for found in by_check.values() if found]


def _over_files(found: list[Leak]) -> Leak:
    more = f" and {len(found) - 1} more files" if len(found) > 1 else ""
    return replace(found[0], file=found[0].file + more, count=sum(leak.count for leak in found))


def time_limits(schema: Schema) -> dict[str, int]:
    """Split -> the time at which evaluation begins for it: the first request of the later splits.

    Only splits that share no day count: where days are shared, something other than time tells the splits apart.
    """
    parts = {split: [part for part in schema.parts if part.split == split and part.rows] for split in SPLITS}
    limits: dict[str, int] = {}
    for place, split in enumerate(SPLITS):
        days = {part.day for part in parts[split]}
        later = [parts[other] for other in SPLITS[place + 1 :] if not days & {part.day for part in parts[other]}]
        begins = [part.begin for others in later for part in others]
        if days and begins:
            limits[split] = min(begins)
    return limits


def check_chunk(chunk: Chunk, limits: Mapping[str, int]) -> Iterator[Found]:
    """Everything that one request, or its file's split, can tell."""
    schema = chunk.dataset.schema
    yield _split_column(chunk)
    yield _exposed_among_negatives(chunk)
    yield _candidates_too_early(chunk, "exposure_before_first_day", chunk.exposed)
    yield _candidates_too_early(chunk, "candidate_before_first_day", ~chunk.exposed)
    yield from (_history_too_early(chunk, history.name) for history in schema.histories)
    yield from (_history_too_late(chunk, history.name) for history in schema.histories if history.timed)
    yield from (_feedback_on_unexposed(chunk, label) for label in schema.labels)
    if (limit := limits.get(chunk.part.split)) is not None:
        yield _later_than_evaluation(chunk, limit)
        if chunk.part.split == "train":
            yield from (_immature_labels(chunk, label, days, limit) for label, days in schema.matures_after.items())


def _split_column(chunk: Chunk) -> Found:
    splits = chunk.requests.scalars("split")
    return found(
        "split_column",
        np.flatnonzero(splits != chunk.part.split),
        lambda i: f"request {chunk.ids[i]}: {splits[i]}; dataset.json says {chunk.part.split}",
    )


def check_catalogue(dataset: Dataset) -> Iterator[Found]:
    """An item cannot be in a pool before it is in the catalogue."""
    yield from (_pool_too_early(dataset, pool) for pool in dataset.schema.pools)


def _pool_too_early(dataset: Dataset, pool: str) -> Found:
    first, joined = dataset.first_day[""], dataset.first_day[pool]

    def tell(item: int) -> str:
        return f"item {item}: {first_day_column(pool)} {_date(joined[item])}, first_day {_date(first[item])}"

    return found("pool_before_first_day", np.flatnonzero(joined < first), tell)


def _exposed_among_negatives(chunk: Chunk) -> Found:
    """(request, item) pairs with an exposed and an unexposed candidate."""
    pairs = chunk.rows * chunk.dataset.schema.items + chunk.items.values
    keys = np.sort(pairs * 2 + chunk.exposed)
    # Sorted, a pair's unexposed candidates come right before its exposed ones: one such step a pair.
    row, item = np.divmod(keys[1:][(keys[1:] == keys[:-1] + 1) & (keys[1:] % 2 == 1)] // 2, chunk.dataset.schema.items)
    return found(
        "exposed_among_negatives", np.arange(len(row)), lambda i: f"request {chunk.ids[row[i]]}, item {item[i]}"
    )


def _candidates_too_early(chunk: Chunk, check: str, member: np.ndarray) -> Found:
    items, first_day = chunk.items.values, chunk.dataset.first_day[""]
    where = np.flatnonzero((first_day[items] > chunk.day) & member)
    return found(check, where, lambda i: _too_early(chunk, chunk.rows[i], items[i]))


def _history_too_early(chunk: Chunk, name: str) -> Found:
    past, first_day = chunk.requests.lists(name), chunk.dataset.first_day[""]
    where = np.flatnonzero(first_day[past.values] > chunk.day)
    return found(
        "history_before_first_day", where, lambda i: f"{_too_early(chunk, past.rows[i], past.values[i])} in {name}"
    )


def _too_early(chunk: Chunk, row: int, item: int) -> str:
    first_day = _date(chunk.dataset.first_day[""][item])
    return f"request {chunk.ids[row]} of {chunk.part.day}, item {item} (first day {first_day})"


def _history_too_late(chunk: Chunk, name: str) -> Found:
    times = chunk.requests.lists(f"{name}.timestamp")
    row, asked = times.rows, chunk.timestamps[times.rows]
    return found(
        "history_after_request",
        np.flatnonzero(times.values >= asked),
        lambda i: f"request {chunk.ids[row[i]]} at {asked[i]} has {times.values[i]} in {name}",
    )


def _feedback_on_unexposed(chunk: Chunk, label: str) -> Found:
    values, items = chunk.label(label), chunk.items.values
    return found(
        "feedback_on_unexposed",
        np.flatnonzero(~np.isnan(values) & ~chunk.exposed),
        lambda i: f"request {chunk.ids[chunk.rows[i]]}, item {items[i]}: {label} is {values[i]:g}",
    )


def _later_than_evaluation(chunk: Chunk, limit: int) -> Found:
    return found(
        "later_than_evaluation",
        np.flatnonzero(chunk.timestamps > limit),
        lambda i: f"request {chunk.ids[i]} at {chunk.timestamps[i]}, evaluation begins at {limit}",
    )


def _immature_labels(chunk: Chunk, label: str, days: float, limit: int) -> Found:
    known = (chunk.timestamps + days * SECONDS_A_DAY)[chunk.rows]
    observed = chunk.exposed & ~np.isnan(chunk.label(label))
    return found(
        "immature_label",
        np.flatnonzero(observed & (known > limit)),
        lambda i: (
            f"request {chunk.ids[chunk.rows[i]]}: {label} is known at {known[i]:.0f}, evaluation begins at {limit}"
        ),
    )


class Seen:
    """What must not come twice. Feed it the evaluation splits first: training exposures are compared, never kept."""

    def __init__(self) -> None:
        self._ids: list[np.ndarray] = []
        self._files: list[tuple[str, str]] = []  # split and path, for each of `_ids`
        self._exposures: dict[str, list[np.ndarray]] = {}  # sorted hashes, made one array when they are first needed

    def exposures(self, chunk: Chunk) -> Iterator[Found]:
        """Exposures of a known user that a split fed earlier has too. (user, item, time) are kept as 64-bit hashes."""
        if chunk.users is None:
            return
        user = chunk.users[chunk.rows]
        shown = np.flatnonzero(chunk.exposed & (user > 0))
        time, item = chunk.timestamps[chunk.rows], chunk.items.values
        keys = draw(user[shown], item[shown], time[shown])
        for split, known in self._exposures.items():
            if split != chunk.part.split:
                known[:] = known if len(known) == 1 else [np.sort(np.concatenate(known))]
                again = shown[contains(known[0], keys)]
                first = f"user {user[again[0]]}, item {item[again[0]]} at {time[again[0]]}" if len(again) else ""
                yield Found("exposure_in_two_splits", len(again), f"{first}, also in {split}")
        if chunk.part.split != "train":
            self._exposures.setdefault(chunk.part.split, []).append(np.sort(keys))

    def requests(self, chunk: Chunk) -> None:
        """Note the request ids (8 bytes each)."""
        self._ids.append(chunk.ids)
        self._files.append((chunk.part.split, chunk.part.path))

    def repeated(self) -> Iterator[tuple[str, Found]]:
        """With its file, every request id that was noted before, in the same split or in another one."""
        ids = np.concatenate(self._ids)
        source = np.repeat(np.arange(len(self._ids)), [len(some) for some in self._ids])
        order = np.argsort(ids, kind="stable")
        again = ids[order][1:] == ids[order][:-1]
        first, second = source[order[:-1][again]], source[order[1:][again]]
        repeated = ids[order[1:][again]]
        for one, two in np.unique(np.stack([first, second], axis=1), axis=0):
            (split, path), (other, file) = self._files[one], self._files[two]
            check = "duplicate_request_id" if split == other else "request_in_two_splits"
            some = repeated[(first == one) & (second == two)]
            yield file, Found(check, len(some), f"request {some[0]}, also in {path}")


def unchecked(dataset: Dataset) -> dict[str, str]:
    """Check -> what of it this dataset gives no means to check, and why."""
    schema, said = dataset.schema, {}
    if untimed := [history.name for history in schema.histories if not history.timed]:
        said["history_after_request"] = f"no timestamps of {', '.join(untimed)}: it could not be checked"
    if not user_count(dataset):
        said["exposure_in_two_splits"] = f"no request feature {USER}: it could not be checked"
    if not dataset.first_day[""].any():
        why = "no item has a first day: nothing can come before it"
        said |= {name: why for name in CHECKS if name.endswith("before_first_day")}
    if shared := _sharing_days(schema):
        said["later_than_evaluation"] = f"{shared} share days: {PER_USER}"
    if not schema.matures_after:
        said["immature_label"] = "no label says when it matures (matures_after)"
    elif "train" in shared:
        said["immature_label"] = said["later_than_evaluation"]
    elif odd := [part for part in schema.parts if _outside_its_day(part.begin, part.day)]:
        said["immature_label"] = f"{odd[0].path} begins at {odd[0].begin}, which in seconds is not near its day"
    return said


def _sharing_days(schema: Schema) -> str:
    """The pairs of splits with a day in common; '' for none."""
    days = {split: {part.day for part in schema.parts if part.split == split} for split in SPLITS}
    pairs = [(one, two) for place, one in enumerate(SPLITS) for two in SPLITS[place + 1 :] if days[one] & days[two]]
    return ", ".join(f"{one} and {two}" for one, two in pairs)


def _outside_its_day(timestamp: int, day: str) -> bool:
    """Days may be local ones, so the day before and the day after do."""
    return abs(timestamp // SECONDS_A_DAY - day_number(day)) > 1


def _date(day: int) -> str:
    return "never" if day == NEVER else day_name(day)
