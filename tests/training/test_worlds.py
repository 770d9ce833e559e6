"""A trained funnel on a planted world: what its ten are truly worth, and whom its heads agree with."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch

import joint
from joint.cascade import main as cascade
from joint.config import load_config
from joint.cost import head_costs
from joint.data.assemble import Assembler, logged
from joint.data.dataset import Dataset
from joint.data.planted.simulate import parameters_of, simulate
from joint.data.planted.truth import open_truth
from joint.data.ragged import Ragged
from joint.data.sampling import unlabelled
from joint.data.softmax_pool import PoolItems
from joint.distributed import process_group
from joint.errors import UserError
from joint.evaluating.choosing import choose_fusion
from joint.evaluating.evaluator import evaluator_of
from joint.evaluating.finished_run import open_model, reference_of
from joint.features import Plan
from joint.funnels.measure import sweep_quotas
from joint.funnels.show import show_funnel
from joint.fusion import fuse
from joint.predicting.writing import predict
from joint.schema import Stage
from joint.task import build_task
from joint.train import main

CONFIG = Path(joint.__file__).parents[1] / "configs" / "joint.yaml"
SMALL = ["data.requests_per_batch=64", "evaluation.quotas={retrieval: 40, pre_ranking: 20, ranking: 10}"]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small world: 1,500 training requests."""
    out = tmp_path_factory.mktemp("world") / "biased"
    simulate(out, parameters_of("biased", "small"), seed=0, world="biased")
    return out


