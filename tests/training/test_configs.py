"""Every config that is shipped resolves to its golden snapshot, fits its data, trains, and measures what it names.

A new or changed config: `make golden` (or REWRITE=1 with this file), then read the difference before it is committed.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import re
from collections.abc import Iterator
from difflib import unified_diff
from fnmatch import fnmatch
from pathlib import Path

import pytest
import torch
import yaml

import joint
from joint import first_steps
from joint.comparison.ablation import read_ablation
from joint.config import load_config
from joint.configuring import settings, sources
from joint.data.assemble import Assembler
from joint.data.dataset import Dataset
from joint.data.loader import Loader
from joint.data.order import Position
from joint.data.planted.simulate import parameters_of, simulate
from joint.distributed import process_group
from joint.errors import ConfigError
from joint.evaluating.evaluator import evaluator_of
from joint.experiment import Config
from joint.features import Plan
from joint.fit import check_against
from joint.optimizers import build_optimizer
from joint.pipeline import build_pipeline
from joint.predicting.writing import predict
from joint.schema import read_schema
from joint.task import build_task
from joint.train import main
from towers.mixtures import set_step

CONFIGS = Path(joint.__file__).parents[1] / "configs"
GOLDEN = Path(__file__).parents[1] / "configs_golden"
FILES = sorted(str(path.relative_to(CONFIGS)) for path in CONFIGS.glob("**/*.yaml"))
ABLATIONS = [name for name in FILES if "variants" in yaml.safe_load((CONFIGS / name).read_text())]
STEPS = 3


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, dataset_path: Path) -> Path:
    """A folder in which every dataset that a config names is there, tiny."""
    here = tmp_path_factory.mktemp("data")
    for name, world, competitors in (("biased", "biased", 0), ("misled", "misled", 0), ("competing", "biased", 3)):
        parameters = parameters_of(world, "small", ["requests=180", "users=40", f"competitors={competitors}"])
        simulate(here / "worlds" / f"{name}-0", parameters, seed=0, world=world)
    (here / "worlds" / "fair-100").symlink_to("biased-0")  # of those kept for choosing
    (here / "ml-100k").symlink_to(dataset_path)
    for model in ("rra", "rra_base"):  # the teachers that RRA's Table 1 learns from offline
        world, runs = here / "worlds" / "biased-0", tmp_path_factory.mktemp("teachers")
        assert main([str(CONFIGS / "papers" / f"{model}.yaml"), f"data.path={world}", f"run.dir={runs}"]) == 0
        out = here / "teachers" / model / world.name
        predict(runs / model, world, out, splits=["train"], heads=["ranking"], k=0)
    return here


@pytest.fixture(autouse=True)
def place(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Paths of configs are relative, so each test has a folder of its own with that data in it."""
    (tmp_path / "data").symlink_to(data)
    monkeypatch.chdir(tmp_path)


def test_every_snapshot_is_of_a_config() -> None:
    assert len(ABLATIONS) >= 4
    assert len(FILES) >= len(ABLATIONS) + 4
    gone = {str(path.relative_to(GOLDEN)) for path in GOLDEN.glob("**/*.yaml")} - {*FILES}
    assert not gone, "delete these snapshots"


def test_the_index_has_every_config() -> None:
    listed = set(re.findall(r"\]\(([\w/]+\.yaml)\)", (CONFIGS / "README.md").read_text()))
    assert not {*FILES} - listed, "configs/README.md says what each file is of"


@pytest.mark.parametrize("name", FILES)
def test_a_head_says_what_is_mirrored_with_which_command(name: str) -> None:
    head = "".join(itertools.takewhile(lambda line: line.startswith("#"), (CONFIGS / name).open()))
    command = "joint.compare" if name in ABLATIONS else "joint.train"
    assert f"-m {command} configs/{name}" in head


@pytest.mark.parametrize("name", FILES)
def test_a_config_resolves_to_its_snapshot(name: str) -> None:
    found, golden = snapshot(CONFIGS / name), GOLDEN / name
    if os.environ.get("REWRITE"):
        golden.parent.mkdir(parents=True, exist_ok=True)
        golden.write_text(found)
    assert golden.is_file(), "a new config: make golden"
    differing = unified_diff(golden.read_text().splitlines(), found.splitlines(), "snapshot", "now", n=1, lineterm="")
    assert not (lines := list(differing)), "\n".join([f"{name} has changed; if it should have: make golden", *lines])


