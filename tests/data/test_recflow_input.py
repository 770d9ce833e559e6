"""RecFlow: what is said of files that are not as they should be, and days in parallel, interrupted and resumed."""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.feather
import pytest

from benchmarks.recflow_days import make_day, write_day
from joint.data.dataset import Dataset
from joint.data.recflow import reader as recflow
from joint.data.recflow import rows as recflow_rows
from joint.data.recflow.reader import prepare_recflow
from joint.errors import DataError
from joint.schema import SPLITS, Schema

DAYS = ("2024-02-03", "2024-02-04", "2024-02-05", "2024-02-06")
BAD = "2024-02-04"
Frame = pd.DataFrame


def release(root: Path, days: tuple[str, ...] = DAYS) -> Path:
    for day in days:
        write_day(root, day, make_day(day, 8, users=4, videos=200, ranked=30))
    return root


def prepare(root: Path, out: Path, **settings: Any) -> Schema:
    return prepare_recflow(root, out, **settings)


def cell(column: str, value: int | None, *, where: str = "index == 3") -> Callable[[Frame], Frame]:
    def change(frame: Frame) -> Frame:
        frame = frame.astype("Int64")
        frame.loc[frame.query(where).index[:1], column] = value
        return frame

    return change


def flags(*names: str) -> Callable[[Frame], Frame]:
    """Row 3 has these flags and no others."""

    def change(frame: Frame) -> Frame:
        every = ["realshow", "rerank_pos", "rerank_neg", "rank_pos", "rank_neg", "coarse_neg", "prerank_neg"]
        shown = ["playing_time", "effective_view", "long_view", "like", "follow", "forward", "comment"]
        frame.loc[3, every + shown] = 0
        frame.loc[3, list(names)] = 1
        return frame

    return change


