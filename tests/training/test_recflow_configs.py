"""RecFlow's experiments: the paper's sizes, on a planted world and on the layout of its own release."""

from __future__ import annotations

from pathlib import Path

import pytest

import joint
from benchmarks.recflow_days import make_day, write_day
from joint.comparison.ablation import read_ablation
from joint.config import load_config
from joint.data.planted.simulate import parameters_of, simulate
from joint.data.recflow.reader import prepare_recflow
from joint.errors import ConfigError
from joint.features import Plan
from joint.fit import check_against
from joint.model import JointModel
from joint.schema import read_schema
from joint.train import main

CONFIGS = Path(joint.__file__).parents[1] / "configs"
NAMES = ("recflow_retrieval", "recflow_pre_ranking", "recflow_ranking")
DAYS = ("2024-02-02", "2024-02-03", "2024-02-04", "2024-02-05")
# The overrides of docs/recflow.md, for the real data.
REAL = ["data.path=data/recflow", "data.not_eligible=[]"]
TIMES = [f"tables.{name}.dim=8" for name in ("weekday", "hour", "minute")]
FEATURES = (
    "[weekday, hour, minute, user_id, device_id, age, gender, province, viewed, "
    "upload_weekday, upload_hour, upload_minute, "
    "video_id, author_id, category_level_two, category_level_one, upload_type]"
)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny world (with competitors, as the tables on them need) and a tiny release, prepared."""
    here = tmp_path_factory.mktemp("recflow")
    for world in ("biased", "competing"):
        parameters = parameters_of("biased", "small", ["requests=180", "users=40", "competitors=3"])
        simulate(here / "data" / "worlds" / f"{world}-0", parameters, seed=0)
    for day in DAYS:
        write_day(here / "release", day, make_day(day, 24, users=6, videos=200, ranked=30))
    prepare_recflow(here / "release", here / "data" / "recflow", jobs=1, competitors=10)
    return here


@pytest.fixture(autouse=True)
def _inside(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(data)


def real(name: str) -> list[str]:
    """The overrides for the real data, the features of time among them."""
    if name == "recflow_retrieval":
        return [*REAL, "data.pool=exposed"]
    return [*REAL, *TIMES, f"heads.{name.removeprefix('recflow_')}.features={FEATURES}"]


def shapes(name: str, overrides: list[str]) -> dict[str, list[int]]:
    """The weights of every linear layer, and positions, by name; a layer for each of one task as a plain one."""
    config, tree = load_config(CONFIGS / "papers" / f"{name}.yaml", overrides)
    schema = read_schema(Path(config.data.path))
    check_against(config, tree, schema)
    plan = Plan(config, schema)
    assert {shape.dim for shape in plan.tables} == {8}
    parameters = JointModel(plan).named_parameters()
    return {
        name: list(p.shape[-2:]) for name, p in parameters if p.dim() > 1 and ("weight" in name or "position" in name)
    }


def test_retrieval_is_one_layer_of_self_attention_and_nothing_else() -> None:
    for overrides in ([], real("recflow_retrieval")):
        assert list(shapes("recflow_retrieval", overrides).items()) == [
            ("encoders.viewed.encoder.position", [50, 8]),
            ("encoders.viewed.encoder.blocks.0.query_key_value.weight", [24, 8]),
            ("encoders.viewed.encoder.blocks.0.output.weight", [8, 8]),
            ("encoders.viewed.encoder.blocks.0.feed_forward.1.0.weight", [8, 8]),
            ("encoders.viewed.encoder.blocks.0.feed_forward.2.weight", [8, 8]),
        ]


def test_pre_ranking_is_two_towers_of_128_64_and_32() -> None:
    """13 and 8 fields of width 8 with the times of RecFlow, 10 and 5 without."""
    for overrides, user, item in ((real("recflow_pre_ranking"), 13, 8), ([], 10, 5)):
        found = shapes("recflow_pre_ranking", overrides)
        assert [found[f"heads.pre_ranking.{side}.first.weight"] for side in ("user", "item")] == [
            [128, 8 * user],
            [128, 8 * item],
        ]
        for side in ("user", "item"):
            rest = [shape for name, shape in found.items() if f".{side}." in name and "first" not in name]
            assert rest == [[64, 128], [64, 32]]  # the last one is [in, out]
        assert len(found) == 6


def test_ranking_is_an_mlp_of_128_128_32_and_1_with_an_attention_of_80() -> None:
    """21 fields of width 8 with the times of RecFlow, 15 without; attention over pairs of 5 fields each."""
    for overrides, fields in ((real("recflow_ranking"), 21), ([], 15)):
        assert list(shapes("recflow_ranking", overrides).values()) == [
            *([80, 80], [1, 80]),
            *([128, 128], [32, 128], [128, 8 * fields], [32, 1]),
        ]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("on", ["world", "recflow", "recflow with times"])
def test_the_same_config_trains_on_a_world_and_on_the_release(name: str, on: str, tmp_path: Path) -> None:
    overrides = {"world": [], "recflow": REAL, "recflow with times": real(name)}[on]
    places = [f"run.dir={tmp_path}", "data.requests_per_batch=32"]
    kept = ["evaluation.quotas={retrieval: 40}"] if name == "recflow_retrieval" else []
    assert main([str(CONFIGS / "papers" / f"{name}.yaml"), *overrides, *places, *kept]) == 0
    assert (tmp_path / name / "eval.json").is_file()


@pytest.mark.parametrize("table", [2, 3])
def test_stage_samples_of_retrieval_stand_in_the_place_of_random_ones(table: int) -> None:
    """200 in all; the videos that were shown and not viewed are not sampled, but about five (of eight) on a world."""
    for name, config in read_ablation(CONFIGS / "ablations" / f"recflow_table{table}.yaml").configs.items():
        drawn = sum(count for count in config.data.candidates.values() if isinstance(count, int))
        (loss,) = config.objectives.values()
        # Of ten rank_pos a world has about five a request, of ten rerank_pos two.
        absent = {"rank_pos_10": 5, "rerank_pos_10": 8}.get(name, 0)
        assert drawn - absent == (195 if "exposed_neg" in loss.space else 200), name
        assert set(loss.space) - {"positive", "exposed_neg"} == set(config.data.candidates) - {"exposed"}, name


@pytest.mark.parametrize("table", [4, 5, 6, 7, 11, 13])
def test_every_stage_that_is_drawn_is_used_and_ranking_never_sees_coarse_neg(table: int) -> None:
    for name, config in read_ablation(CONFIGS / "ablations" / f"recflow_table{table}.yaml").configs.items():
        used = {token for loss in config.objectives.values() for token in loss.space}
        assert used - {"positive", "exposed_neg", "exposed"} == set(config.data.candidates) - {"exposed"}, name
        assert config.heads.ranking is None or "coarse_neg" not in used, name


def test_a_model_of_tables_alone_is_a_mistake() -> None:
    mean = "encoders.viewed.by={kind: mean, mode: null, layers: null, heads: null, positions: null}"
    with pytest.raises(ConfigError, match=r"heads.retrieval.trunk: null, and no encoder with layers"):
        load_config(CONFIGS / "papers" / "recflow_retrieval.yaml", [mean])
    load_config(CONFIGS / "papers" / "recflow_retrieval.yaml", [mean, "heads.retrieval.bias=true"])