def snapshot(path: Path) -> str:
    """An experiment as resolved; an ablation as what each of its variants changes of the experiment it is based on."""
    if str(path.relative_to(CONFIGS)) not in ABLATIONS:
        return settings.dump(load_config(path)[0])
    plan, base = read_ablation(path, any_data=True), base_of(path)
    said = {"base": str(base.relative_to(CONFIGS))} | settings.plain(plan.ablation)
    said["variants"] = {name: changes(base, config) for name, config in plan.configs.items()}
    return yaml.safe_dump(said | {"placebos": plan.placebos}, sort_keys=False, width=10_000)


def base_of(path: Path) -> Path:
    """The nearest experiment among an ablation's bases."""
    found = (path.parent / yaml.safe_load(path.read_text())["base"]).resolve()
    return base_of(found) if str(found.relative_to(CONFIGS)) in ABLATIONS else found


def changes(base: Path, config: Config) -> list[str]:
    """What differs from a base, as it is now; what it was, the base's own snapshot says."""
    lines = settings.differences(load_config(base)[0], config)
    return [f"{line.partition(':')[0]} = {line.rpartition(' != ')[2]}" for line in lines]


@pytest.mark.parametrize("name", FILES)
def test_a_config_trains_three_steps_and_measures_what_it_names(name: str, seen: dict[str, set[str]]) -> None:
    if name not in ABLATIONS:
        config, tree = load_config(CONFIGS / name)
        check_against(config, tree, read_schema(Path(config.data.path)))
        assert train(config, seen)
        return
    plan = read_ablation(CONFIGS / name, any_data=True)
    found = set().union(*(train(config, seen) for config in plan.configs.values()))
    for pattern in (*plan.ablation.metrics, plan.ablation.claim):
        anyone = re.sub(r"^group/\d+/", "group/*/", pattern)  # a tiny test day need not see every user group
        assert any(fnmatch(metric, anyone) for metric in found), f"no variant measures {pattern}"


@pytest.mark.parametrize("name", [name for name in FILES if name not in ABLATIONS])
def test_a_config_can_be_checked_before_it_is_run(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(first_steps, "TIMED", 1)
    assert main([str(CONFIGS / name), "--check"]) == 0
    out = capsys.readouterr().out
    assert "no gradient reaches the" not in out
    assert not Path("runs").exists()


@pytest.fixture(scope="module")
def seen() -> dict[str, set[str]]:
    """Configs that have been trained already, and what they measure: many a variant is another's base."""
    return {}


def test_without_its_teachers_a_table_is_refused_before_anything_runs(tmp_path: Path, data: Path) -> None:
    (tmp_path / "data").unlink()
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "worlds").symlink_to(data / "worlds")
    with pytest.raises(ConfigError) as caught:
        read_ablation(CONFIGS / "ablations" / "rra_table1.yaml")
    assert "predict.json: not found; expected what joint.predict RUN" in str(caught.value)
    assert "(variant base_offline)" in str(caught.value)


def train(config: Config, seen: dict[str, set[str]]) -> set[str]:
    """The names of the metrics of three steps' model."""
    small = dataclasses.replace(config.data, requests_per_batch=4 * config.data.shards, epochs=1)
    config = dataclasses.replace(config, data=small, run=dataclasses.replace(config.run, name="tiny", dir=""))
    key = sources.write(settings.plain(config))
    if key not in seen:
        with process_group() as device:
            seen[key] = set(three_steps(config, device))
    return seen[key]


def three_steps(config: Config, device: torch.device) -> Iterator[str]:
    dataset = Dataset(config.data.path)
    assembler = Assembler(Plan(config, dataset.schema), dataset)
    model = build_task(assembler.plan, device)
    pipeline = build_pipeline(model, build_optimizer(model, config.optimizer), device)
    batches = Loader(assembler, rank=0, world_size=1).from_position(Position())
    for step in range(STEPS):
        set_step(model, step)
        losses = pipeline.progress(batches).losses
        assert all(value.isfinite() for value in losses.values())
    yield from evaluator_of(model, assembler, device).full(config.evaluation.test).numbers
