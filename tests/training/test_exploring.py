"""What a finished run retrieves with some chance in it: the price and the gain, the same each time."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

import joint
from joint.config import load_config
from joint.data.planted.simulate import parameters_of, simulate
from joint.errors import ConfigError
from joint.evaluating.finished_run import open_model
from joint.fit import check_against
from joint.schema import read_schema
from joint.train import main

JOINT = Path(joint.__file__).parents[1] / "configs" / "joint.yaml"
VARIETY = "evaluation.variety=category_level_two"
EXPLORE = "evaluation.explore={{history: effective, noise: {}, keep_history: {}, newest: 2}}"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("world") / "biased"
    simulate(out, parameters_of("biased", "small", ["requests=600", "users=60"]), seed=0, world="biased")
    return out


@pytest.fixture(scope="module")
def run(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    quotas = "evaluation.quotas={retrieval: 40, pre_ranking: 20, ranking: 10}"
    assert main([str(JOINT), f"data.path={world}", f"run.dir={folder}", "data.requests_per_batch=32", quotas]) == 0
    return folder / "joint"


def measured(run: Path, *overrides: str) -> dict[str, float]:
    """The metrics; nan as -1, since it is not equal to itself."""
    with open_model(run, overrides) as opened:
        numbers = opened.evaluator("test", whole_catalogue=False).numbers
    return {name: -1.0 if math.isnan(value) else value for name, value in numbers.items()}


def test_noise_costs_recall_and_brings_other_items(run: Path) -> None:
    plain = measured(run, VARIETY)
    nothing = measured(run, VARIETY, EXPLORE.format(0, 1))
    assert nothing == plain
    loud = measured(run, VARIETY, EXPLORE.format(3.0, 1))
    assert loud == measured(run, VARIETY, EXPLORE.format(3.0, 1))
    assert loud["retrieval/coverage@10"] > plain["retrieval/coverage@10"]
    assert "retrieval/distinct/category_level_two@10" in plain
    assert loud["retrieval/recall@50"] < plain["retrieval/recall@50"]
    assert loud["funnel/true_reward@10"] != plain["funnel/true_reward@10"]
    assert loud["ranking/auc/view"] == plain["ranking/auc/view"]  # later heads read all that they know


def test_a_history_in_part_changes_what_is_retrieved_alone(run: Path) -> None:
    plain, part = measured(run, VARIETY), measured(run, VARIETY, EXPLORE.format(0, 0.3))
    assert part["retrieval/coverage@10"] != plain["retrieval/coverage@10"]
    assert part["retrieval/auc/view"] == plain["retrieval/auc/view"]
    assert "retrieval/coverage@10" not in measured(run)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([VARIETY, EXPLORE.format(-1, 1)], "noise: must be at least 0"),
        ([VARIETY, EXPLORE.format(1, 1.5)], "keep_history: is a share, found 1.5"),
        ([EXPLORE.format(1, 1)], "evaluation.variety must say in what"),
        (["evaluation.variety=category_level_tow"], "no item feature of one id 'category_level_tow'"),
        ([EXPLORE.format(0, 1).replace("effective", "efective")], "no history 'efective'"),
    ],
)
def test_what_makes_no_sense(world: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_against(*load_config(JOINT, [f"data.path={world}", *overrides]), read_schema(world))
