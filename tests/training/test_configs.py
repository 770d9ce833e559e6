"""Every config that is shipped resolves, fits its data, and trains."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import joint
from joint.comparison.ablation import read_ablation
from joint.config import load_config
from joint.data.planted.simulate import parameters_of, simulate
from joint.data.predictions import VERSION
from joint.errors import ConfigError
from joint.fit import check_against
from joint.schema import read_schema
from joint.train import main

CONFIGS = Path(joint.__file__).parents[1] / "configs"
ON_A_WORLD = ["joint.yaml", *sorted(str(path.relative_to(CONFIGS)) for path in (CONFIGS / "papers").glob("*.yaml"))]
ABLATIONS = sorted(path.name for path in (CONFIGS / "ablations").glob("*.yaml"))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A world of a few requests."""
    out = tmp_path_factory.mktemp("worlds") / "biased-0"
    simulate(
        out, parameters_of("biased", "small", ["requests=300", "users=60", "competitors=3"]), seed=0, world="biased"
    )
    return out


def test_there_is_something_to_check() -> None:
    assert len(ON_A_WORLD) >= 3
    assert len(ABLATIONS) >= 4
    load_config(CONFIGS / "sdcl.yaml")


@pytest.mark.parametrize("name", ON_A_WORLD)
def test_a_config_of_the_planted_funnel_trains(name: str, world: Path, tmp_path: Path) -> None:
    quotas = {"retrieval": 40, "pre_ranking": 20, "ranking": 10}
    config, tree = load_config(CONFIGS / name, [f"data.path={world}"])
    check_against(config, tree, read_schema(world))
    kept = {head: quotas[head] for head in config.evaluation.quotas}
    overrides = [f"data.path={world}", f"run.dir={tmp_path}", "data.epochs=1", f"evaluation.quotas={kept}"]
    assert main([str(CONFIGS / name), *overrides]) == 0
    assert (tmp_path / config.run.name / "eval.json").is_file()


@pytest.fixture
def teachers(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A working folder in which the teachers of RRA's Table 1 have predicted, as its header says."""
    said = {"version": VERSION, "dataset": read_schema(world).hash, "splits": ["train"], "hash": "of the teacher"}
    for model in ("rra", "rra_base"):
        folder = tmp_path / "data" / "teachers" / model / world.name
        folder.mkdir(parents=True)
        (folder / "predict.json").write_text(json.dumps(said | {"columns": ["ranking.view", "ranking.dwm"]}))
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("teachers")
@pytest.mark.parametrize("name", ABLATIONS)
def test_an_ablation_resolves(name: str, world: Path) -> None:
    plan = read_ablation(CONFIGS / "ablations" / name, [f"worlds={world.parent}/*"])
    assert plan.ablation.baseline in plan.configs
    assert len(plan.configs) >= 3


def test_without_its_teachers_a_table_is_refused_before_anything_runs(world: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as caught:
        read_ablation(CONFIGS / "ablations" / "rra_table1.yaml", [f"worlds={world.parent}/*"])
    assert "predict.json: not found; expected what joint.predict RUN" in str(caught.value)
    assert "(variant base_offline)" in str(caught.value)
