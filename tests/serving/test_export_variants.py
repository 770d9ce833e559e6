"""Other heads, trunks, gates, sharing and settings export too, and answer as they were trained."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import joint
from joint import checkpoint
from joint.config import load_config
from joint.data.dataset import Dataset
from joint.data.planted.simulate import parameters_of, simulate
from joint.exporting.build import Choices, export_run
from joint.fit import check_against
from joint.serving import Recommender
from joint.serving.errors import CheckError
from joint.training import train

CONFIGS = Path(joint.__file__).parents[1] / "configs"
VARIANTS = {
    "mlp_and_tables_of_its_own": [
        "sharing.mode=none",
        "heads.pre_ranking.kind=mlp",
        "heads.pre_ranking.gate={alpha: 2.0, prior: [clubs]}",
        "heads.retrieval.trunk={kind: ple, hidden: [8], layers: 2, experts: null}",
        "heads.retrieval.similarity=dot",
        "heads.retrieval.gate={alpha: 2.0}",
        "heads.ranking.interaction={kind: bilinear, dim: 8}",
        "heads.ranking.trunk={kind: shared_bottom, hidden: [8]}",
        "heads.ranking.task_gate=null",
    ],
    "cross_tower_and_causal_attention": [
        "heads.pre_ranking.kind=interaction",
        "heads.pre_ranking.trunk={kind: wide_and_deep, hidden: [8], subnetworks: null}",
        "heads.pre_ranking.gate=null",
        "heads.retrieval.trunk={kind: snr, mode: aver, hidden: [8, 8], experts: null}",
        "heads.retrieval.interaction={kind: pnn, dim: 4, rank: null}",
        "encoders.against.by={kind: self_attention, mode: bidirectional, heads: 1, positions: 3}",
        "encoders.attended.by={kind: target_attention, hidden: [8], softmax: true}",
        "heads.ranking.gate={alpha: 2.0, prior: [city], reads_input: false}",
        "encoders.viewed.combine=multiply",
    ],
}


def run_of(path: Path, overrides: list[str]) -> Path:
    config, tree = load_config(path, overrides)
    dataset = Dataset(config.data.path)
    check_against(config, tree, dataset.schema)
    train(config, dataset)
    return Path(config.run.dir) / config.run.name


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_answers_as_it_was_trained(name: str, shop_text: str, tmp_path: Path) -> None:
    path = tmp_path / "shop.yaml"
    path.write_text(shop_text)
    run = run_of(path, [f"run.dir={tmp_path}", f"run.name={name}", *VARIANTS[name]])
    folder, found = export_run(run, tmp_path / "out", Choices(teacher=True))
    assert found.pop("overlap") == 1.0
    assert max(found.values()) < 1e-5
    request = json.loads((folder / "selfcheck/request.json").read_text())[0]
    assert len(Recommender(folder).recommend(request, 5).ids) == 5


@pytest.mark.slow
@pytest.mark.parametrize("name", ["joint.yaml", "papers/rra.yaml"])
def test_a_config_that_is_shipped_exports(name: str, tmp_path: Path) -> None:
    simulate(tmp_path / "world", parameters_of("biased", "small", ["requests=300", "users=60"]), seed=0, world="biased")
    quotas = {"retrieval": 40, "pre_ranking": 20, "ranking": 10}
    config, _ = load_config(CONFIGS / name, [])
    kept = {head: quotas[head] for head in config.evaluation.quotas}
    places = [f"data.path={tmp_path / 'world'}", f"run.dir={tmp_path}", "data.epochs=1", f"evaluation.quotas={kept}"]
    folder, found = export_run(run_of(CONFIGS / name, places), tmp_path / "out", Choices(teacher=name == "joint.yaml"))
    assert found.pop("overlap") == 1.0
    assert max(found.values()) < 1e-5
    said = json.loads((folder / "manifest.json").read_text())
    assert ("ranking" in said["stages"]) == (name == "joint.yaml")


def test_tables_that_were_not_loaded_are_noticed(
    shop_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Graphs take their tables from the checkpoint's files, golden answers from the sharded model."""

    def without(folder: Path, *_: object, **__: object) -> checkpoint.Progress:
        return checkpoint.Progress(step=1)

    monkeypatch.setattr("joint.evaluating.finished_run.checkpoint.load_latest", without)
    with pytest.raises(CheckError, match="does not answer"):
        export_run(shop_run, tmp_path, Choices())
    assert list(tmp_path.iterdir()) == []
