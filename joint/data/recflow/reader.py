"""RecFlow (the public release, as downloaded) -> a dataset. Only its feather files are read, never a pickle.

Protocol. A request of `all_stage` is a request; the last day is the test, the one before it validation. Candidates
stand in file order with all their stages; feedback is known for exposed videos alone. The history `effective` is the
user's newest effective views of strictly earlier seconds within the log. A day without `all_stage` makes no requests;
its exposures (`realshow`) feed histories, activity and the pool `exposed`, which a video joins on the day it is first
shown. Every id is the raw id + 1. docs/recflow.md has the whole of it.
"""

from __future__ import annotations

import argparse
import dataclasses
import shutil
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from joint.data.dataset import DatasetWriter
from joint.data.problems import Problems
from joint.data.recflow.catalogue import TIMES, Catalogue, merge_videos
from joint.data.recflow.files import CONTEXT, FEEDBACK, ORDERS, Day, find_days
from joint.data.recflow.records import REQUEST, append, count, event_record, load
from joint.data.recflow.scan import scan_day
from joint.data.recflow.work import in_parallel, recorded, tidy
from joint.data.recflow.write import WINDOW, DayPlan, active_days, days_active, group_edges, newest_events, write_day
from joint.errors import DataError
from joint.schema import SPLITS, Feature, History, Part, Schema, Stage

CITATION = """RecFlow: Qi Liu, Kai Zheng, Rui Huang, et al. 2025. RecFlow: An Industrial Full Flow Recommendation
Dataset. International Conference on Learning Representations. Licensed by its authors for non-commercial use."""


