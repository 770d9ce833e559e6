"""What an ablation file stands for: overlays, worlds, placebos, draws; and every mistake before anything runs."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from scipy import stats

from joint.comparison.ablation import Plan, read_ablation
from joint.comparison.tuning import Tune, applied, reach
from joint.config import load_config
from joint.configuring.settings import differences
from joint.errors import ConfigError, DataError
from joint.fit import load_fitting

TUNE = "\ntune: {trials: 3, over: {optimizer.dense.lr: [0.001, 0.1], objectives.distill.weight: [0.1, 10]}}"


def edited(path: Path, *changes: tuple[str, str]) -> Path:
    text = path.read_text()
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    path.write_text(text)
    return path


def errors(path: Path, *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        read_ablation(path, overrides)
    return [line.removeprefix(f"{path.parent}/") for line in str(caught.value).splitlines()]


def test_a_variant_is_its_overlay_merged_leaf_by_leaf(ablation):
    plan = read_ablation(ablation)
    assert list(plan.configs) == ["snr", "sdcl", "sdcl_random"]
    assert sorted(plan.configs["snr"].objectives) == ["retrieve", "student", "teacher"]
    assert differences(plan.configs["sdcl"], plan.configs["sdcl_random"]) == ["objectives.negatives.weight: 1.0 != 0.5"]
    assert plan.placebos == {"sdcl_random": "sdcl"}


def test_runs_have_folders_seeds_and_configs_of_their_own(ablation, dataset_path):
    runs = read_ablation(ablation).runs("sdcl")
    assert [(run.seed, run.config.run.dir, run.config.run.name) for run in runs] == [
        (0, "runs/ablation/sdcl", "seed-0"),
        (1, "runs/ablation/sdcl", "seed-1"),
    ]
    assert [run.config.run.seed for run in runs] == [0, 1]
    assert {run.config.data.path for run in runs} == {str(dataset_path)}


def test_overrides_are_for_all_variants_but_do_not_undo_what_one_says(ablation):
    plan = read_ablation(
        ablation, ["data.epochs=1", "objectives.negatives.weight=3", "seeds=4", "variants.sdcl_random=null"]
    )
    assert {config.data.epochs for config in plan.configs.values()} == {1}
    assert "negatives" not in plan.configs["snr"].objectives
    assert plan.configs["sdcl"].objectives["negatives"].weight == 3
    assert plan.ablation.seeds == 4
    assert list(plan.configs) == ["snr", "sdcl"]


def test_every_world_gets_every_seed(ablation, worlds):
    edited(ablation, ("seeds: 2", "seeds: 2\nworlds: worlds/seed-*"))
    plan = read_ablation(ablation)
    runs = plan.runs("snr")
    assert [(run.world, run.seed) for run in runs] == [("seed-0", 0), ("seed-0", 1), ("seed-1", 0), ("seed-1", 1)]
    assert [run.config.data.path for run in runs][::2] == ["worlds/seed-0", "worlds/seed-1"]
    assert runs[2].config.run.dir == "runs/ablation/snr/seed-1"
    assert list(read_ablation(ablation, worlds=1).worlds) == ["seed-0"]


def test_worlds_are_in_the_order_of_their_numbers_and_a_variant_cannot_leave_them(ablation, worlds):
    Path("worlds/seed-1").rename("worlds/seed-10")
    Path("worlds/seed-2").symlink_to("seed-0")
    edited(ablation, ("seeds: 2", "worlds: worlds/*"))
    assert list(read_ablation(ablation).worlds) == ["seed-0", "seed-2", "seed-10"]
    edited(ablation, ("sdcl: {}", "sdcl: {data: {path: x}}"))
    assert errors(ablation) == ["ablation.yaml:6: variants.sdcl: sets data.path, but the datasets are those of worlds"]


def test_mistakes_of_the_file_have_lines(ablation):
    path = edited(
        ablation,
        ("baseline: snr", "baseline: srn"),
        ("sdcl: {}", "sdcl: {run: {seed: 3}}"),
        ("placebo: sdcl", "placebo: sdlc"),
        ("seeds: 2", "seeds: 0"),
        ("primary: funnel/ranking/recall@5", ""),
    )
    assert errors(path) == [
        "ablation.yaml:2: primary: missing; expected the metric that the claim is about",
        "ablation.yaml:3: baseline: no variant 'srn'; did you mean snr?",
        "ablation.yaml:6: variants.sdcl: sets run, but names, folders and seeds of runs are the comparison's",
        "ablation.yaml:7: variants.sdcl_random: no variant 'sdlc' to be a placebo of; did you mean sdcl?",
        "ablation.yaml:8: seeds must be at least 1, found 0",
    ]
    assert errors(edited(path, ("seeds: 0", "sedes: 3"))) == [
        "ablation.yaml:8: sedes: unknown key; did you mean seeds?"
    ]


def test_mistakes_of_all_variants_come_at_once_and_those_of_the_base_once(ablation):
    edited(
        ablation,
        ("distill: null", "distil: null"),
        ("sdcl: {}", "sdcl: {tables: {year: null}}"),
        ("weight: 0.5", "wieght: 0.5"),
    )
    assert errors(ablation) == [
        "ablation.yaml:5: objectives.distil: nothing to remove; did you mean distill? (variant snr)",
        "ablation.yaml:6: tables: no table 'year', which features in use need (variant sdcl)",
        "ablation.yaml:7: objectives.negatives.wieght: unknown key; did you mean weight? (variant sdcl_random)",
    ]
    said = errors(ablation, "data.epochs=0", "variants.sdcl.tables.year={dim: 4}")
    assert said.count("data.epochs=0 (command line): data.epochs: must be at least 1, found 0") == 1


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("sdcl: {}", "sdcl: 3", "ablation.yaml:6: variants.sdcl: must be a mapping; write {} for the base itself"),
        ("sdcl: {}", "a/b: {}", "ablation.yaml:6: variants.a/b: must be one plain folder name"),
        ("snr: {", "snr: {placebo: sdcl, ", "ablation.yaml:5: variants.snr: the baseline cannot be a placebo"),
        ("sdcl: {}", "sdcl: {placebo: snr}", "variants.sdcl: no variant 'snr' to be a placebo of"),
        ("seeds: 2", "worlds: worlds/*", "ablation.yaml:8: worlds: no prepared dataset matches worlds/*"),
        ("seeds: 2", "tune: {trials: 0, over: {}}", "ablation.yaml:8: tune.trials: must be at least 1, found 0"),
        ("seeds: 2", "tune: {trials: 1, over: {data.epochs: [1, 2]}}", "no variant has a number with a fraction there"),
        ("seeds: 2", "tune: {trials: 1, over: {a: [2, 1]}}", "over: a must be a range above 0, low before high"),
        ("seeds: 2", "tune: {trials: 1, over: {a: [0, 2]}}", "must be a range above 0"),
    ],
)
def test_other_mistakes(ablation, old, new, says):
    assert says in "\n".join(errors(edited(ablation, (old, new))))


def test_an_experiment_in_place_of_an_ablation_and_the_reverse_are_one_line(tmp_path):
    experiment, other = tmp_path / "experiment.yaml", tmp_path / "ablation.yaml"
    experiment.write_text("data: {path: nowhere}\n")
    other.write_text("baseline: base\nvariants: {base: {}}\nseeds: 3\nprimary: x\n")
    with pytest.raises(ConfigError) as raised:
        read_ablation(experiment)
    said = "is an experiment, without variants to compare: python -m joint.train"
    assert str(raised.value) == f"{experiment} {said} {experiment}"
    for read in (load_config, load_fitting):
        with pytest.raises(ConfigError) as raised:
            read(other)
        assert str(raised.value) == f"{other} is an ablation: python -m joint.compare {other}"


def test_a_dataset_that_is_not_there_is_said_once(ablation):
    with pytest.raises(ConfigError, match=r"^/nowhere/dataset.json: not found; expected a prepared dataset .*$"):
        read_ablation(ablation, ["data.path=/nowhere"])


def test_variants_on_other_data_are_refused_unless_told(ablation, worlds):
    edited(ablation, ("sdcl: {}", "sdcl: {data: {path: worlds/seed-1}}"))
    assert errors(ablation)[0].startswith("ablation.yaml:6: variants.sdcl: another dataset than that of snr")
    assert read_ablation(ablation, any_data=True).configs["sdcl"].data.path == "worlds/seed-1"


# Tuning


def test_draws_are_log_uniform_and_a_function_of_trial_and_key():
    tune = Tune(trials=500, over={"a": (0.001, 10.0), "b": (1.0, 2.0)})
    draws = [tune.draw(trial) for trial in range(1, 501)]
    exponents = [math.log10(draw["a"]) for draw in draws]
    assert stats.kstest(exponents, stats.uniform(-3, 4).cdf).pvalue > 0.01
    assert all(1 <= draw["b"] <= 2 for draw in draws)
    assert abs(stats.spearmanr(exponents, [draw["b"] for draw in draws]).statistic) < 0.15
    alone = Tune(trials=3, over={"b": (1.0, 2.0)})
    assert [alone.draw(trial)["b"] for trial in (1, 2, 3)] == [draw["b"] for draw in draws[:3]]
    assert tune.draw(0) == {}


def tuned(ablation: Path) -> Plan:
    ablation.write_text(ablation.read_text() + TUNE)
    return read_ablation(ablation)


def test_trials_are_the_same_for_every_variant_but_for_keys_it_lacks(ablation):
    plan = tuned(ablation)
    assert plan.ablation.tune
    snr, sdcl = plan.trials("snr"), plan.trials("sdcl")
    assert [run.config.run.name for run in snr] == ["trial-0", "trial-1", "trial-2", "trial-3"]
    assert [run.config.optimizer.dense.lr for run in snr] == [run.config.optimizer.dense.lr for run in sdcl]
    assert len({run.config.objectives["distill"].weight for run in sdcl}) == 4
    assert reach(plan.configs["snr"], plan.ablation.tune) == ["optimizer.dense.lr"]


def test_trials_are_judged_on_the_validation_part_and_do_not_train_on_it(ablation):
    edited(
        ablation.parent / "tiny.yaml",
        ("  epochs: 2", "  epochs: 2\n  train: [train, valid]"),
        ("task: like,", "task: like, test: test,"),
    )
    ablation.write_text(ablation.read_text() + "\ntrain: {evaluate_every_epochs: 0}")
    plan = tuned(ablation)
    for run in plan.trials("sdcl"):
        assert (run.config.data.train, run.config.evaluation.test) == (("train",), "valid")
        assert run.seed not in {final.seed for final in plan.runs("sdcl")}
    final = plan.runs("sdcl", {"optimizer.dense.lr": 0.02})[0]
    assert (final.config.data.train, final.config.evaluation.test) == (("train", "valid"), "test")
    assert final.config.optimizer.dense.lr == 0.02
    assert final.config.run.dir == "runs/ablation/sdcl/tuned"


def test_a_value_that_a_config_does_not_allow_is_said(ablation):
    with pytest.raises(ConfigError, match=r"tune.over.optimizer.dense.lr: -1 is drawn, but lr must be at least 0"):
        applied(read_ablation(ablation).configs["sdcl"], {"optimizer.dense.lr": -1.0})


def test_an_unreadable_world_is_an_error_of_data(ablation, worlds):
    edited(ablation, ("seeds: 2", "worlds: [worlds/seed-0, worlds/seed-1]"))
    Path("worlds/seed-1/dataset.json").write_text("{")
    with pytest.raises((ConfigError, DataError), match=r"worlds/seed-1/dataset.json"):
        read_ablation(ablation)
