"""From results to verdicts and words: units, margins, placebos, gaps, users, and what the report says of them."""

from __future__ import annotations

import csv
import io
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from joint.comparison.analysis import analyse, metric_names
from joint.comparison.folders import Result, read_json
from joint.comparison.goals import goodness, higher_is_better, in_words, shown
from joint.comparison.report import headline, markdown, rows_csv, summary_csv
from joint.comparison.writing import write_report

BASE = [0.400, 0.405, 0.398, 0.402, 0.401]
GOOD = [0.420, 0.424, 0.417, 0.425, 0.421]
HALF = [0.410, 0.413, 0.409, 0.411, 0.412]
ALIKE = [0.4002, 0.4049, 0.3981, 0.4021, 0.4009]
BAD = [0.380, 0.384, 0.377, 0.383, 0.383]


def said_of(comparison) -> dict[str, str]:
    """Variant -> the headline's paragraph on it."""
    metric = analyse(comparison, comparison.primary)
    paragraphs = list(headline(comparison, metric))[1:]
    return {text.split("**")[1]: text for text in paragraphs}


def test_verdicts_of_a_metric_and_their_numbers(made_up):
    comparison = made_up({"a": BASE, "good": GOOD, "bad": BAD, "alike": ALIKE})
    metric = analyse(comparison, comparison.primary)
    assert {name: contrast.verdict for name, contrast in metric.contrasts.items()} == {
        "good": "better",
        "bad": "worse",
        "alike": "same",
    }
    good = metric.contrasts["good"]
    assert good.test.p == pytest.approx(stats.ttest_rel(GOOD, BASE).pvalue)
    p = {name: float(stats.ttest_rel(x, BASE).pvalue) for name, x in (("good", GOOD), ("bad", BAD), ("alike", ALIKE))}
    first, second, third = sorted(p.values())
    assert {name: metric.contrasts[name].adjusted for name in p} == pytest.approx(
        {name: {first: 3 * first, second: max(3 * first, 2 * second), third: third}[value] for name, value in p.items()}
    )
    assert good.relative == pytest.approx(np.mean(np.subtract(GOOD, BASE)) / np.mean(BASE))
    edge = 0.01 * np.mean(BASE)
    d = np.subtract(ALIKE, BASE)
    expected = max(
        stats.ttest_1samp(d, -edge, alternative="greater").pvalue, stats.ttest_1samp(d, edge, alternative="less").pvalue
    )
    assert metric.contrasts["alike"].test.p_same == pytest.approx(expected)
    assert (metric.summaries["a"].mean, metric.summaries["a"].std) == (np.mean(BASE), np.std(BASE, ddof=1))


def test_lower_is_better_where_the_name_says_so(made_up):
    comparison = made_up({"a": BASE, "up": GOOD, "down": BAD}, metric="alignment/reverse_rate/fused")
    verdicts = analyse(comparison, comparison.primary).contrasts
    assert (verdicts["up"].verdict, verdicts["down"].verdict) == ("worse", "better")


@pytest.mark.parametrize(
    ("metric", "higher"),
    [
        ("funnel/true_reward@10", True),
        ("pre_ranking/recall@10", True),
        ("alignment/overlap@50", True),
        ("alignment/retrieval_reverse_rate/like", False),
        ("alignment/nktd@200/retrieval", False),
        ("ranking/log_loss/like", False),
        ("ranking/calibration/like", False),
    ],
)
def test_which_way_is_better(metric, higher):
    assert higher_is_better(metric) == higher


@pytest.mark.parametrize(
    ("metric", "words"),
    [
        ("funnel/true_reward@10", "True reward per item of the 10 served"),
        ("pre_ranking/true_reward@10", "True reward per item of pre-ranking's own 10"),
        ("funnel/pre_ranking/recall@50", "Positives left when pre-ranking has kept 50"),
        ("funnel/lost/retrieval", "Positives lost by retrieval"),
        ("ranking/auc/like/ranking_ns", "ranking/auc/like/ranking_ns"),  # nobody has words for it
    ],
)
def test_pictures_are_titled_in_words_where_there_are_some(metric, words):
    assert in_words(metric) == words


