"""Every leakage check: a log that has exactly that leak is found out, with count and example; a clean one passes."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from joint.audit import main
from joint.auditing import chunks as audit_chunks
from joint.auditing.checks import CHECKS, time_limits
from joint.auditing.measure import Report, audit
from joint.data.dataset import Dataset, DatasetWriter
from joint.data.ragged import Ragged, offsets_of
from joint.data.requests import Requests
from joint.schema import NEVER, Feature, History, Schema, Stage

NAN = float("nan")
FIRST = 19_723  # 2024-01-01
E, R, C = int(Stage.RANKED | Stage.EXPOSED), int(Stage.RANKED), int(Stage.COARSE_NEG)
TRAIN, TRAIN_2, VALID, TEST = (
    f"requests/day=2024-01-{day:02}/part-{split}-0.parquet"
    for day, split in ((1, "train"), (2, "train"), (3, "valid"), (10, "test"))
)


def at(day: int, second: int) -> int:
    """Seconds since 1970, `day` counted from the first one."""
    return (FIRST + day) * 86_400 + second


@dataclass
class Row:
    """A request as a test writes it."""

    id: int
    day: int
    split: str
    time: int
    user: int
    candidates: list[int]
    stages: list[int]
    click: list[float]
    watched: list[int] = field(default_factory=list)
    watched_at: list[int] = field(default_factory=list)


@dataclass
class Log:
    """Six requests of four days without a leak, the click of request 3 known just in time; what a test changes."""

    rows: dict[int, Row]
    first_day: list[int]
    hot: list[int]  # the first days in the pool
    schema: Schema


def clean_log() -> Log:
    rows = [
        Row(1, 0, "train", at(0, 100), 1, [0, 1, 2], [E, R, C], [1, NAN, NAN], [3], [at(0, 50)]),
        Row(2, 0, "train", at(0, 200), 2, [1, 3], [E, C], [0, NAN]),
        Row(3, 1, "train", at(1, 150), 1, [2, 0, 3], [E, R, C], [0, NAN, NAN], [0], [at(0, 100)]),
        Row(4, 2, "valid", at(2, 150), 2, [0, 1], [E, C], [1, NAN], [1], [at(0, 200)]),
        Row(5, 9, "test", at(9, 100), 1, [4, 2], [E, C], [1, NAN], [0, 2], [at(0, 100), at(1, 100)]),
        Row(6, 9, "test", at(9, 300), 3, [1], [E], [NAN]),
    ]
    schema = Schema(
        name="clean",
        items=6,
        features=(
            Feature(name="user_id", level="request", kind="id", size=5),
            Feature(name="item_id", level="item", kind="id", size=7),
        ),
        histories=(History(name="watched", timed=True),),
        labels=("click",),
        stages=("coarse_neg", "ranked", "exposed"),
        input_space={"ranking": ("ranked",)},
        pools=("hot",),
        matures_after={"click": 1.0},
    )
    first_day = [FIRST] * 4 + [FIRST + 9, FIRST]
    hot = [FIRST, FIRST, FIRST + 1, NEVER, FIRST + 9, NEVER]
    return Log({row.id: row for row in rows}, first_day, hot, schema)


def write(log: Log, out: Path) -> Dataset:
    """The log on disk, opened."""
    with DatasetWriter(out) as writer:
        writer.items(
            {
                "item_id": np.arange(1, 7),
                "first_day": np.array(log.first_day, np.int32),
                "first_day.hot": np.array(log.hot, np.int32),
            }
        )
        for day, split in sorted({(row.day, row.split) for row in log.rows.values()}):
            rows = [row for row in log.rows.values() if (row.day, row.split) == (day, split)]
            writer.add(_requests(rows), day=str(np.datetime64(FIRST + day, "D")), split=split)
        writer.finish(log.schema)
    return Dataset(out)


def _requests(rows: list[Row]) -> Requests:
    def scalars(name: str) -> np.ndarray:
        return np.array([getattr(row, name) for row in rows], np.int64)

    def lists(name: str, kind: Any) -> Ragged:
        some = [np.array(getattr(row, name), kind) for row in rows]
        return Ragged(np.concatenate(some), offsets_of(np.array([len(one) for one in some])))

    return Requests(
        {
            "request_id": scalars("id"),
            "timestamp": scalars("time"),
            "group": np.zeros(len(rows), np.int8),
            "user_id": scalars("user"),
            "watched": lists("watched", np.int32),
            "watched.timestamp": lists("watched_at", np.int64),
            "candidates": lists("candidates", np.int32),
            "stages": lists("stages", np.uint16),
            "click": lists("click", np.float32),
        }
    )


def leaks(report: Report) -> dict[tuple[str, str], tuple[int, str]]:
    return {(leak["check"], leak["file"]): (leak["count"], leak["first"]) for leak in report["leaks"]}


def notes(report: Report) -> dict[tuple[str, str], tuple[int, str]]:
    return {(note["check"], note["file"]): (note["count"], note["first"]) for note in report["notes"]}


def test_a_clean_log_passes(tmp_path: Path) -> None:
    report = audit(write(clean_log(), tmp_path / "log"))
    assert report["leaks"] == []
    assert {name: check["status"] for name, check in report["checks"].items()} == dict.fromkeys(CHECKS, "clean")
    assert {check["note"] for check in report["checks"].values()} == {""}


def _exposed_negative(log: Log) -> None:
    log.rows[1] = replace(log.rows[1], candidates=[0, 1, 0, 0], stages=[E, R, C, R], click=[1, NAN, NAN, NAN])
    log.rows[2] = replace(log.rows[2], candidates=[1, 3, 3], stages=[E, C, C], click=[0, NAN, NAN])  # no leak


def _exposed_early(log: Log) -> None:
    log.rows[1].candidates[0] = 4


def _candidate_early(log: Log) -> None:
    log.rows[3].candidates[1:] = [4, 4]


def _history_early(log: Log) -> None:
    log.rows[4].watched = [4]


def _pool_early(log: Log) -> None:
    log.hot[4] = FIRST + 8


def _history_late(log: Log) -> None:
    log.rows[3].watched_at = [at(1, 150)]  # the very second of the request
    log.rows[5].watched_at = [at(9, 101), at(9, 102)]


def _immature(log: Log) -> None:
    log.schema = replace(log.schema, matures_after={"click": 1.5})


def _immature_by_a_week(log: Log) -> None:
    log.schema = replace(log.schema, matures_after={"click": 7})
    log.rows[1].click = [NAN] * 3  # unobserved, as it should be


def _immature_but_unexposed(log: Log) -> None:
    log.rows[3].click[1] = 1  # was never feedback, whenever it is known
    log.schema = replace(log.schema, matures_after={"click": 1.5})
    log.rows[3].click[0] = NAN


def _unexposed_feedback(log: Log) -> None:
    log.rows[1].click = [1, 0, 1]
    log.rows[5].click = [1, 1]


def _same_request(log: Log) -> None:
    log.rows[6].id = 2


def _twice(log: Log) -> None:
    log.rows[2].id = 1


def _later(log: Log) -> None:
    log.schema = replace(log.schema, matures_after={})
    log.rows[3].time = at(2, 151)


def _valid_later(log: Log) -> None:
    log.rows[4].time = at(9, 101)


LEAKS: dict[Callable[[Log], None], dict[tuple[str, str], tuple[int, str]]] = {
    _exposed_negative: {("exposed_among_negatives", TRAIN): (1, "request 1, item 0")},
    _exposed_early: {
        ("exposure_before_first_day", TRAIN): (1, "request 1 of 2024-01-01, item 4 (first day 2024-01-10)")
    },
    _candidate_early: {
        ("candidate_before_first_day", TRAIN_2): (2, "request 3 of 2024-01-02, item 4 (first day 2024-01-10)")
    },
    _history_early: {
        ("history_before_first_day", VALID): (1, "request 4 of 2024-01-03, item 4 (first day 2024-01-10) in watched")
    },
    _pool_early: {
        ("pool_before_first_day", "items.parquet"): (1, "item 4: first_day.hot 2024-01-09, first_day 2024-01-10")
    },
    _history_late: {
        ("history_after_request", TRAIN_2): (1, f"request 3 at {at(1, 150)} has {at(1, 150)} in watched"),
        ("history_after_request", TEST): (2, f"request 5 at {at(9, 100)} has {at(9, 101)} in watched"),
    },
    _immature_but_unexposed: {("feedback_on_unexposed", TRAIN_2): (1, "request 3, item 0: click is 1")},
    _unexposed_feedback: {
        ("feedback_on_unexposed", TRAIN): (2, "request 1, item 1: click is 0"),
        ("feedback_on_unexposed", TEST): (1, "request 5, item 2: click is 1"),
    },
    _same_request: {("request_in_two_splits", TRAIN): (1, f"request 2, also in {TEST}")},
    _twice: {("duplicate_request_id", TRAIN): (1, f"request 1, also in {TRAIN}")},
    _later: {
        ("later_than_evaluation", TRAIN_2): (
            1,
            f"request 3 at {at(2, 151)}, evaluation begins at {at(2, 150)}",
        )
    },
    _valid_later: {
        ("later_than_evaluation", VALID): (1, f"request 4 at {at(9, 101)}, evaluation begins at {at(9, 100)}")
    },
}


@pytest.mark.parametrize("change", LEAKS, ids=lambda change: change.__name__)
def test_exactly_that_leak_is_found(change: Callable[[Log], None], tmp_path: Path) -> None:
    log = clean_log()
    change(log)
    report = audit(write(log, tmp_path / "log"))
    assert leaks(report) == LEAKS[change]
    found = {check for check, _ in LEAKS[change]}
    assert {name for name, check in report["checks"].items() if check["status"] == "leak"} == found
    for leak in report["leaks"]:
        said = f"{leak['file']}: {leak['count']} {CHECKS[leak['check']]}; first: {leak['first']}"
        assert leak["line"] == said
    if change is _exposed_negative:
        assert report["oddities"]["repeated_candidates"] == 3


NOTES: dict[Callable[[Log], None], dict[tuple[str, str], tuple[int, str]]] = {
    _immature: {
        ("immature_label", TRAIN_2): (
            1,
            f"request 3: click is known at {at(2, 43_350)}, evaluation begins at {at(2, 150)}",
        )
    },
    _immature_by_a_week: {
        ("immature_label", f"{TRAIN} and 1 more files"): (
            2,
            f"request 2: click is known at {at(7, 200)}, evaluation begins at {at(2, 150)}",
        ),
    },
}


@pytest.mark.parametrize("change", NOTES, ids=lambda change: change.__name__)
def test_what_training_leaves_out_is_one_note_a_check(change: Callable[[Log], None], tmp_path: Path) -> None:
    log = clean_log()
    change(log)
    report = audit(write(log, tmp_path / "log"))
    assert report["leaks"] == []
    assert notes(report) == NOTES[change]
    assert {name: check["status"] for name, check in report["checks"].items() if check["status"] != "clean"} == {
        "immature_label": "note"
    }


def test_a_note_hides_no_leak_and_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    log = clean_log()
    _immature_by_a_week(log)
    dataset = write(log, tmp_path / "log")
    monkeypatch.setattr(sys, "argv", ["joint.audit", str(dataset.directory)])
    assert main() == 0
    text = capsys.readouterr().out
    assert text.startswith("leakage: none found; 12 of 13 checks are clean\n  note: ")
    assert "LEAK" not in text
    found = json.loads((dataset.directory / "audit" / "audit.json").read_text())
    if find_spec("matplotlib"):
        page = (dataset.directory / "audit" / "audit.html").read_text()
        assert "None found." in page
        assert f"<p>Note: {found['notes'][0]['line']}</p>" in page
    log.rows[5].click = [1, 1]
    dataset = write(log, tmp_path / "leaky")
    monkeypatch.setattr(sys, "argv", ["joint.audit", str(dataset.directory)])
    assert main() == 1
    verdict, leak, note = capsys.readouterr().out.splitlines()[:3]
    assert verdict == "leakage: 1 finding; 11 of 13 checks are clean"
    assert leak.startswith(f"  LEAK {TEST}: 1 labels")
    assert note.startswith(f"  note: {TRAIN} and 1 more files: 2 training labels")


def test_the_column_split_is_held_against_the_schema(tmp_path: Path) -> None:
    dataset = write(clean_log(), tmp_path / "log")
    table = pq.read_table(dataset.directory / TRAIN, partitioning=None)
    place = table.column_names.index("split")
    changed = table.set_column(place, "split", pa.array(["train", "test"]))
    pq.write_table(changed, dataset.directory / TRAIN)
    report = audit(Dataset(dataset.directory))
    assert leaks(report) == {("split_column", TRAIN): (1, "request 2: test; dataset.json says train")}


def one_day(log: Log) -> Log:
    """The same requests, all of them filed under the last day: splits per user."""
    for row in log.rows.values():
        row.day = 9
    return log


def test_splits_per_user_are_not_held_against_the_days(tmp_path: Path) -> None:
    log = one_day(clean_log())
    log.rows[3].time = at(9, 999)
    report = audit(write(log, tmp_path / "log"))
    assert report["leaks"] == []
    for name in ("later_than_evaluation", "immature_label"):
        assert report["checks"][name]["status"] == "not checked"
        assert "splits are per user" in report["checks"][name]["note"]
    assert time_limits(Dataset(tmp_path / "log").schema) == {}


def test_an_exposure_of_a_known_user_in_two_splits(tmp_path: Path) -> None:
    log = one_day(clean_log())
    log.rows[3] = replace(log.rows[3], user=1, time=at(9, 100), candidates=[4, 0, 3])  # as request 5 of test
    log.rows[4] = replace(log.rows[4], user=3, time=at(9, 300), candidates=[1, 0])  # as request 6 of test
    file = "requests/day=2024-01-10/part-{}-0.parquet"
    report = audit(write(log, tmp_path / "log"))
    assert leaks(report) == {
        ("exposure_in_two_splits", file.format("train")): (1, f"user 1, item 4 at {at(9, 100)}, also in test"),
        ("exposure_in_two_splits", file.format("valid")): (1, f"user 3, item 1 at {at(9, 300)}, also in test"),
    }
    for row in log.rows.values():
        row.user = 0  # nobody knows who that is
    assert audit(write(log, tmp_path / "unknown"))["leaks"] == []


def test_every_exposure_in_two_splits_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forty of them, in requests of five; once with all in a chunk, once with a chunk a row group."""

    def row(id_: int, split: str, user: int) -> Row:
        items = [4, 0, 3, 1, 2]
        return Row(id_, 9, split, at(9, user), user, items, [E, E, E, E, E], [NAN] * 5)

    log = clean_log()
    log.schema = replace(log.schema, features=(Feature(name="user_id", level="request", kind="id", size=99),))
    log.rows = {n: row(n, "test", n) for n in range(1, 41)} | {n + 50: row(n + 50, "train", n) for n in range(8, 16)}
    file = "requests/day=2024-01-10/part-train-0.parquet"
    dataset = write(log, tmp_path / "log")
    for size in (audit_chunks.CHUNK, 16):
        monkeypatch.setattr(audit_chunks, "CHUNK", size)
        found = leaks(audit(dataset))
        assert found == {("exposure_in_two_splits", file): (40, f"user 8, item 4 at {at(9, 8)}, also in test")}


