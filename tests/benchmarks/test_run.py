"""Benchmarks are found by their names; each new one runs at a tiny size."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from benchmarks import apart, growth, own_log, run
from joint.config import load_config
from joint.experiment import heads_of
from joint.reporting import Reporter
from joint.schema import SPLITS, read_schema


def test_every_name_is_a_module_that_is_listed(capsys):
    assert run.main([]) == 0
    listed = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert listed == sorted(run.BENCHMARKS)
    assert all(importlib.util.find_spec(f"benchmarks.{name}") for name in listed)


def test_an_unknown_name_is_said(capsys):
    assert run.main(["steps"]) == 2
    assert "no benchmark steps; there are apart, attention" in capsys.readouterr().err


def test_the_exponent_is_that_of_the_upper_half():
    assert growth.exponent([1, 10, 100, 1000], [5, 5, 7, 7 * 10**1.5]) == pytest.approx(1.5)
    assert growth.exponent([1, 2], [3, 6]) == pytest.approx(1)


def test_a_point_of_growth(monkeypatch):
    monkeypatch.setattr("joint.training.Reporter", Reporter)  # the trainer's stopwatch puts its own there
    size = growth.BASE | {
        "requests": 64,
        "batch": 8,
        "candidates": 7,
        "history": 3,
        "corpus": 20,
        "rows": 40,
        "tasks": 3,
    }
    found = growth.point(size, steps=2)
    assert found["ms"] > 0
    assert found["mb"] > 50


def test_growth_draws(tmp_path):
    sizes = {"tasks": [1, 2], "rows": [10, 100]}
    points = [{"ms": 1.0, "mb": 2.0}, {"ms": 2.0, "mb": 2.0}]
    growth.draw(dict.fromkeys(sizes, points), sizes, tmp_path / "growth.png")
    assert (tmp_path / "growth.png").stat().st_size > 1000


OWN = {
    "retrieval": ({"retrieve", "masked"}, {"exposed"}),
    "pre_ranking": ({"student", "negatives", "order"}, {"exposed", "ranked", "coarse_neg", "prerank_neg", "random"}),
    "ranking": ({"teacher"}, {"exposed", "random"}),
}


@pytest.mark.parametrize("head", [*OWN])
def test_apart_trains_one_head_with_its_own_objectives_and_candidates(head):
    whole, _ = load_config(Path("configs/joint.yaml"), [])
    config, _ = load_config(Path("configs/joint.yaml"), apart.alone(whole, head))
    assert [*heads_of(config)] == [head]
    drawn = {name for name, quota in config.data.candidates.items() if quota}
    assert ({*config.objectives}, drawn) == OWN[head]


def test_apart_a_student_is_taught_by_what_was_written(tmp_path):
    whole, _ = load_config(Path("configs/joint.yaml"), [])
    config, _ = load_config(Path("configs/joint.yaml"), apart.taught_by(whole, tmp_path))
    assert [*heads_of(config)] == ["pre_ranking"]
    assert {*config.objectives} == {"student", "distill", "negatives", "order"}
    assert config.objectives["distill"].teacher == "logged"
    assert config.tasks["like"].score == "ranking.like"


def test_an_own_log_is_read(tmp_path, capsys):
    (tmp_path / "map.yaml").write_text(own_log.MAP)
    own_log.make_log(tmp_path / "log.parquet", 3000)
    own_log.child(tmp_path)
    assert json.loads(capsys.readouterr().out)["seconds"] > 0
    schema = read_schema(tmp_path / "dataset")
    assert sum(schema.requests(split) for split in SPLITS) == 300


@pytest.mark.slow
def test_startup(tmp_path, capsys, monkeypatch):
    from benchmarks import startup

    monkeypatch.setattr("sys.argv", ["startup", str(tmp_path), "--rounds", "1"])
    startup.main()
    assert "from there to the first step: " in capsys.readouterr().out
    assert json.loads((tmp_path / "world" / "dataset.json").read_text())["items"] > 0