@pytest.fixture(scope="module")
def runs(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run `first`, and `second`, which is held against it."""
    folder = tmp_path_factory.mktemp("runs")
    common = [str(CONFIG), f"data.path={world}", f"run.dir={folder}", *SMALL]
    assert main([*common, "run.name=first"]) == 0
    assert main([*common, "run.name=second", "run.seed=1", f"evaluation.reference={folder / 'first'}"]) == 0
    return folder


def found(runs: Path, name: str) -> dict[str, float]:
    return json.loads((runs / name / "eval.json").read_text())


def test_the_true_reward_stands_beside_what_others_would_earn(runs: Path) -> None:
    one = found(runs, "first")
    earned = {name: one[f"baselines/{name}/true_reward@10"] for name in ("random", "popularity", "incumbent", "oracle")}
    assert earned["random"] < earned["popularity"] < earned["incumbent"] < earned["oracle"]
    assert earned["random"] < one["funnel/true_reward@10"] < earned["oracle"]
    assert one["funnel/retrieval/true_favourites"] >= one["funnel/pre_ranking/true_favourites"]
    log = (runs / "first" / "train.log").read_text()
    assert "true_reward@10" in log
    assert "oracle" in log


def test_the_funnel_of_a_run_in_print(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    show_funnel(runs / "first", None)
    out = capsys.readouterr().out
    one, rows = (
        found(runs, "first"),
        {line.split()[0]: line.split() for line in out.partition("lost by:")[0].splitlines()[3:-1]},
    )
    assert rows["retrieval"][1:3] == ["600", "40"]
    assert rows["ranking"][1:3] == ["20", "10"]
    for head, quota in (("retrieval", 40), ("pre_ranking", 20), ("ranking", 10)):
        names = [f"funnel/{head}/recall@{quota}", f"funnel/{head}/teacher_favourites", f"funnel/{head}/true_favourites"]
        assert rows[head][4:] == [f"{one[name]:.4f}" for name in [*names, f"{head}/true_reward@10"]]
    assert rows["funnel"][-1] == f"{one['funnel/true_reward@10']:.4f}"
    assert rows["oracle"][-1] == f"{one['baselines/oracle/true_reward@10']:.4f}"
    cost = json.loads((runs / "first" / "metrics.jsonl").read_text().splitlines()[0])
    expected = cost["cost/retrieval/request"] + 600 * cost["cost/retrieval/candidate"]
    assert rows["retrieval"][3] == f"{int(expected):,}"


def test_a_sweep_of_true_worth_is_as_many_runs(runs: Path) -> None:
    grid = [{"retrieval": n, "pre_ranking": m, "ranking": 10} for n in (30, 60) for m in (12, 25)]
    with open_model(runs / "first", []) as (_, evaluator, model, _):
        points = sweep_quotas(evaluator, "test", grid, head_costs(model), scored=600)
        config = evaluator.config
        for point in points:
            evaluator.config = replace(config, evaluation=replace(config.evaluation, quotas=point.quotas))
            numbers = evaluator("test", whole_catalogue=False).numbers
            assert point.values["true_reward@10"] == pytest.approx(numbers["funnel/true_reward@10"])
            assert point.values["true_favourites"] == numbers["funnel/ranking/true_favourites"]
            assert numbers["funnel/lost/retrieval/true_favourites"] == pytest.approx(
                1 - numbers["funnel/retrieval/true_favourites"]
            )


def test_a_run_s_report_and_several_runs_beside_each_other(runs: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    first, second = str(runs / "first"), str(runs / "second")
    assert cascade([first, "--sweep", "retrieval=20,40,80", "pre_ranking=10,20", "--out", str(tmp_path / "one")]) == 0
    out = capsys.readouterr().out
    assert "A star: no other of these funnels" in out
    names = {"report.md", "lost.csv", "lost.png", "survival.png", "sweep.csv", "sweep.png"}
    assert {path.name for path in (tmp_path / "one").iterdir()} == names
    table = pd.read_csv(tmp_path / "one" / "sweep.csv")
    assert len(table) == 6
    assert table.efficient_by_positives.any()
    lost = pd.read_csv(tmp_path / "one" / "lost.csv")
    assert set(lost.wanted) == {"positives", "teacher_favourites", "true_favourites"}
    assert lost.drop(columns=["wanted", "of"]).sum(axis=1).tolist() == pytest.approx([1] * len(lost))
    assert cascade([first, second, "--split", "valid", "--out", str(tmp_path / "two")]) == 0
    assert {path.name for path in (tmp_path / "two").iterdir()} == {"report.md", "lost.csv", "survival.png"}
    assert set(pd.read_csv(tmp_path / "two" / "lost.csv").run) == {"first", "second"}
    for arguments, said in [
        ([first, second, "--sweep", "retrieval=3"], "several without --sweep"),
        ([first, first], "first: given twice"),
        ([first, "evaluation.pools={all: {quota: 5}}", "--sweep", "retrieval=20"], "reserves 5 places"),
        ([first, "--sweep", "retrieval=many"], "expected numbers of 1 or more"),
        ([first, "evaluation.quotas=null", "--sweep", "retrieval=3"], "there is no funnel"),
    ]:
        with pytest.raises(UserError, match=said):
            cascade(arguments)
    monkeypatch.setattr("joint.cascade.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"a report needs matplotlib: pip install matplotlib"):
        cascade([first])


def test_the_report_of_heads_below_a_retrieval_that_is_not_ours(world: Path, tmp_path: Path, capsys) -> None:
    paper = CONFIG.parent / "papers" / "sdcl.yaml"
    where = [f"data.path={world}", f"run.dir={tmp_path}", "run.name=below", "data.epochs=1"]
    assert main([str(paper), *where, "evaluation.quotas={pre_ranking: 8, ranking: 4}"]) == 0
    capsys.readouterr()
    assert cascade([str(tmp_path / "below"), "--sweep", "pre_ranking=4,8,12"]) == 0
    one = found(tmp_path, "below")
    table = pd.read_csv(tmp_path / "below" / "cascade" / "sweep.csv")
    own = table[table.pre_ranking == 8].iloc[0]
    assert len(table) == 3
    assert own.positives == pytest.approx(one["funnel/ranking/recall@4"])
    assert own["true_reward@10"] == pytest.approx(one["funnel/true_reward@10"])
    lost = pd.read_csv(tmp_path / "below" / "cascade" / "lost.csv").set_index(["wanted", "of"]).loc["positives", "all"]
    assert lost.pre_ranking == pytest.approx(one["funnel/lost/pre_ranking"])
    assert lost.outside == 0
    assert lost.sum() == pytest.approx(1)
    said = capsys.readouterr().out.splitlines()
    assert any(line.split()[:3] == ["pre_ranking", str(round(one["logged/candidates"])), "8"] for line in said)
    assert "lost.png" in {path.name for path in (tmp_path / "below" / "cascade").iterdir()}


def test_fusion_weights_of_every_head_are_tried(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for head in ("pre_ranking", "ranking"):
        choose_fusion(runs / "first", head, None, ["evaluation.k=[50, 10]"])
        lines = [line.split() for line in capsys.readouterr().out.splitlines()]
        assert len(lines) == 15
        assert {line[0] for line in lines} == {f"{head}/recall@10"}
        assert len({line[1] for line in lines}) > 3
        with open_model(runs / "first", ["evaluation.k=[10]"]) as (_, evaluator, *_):
            evaluator.heads[head] = replace(evaluator.heads[head], fusion={"view": 0.25, "like": 0.75})
            value = evaluator("valid", whole_catalogue=False).numbers[f"{head}/recall@10"]
        said = f"{value:.4f} heads.{head}.fusion={{view: 0.25, like: 0.75, dwm: 0}}".split()
        assert said in [line[1:] for line in lines]


def test_a_reference_is_another_s_teacher(runs: Path, world: Path) -> None:
    second = found(runs, "second")
    names = [name for name in second if name.startswith("alignment/reference/") and "group" not in name]
    assert {name.split("/")[-1] for name in names} == {"retrieval", "pre_ranking", "ranking"}
    assert 0.05 < second["alignment/reference/reverse_rate/ranking"] < 0.6
    config, _ = load_config(runs / "first" / "config.yaml", [f"evaluation.reference={runs / 'first'}"])
    with process_group() as device:
        dataset = Dataset(world)
        itself = reference_of(config, dataset, device)
        assert itself is not None
        itself.reference = reference_of(config, dataset, device)
        numbers = itself("valid", whole_catalogue=False).numbers
    assert numbers["alignment/reference/reverse_rate/ranking"] == 0
    assert numbers["alignment/reference/overlap@10/ranking"] == 1
    assert numbers["alignment/reference/nktd@40/ranking"] == 0


@pytest.fixture
def scored(world: Path):
    """An untrained model on the test part: what the evaluator says, and every head's score of every item by request."""
    config, _ = load_config(CONFIG, [f"data.path={world}", *SMALL, "tables.video_id.init=0.9"])
    dataset = Dataset(world)
    with process_group() as device:
        assembler = Assembler(Plan(config, dataset.schema), dataset)
        model = build_task(assembler.plan, device)
        evaluator = evaluator_of(model, assembler, device)
        measured = evaluator("test", whole_catalogue=False)
        requests = dataset.read_split("test")
        scores = []
        for row in range(len(requests)):
            one = requests.take(np.array([row]))
            every = unlabelled(Ragged(np.arange(dataset.schema.items), np.array([0, dataset.schema.items])), ())
            every = type(every)(every.items, every.stages, dict.fromkeys(dataset.schema.labels, every.stages * np.nan))
            pool = PoolItems.corpus(np.zeros(0, np.int64))
            batch = assembler(one, every, pool, position=None, scoring=evaluator.heads)  # type: ignore[arg-type]
            with torch.no_grad():
                outputs = model(batch)[1].outputs
            scores.append({h: fuse(evaluator.heads[h], evaluator.tasks, outputs[h].logits) for h in outputs})
        yield measured, assembler, requests, scores


def discordant(a: np.ndarray, b: np.ndarray) -> float:
    pairs = list(itertools.combinations(range(len(a)), 2))
    return float(np.mean([(a[i] - a[j]) * (b[i] - b[j]) < 0 for i, j in pairs]))


def test_the_reward_and_the_orders_by_brute_force(scored, world: Path) -> None:
    measured, assembler, requests, scores = scored
    truth = open_truth(world)
    assert truth is not None
    table = pd.DataFrame(measured.requests)
    free = assembler.eligibility.mask(requests)
    candidates = logged(requests, assembler.dataset)
    orders = assembler.dataset.read(assembler.dataset.parts(["test"]).popitem()[1][0], further=["rank_index"])
    for row in range(0, len(requests), 17):
        one = requests.take(np.array([row]))
        worth = truth.reward(one, Ragged(np.arange(600), np.array([0, 600])))
        kept = np.flatnonzero(free[row])
        for head, quota in (("retrieval", 40), ("pre_ranking", 20), ("ranking", 10)):
            score = scores[row][head].numpy()
            if head == "retrieval":
                kept = kept[np.argsort(-score[kept], kind="stable")[:quota]]
                retrieved = kept
                continue
            kept = kept[np.argsort(-score[kept], kind="stable")[:quota]]
        assert table["funnel/true_reward@10.total"][row] == pytest.approx(worth[kept].sum() / 10, rel=1e-6)
        own = retrieved[np.argsort(-scores[row]["retrieval"].numpy()[retrieved], kind="stable")[:10]]
        assert table["retrieval/true_reward@10.total"][row] == pytest.approx(worth[own].sum() / 10, rel=1e-6)
        best = set(sorted(np.flatnonzero(free[row]), key=lambda item: (-worth[item], item))[:10])
        assert table["funnel/retrieval/true_favourites.total"][row] == len(best & set(retrieved.tolist()))
        shown = candidates.items.take(np.array([row])).values
        of_candidates = scores[row]["ranking"].numpy()[shown]
        by_truth = discordant(of_candidates, worth[shown])
        assert table["alignment/truth/reverse_rate/ranking.total"][row] == pytest.approx(by_truth, abs=0.02)
        place = orders.lists("rank_index").take(np.array([row])).values
        known = place >= 0
        by_log = discordant(of_candidates[known], -place[known].astype(float))
        assert table["alignment/logged/reverse_rate/ranking.total"][row] == pytest.approx(by_log, abs=0.02)


def test_weighted_recall_among_the_logged_candidates_of_a_head(runs: Path, world: Path) -> None:
    """Of the items viewed, each weighs its minutes: by the scores that the run itself predicts."""
    predict(runs / "first", world, runs / "predicted", splits=["test"], heads=["ranking"], k=0)
    config, _ = load_config(runs / "first" / "config.yaml")
    fusion, hit, total = config.heads.ranking.fusion, dict.fromkeys(config.evaluation.k, 0.0), 0.0
    for path in sorted((runs / "predicted" / "scores").rglob("*.parquet")):
        logged_rows = pq.ParquetFile(world / path.relative_to(runs / "predicted" / "scores")).read().to_pylist()
        for row, scores in zip(logged_rows, pq.ParquetFile(path).read().to_pylist(), strict=True):
            logits = {task: np.array(scores[f"ranking.{task}"]) for task in fusion}
            fused = fusion["view"] / (1 + np.exp(-logits["view"])) + fusion["like"] / (1 + np.exp(-logits["like"]))
            fused = fused + fusion["dwm"] * np.exp(logits["dwm"])
            space = np.array(row["stages"]) & (Stage.EXPOSED | Stage.RANKED) != 0
            minutes = np.array(
                [
                    0 if m is None or m < 0.01 or not v else m
                    for m, v in zip(row["dwm"], row["effective_view"], strict=True)
                ]
            )
            order = np.argsort(-np.where(space, fused, -np.inf))
            total += minutes.sum()
            for k in hit:
                hit[k] += minutes[order[:k]].sum()
    measured = found(runs, "first")
    assert total > 0
    for k, minutes in hit.items():
        assert measured[f"ranking/weighted_recall@{k}/dwm"] == pytest.approx(minutes / total, rel=1e-4)
