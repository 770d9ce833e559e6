"""The first pass: all files are read once, their rows put aside by request or user."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import pyarrow as pa

from joint.configuring.settings import Tree
from joint.data.flat.append import Old, mature
from joint.data.flat.columns import MICRO
from joint.data.flat.files import (
    Source,
    history_columns,
    log_columns,
    open_source,
    table_columns,
    watch_columns,
)
from joint.data.flat.job import Job, see
from joint.data.flat.map import LogMap
from joint.data.flat.rows import Vocabularies, read_history, read_log, read_watch_log
from joint.data.flat.spill import Spill
from joint.data.problems import Problems
from joint.data.requests import Requests
from joint.errors import DataError

BUCKET = 250_000  # rows in memory at a time, about
MOST_BUCKETS = 256


def open_sources(files: Sequence[Path], m: LogMap, tree: Tree) -> dict[str, Source]:
    """The log under 'log', and each further file that the map names under its place in the map.

    Raises:
        ConfigError, DataError: as `open_source`.
    """
    sources = {"log": open_source(files, log_columns(m), tree)}
    if m.items:
        sources["items"] = open_source([m.items.file], table_columns("items", m.items, m), tree)
    if m.users:
        sources["users"] = open_source([m.users.file], table_columns("users", m.users, m), tree)
    for name, history in m.histories.items():
        if history.file:
            sources[f"histories.{name}"] = open_source([history.file], history_columns(name, history, m), tree)
    for name, of in m.discoveries.items():
        if of.watch_log:
            sources[f"labels.{name}"] = open_source([of.watch_log], watch_columns(name, m), tree)
    return sources


def check_families(sources: Mapping[str, Source], m: LogMap, vocabularies: Vocabularies) -> None:
    """DataError unless the words of every id space are all integers or all strings, also those of an older dataset."""
    family: dict[str, tuple[str, str]] = {}
    for space, vocabulary in vocabularies.items():
        if (word := next(iter(vocabulary.codes), None)) is not None:
            family[space] = ("string" if isinstance(word, str) else "integer", "the dataset")
    for source in sources.values():
        for want in source.wanted:
            space = _space(want.path, m)
            if space and want.column in source.families:
                found, where = source.families[want.column], f"{source.files[0]}: column {want.column}"
                before, there = family.setdefault(space, (found, where))
                if found != before:
                    raise DataError(
                        f"{where} has {found} values; {there} has {before} values of the same ids ({space})"
                    )


def _space(path: str, m: LogMap) -> str:
    """The id space of a place in the map; '' if it is no id."""
    keys = path.split(".")
    if keys[0] == "features":
        return m.space(keys[1]) if m.features[keys[1]].kind in ("id", "ids") else ""
    spaces = {"items.key": "item_id", "users.key": "user_id", "group.column": "group"}
    return spaces.get(path) or {"user": "user_id", "item": "item_id"}.get(keys[-1], "")


def job_of(m: LogMap, vocabularies: Vocabularies, old: Old | None, work: Path, rows: int) -> Job:
    """A job over so many rows, its temporary files under `work`."""
    buckets = min(1 + rows // BUCKET, MOST_BUCKETS)

    def spills(what: str, names: Iterable[str]) -> dict[str, Spill]:
        return {name: Spill(work / what / name, buckets) for name in names}

    return Job(
        m=m,
        vocabularies=vocabularies,
        old=old,
        **{name: Spill(work / name, buckets) for name in ("rows", "users", "active")},  # type: ignore[arg-type]
        events=spills("events", m.histories),
        past=spills("past", m.histories),
        playbacks=spills("playbacks", m.discoveries),
        exposures=spills("exposures", m.discoveries),
        days_folder=work / "days",
    )


def put_aside(job: Job, sources: Mapping[str, Source], problems: Problems) -> None:
    """Read all rows, and what the old dataset goes on from."""
    m = job.m
    last_day = job.old.last_day if job.old else None
    for rows in read_log(sources["log"], m, job.vocabularies, problems, last_day=last_day):
        job.rows.write(rows, rows.scalars("log.request" if m.request else "log.user"))
    for rows in job.old.state("active") if job.old else ():
        _put(job.active, rows)
    job.rows.close()  # one after the other: a spill has a file open for each bucket
    job.active.close()
    for name in m.histories:
        _put_history(job, name, sources.get(f"histories.{name}"), problems, last_day)
    for name in m.discoveries:
        _put_discoveries(job, name, sources.get(f"labels.{name}"), problems, last_day)


def _put_history(job: Job, name: str, source: Source | None, problems: Problems, last_day: int | None) -> None:
    """Events of a history: those of the old dataset, and those of its own file."""
    for rows in job.old.state(f"history.{name}") if job.old else ():
        _put(job.past[name], rows)
    job.past[name].close()
    if source:
        for rows in read_history(source, name, job.m, job.vocabularies, problems, last_day=last_day):
            _put_events(job, name, rows)
    job.events[name].close()


def _put_discoveries(job: Job, name: str, source: Source | None, problems: Problems, last_day: int | None) -> None:
    """Playbacks and unripe exposures of the old dataset, and the playbacks of the watch log."""
    if job.old:
        for rows in job.old.exposures_since(mature(name, job.m, job.old.end)):
            _put(job.exposures[name], rows)
        job.exposures[name].close()
        for rows in job.old.state(f"playbacks.{name}"):
            words = {key: pa.array(rows.scalars(key)) for key in ("user", "item")}
            codes = {key: job.vocabularies[f"{key}_id"].encode(of) for key, of in words.items()}
            _put(job.playbacks[name], Requests({**rows.columns, **codes}))
    if source:
        for rows in read_watch_log(source, name, job.m, job.vocabularies, problems, last_day=last_day):
            keys = {key: rows.scalars(f"log.{key}") for key in ("user", "item")}
            watched = {key: rows.scalars(key) for key in ("minutes", "exploring")}
            _put(job.playbacks[name], Requests({**keys, "time": rows.scalars("log.time") // MICRO, **watched}))
    job.playbacks[name].close()


def _put(spill: Spill, rows: Requests) -> None:
    spill.write(rows, rows.scalars("user"))


def _put_events(job: Job, name: str, rows: Requests) -> None:
    """Events of a history's own file: their users and items are known from then on, as if the log had shown them."""
    user, item, day = (rows.scalars(f"log.{key}") for key in ("user", "item", "day"))
    see(job.vocabularies, "user_id", user, day)
    see(job.vocabularies, "item_id", item, day)
    for event in job.m.histories[name].events:
        feature = job.m.features[event]
        if feature.kind == "id" and job.m.space(event) not in ("user_id", "item_id"):
            see(job.vocabularies, job.m.space(event), rows.columns[event], day)
    events = {event: rows.columns[event] for event in job.m.histories[name].events}
    _put(job.events[name], Requests({"user": user, "item": item, "time": rows.scalars("log.time"), **events}))