def test_calibration_is_best_at_one():
    assert shown("ranking/calibration/like", 0.9) == pytest.approx(0.1)
    assert goodness("ranking/calibration/like", 1.05) > goodness("ranking/calibration/like", 0.9)
    assert goodness("ranking/calibration/like", 0.9) > goodness("ranking/calibration/like", 1.2)
    assert goodness("funnel/recall@10", 0.2) > goodness("funnel/recall@10", 0.1)


def test_the_unit_is_the_world_and_seeds_are_nested(made_up):
    rng = np.random.default_rng(0)
    a, b = rng.normal(0.4, 0.01, 12), rng.normal(0.41, 0.01, 12)  # world of place p is p % 4: 3 seeds each
    comparison = made_up({"a": list(a), "b": list(b)}, worlds=4)
    metric = analyse(comparison, comparison.primary)
    by_world = [values.reshape(3, 4).mean(axis=0) for values in (b, a)]
    contrast = metric.contrasts["b"]
    assert (contrast.test.n, metric.summaries["b"].planned) == (4, 4)
    assert contrast.test.p == pytest.approx(stats.ttest_rel(*by_world).pvalue)
    assert metric.summaries["b"].std == pytest.approx(by_world[0].std(ddof=1))


def test_a_placebo_decides_whether_a_variant_helps(made_up):
    beaten = made_up({"a": BASE, "v": GOOD, "p": HALF}, placebos={"p": "v"})
    assert said_of(beaten)["v"].startswith("**v** **helps**: it beats the baseline and its placebo p (0.4214: +0.0202")
    assert "though it is only a placebo" in said_of(beaten)["p"]
    equal = made_up(
        {"a": BASE, "v": GOOD, "p": list(np.add(GOOD, (0.001, -0.002, 0.001, -0.001, 0.001)))},
        placebos={"p": "v"},
    )
    assert "beats the baseline but not its placebo p" in said_of(equal)["v"]
    without = made_up({"a": BASE, "v": GOOD})
    assert "no placebo says whether by what it is about" in said_of(without)["v"]
    contrast = analyse(beaten, beaten.primary).placebos["p"]
    assert (contrast.variant, contrast.reference) == ("v", "p")
    assert contrast.test.p == pytest.approx(stats.ttest_rel(GOOD, HALF).pvalue)


def test_one_seed_is_not_tested_and_it_is_said(made_up):
    comparison = made_up({"a": [0.4], "b": [0.9]})
    contrast = analyse(comparison, comparison.primary).contrasts["b"]
    assert contrast.verdict == "too few"
    assert math.isnan(contrast.test.p)
    assert (
        "has 1 result(s) to compare; a test needs two. So far: 0.9000: +0.5000 (+125.0%)." in said_of(comparison)["b"]
    )


@pytest.mark.parametrize("lacking", ["a", "b"])
def test_a_run_without_the_metric_leaves_no_verdict(made_up, lacking):
    comparison = made_up({"a": BASE, "b": GOOD})
    results = [
        replace(r, state="failed", metrics={}, note="exit code 1: out | of memory")
        if (r.variant, r.seed) == (lacking, 3)
        else r
        for r in comparison.results
    ]
    comparison = replace(comparison, results=results)
    metric = analyse(comparison, comparison.primary)
    contrast = metric.contrasts["b"]
    assert (contrast.verdict, contrast.test.n) == ("incomplete", 4)
    kept = [place for place in range(5) if place != 3]
    assert contrast.test.difference == pytest.approx(np.subtract(GOOD, BASE)[kept].mean())
    assert (len(metric.summaries[lacking].values), metric.summaries[lacking].planned) == (4, 5)
    text = markdown(comparison, [metric], None, {})
    assert f"not every run of {lacking} has this metric" in text
    assert "**1 of 10 runs have no result**" in text
    assert "| 4 of 5 |" in text
    assert f"{lacking}/seed-3` | failed | exit code 1: out \\| of memory |" in text