ROWS: dict[str, tuple[Callable[[Frame], Frame], str]] = {
    "negative id": (cell("video_id", -4), "column video_id, row 4: found -4; expected an id, 0 or more"),
    "huge id": (cell("user_id", 2**40), "column user_id, row 4: found 1099511627776; expected an id"),
    "null": (cell("author_id", None), "column author_id, row 4: found null; expected an integer"),
    "late in the file": (cell("age", -1, where="index == 333"), "column age, row 334: found -1;"),
    "no flag": (cell("like", 5, where="realshow == 1"), r"column like, row \d+: found 5; expected a flag, 0 or 1"),
    "seconds": (
        lambda frame: frame.assign(request_timestamp=frame.request_timestamp // 1000),
        r"column request_timestamp, row 1: found 170\d{7}; expected milliseconds within the file's day in China "
        r"\(and 389 more such rows\)",
    ),
    "another day": (cell("request_timestamp", 1707062400000), "column request_timestamp, row 4: found 1707062400000;"),
    "the request's clock": (
        lambda frame: frame.assign(request_timestamp=frame.request_timestamp - (frame.index == 3)),
        r"column request_timestamp, row 4: found \d+; expected the value of the request's first row \(and 57 more",
    ),
    "another user": (
        cell("gender", 77),
        "column gender, row 4: found 77; expected the value of the request's first row",
    ),
    "upload in ms": (cell("upload_timestamp", 1707062400000), "upload_timestamp, row 4: .* seconds since 1970"),
    "early and late": (
        flags("prerank_neg", "realshow"),
        "stage flags, row 4: found prerank_neg, realshow; expected one of them at most",
    ),
    "both cuts": (flags("prerank_neg", "coarse_neg"), "found prerank_neg, coarse_neg; expected one of them"),
    "rank twice": (flags("rank_pos", "rank_neg"), "found rank_neg, rank_pos; expected one of them"),
    "re-rank twice": (flags("rerank_pos", "rerank_neg"), "found rerank_neg, rerank_pos; expected one of them"),
    "no stage": (flags(), "stage flags, row 4: found none; expected at least one"),
    "feedback": (
        cell("long_view", 1, where="realshow == 0"),
        "column long_view, row .*: found 1; expected 0 where the video was not exposed",
    ),
    "rank": (
        cell("rank_index", 40_000, where="rank_pos == 1"),
        r"column rank_index, row \d+: found 40000; expected a rank",
    ),
    "twice": (
        lambda frame: pd.concat([frame, frame.iloc[5:6]]),
        r"column video_id, row 465: found \d+; expected a video once a request",
    ),
    "empty": (lambda frame: frame.iloc[:0], "found an empty file; expected the rows of a day"),
}


@pytest.mark.parametrize("case", ROWS)
def test_wrong_rows_are_named_or_counted(tmp_path, case, capsys, monkeypatch):
    change, message = ROWS[case]
    batch = 400 if "more" in message else 40  # "more" counts the rows of a batch
    monkeypatch.setattr(recflow_rows, "CHUNK", batch - 10)
    root = release(tmp_path / "recflow")
    path = root / "all_stage" / f"{BAD}.feather"
    change(pd.read_feather(path)).reset_index(drop=True).to_feather(path, chunksize=batch)
    with pytest.raises(DataError, match=message) as error:
        prepare(root, tmp_path / "out")
    assert str(error.value).startswith(str(path))
    assert "--on-error skip leaves such rows out" in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()
    schema = prepare(root, tmp_path / "out", skip=True)
    skipped = schema.provenance["skipped"]
    assert sum(skipped.values()) >= 1
    assert "skipped " in capsys.readouterr().err
    with pytest.raises(DataError, match=message):
        prepare(root, tmp_path / "strict")


def test_skipped_rows_are_counted_by_column_and_what_was_found(tmp_path):
    root = release(tmp_path / "recflow")
    path = root / "all_stage" / f"{BAD}.feather"
    frame = cell("video_id", -4)(pd.read_feather(path))
    frame = cell("age", None, where="index == 4")(cell("video_id", 2**40, where="index == 5")(frame))
    frame.to_feather(path, chunksize=5)
    assert prepare(root, tmp_path / "out", skip=True).provenance["skipped"] == {
        "column video_id: found a number out of range; expected an id, 0 or more, that fits in 31 bits": 2,
        "column age: found null; expected an integer": 1,
    }


def test_a_request_that_contradicts_itself_is_left_out_whole(tmp_path):
    root = release(tmp_path / "recflow")
    path = root / "all_stage" / f"{DAYS[2]}.feather"
    frame = pd.read_feather(path)
    rows = int((frame.request_id == frame.request_id[0]).sum())
    cell("user_id", 77, where="index == 0")(frame).to_feather(path)
    schema = prepare(root, tmp_path / "out", skip=True)
    assert schema.provenance["skipped"] == {
        "column user_id: found another value; expected the value of the request's first row": rows
    }
    assert schema.requests("valid") == 7
    later = frame.request_timestamp[0] // 1000 // 900 * 900_000 + 950_000  # another quarter of an hour
    cell("request_timestamp", later, where="index == 0")(frame).to_feather(path)
    schema = prepare(root, tmp_path / "time", skip=True)
    assert list(schema.provenance["skipped"].values()) == [rows]
    assert schema.requests("valid") == 7


def test_a_request_id_of_two_days_is_an_error_or_left_out_of_both(tmp_path):
    root = release(tmp_path / "recflow")
    frames = {day: pd.read_feather(root / "all_stage" / f"{day}.feather") for day in DAYS[1:3]}
    first, second = (frame.request_id[0] for frame in frames.values())
    rows = sum(int((frame.request_id == frame.request_id[0]).sum()) for frame in frames.values())
    path = root / "all_stage" / f"{DAYS[2]}.feather"
    frames[DAYS[2]].replace({"request_id": {second: first}}).to_feather(path)
    message = rf"{DAYS[1]}.feather: column request_id, row 1: found {first}; expected an id that no other day has"
    for jobs in (1, 2):
        with pytest.raises(DataError, match=message):
            prepare(root, tmp_path / "out", jobs=jobs)
        schema = prepare(root, tmp_path / f"out-{jobs}", jobs=jobs, skip=True)
        assert schema.provenance["skipped"] == {
            "column request_id: found an id of another day; expected an id that no other day has": rows
        }
        assert [schema.requests(split) for split in SPLITS] == [15, 7, 8]


def test_splits_are_cut_over_the_days_that_have_requests(tmp_path, capsys):
    root = release(tmp_path / "recflow")
    path = root / "all_stage" / f"{DAYS[2]}.feather"
    change_frame(path, lambda frame: frame.assign(user_id=-1))
    schema = prepare(root, tmp_path / "out", skip=True)
    assert {part.day: part.split for part in schema.parts} == {DAYS[0]: "train", DAYS[1]: "valid", DAYS[3]: "test"}
    assert schema.provenance["days"] == [DAYS[0], DAYS[1], DAYS[3]]
    assert f"warning: {path}: no request is left" in capsys.readouterr().err
    for day in DAYS[:2]:
        change_frame(root / "all_stage" / f"{day}.feather", lambda frame: frame.assign(user_id=-1))
    with pytest.raises(DataError, match="1 chosen days of all_stage have requests; expected more than"):
        prepare(root, tmp_path / "fewer", skip=True)


def test_files_of_macos_are_no_days(tmp_path):
    root = release(tmp_path / "recflow")
    (root / "all_stage" / f"._{BAD}.feather").write_bytes(b"\0\5\x16\7")
    assert prepare(root, tmp_path / "out").requests("train") == 16


def test_an_error_without_words_is_named(tmp_path, monkeypatch):
    root = release(tmp_path / "recflow")

    def fail(*args: object, **settings: object) -> None:
        raise pa.ArrowInvalid("")

    monkeypatch.setattr(pa.ipc, "open_file", fail)
    with pytest.raises(DataError, match=r"not a whole Feather file \(ArrowInvalid\)"):
        prepare(root, tmp_path / "out")


INTERRUPTED = """
import sys, time
from pathlib import Path
from joint.commands import run_command
from joint.data.recflow.work import in_parallel
def work(number):
    Path(sys.argv[0]).with_name(f"begun-{number}").touch()
    time.sleep(60)
if __name__ == "__main__":
    Path(sys.argv[0]).with_name("begun").touch()
    raise SystemExit(run_command(lambda: in_parallel(work, range(9), 2, "scan")))
"""


@pytest.mark.parametrize("wait_for", [1, 3], ids=["starting", "working"])
def test_an_interrupted_command_ends_quietly_and_at_once(tmp_path, wait_for):
    script = tmp_path / "script.py"
    script.write_text(INTERRUPTED)
    with subprocess.Popen(
        [sys.executable, script],
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a job in the background ignores it
    ) as command:
        end = time.monotonic() + 60
        while len(list(tmp_path.glob("begun*"))) < wait_for and time.monotonic() < end:
            time.sleep(0.05)
        time.sleep(0.2)
        os.killpg(command.pid, signal.SIGINT)  # as a terminal does: all processes of the group
        try:
            said = command.communicate(timeout=20)[1]
        except subprocess.TimeoutExpired:
            os.killpg(command.pid, signal.SIGKILL)
            raise
    assert command.returncode == 130
    assert "Traceback" not in said
    assert len(said.splitlines()) <= 1
    assert len(list(tmp_path.glob("begun*"))) <= 3  # no further task began


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-200])