def test_the_limit_is_the_first_request_of_any_later_split(tmp_path: Path) -> None:
    schema = write(clean_log(), tmp_path / "log").schema
    assert time_limits(schema) == {"train": at(2, 150), "valid": at(9, 100)}
    shared = clean_log()
    shared.rows[4].day = 1  # validation on a day of training: only the test is told from training by days
    assert time_limits(write(shared, tmp_path / "shared").schema) == {"train": at(9, 100), "valid": at(9, 100)}


def test_a_third_copy_counts_again(tmp_path: Path) -> None:
    log = clean_log()
    for row in (2, 3, 6):
        log.rows[row].id = 1
    assert leaks(audit(write(log, tmp_path / "log"))) == {
        ("request_in_two_splits", TRAIN): (1, f"request 1, also in {TEST}"),
        ("duplicate_request_id", TRAIN): (1, f"request 1, also in {TRAIN}"),
        ("duplicate_request_id", TRAIN_2): (1, f"request 1, also in {TRAIN}"),
    }


def test_what_cannot_be_checked_is_said(tmp_path: Path) -> None:
    log = clean_log()
    log.schema = replace(
        log.schema,
        histories=(History(name="watched"),),
        features=(log.schema.features[1],),
        matures_after={},
    )
    log.first_day, log.hot = [0] * 6, [0] * 6
    checks = audit(write(log, tmp_path / "log"))["checks"]
    assert {name: check["note"] for name, check in checks.items() if check["status"] == "not checked"} == {
        "history_after_request": "no timestamps of watched: it could not be checked",
        "exposure_in_two_splits": "no request feature user_id: it could not be checked",
        "immature_label": "no label says when it matures (matures_after)",
        **{
            f"{what}_before_first_day": "no item has a first day: nothing can come before it"
            for what in ("exposure", "candidate", "history", "pool")
        },
    }


def test_timestamps_that_are_no_seconds_are_said(tmp_path: Path) -> None:
    log = clean_log()
    for row in log.rows.values():
        row.time *= 1000
    note = audit(write(log, tmp_path / "log"))["checks"]["immature_label"]["note"]
    assert note == f"{TRAIN} begins at {at(0, 100) * 1000}, which in seconds is not near its day"
