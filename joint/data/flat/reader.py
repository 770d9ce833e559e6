"""Your own flat log, one row for each (request, item) -> a dataset, as a map says (`docs/own_logs.md`).

    python -m joint.prepare parquet monday.parquet tuesday.parquet data/mine --map map.yaml
    python -m joint.prepare parquet wednesday.parquet data/mine --map map.yaml --append

Rows may lie anywhere in the files. They are put aside on disk by request, then as whole requests by user (histories
need no more than that), then by day; each time one bucket is in memory. In memory at once are the vocabularies, the
catalogue and the items and users files.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from joint.configuring.settings import Tree, plain
from joint.data.dataset import DatasetWriter
from joint.data.flat.append import open_old, take_over
from joint.data.flat.build import Builder
from joint.data.flat.days import write_days
from joint.data.flat.features import described
from joint.data.flat.files import check_zone
from joint.data.flat.job import Job
from joint.data.flat.map import LogMap, read_map, seconds
from joint.data.flat.put import check_families, job_of, open_sources, put_aside
from joint.data.flat.requests import Gather, gather_requests
from joint.data.flat.rows import read_table, spaces
from joint.data.flat.statistics import fix_statistics
from joint.data.flat.tables import Lookup, catalogue, note_tables
from joint.data.flat.vocabulary import Vocabulary
from joint.data.problems import Problems
from joint.data.requests import Requests
from joint.errors import DataError
from joint.schema import STAGES, History, Schema, day_name, day_number

MOST_GROUPS = 128  # the dataset holds them as int8


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line of `joint.prepare parquet`."""
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE", help="Parquet files of the log")
    parser.add_argument("out", type=Path, help="folder of the dataset")
    parser.add_argument("--map", type=Path, required=True, help="YAML: which column means what")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override an entry of the map")
    parser.add_argument("--append", action="store_true", help="add later days to the dataset OUT")
    parser.add_argument(
        "--on-error", choices=("stop", "skip"), default="stop", help="skip: leave bad rows out, counted"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace OUT")


def prepare(arguments: argparse.Namespace) -> Schema:
    """Run the command; prints what was skipped."""
    m, tree = read_map(arguments.map, arguments.set)
    problems = Problems(skip=arguments.on_error == "skip")
    schema = prepare_log(
        arguments.files,
        arguments.out,
        m,
        tree,
        problems=problems,
        append=arguments.append,
        overwrite=arguments.overwrite,
    )
    for line in problems.lines():
        print(line)
    return schema


def prepare_log(
    files: Sequence[Path],
    out: Path,
    m: LogMap,
    tree: Tree,
    *,
    problems: Problems,
    append: bool = False,
    overwrite: bool = False,
) -> Schema:
    """Prepare the files of a log, or append them to the dataset OUT, which stays as it is until all is done.

    Args:
        tree: where the map was written, for its mistakes.

    Raises:
        ConfigError: the map asks for what the files do not have, a line each.
        DataError: a file or row is bad, or there are too few days for the splits.
    """
    check_zone(m, tree)
    old = open_old(out, m) if append else None
    writer = DatasetWriter(out, overwrite=overwrite or append)
    sources = open_sources(files, m, tree)
    vocabularies = {space: Vocabulary(old.words(space) if old else ()) for space in spaces(m)}
    check_families(sources, m, vocabularies)
    with writer:
        work, state = writer.temporary / "work", writer.temporary / "state"
        rows = sum(source.rows for source in sources.values()) + (old.rows if old else 0)
        job = job_of(m, vocabularies, old, work, rows)
        tables = {
            "items": read_table(sources.get("items"), "items", m.items, m, vocabularies, problems),
            "users": read_table(sources.get("users"), "users", m.users, m, vocabularies, problems),
        }
        put_aside(job, sources, problems)
        _gather(job, sources["log"].files, problems)
        schema = _build(job, tables, writer, state)
        shutil.rmtree(work)
        before = old.schema.provenance["files"] if old else []
        assert isinstance(before, list)
        provenance = schema.provenance | {"files": [*before, *map(str, files)], "skipped": dict(problems.counts)}
        provenance["grown_from"] = [*old.schema.grown_from, old.schema.hash] if old else []
        return writer.finish(dataclasses.replace(schema, provenance=provenance))


def _gather(job: Job, files: Sequence[Path], problems: Problems) -> None:
    old, m = job.old, job.m
    known = old.requests_since(old.end - seconds(m.spread)) if old else np.zeros(0, np.int64)
    hashes = {space: job.vocabularies[space].hashes() for space in ("user_id", "item_id")}
    gather_requests(job, Gather(m, files, problems, hashes["user_id"], hashes["item_id"], known))
    if not job.days:
        raise DataError(f"{files[0]}: no good row in the log; expected at least one request")


def _build(job: Job, tables: Mapping[str, Sequence[Requests]], writer: DatasetWriter, state: Path) -> Schema:
    """Everything after the days and words of the log are known."""
    m, old, vocabularies = job.m, job.old, job.vocabularies
    items, users = _lookups(job, tables)
    last_day = max(job.days)
    end = end_of(last_day, m.timezone)
    note_tables(job, items, users, last_day)
    for vocabulary in vocabularies.values():
        vocabulary.finish(last_day)
    if not isinstance(m.group, str) and vocabularies["group"].size > MOST_GROUPS:
        raise DataError(f"group.column: {vocabularies['group'].size - 1} groups; expected at most {MOST_GROUPS - 1}")
    days = sorted(job.days | {day_number(part.day) for part in old.schema.parts}) if old else sorted(job.days)
    split_of = splits(days, m)
    if old:
        job.statistics = old.statistics
    else:
        fix_statistics(job, users, items, max(day for day in days if split_of[day_name(day)] == "train"))
    state.mkdir()
    builder = Builder(job, users, vocabularies["item_id"].hashes(), last_day=last_day, end=end, state=state)
    matured = builder.run()
    if old:
        take_over(old, writer, split_of, matured)
    write_days(job.days_folder, writer, split_of)
    (state / "statistics.json").write_text(json.dumps(job.statistics, indent=1))
    writer.items(catalogue(job, items, old))
    for space, vocabulary in vocabularies.items():
        writer.vocabulary(space, vocabulary.words())
    return _schema(job, end)


def _lookups(job: Job, tables: Mapping[str, Sequence[Requests]]) -> tuple[Lookup, Lookup]:
    """The features of items and of users, by code."""
    m = job.m
    item_rows, key = (tables["items"], "key") if m.items else ([job.firsts] if job.firsts else [], "log.item")
    items = Lookup(m, list(m.features_of("item")), item_rows, key, len(job.vocabularies["item_id"].codes))
    users = Lookup(m, list(m.features_of("user")), tables["users"], "key", len(job.vocabularies["user_id"].codes))
    return items, users


def splits(days: Sequence[int], m: LogMap) -> dict[str, str]:
    """Day (YYYY-MM-DD) -> split: the last `test_days` days that have requests, the `valid_days` before, the rest."""
    test, valid = m.splits.test_days, m.splits.valid_days
    if len(days) <= test + valid:
        raise DataError(
            f"the log has requests on {len(days)} days; expected at least {test + valid + 1}: {valid} valid_days, "
            f"{test} test_days (splits in the map) and one to train on"
        )
    names = ["train"] * (len(days) - test - valid) + ["valid"] * valid + ["test"] * test
    return {day_name(day): name for day, name in zip(days, names, strict=True)}


def end_of(day: int, zone: str) -> int:
    """The UNIX second in which a day ends."""
    return int(
        pd.Timestamp(day_name(day + 1)).tz_localize(zone, nonexistent="shift_forward", ambiguous=True).timestamp()
    )


def _schema(job: Job, end: int) -> Schema:
    m = job.m
    return Schema(
        name=m.name,
        items=job.vocabularies["item_id"].size - 1,
        features=described(m, job.vocabularies, job.statistics),
        histories=tuple(History(name=name, events=of.events, timed=True) for name, of in m.histories.items()),
        labels=tuple(m.columns),
        stages=_stages(m),
        input_space=m.input_space,
        pools=tuple(m.pools),
        orders=tuple(m.orders),
        scores=tuple(m.scores),
        matures_after={name: label.days for name, label in m.columns.items() if label.days},
        provenance={"source": "parquet", "map": plain(m), "end": end, "statistics": job.statistics},
    )


def _stages(m: LogMap) -> tuple[str, ...]:
    """The stages that the log can hold, in the order of the funnel."""
    if isinstance(m.stages, str):
        return (m.stages,)
    used = {*m.stages.flags, *(stage for of in m.stages.values.values() for stage in of)}
    return tuple(stage for stage in STAGES if stage in used)
