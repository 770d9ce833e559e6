"""The commands as a user starts them: exit codes, what is said, and by whom."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

import joint
from joint import checkpoint, commands
from joint.commands import run_command
from joint.config import load_config
from joint.data.assemble import Assembler
from joint.data.dataset import Dataset
from joint.data.loader import Loader
from joint.errors import UserError
from joint.features import Plan
from joint.stopping import stop_signal
from joint.summary import alignment_table
from joint.train import main

TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


def start(*arguments: str) -> subprocess.Popen[str]:
    """Python, which a terminal's Ctrl-C would reach, with these arguments, at the root of the project."""
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")} | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, *arguments],
        cwd=Path(joint.__file__).parents[1],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a job in the background ignores it
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


def test_one_process_needs_no_torchrun_and_evaluate_repeats_its_table(tiny_file, tmp_path):
    code, out, err = finish(start("-m", "joint.train", str(tiny_file), "data.epochs=1"))
    assert code == 0, err
    assert "Warning" not in err
    assert "warning" not in out
    tables = out[out.index("             recall@3") :]
    assert "share of the like positives left: retrieval keeps 20" in tables
    run = tmp_path / "runs" / "tiny"
    assert tables in (run / "train.log").read_text()
    written = (run / "eval.json").read_bytes()
    (run / "eval.json").unlink()
    code, out, err = finish(start("-m", "joint.evaluate", str(run)))
    aligned = alignment_table(load_config(run / "config.yaml")[0], json.loads(written))
    assert aligned
    assert tables.endswith(f"\n\n{aligned}\n")
    assert (code, out) == (0, f"{run}, step 8, on test:\n{tables}"), err
    assert (run / "eval.json").read_bytes() == written


def test_a_label_that_is_no_number_is_named_by_file_column_and_row(tiny_file, tiny_data, tmp_path, capsys, monkeypatch):
    copy = tmp_path / "data"
    shutil.copytree(tiny_data, copy)
    part = next(copy.rglob("part-train-0.parquet"))
    table = pq.read_table(part)
    rows = table.column("rating").to_pylist()
    rows[3][0] = float("nan")
    at = table.schema.get_field_index("rating")
    odd = table.set_column(at, table.schema.field(at), pa.array(rows, table.schema.field(at).type))
    pq.write_table(odd, part, row_group_size=pq.ParquetFile(part).metadata.row_group(0).num_rows)
    monkeypatch.setattr(sys, "argv", ["train", str(tiny_file), f"data.path={copy}"])
    assert run_command(main) == 2
    assert f"{part}: column rating, row 3: nan; expected numbers" in capsys.readouterr().err


def test_threads_are_those_of_the_config_whatever_the_environment_says(tiny_file, tmp_path):
    measured = []
    before = torch.get_num_threads()
    try:
        for name, outside in (("one", 1), ("other", 2)):
            torch.set_num_threads(outside)
            assert main([str(tiny_file), "data.epochs=1", f"run.name={name}"]) == 0
            said = json.loads((tmp_path / "runs" / name / "environment.json").read_text())
            assert (said["threads_per_rank"], said["seed"]) == (1, 3)
            assert said["dtypes"] == {"tables": "float32", "parameters": "float32", "products": "float32"}
            measured.append((tmp_path / "runs" / name / "eval.json").read_bytes())
        assert measured[0] == measured[1]
        torch.set_num_threads(1)
        assert main([str(tiny_file), "data.epochs=1", "run.name=two", "train.threads=2"]) == 0
        assert json.loads((tmp_path / "runs/two/environment.json").read_text())["threads_per_rank"] == 2
    finally:
        torch.set_num_threads(before)