def test_a_metric_that_a_variant_cannot_have_is_not_a_failure(made_up):
    comparison = made_up({"a": BASE, "b": GOOD})
    results = [r if r.variant == "a" else replace(r, metrics={"other": 1.0}) for r in comparison.results]
    comparison = replace(comparison, results=results)
    assert analyse(comparison, comparison.primary).contrasts["b"].verdict == "not measured"
    assert said_of(comparison)["b"] == "**b** has no such metric."


def test_metrics_that_are_not_finite_are_dropped_and_said(ablation, trainer, capsys):
    from joint import compare
    from joint.commands import run_command

    trainer({"sdcl/seed-1": "lacks"})
    assert run_command(lambda: compare.main(["ablation.yaml"])) == 0
    assert "sdcl has no verdict" in capsys.readouterr().out
    report = Path("runs/ablation/report.md").read_text()
    assert "| `runs/ablation/sdcl/seed-1` | finished | not finite: funnel/ranking/recall@5 |" in report
    assert "inf" not in Path("runs/ablation/report.csv").read_text()


def test_the_primary_metric_comes_first_and_globs_in_their_order(made_up):
    comparison = made_up({"a": [0.1]})
    known = dict.fromkeys(["x/recall@100", "x/recall@20", "y/auc", "z/other", comparison.primary], 0.5)
    comparison = replace(
        comparison,
        results=[replace(comparison.results[0], metrics=known)],
        metrics=("y/*", "not/there", "x/recall@*", "*auc"),
    )
    assert metric_names(comparison) == [comparison.primary, "y/auc", "not/there", "x/recall@20", "x/recall@100"]


# Users


def logged(result: Result, metric: str, users: np.ndarray, hits: np.ndarray) -> Result:
    """A result whose run logs one positive a request, found or not."""
    columns = {"request_id": [f"r{i}" for i in range(len(users))], "user_id": users, "group": 0}
    frame = pd.DataFrame(columns | {f"{metric}.total": hits.astype(float), f"{metric}.count": 1.0})
    (result.path / "eval").mkdir(parents=True)
    frame.sample(frac=1, random_state=result.seed).to_parquet(result.path / "eval/requests.parquet")
    return replace(result, metrics={metric: float(hits.mean())})


def test_users_are_resampled_as_clusters_and_paired_by_request(made_up):
    rng = np.random.default_rng(1)
    users = rng.integers(0, 60, 600)
    liking = rng.normal(0, 0.25, 60)[users]  # requests of a user are alike
    comparison = made_up({"a": [0.0] * 3, "b": [0.0] * 3})
    results, hits = [], {}
    for result in comparison.results:
        chance = 0.4 + liking + (0.05 if result.variant == "b" else 0)
        hits[result.variant, result.seed] = rng.random(600) < chance
        results.append(logged(result, comparison.primary, users, hits[result.variant, result.seed]))
    comparison = replace(comparison, results=results)
    contrast = analyse(comparison, comparison.primary).contrasts["b"]
    assert contrast.users is not None
    low, high = contrast.users
    # The delta method over users: the spread of a ratio of sums over clusters.
    difference = np.mean([hits["b", s].astype(float) - hits["a", s] for s in range(3)], axis=0)
    residual = np.bincount(users, difference - difference.mean(), minlength=60)
    error = math.sqrt((residual**2).sum()) / 600
    assert contrast.test.difference == pytest.approx(difference.mean())
    assert (low + high) / 2 == pytest.approx(difference.mean(), abs=0.25 * error)
    assert (high - low) / (2 * 1.96 * error) == pytest.approx(1, abs=0.12)


