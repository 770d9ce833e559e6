"""A training that is killed at any moment, any number of times, ends like one that nobody touched."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import joint
from joint import checkpoint

HERE = Path(__file__).parent
ENVIRONMENT = os.environ | {"PYTHONPATH": str(HERE.parents[1]), "OMP_NUM_THREADS": "1"}
Starts = list[dict[str, object]]


@pytest.fixture(scope="module")
def killed(tiny_text, tmp_path_factory) -> Callable[..., tuple[Path, Starts, str]]:
    """`killed(name, ranks, epochs, kills, timeout=…)`: the run directory, what became of each start, what they said."""
    folder = tmp_path_factory.mktemp("faults")
    (folder / "tiny.yaml").write_text(tiny_text(folder / "runs"))

    def start(
        name: str, ranks: int, epochs: int, kills: list[tuple[int, str, int]], timeout: int = 300
    ) -> tuple[Path, Starts, str]:
        run = folder / "runs" / name
        overrides = [f"run.name={name}", f"data.epochs={epochs}", "train.checkpoint_every=7", "train.keep=2"]
        arguments = [str(folder / "tiny.yaml"), *overrides, "train.evaluate_every_epochs=0"]
        plan = folder / f"{name}.json"
        said = {"arguments": arguments, "run": str(run), "ranks": ranks, "kills": kills, "timeout": timeout}
        plan.write_text(json.dumps(said))
        command = [sys.executable, str(HERE / "kills.py"), str(plan)]
        limit = 120 + 3 * epochs + 20 * len(kills)
        done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=limit)
        assert done.returncode == 0, done.stderr
        return run, json.loads(done.stdout), done.stderr

    return start


def numbers(run: Path) -> list[dict[str, float]]:
    """metrics.jsonl, but for what depends on the machine."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith(("speed/", "memory/"))} for line in lines]


def assert_same(run: Path, unbroken: Path, flat) -> None:
    weights, after = flat(unbroken / "checkpoints"), flat(run / "checkpoints")
    assert after.keys() == weights.keys()
    assert [name for name in weights if not torch.equal(after[name], weights[name])] == []
    assert numbers(run) == numbers(unbroken)
    assert (run / "eval.json").read_bytes() == (unbroken / "eval.json").read_bytes()
    assert not [*(run / "checkpoints").glob(".*")]


def kills(count: int, steps: int, ranks: int, seed: int) -> list[tuple[int, str, int]]:
    """When to kill whom: the first in a save, the others anywhere or in a save, at random."""
    draw = random.Random(seed)
    moments = sorted(draw.randrange(1, steps - 8) for _ in range(count))
    return [
        (step, "now" if n and draw.random() < 0.6 else "saving", draw.randrange(ranks))
        for n, step in enumerate(moments)
    ]


def check(killed, flat, *, ranks: int, epochs: int, count: int) -> None:
    unbroken, starts, _ = killed(f"unbroken-{ranks}-{epochs}", ranks, epochs, [])
    assert [start["codes"] for start in starts] == [[0] * ranks]
    plan = kills(count, 8 * epochs, ranks, seed=ranks)
    run, starts, said = killed(f"killed-{ranks}-{epochs}", ranks, epochs, plan)
    assert len(starts) == count + 1
    for (_, _, victim), start in zip(plan, starts, strict=False):
        assert start["codes"][victim] == -signal.SIGKILL  # type: ignore[index]
        assert start["reached"] < 8 * epochs  # type: ignore[operator]
        # Who is left alone ends at once, not after five minutes.
        assert start["codes"].count(0) == 0, said  # type: ignore[attr-defined]
        assert start["seconds"] < 30  # type: ignore[operator]
    assert starts[-1]["codes"] == [0] * ranks, said
    assert_same(run, unbroken, flat)


def test_three_kills_of_two_ranks_leave_no_trace(killed, flat):
    check(killed, flat, ranks=2, epochs=8, count=3)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_thirty_kills_leave_no_trace(killed, flat, ranks):
    check(killed, flat, ranks=ranks, epochs=40, count=30)


@pytest.mark.slow
def test_a_rank_that_hangs_ends_the_job_in_time_and_the_next_start_goes_on(killed, flat):
    unbroken, _, _ = killed("unbroken-hanging", 2, 8, [])
    run, (hung, after), said = killed("hanging", 2, 8, [(20, "hanging", 1)], timeout=10)
    assert hung["codes"] == [1, -signal.SIGKILL]
    assert 10 <= hung["seconds"] < 30
    assert "rank 0: another rank has died or does not answer (" in said
    assert "Timed out waiting 10000ms" in said
    assert after["codes"] == [0, 0], said
    assert_same(run, unbroken, flat)


@pytest.mark.slow
def test_torchrun_restarts_the_ranks_by_itself(killed, flat, tiny_text, tmp_path):
    unbroken, _, _ = killed("unbroken-elastic", 2, 8, [])
    (tmp_path / "tiny.yaml").write_text(tiny_text(tmp_path / "runs"))
    overrides = ["data.epochs=8", "train.checkpoint_every=7", "train.keep=2", "train.evaluate_every_epochs=0"]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "2"]
    command = [sys.executable, *torchrun, "-m", "joint.train", str(tmp_path / "tiny.yaml"), *overrides]
    process = subprocess.Popen(command, cwd=Path(joint.__file__).parents[1], env=ENVIRONMENT, stderr=subprocess.PIPE)
    checkpoints = tmp_path / "runs/tiny/checkpoints"
    for least in (14, 35):
        while not [path for path in checkpoint.steps(checkpoints) if int(path.name[5:]) >= least]:
            assert process.poll() is None
            time.sleep(0.01)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        os.kill(int(children[-1]), signal.SIGKILL)
    _, error = process.communicate(timeout=120)
    assert process.returncode == 0, error
    assert_same(tmp_path / "runs/tiny", unbroken, flat)