def test_weights_are_chosen_on_the_validation_part_and_measured_as_given(tiny_file, tmp_path):
    assert finish(start("-m", "joint.train", str(tiny_file), "data.epochs=1"))[0] == 0
    run = str(tmp_path / "runs" / "tiny")
    before = (tmp_path / "runs/tiny/eval.json").read_bytes()
    code, out, err = finish(start("-m", "joint.evaluate", run, "--choose-fusion", "retrieval"))
    assert code == 0, err
    lines = [line.split() for line in out.splitlines()]
    assert len(lines) == 11
    assert [line[0] for line in lines] == ["retrieval/recall@3"] * 11
    values = [float(line[1]) for line in lines]
    assert values == sorted(values)
    best = out.splitlines()[-1].split("  ")[1]
    assert best.startswith("heads.retrieval.fusion={like: ")
    code, out, err = finish(start("-m", "joint.evaluate", run, "--split", "valid", best, "evaluation.k=[3]"))
    assert code == 0, err
    row = next(line for line in out.splitlines() if line.startswith("retrieval"))
    assert row.split()[1] == lines[-1][1]
    assert (tmp_path / "runs/tiny/eval.json").read_bytes() == before
    code, _, err = finish(start("-m", "joint.evaluate", run, "data.epochs=3"))
    assert code == 2
    assert "of a trained run only evaluation.* and fusion weights may be changed" in err
    code, _, err = finish(start("-m", "joint.evaluate", run, "--choose-fusion", "ranker"))
    assert code == 2
    assert "expected a head of retrieval, pre_ranking, ranking" in err


def test_torchrun_trains_on_two_ranks_and_one_of_them_speaks(tiny_file, tmp_path):
    code, out, err = finish(start(*TORCHRUN, "-m", "joint.train", str(tiny_file), "data.epochs=1"))
    assert code == 0, err
    assert out.count("8 steps of 16 (15.8 on average) on 2 rank(s)") == 1
    assert out.count("step      8/8") == 1
    run = tmp_path / "runs" / "tiny"
    assert json.loads((run / "environment.json").read_text())["ranks"] == 2
    lines = (run / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == 1 + 8 + 1 + 1  # costs, steps, the epoch, the test part


def test_a_mistake_is_one_line_and_exit_code_2(tiny_file, tmp_path):
    code, out, err = finish(start("-m", "joint.train", str(tiny_file), "objectives.teacher.wieght=2"))
    assert (code, out) == (2, "")
    assert err == (
        "objectives.teacher.wieght=2 (command line): objectives.teacher.wieght: unknown key; did you mean weight?\n"
    )
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("heads.ranking.features=[user_id, price, item_id]", "no feature, encoder or cross feature 'price'"),
        ("tasks.like.label=clicks", "tasks.like.label: no label 'clicks'; known: rating"),
        ("data.path=/nowhere", "/nowhere/dataset.json: not found; expected a prepared dataset"),
        ("objectives.negatives.temperature=0", "temperature: is 0.0, expected a number above 0"),
        ("tables.gender.sharding=row_wise", None),  # three rows, one rank: fine
    ],
)
def test_what_can_be_checked_is_checked_before_anything_starts(tiny_file, tmp_path, capsys, override, says):
    code = run_command(lambda: main([str(tiny_file), override, "data.epochs=1"]))
    err = capsys.readouterr().err
    assert code == (2 if says else 0)
    if says:
        assert says in err
        assert err.count("\n") == 1
        assert not (tmp_path / "runs").exists()


