"""An ablation file over the little MovieLens, and a stand-in for the trainer that takes no time."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from joint.comparison import runs
from joint.comparison.comparison import Comparison
from joint.comparison.folders import Result

ABLATION = """
base: tiny.yaml
baseline: snr
variants:
  snr: {objectives: {distill: null, negatives: null}}
  sdcl: {}
  sdcl_random: {placebo: sdcl, objectives: {negatives: {weight: 0.5}}}
seeds: 2
metrics: [funnel/*, alignment/reverse_rate/fused]
primary: funnel/ranking/recall@5
"""
# Trains nothing: a run's metrics follow from its config, and what should happen to it from files in the folder.
FAKE = """
import json, math, pathlib, signal, sys, time, yaml
config = yaml.safe_load(open(sys.argv[1]))
run = pathlib.Path(config["run"]["dir"], config["run"]["name"])
with open("started.txt", "a") as log:
    print(run, file=log)
name = str(run).split("runs/ablation/")[1]
wish = json.loads(pathlib.Path("wishes.json").read_text()).get(name, "")
print("training", name, flush=True)
if wish == "fail":
    sys.exit("the loss of teacher is not finite")
(run / "metrics.jsonl").write_text('{"step": 7, "loss/teacher": 0.5}\\n{"step": 8, "torn')
(run / "train.log").write_text("step      7/10  teacher 0.5\\n")
if wish == "slow":
    signal.signal(signal.SIGTERM, lambda *_: ((run / "saved").write_text(""), sys.exit(0)))
    time.sleep(60)
if wish == "pause":
    time.sleep(0.8)
schema = json.loads(pathlib.Path(config["data"]["path"], "dataset.json").read_text())
(run / "environment.json").write_text(json.dumps({"dataset": schema["hash"], "machine": "made up"}))
objectives, seed = config["objectives"], config["run"]["seed"]
value = 0.3 + 0.001 * seed + (0.05 + 0.0002 * seed if "negatives" in objectives else 0)
value -= 0.01 * abs(math.log(config["optimizer"]["dense"]["lr"] / 0.02))
value -= 0.02 * (1 - objectives.get("negatives", {}).get("weight", 1.0)) * (1 + 0.1 * seed)
found = {"funnel/ranking/recall@5": value, "funnel/retrieval/recall@20": 0.7, "alignment/reverse_rate/fused": 1 - value}
if wish == "lacks":
    found["funnel/ranking/recall@5"] = math.inf
(run / "eval.json").write_text(json.dumps(found))
"""


@pytest.fixture
def ablation(config_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An ablation file of three variants and two seeds, in a folder of its own, which is the current one."""
    monkeypatch.chdir(config_path.parent)
    config_path.write_text(config_path.read_text().replace(f"{config_path.parent}/runs", "runs"))
    path = config_path.parent / "ablation.yaml"
    path.write_text(ABLATION)
    return path


@pytest.fixture
def worlds(ablation: Path, dataset_path: Path) -> list[str]:
    """Two datasets of different hashes, `worlds/seed-0` and `worlds/seed-1`."""
    for seed in range(2):
        shutil.copytree(dataset_path, f"worlds/seed-{seed}")
        schema = json.loads(Path(f"worlds/seed-{seed}/dataset.json").read_text())
        Path(f"worlds/seed-{seed}/dataset.json").write_text(json.dumps(schema | {"hash": f"hash{seed}"}))
    return ["seed-0", "seed-1"]


Wish = Callable[[Mapping[str, str]], None]


@pytest.fixture
def trainer(ablation: Path, monkeypatch: pytest.MonkeyPatch) -> Wish:
    """Puts the stand-in in the trainer's place; `trainer({'sdcl/seed-1': 'fail'})` says what happens to a run."""
    Path("fake.py").write_text(FAKE)
    Path("started.txt").write_text("")
    monkeypatch.setattr(runs, "command", lambda config: [sys.executable, "fake.py", str(config)])
    monkeypatch.setattr(runs, "keep_code", lambda folder: ("c0de", folder))
    monkeypatch.setattr(runs, "code_version", lambda: "c0de")
    monkeypatch.setattr(runs, "POLL_SECONDS", 0.02)

    def wish(wishes: Mapping[str, str]) -> None:
        Path("wishes.json").write_text(json.dumps(wishes))

    wish({})
    return wish


@pytest.fixture
def started() -> Callable[[], list[str]]:
    """`started()`: the runs that were started since it was last asked, in order."""

    def read() -> list[str]:
        found = Path("started.txt").read_text().split()
        Path("started.txt").write_text("")
        return [run.removeprefix("runs/ablation/") for run in found]

    return read


@pytest.fixture
def made_up(tmp_path: Path) -> Callable[..., Comparison]:
    """`made_up({variant: [value of seed 0, ...]}, placebos={...})`: a comparison of finished runs with one metric."""

    def build(
        values: Mapping[str, list[float]],
        metric: str = "funnel/ranking/recall@5",
        placebos: Mapping[str, str] | None = None,
        worlds: int = 1,
    ) -> Comparison:
        results = []
        for variant, found in values.items():
            for place, value in enumerate(found):
                world = f"w{place % worlds}" if worlds > 1 else ""
                path = tmp_path / variant / world / f"seed-{place // worlds}"
                result = Result(variant, world, place // worlds, path, "finished", {metric: value})
                results.append(replace(result, environment={"dataset": "abc"}, code="c0de", seconds=60.0))
        names = tuple(values)
        differs = {name: ["data.epochs: 1 != 2"] for name in names}
        return Comparison("x", tmp_path, names[0], names, placebos or {}, (metric,), metric, results, differs)

    return build