@dataclass(frozen=True)
class ScanPlan:
    """A day to scan, and where to."""

    day: Day
    folder: Path
    key: list[object]  # the inputs
    competitors: int
    skip: bool
    elsewhere: tuple[int, ...] = ()  # request ids that another day has


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line of `joint.prepare recflow`."""
    parser.add_argument("path", type=Path, metavar="DIR", help="folder of the release: all_stage/, realshow/")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder of the dataset, made by this command")
    parser.add_argument("--days", default="", help="A..B, or days and ranges separated by commas (default all)")
    parser.add_argument("--valid", type=int, default=1, help="days of validation, before the test (default 1)")
    parser.add_argument("--test", type=int, default=1, help="days of test, the last ones (default 1)")
    parser.add_argument("--history", type=int, default=50, help="past effective views a request keeps (default 50)")
    parser.add_argument("--competitors", type=int, default=0, help="rank_pos videos kept for each of them (default 0)")
    parser.add_argument("--jobs", type=int, default=1, help="days read at the same time (default 1)")
    parser.add_argument("--on-error", choices=("stop", "skip"), default="stop", help="wrong rows: stop, or leave out")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT")


def prepare(arguments: argparse.Namespace) -> Schema:
    """What `joint.prepare recflow` does; the same command goes on where an interrupted one stopped."""
    for name, lowest in (("jobs", 1), ("history", 1), ("competitors", 0), ("valid", 0), ("test", 0)):
        if getattr(arguments, name) < lowest:
            raise DataError(f"--{name} is {getattr(arguments, name)}; expected {lowest} or more")
    print(CITATION, flush=True)
    return prepare_recflow(
        arguments.path,
        arguments.out,
        days=arguments.days,
        held_out=(arguments.valid, arguments.test),
        history=arguments.history,
        competitors=arguments.competitors,
        jobs=arguments.jobs,
        skip=arguments.on_error == "skip",
        overwrite=arguments.overwrite,
    )


def prepare_recflow(
    source: Path,
    out: Path,
    *,
    days: str = "",
    held_out: tuple[int, int] = (1, 1),
    history: int = 50,
    competitors: int = 0,
    jobs: int = 1,
    skip: bool = False,
    overwrite: bool = False,
) -> Schema:
    """Read a RecFlow folder and write the dataset OUT.

    What is done of it lies in `.OUT.unfinished` until all is; a scanned or written day is kept there for the same
    command if its inputs are unchanged. The bytes written depend on neither `jobs` nor interruptions.

    Args:
        days: which to read (see `find_days`).
        held_out: days of validation and of test, at the end.
        history, competitors: effective views a request keeps, and videos of rank_pos kept for each.
        jobs: processes.
        skip: leave wrong rows out and count them.

    Raises:
        DataError: the folder is not RecFlow, a file is not as it should be, or a row is wrong and not to be skipped.
    """
    writer = DatasetWriter(out, overwrite=overwrite, keep=True)  # refuses OUT before anything is read
    chosen, warnings = find_days(source, days)
    _splits(source, [day for day in chosen if day.logged], *held_out)  # too few days are said before they are read
    for warning in warnings:
        print(f"warning: {warning}", file=sys.stderr, flush=True)
    with writer:
        state = writer.temporary / "state"
        tidy(writer.temporary, [day.day for day in chosen])
        problems = _scan(chosen, state, competitors, jobs, skip)
        asked = [day for day in chosen if day.logged and count(_folder(state, day) / "requests", REQUEST)]
        empty = [f"warning: {day.path}: no request is left" for day in chosen if day.logged and day not in asked]
        for line in [*problems.lines(), *empty]:
            print(line, file=sys.stderr, flush=True)
        splits = _splits(source, asked, *held_out)
        catalogue = _merge(chosen, state)
        columns, item_features, changed = catalogue.build()
        edges, sizes = _users(chosen, splits, state, history, competitors)
        writer.parts += _write(chosen, splits, writer.temporary, (history, competitors, edges), jobs)
        writer.items(columns)
        provenance = {
            "source": str(source),
            "days": list(splits),
            "days_of_exposures_only": [day.day for day in chosen if not day.logged],
            "skipped": dict(problems.counts),
            "videos_whose_features_change": changed,
            "group_edges": list(edges),
        }
        schema = _schema(len(catalogue), item_features, sizes, competitors, provenance)
        shutil.rmtree(state)
        return writer.finish(schema)


def _splits(source: Path, days: Sequence[Day], valid: int, test: int) -> dict[str, str]:
    """Day -> split, for the days that make requests."""
    train = len(days) - valid - test
    if train < 1:
        raise DataError(
            f"{source}: {len(days)} chosen days of all_stage have requests; expected more than the {valid} of "
            f"validation and {test} of test (--valid, --test)"
        )
    return dict(zip((day.day for day in days), np.repeat(SPLITS, (train, valid, test)).tolist(), strict=True))


def _folder(state: Path, day: Day) -> Path:
    return state / "days" / day.day


def _scan_key(day: Day, competitors: int) -> list[object]:
    return ["scan", day.logged, competitors, *day.identity]


def _scan(days: Sequence[Day], state: Path, competitors: int, jobs: int, skip: bool) -> Problems:
    """Scan the days that are not yet scanned; returns what was wrong with all of them.

    Days that have requests of each other are scanned again, to leave those out.
    """
    problems = Problems(skip=skip)
    plans = [ScanPlan(day, _folder(state, day), _scan_key(day, competitors), competitors, skip) for day in days]
    counts = in_parallel(_scan_one, plans, jobs, "scan")
    ids = [load(plan.folder / "requests", REQUEST)["request_id"] for plan in plans]
    known, times = np.unique(np.concatenate(ids), return_counts=True)
    repeated = [tuple(np.intersect1d(mine, known[times > 1]).tolist()) for mine in ids]
    if any(repeated):
        plans = [dataclasses.replace(plan, elsewhere=some) for plan, some in zip(plans, repeated, strict=True)]
        counts = in_parallel(_scan_one, plans, jobs, "scan again")
    problems.counts = sum((Counter(day) for day in counts), Counter())
    return problems


def _scan_one(plan: ScanPlan) -> dict[str, int]:
    def work() -> dict[str, int]:
        problems = Problems(skip=plan.skip)
        shutil.rmtree(plan.folder, ignore_errors=True)
        plan.folder.mkdir(parents=True)
        elsewhere = np.array(plan.elsewhere, np.int64)
        scan_day(plan.day, plan.folder, competitors=plan.competitors, problems=problems, elsewhere=elsewhere)
        return dict(problems.counts)

    # A day whose wrong rows were skipped has to be read again when they are not to be.
    key = [*plan.key, *plan.elsewhere]
    return recorded(plan.folder.with_suffix(".scanned"), key, work, lambda counts: plan.skip or not counts)


def _merge(days: Sequence[Day], state: Path) -> Catalogue:
    folder = state / "catalogue"
    folder.mkdir(exist_ok=True)
    merge_videos([_folder(state, day) / "videos" for day in days], folder / "videos")
    return Catalogue(folder)


def _users(
    days: Sequence[Day], splits: dict[str, str], state: Path, history: int, competitors: int
) -> tuple[tuple[int, ...], dict[str, int]]:
    """Write each day's users as its plan wants them; returns the group edges, and the sizes of request id spaces."""
    events = np.zeros(0, event_record(competitors))
    recent: list[tuple[int, np.ndarray]] = []
    highest = np.zeros(len(CONTEXT), np.int64)
    edges: tuple[int, ...] = ()
    for day in days:
        folder = _folder(state, day)
        context = load(folder / "requests", REQUEST)["context"]
        today = np.unique(context[:, 0])
        recent = [(number, users) for number, users in recent if number >= day.number - WINDOW]
        active = active_days([users for _, users in recent])
        if splits.get(day.day) == "train":
            edges = group_edges(days_active(active, today))  # the last training day's: its window is the longest
        for name, records in (("history", events), ("active", active)):
            (folder / name).unlink(missing_ok=True)
            append(folder / name, records)
        events = newest_events(np.concatenate([events, load(folder / "events", events.dtype)]), history)
        recent.append((day.number, today))
        highest = np.maximum(highest, context.max(axis=0, initial=0))
    return edges, dict(zip(CONTEXT, (highest + 2).tolist(), strict=True))