def test_a_run_directory_that_cannot_be_made_is_said_so(tiny_file, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    code = run_command(lambda: main([str(tiny_file), f"run.dir={tmp_path}/file"]))
    assert (code, capsys.readouterr().err) == (2, f"{tmp_path}/file/tiny: cannot be made (Not a directory)\n")


def test_a_loss_that_blows_up_is_named_and_leaves_no_thread_behind(tiny_file, tmp_path, capsys):
    before = set(threading.enumerate())
    code = run_command(lambda: main([str(tiny_file), "optimizer.dense.lr=1e30", "data.epochs=50"]))
    err = capsys.readouterr().err
    assert code == 2
    assert (
        err
        == "loss of teacher, student, distill, negatives, retrieve is not finite; a lower learning rate may mend it\n"
    )
    assert not checkpoint.steps(tmp_path / "runs/tiny/checkpoints")
    for _ in range(50):
        loaders = [t for t in set(threading.enumerate()) - before if t.name == "loader"]
        if not loaders:
            return
        time.sleep(0.1)
    pytest.fail(f"still there: {loaders}")


@pytest.mark.parametrize(("rank", "says"), [("0", True), ("1", False)])
def test_the_first_rank_speaks_of_what_all_see_and_has_the_time_to(monkeypatch, capsys, rank, says):
    waited: list[float] = []
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setattr(commands.time, "sleep", waited.append)

    def fail() -> int:
        raise UserError("wrong")

    assert run_command(fail) == 2
    assert capsys.readouterr().err == ("wrong\n" if says else "")
    assert bool(waited) != says


def test_an_interrupt_is_130():
    def interrupted() -> int:
        raise KeyboardInterrupt

    assert run_command(interrupted) == 130


@pytest.fixture
def broken_for_one(tiny_file, configure, tiny_data, tmp_path) -> Path:
    """A dataset with one row group that only the second rank reads, and cannot."""
    copy = tmp_path / "data"
    shutil.copytree(tiny_data, copy)
    config = configure()
    dataset = Dataset(copy)
    loader = Loader(Assembler(Plan(config, dataset.schema), dataset), rank=1, world_size=2)
    windows = loader._order(0, next(iter(loader.days))).windows[1]
    part, group = windows[0].groups[0]
    assert group != 0  # that one serves as a model of an empty batch
    column = pq.ParquetFile(copy / part.path).metadata.row_group(group).column(0)
    with (copy / part.path).open("r+b") as file:
        file.seek(column.dictionary_page_offset or column.data_page_offset)
        file.write(b"\xff" * column.total_compressed_size)
    return copy


@pytest.mark.slow
def test_a_mistake_that_one_rank_sees_is_said_by_it_and_ends_all(tiny_file, broken_for_one):
    copy = broken_for_one
    began = time.monotonic()
    code, _, err = finish(start(*TORCHRUN, "-m", "joint.train", str(tiny_file), f"data.path={copy}"))
    assert code != 0
    assert f"rank 1: {copy}/requests/day=" in err
    assert "cannot be read" in err
    assert time.monotonic() - began < 60  # the other rank does not wait for its five minutes


@pytest.mark.slow
def test_a_loss_that_blows_up_ends_all_ranks_and_is_said_once(tiny_file):
    code, _, err = finish(start(*TORCHRUN, "-m", "joint.train", str(tiny_file), "optimizer.dense.lr=1e30"))
    assert code != 0
    assert err.count("is not finite; a lower learning rate may mend it") == 1


def amid(config: str, *launcher: str) -> tuple[subprocess.Popen[str], tuple[str, ...]]:
    """A training amid 200 steps that save nothing, and its overrides."""
    overrides = ("data.epochs=25", "train.checkpoint_every=100000", "train.evaluate_every_epochs=0")
    process = start(*launcher, "-m", "joint.train", config, *overrides)
    assert process.stdout is not None
    while not process.stdout.readline().startswith("step     10/"):
        assert process.poll() is None
    return process, overrides


def test_ctrl_c_saves_and_says_so(tiny_file, tmp_path):
    process, _ = amid(str(tiny_file))
    process.send_signal(signal.SIGINT)
    code, out, err = finish(process)
    (saved,) = checkpoint.steps(tmp_path / "runs/tiny/checkpoints")
    assert code == 130, err
    assert err == "interrupted: training stops at its next step and saves; Ctrl-C again ends it at once, without\n"
    assert f"stopped after step {int(saved.name[5:])} of 200; the same command goes on from there" in out


@pytest.mark.usefixtures("heeding_ctrl_c")
def test_a_second_ctrl_c_is_the_system_s_own_and_one_that_is_ignored_stays_so():
    before = signal.getsignal(signal.SIGINT)
    stopping = stop_signal()
    asked = stopping.__enter__()
    assert not asked()
    signal.raise_signal(signal.SIGINT)
    assert asked()
    assert signal.getsignal(signal.SIGINT) == signal.SIG_DFL
    with pytest.raises(KeyboardInterrupt):
        stopping.__exit__(None, None, None)
    assert signal.getsignal(signal.SIGINT) == before
    try:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        with stop_signal() as asked:
            signal.raise_signal(signal.SIGINT)
            assert not asked()
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_torchrun_saves_and_one_process_goes_on(tiny_file, tmp_path, number):
    process, overrides = amid(str(tiny_file), *TORCHRUN)
    process.send_signal(number)
    _, out, _ = finish(process)
    (saved,) = checkpoint.steps(tmp_path / "runs/tiny/checkpoints")
    step = int(saved.name.split("-")[1])
    assert f"stopped after step {step} of 200; the same command goes on from there" in out
    code, out, err = finish(start("-m", "joint.train", str(tiny_file), *overrides))
    assert code == 0, err
    assert f"resuming after step {step}" in out
    steps = [json.loads(line)["step"] for line in (tmp_path / "runs/tiny/metrics.jsonl").read_text().splitlines()]
    assert steps == [*range(201), 200]  # 0 says what the heads cost