def change_frame(path: Path, change: Callable[[Frame], Frame]) -> None:
    change(pd.read_feather(path)).to_feather(path)


FILES: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (truncate, "not a whole Feather file"),
    "nothing": (lambda path: path.write_bytes(b""), "not a Feather file: it starts with b''"),
    "pickle": (lambda path: path.write_bytes(b"\x80\x04K\x01."), "not a Feather file: it starts with"),
    "version 1": (
        lambda path: pa.feather.write_feather(pa.feather.read_table(path, memory_map=False), path, version=1),
        "Feather version 1; expected version 2",
    ),
    "lacks a column": (
        lambda path: change_frame(path, lambda f: f.drop(columns=["like", "rank_pos"])),
        "no column rank_pos, like; found: request_id",
    ),
    "twice a column": (
        lambda path: change_frame(path, lambda f: f.assign(**{"like ": f.like})),
        "column like: found twice",
    ),
    "floats": (
        lambda path: change_frame(path, lambda f: f.assign(video_id=f.video_id * 1.0)),
        "column video_id: found type double; expected integers",
    ),
    "words": (
        lambda path: change_frame(path, lambda f: f.assign(age="ten")),
        "column age: found type .*string; expected integers",
    ),
    "another name": (lambda path: path.rename(path.with_stem("sample")), "'sample' is not a day; expected YYYY-MM-DD"),
    "no day": (lambda path: path.rename(path.with_stem("2024-02-31")), "'2024-02-31' is not a day"),
    "link to nowhere": (
        lambda path: (path.unlink(), path.symlink_to(path.with_name("nowhere"))),
        r"feather: cannot be read \(No such file",
    ),
    "link to itself": (
        lambda path: (path.unlink(), path.symlink_to(path)),
        r"feather: cannot be read \(Too many levels",
    ),
    "folder": (lambda path: (path.unlink(), path.mkdir()), "cannot be read"),
}


