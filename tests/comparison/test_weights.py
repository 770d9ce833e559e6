"""The table and the picture of learned weights, from a log made up here."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from joint.comparison.weights import late, picture, read_weights, table
from joint.errors import UserError
from joint.run import RunDirectory
from joint.weights import main


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    """Two stages, one task, two groups at four steps; group 1 has no pairs at the last, and delta is 2."""
    lines: list[dict[str, float]] = [{"step": 0, "cost/ranking/candidate": 9.0}]
    for step, confidence in ((10, 0.5), (20, 0.4), (30, 0.2), (40, 0.1)):
        entry: dict[str, float] = {"step": step, "loss/total": 1.0}
        for group in (0, 1):
            entry[f"negative_weights/base_rate/view/{group}"] = 0.05 * (1 + group) if step != 40 else 0.0
            for stage, more in (("ranking_ns", 0.1), ("matching_ns", 0.0)):
                if (group, step) != (1, 40):
                    name = f"negative_weights/{stage}/view/{group}"
                    entry |= {name: 2 * (0.25 + confidence + more), f"{name}/similarity": 0.25}
                    entry |= {f"{name}/confidence": confidence + more, f"{name}/even": 0.2}
        lines.append(entry)
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return RunDirectory(tmp_path)


def test_the_second_half_by_task_group_and_stage(run: RunDirectory) -> None:
    found = table(late(read_weights(run)))
    assert list(found.index)[:4] == [
        ("view", "all", "matching_ns"),
        ("view", "all", "ranking_ns"),
        ("view", "0", "matching_ns"),
        ("view", "0", "ranking_ns"),
    ]
    row = found.loc[("view", "0", "ranking_ns")]
    assert row["weight"] == pytest.approx(2 * (0.25 + 0.15 + 0.1))
    assert row["learned"] == pytest.approx(row["weight"] - 2 * 0.2)
    assert row["base rate"] == pytest.approx(0.025)  # a batch without a positive counts too
    assert row["over base rate"] == pytest.approx(row["weight"] / 0.025)
    other = found.loc[("view", "1", "matching_ns")]
    assert other["weight"] == pytest.approx(0.9)
    assert other["base rate"] == pytest.approx(0.05)


def test_the_command_prints_and_draws(run: RunDirectory, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(run.path)]) == 0
    said = capsys.readouterr().out
    assert "step 30 to 40" in said
    assert "over base rate" in said
    assert run.negative_weights.read_bytes().startswith(b"\x89PNG")


def test_a_single_line_is_all_there_is(run: RunDirectory, tmp_path: Path) -> None:
    first = run.metrics.read_text().splitlines()[1]
    run.metrics.write_text(first + "\n")
    logged = read_weights(run)
    assert len(late(logged)) == len(logged)
    picture(logged, tmp_path / "one.png")


def test_a_run_without_such_weights(run: RunDirectory, tmp_path: Path) -> None:
    run.metrics.write_text('{"step": 10, "loss/total": 1.0}\n')
    with pytest.raises(UserError, match="expected adaptive_contrastive with adaptive: true"):
        read_weights(run)
    with pytest.raises(UserError, match="not a run directory"):
        read_weights(RunDirectory(tmp_path / "nowhere"))