def test_without_a_request_log_there_is_no_interval_and_one_that_is_wrong_is_said(made_up):
    comparison = made_up({"a": [0.5, 0.5], "b": [0.6, 0.7]})
    users, rng = np.arange(50), np.random.default_rng(2)
    results = [logged(r, comparison.primary, users, rng.random(50) < 0.5) for r in comparison.results[:3]]
    some = replace(comparison, results=[*results, comparison.results[3]])
    assert analyse(some, comparison.primary).contrasts["b"].users is None
    wrong = [replace(results[0], metrics={comparison.primary: 0.9}), *results[1:], comparison.results[3]]
    metric = analyse(replace(comparison, results=wrong), comparison.primary)
    assert metric.oddities == [f"{results[0].path}/eval/requests.parquet does not add up to eval.json's {metric.name}"]
    assert f"Note: {metric.oddities[0]}." in markdown(replace(comparison, results=wrong), [metric], None, {})


def test_runs_on_other_requests_are_not_paired(made_up):
    comparison = made_up({"a": [0.5, 0.5], "b": [0.6, 0.7]})
    rng = np.random.default_rng(3)
    results = [
        logged(r, comparison.primary, np.arange(50 + (r.variant == "b")), rng.random(50 + (r.variant == "b")) < 0.5)
        for r in comparison.results
    ]
    assert analyse(replace(comparison, results=results), comparison.primary).contrasts["b"].users is None


# Files


def test_the_files_of_a_report(made_up, tmp_path):
    comparison = made_up({"a": BASE, "v": GOOD, "p": HALF}, placebos={"p": "v"})
    write_report(comparison)
    text = (tmp_path / "report.md").read_text()
    for line in (
        "Held against **a** (0.4012 ± 0.0026, 5 seeds) on `funnel/ranking/recall@5`, where higher is better:",
        "| a | 5 | 0.4012 ± 0.0026 |  |  |  |  |  | baseline |",
        "| `funnel/ranking/recall@5` | v | p | 5 | +0.0104 (+2.5%) |",
        "- `data.epochs: 1 != 2`",
        "| code version | c0de |",
        "| dataset | `abc` |",
        "| v | 5 | 5 | 0 | 0 | 0 | 0:01:00 |",
        "Every run finished.",
    ):
        assert line in text
    pictures = [line.split("(")[1].rstrip(")") for line in text.splitlines() if line.startswith("![")]
    assert pictures == ["figures/funnel-ranking-recall-5.png", "figures/funnel.png"]
    for picture in pictures:
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")
    rows = list(csv.DictReader(io.StringIO((tmp_path / "report.csv").read_text())))
    assert len(rows) == 15
    assert rows[5] == {"variant": "v", "world": "", "seed": "0", "metric": comparison.primary, "value": "0.42"}
    summary = pd.read_csv(tmp_path / "summary.csv")
    assert list(zip(summary["variant"], summary["reference"], summary["verdict"], strict=True)) == [
        ("v", "a", "better"),
        ("p", "a", "better"),
        ("v", "p", "better"),
    ]


def test_every_table_has_as_many_cells_in_every_row(made_up):
    comparison = made_up({"a": BASE, "v": GOOD, "p": HALF, "one": [0.4]}, placebos={"p": "v"})
    text = markdown(comparison, [analyse(comparison, comparison.primary)], None, {})
    for block in text.split("\n\n"):
        if block.startswith("|"):
            assert len({line.replace("\\|", "").count("|") for line in block.splitlines()}) == 1


def test_a_comparison_without_any_result_still_has_a_report(made_up, tmp_path):
    comparison = made_up({"a": BASE, "b": GOOD})
    nothing = [replace(r, state="missing", metrics={}, environment={}) for r in comparison.results]
    (metric,) = write_report(replace(comparison, results=nothing))
    assert metric.contrasts["b"].verdict == "incomplete"
    assert "**10 of 10 runs have no result**" in (tmp_path / "report.md").read_text()
    assert rows_csv(replace(comparison, results=nothing)) == "variant,world,seed,metric,value\n"
    assert "incomplete" in summary_csv(comparison, [metric])


def test_json_that_is_torn_or_no_object_is_nothing(tmp_path):
    path = tmp_path / "x.json"
    assert read_json(path) == {}
    for text in ('{"a": 1', "[1]", ""):
        path.write_text(text)
        assert read_json(path) == {}
    path.write_text(json.dumps({"a": 1}))
    assert read_json(path) == {"a": 1}