def _write(
    days: Sequence[Day],
    splits: dict[str, str],
    out: Path,
    settings: tuple[int, int, tuple[int, ...]],
    jobs: int,
) -> list[Part]:
    """Write the parts of the days that are not yet written; returns those of all days, in time order."""
    history, competitors, edges = settings
    inputs = [_scan_key(day, competitors) for day in days]  # a part depends on all days, by item indices
    plans = [
        DayPlan(
            day=day.day,
            split=splits[day.day],
            scan=_folder(out / "state", day),
            catalogue=out / "state" / "catalogue",
            out=out,
            history=history,
            competitors=competitors,
            edges=edges,
        )
        for day in days
        if day.day in splits
    ]
    done = in_parallel(_write_one, [(plan, [history, plan.split, inputs]) for plan in plans], jobs, "write")
    return [Part(**part | {"groups": tuple(part["groups"])}) for parts in done for part in parts]


def _write_one(task: tuple[DayPlan, list[object]]) -> list[dict[str, Any]]:
    plan, key = task

    def work() -> list[dict[str, Any]]:
        shutil.rmtree(plan.out / f"requests/day={plan.day}", ignore_errors=True)
        return [dataclasses.asdict(part) for part in write_day(plan)]

    return recorded(plan.scan.with_suffix(".written"), ["write", *key], work, lambda _: True)


def _schema(
    items: int,
    item_features: tuple[Feature, ...],
    sizes: dict[str, int],
    competitors: int,
    provenance: dict[str, object],
) -> Schema:
    sizes = sizes | TIMES
    return Schema(
        name="recflow",
        items=items,
        features=(
            *(Feature(name=name, level="request", kind="id", size=size) for name, size in sizes.items()),
            *item_features,
        ),
        histories=(History(name="effective", timed=True, competitors=competitors),),
        labels=FEEDBACK,
        stages=tuple(stage.name.lower() for stage in Stage if stage.name and stage != Stage.RANDOM),
        input_space={"pre_ranking": ("ranked", "coarse_neg"), "ranking": ("ranked",)},
        pools=("exposed",),
        orders=ORDERS,
        provenance=provenance,
    )