@pytest.mark.parametrize("case", FILES)
def test_wrong_files_are_one_line(tmp_path, case):
    change, message = FILES[case]
    root = release(tmp_path / "recflow")
    change(root / "all_stage" / f"{BAD}.feather")
    for skip in (False, True):  # there is nothing to be skipped in a file that is not what it should be
        with pytest.raises(DataError, match=message) as error:
            prepare(root, tmp_path / "out", skip=skip)
        assert str(root) in str(error.value)
        assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_not_recflow_is_one_line(tmp_path):
    (tmp_path / "u.data").write_text("1")
    with pytest.raises(DataError, match=r"not RecFlow: expected all_stage/YYYY-MM-DD.feather; found: u.data"):
        prepare(tmp_path, tmp_path / "out")
    with pytest.raises(DataError, match="no folder of that name"):
        prepare(tmp_path / "nowhere", tmp_path / "out")


def test_days_can_be_chosen(tmp_path, capsys):
    root = release(tmp_path / "recflow")
    schema = prepare(root, tmp_path / "out", days="2024-02-03..2024-02-04, 2024-02-06", held_out=(0, 1))
    assert {part.day: part.split for part in schema.parts} == {
        "2024-02-03": "train",
        "2024-02-04": "train",
        "2024-02-06": "test",
    }
    for days, message in [
        ("2024-03-01", "no such file; there are 2024-02-03 to 2024-02-06"),
        ("yesterday", "--days: 'yesterday' is not a day"),
        ("2024-02-04..2024-02-03", "no such file"),
    ]:
        with pytest.raises(DataError, match=message):
            prepare(root, tmp_path / "other", days=days)
    with pytest.raises(DataError, match="2 chosen days of all_stage have requests; expected more than the 1 of"):
        prepare(root, tmp_path / "other", days="2024-02-03..2024-02-04")
    for folder in ("all_stage", "realshow"):
        (root / folder / "2024-02-05.feather").unlink()
    capsys.readouterr()
    prepare(root, tmp_path / "other")
    assert "no file at all for 2024-02-05" in capsys.readouterr().err


def test_command_line(tmp_path):
    parser = argparse.ArgumentParser()
    recflow.add_arguments(parser.add_subparsers(dest="source").add_parser("recflow"))
    root = release(tmp_path / "recflow")

    def run(out: str, *more: str) -> Schema:
        return recflow.prepare(parser.parse_args(["recflow", str(root), str(tmp_path / out), *more]))

    schema = run("out", "--competitors", "4")
    assert Dataset(tmp_path / "out").schema == schema
    assert [f.name for f in schema.features if f.level == "request"][:2] == ["user_id", "device_id"]
    assert {f.space for f in schema.features if f.name in ("hour", "upload_hour")} == {"hour"}
    with pytest.raises(DataError, match="exists already"):
        run("out")
    assert run("out", "--competitors", "4", "--overwrite", "--jobs", "2").hash == schema.hash
    with pytest.raises(DataError, match="--jobs is 0; expected 1 or more"):
        run("new", "--jobs", "0")


def files_of(out: Path) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}


def test_two_processes_write_the_bytes_of_one_and_say_the_first_days_error(tmp_path):
    root = release(tmp_path / "recflow")
    prepare(root, tmp_path / "one")
    prepare(root, tmp_path / "two", jobs=2)
    prepare(root, tmp_path / "again")
    assert files_of(tmp_path / "one") == files_of(tmp_path / "two") == files_of(tmp_path / "again")
    for day in DAYS[1:3]:
        truncate(root / "all_stage" / f"{day}.feather")
    with pytest.raises(DataError, match=f"{DAYS[1]}.feather: not a whole"):
        prepare(root, tmp_path / "three", jobs=2)


KILLED = """
import os, sys
from pathlib import Path
from joint.data.recflow import reader as recflow
from joint.data.recflow import rows as recflow_rows
calls, name = 0, sys.argv[3]
real = getattr(recflow, name)
def until_the_third(*args, **settings):
    global calls
    calls += 1
    if calls == 3:
        os.kill(os.getpid(), 9)
    return real(*args, **settings)
setattr(recflow, name, until_the_third)
recflow.prepare_recflow(Path(sys.argv[1]), Path(sys.argv[2]))
"""


@pytest.mark.parametrize(("killed", "scanned", "written"), [("scan_day", 2, 4), ("write_day", 0, 2)])
def test_a_killed_command_goes_on_and_ends_as_if_uninterrupted(tmp_path, monkeypatch, killed, scanned, written):
    root = release(tmp_path / "recflow")
    prepare(root, tmp_path / "whole")
    command = [sys.executable, "-c", KILLED, str(root), str(tmp_path / "out"), killed]
    assert subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True).returncode == -9
    assert not (tmp_path / "out").exists()
    done = {"scan_day": 0, "write_day": 0}
    for name in done:
        _count(monkeypatch, name, done)
    schema = prepare(root, tmp_path / "out")
    assert done == {"scan_day": scanned, "write_day": written}
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")
    assert not list(tmp_path.glob(".*"))
    assert schema.requests("train") == 16


def _count(monkeypatch: pytest.MonkeyPatch, name: str, done: dict[str, int]) -> None:
    real = getattr(recflow, name)

    def counted(*args: Any, **settings: Any) -> Any:
        done[name] += 1
        return real(*args, **settings)

    monkeypatch.setattr(recflow, name, counted)


def _leave_unfinished(monkeypatch: pytest.MonkeyPatch, root: Path, out: Path, **settings: Any) -> None:
    """All days are read and written, but the command ends before it is done."""
    with monkeypatch.context() as patch:
        patch.setattr(recflow.DatasetWriter, "items", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            prepare(root, out, **settings)
    assert out.with_name(f".{out.name}.unfinished").is_dir()


def test_skipped_rows_of_unfinished_work_are_not_forgotten(tmp_path, monkeypatch):
    root = release(tmp_path / "recflow")
    change_frame(root / "all_stage" / f"{BAD}.feather", cell("age", -1))
    _leave_unfinished(monkeypatch, root, tmp_path / "out", skip=True)
    with pytest.raises(DataError, match="column age, row 4"):
        prepare(root, tmp_path / "out")
    assert sum(prepare(root, tmp_path / "out", skip=True).provenance["skipped"].values()) == 1


def test_unfinished_work_of_other_inputs_is_not_used(tmp_path, monkeypatch):
    root = release(tmp_path / "recflow")
    _leave_unfinished(monkeypatch, root, tmp_path / "out")
    write_day(root, DAYS[1], make_day(DAYS[1], 9, users=4, videos=200, seed=5))
    for folder in ("all_stage", "realshow"):
        (root / folder / f"{DAYS[0]}.feather").unlink()
    done = {"scan_day": 0, "write_day": 0}
    for name in done:
        _count(monkeypatch, name, done)
    prepare(root, tmp_path / "out", history=7)
    assert done == {"scan_day": 1, "write_day": 3}
    prepare(root, tmp_path / "fresh", history=7)
    assert files_of(tmp_path / "out") == files_of(tmp_path / "fresh")
