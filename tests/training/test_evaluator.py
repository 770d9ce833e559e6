"""Every figure of an evaluation, computed again slowly from the Parquet files and one request's scores at a time."""

from __future__ import annotations

import itertools
import math
import re
from dataclasses import dataclass

import numpy as np
import pandas as pd
import pytest
import torch

from joint.data.eligibility import Eligibility
from joint.data.order import Position
from joint.data.ragged import Ragged, side_by_side
from joint.data.sampling import unlabelled
from joint.data.softmax_pool import PoolItems
from joint.evaluating.evaluator import evaluator_of
from joint.evaluating.funnel_metrics import funnel, top_k
from joint.experiment import Config
from joint.task import build_task

HEADS = ("retrieval", "pre_ranking", "ranking")
ITEMS = 61


@dataclass
class Request:
    """One request of the test part, and every head's logits on the whole catalogue."""

    user: int
    candidates: np.ndarray
    ratings: np.ndarray
    eligible: np.ndarray  # bool [ITEMS]
    logits: dict[str, np.ndarray]  # head -> [ITEMS, T]

    @property
    def relevant(self) -> list[int]:
        return self.candidates[self.ratings >= 4].tolist()

    def fused(self, head: str) -> np.ndarray:
        """The config fuses retrieval by the first task alone, the others by the plain sum."""
        return self.logits[head][:, 0] if head == "retrieval" else self.logits[head].sum(1)

    def best(self, head: str, items: list[int], k: int) -> list[int]:
        """The K best of some items, the irrelevant first among equals."""
        scores, wanted = self.fused(head), set(self.relevant)
        return sorted(items, key=lambda item: (-scores[item], item in wanted, item))[:k]


def read(data, *splits: str) -> pd.DataFrame:
    files = [file for split in splits for file in sorted((data / "requests").glob(f"day=*/part-{split}*.parquet"))]
    return pd.concat([pd.read_parquet(file, partitioning=None) for file in files], ignore_index=True)


@pytest.fixture
def measure(configure, group, assemble, tiny_data):
    """`measure(*overrides)`: config, untrained model, what `evaluate` says of it, and the requests with all scores."""

    def look(*overrides: str):
        wide = [f"tables.{name}.init=0.7" for name in ("user_id", "item_id", "gender", "genres", "rating")]
        config = configure(*wide, *overrides)
        assembler = assemble.assembler(config)
        model = build_task(assembler.plan, group)
        found = evaluator_of(model, assembler, group).full("test").numbers
        requests, table = assembler.dataset.read_split("test"), read(tiny_data, "test")
        slow = []
        for number, row in table.iterrows():
            catalogue = unlabelled(Ragged(np.arange(ITEMS), np.array([0, ITEMS])), assembler.dataset.schema.labels)
            one = requests.take(np.array([number]))
            batch = assembler(one, catalogue, PoolItems.corpus(np.arange(ITEMS)), position=Position(), scoring=HEADS)
            with torch.no_grad():
                outputs = model(batch)[1].outputs
            eligible = ~np.isin(np.arange(ITEMS), row["rated"])
            logits = {head: outputs[head].logits.double().numpy() for head in HEADS}
            slow.append(Request(row["user_id"], row["candidates"], row["rating"], eligible, logits))
        return config, model, found, slow

    return look


@pytest.fixture
def measured(measure):
    return measure()


def recall_over_the_catalogue(slow: list[Request], head: str, k: int) -> float:
    hits = sum(len(set(r.best(head, np.flatnonzero(r.eligible).tolist(), k)) & set(r.relevant)) for r in slow)
    return hits / sum(len(r.relevant) for r in slow)


def discordant_share(a: np.ndarray, b: np.ndarray) -> float:
    pairs = list(itertools.combinations(range(len(a)), 2))
    found = [np.sign(a[i] - a[j]) * np.sign(b[i] - b[j]) for i, j in pairs]
    return sum(sign < 0 for sign in found) / len(pairs)


def test_recall_over_the_eligible_catalogue(measured):
    config, _, found, slow = measured
    for head, k in itertools.product(HEADS, config.evaluation.k):
        assert found[f"{head}/recall@{k}"] == pytest.approx(recall_over_the_catalogue(slow, head, k)), (head, k)
    assert len({found[f"{head}/recall@10"] for head in HEADS}) > 1
    assert any(not r.eligible[item] for r in slow for item in range(ITEMS))


def test_dcg_of_retrieval_counts_every_positive_as_the_only_one(measured):
    config, _, found, slow = measured
    for k in config.evaluation.k:
        gain = 0.0
        for r in slow:
            best = r.best("retrieval", np.flatnonzero(r.eligible).tolist(), k)
            gain += sum(1 / math.log2(best.index(item) + 2) for item in r.relevant if item in best)
        total = sum(len(r.relevant) for r in slow)
        assert found[f"retrieval/dcg_per_positive@{k}"] == pytest.approx(gain / total)


def test_weighted_recall_by_brute_force(measure):
    """Of the items rated 4 or more, each weighs what the weighted task `fine` has of it: its rating."""
    config, _, found, slow = measure(
        "tasks.fine.kind=weighted", "tasks.fine.at_least=5", "evaluation.whole_catalogue=[]"
    )
    weights = [{i: v * (v >= 5) for i, v in zip(r.candidates, r.ratings, strict=True) if v >= 4} for r in slow]
    total = sum(sum(own.values()) for own in weights)
    assert sum(value == 0 for own in weights for value in own.values()) > 0
    kept = [np.flatnonzero(r.eligible).tolist() for r in slow]
    for k in config.evaluation.k:
        hit = sum(
            sum(w.get(i, 0) for i in r.best("retrieval", of, k)) for r, w, of in zip(slow, weights, kept, strict=True)
        )
        assert found[f"retrieval/weighted_recall@{k}/fine"] == pytest.approx(hit / total, rel=1e-6)
    for head, quota in config.evaluation.quotas.items():
        kept = [r.best(head, items, quota) for r, items in zip(slow, kept, strict=True)]
        hit = sum(w.get(item, 0) for w, items in zip(weights, kept, strict=True) for item in items)
        assert 0 < hit < total
        assert found[f"funnel/{head}/weighted_recall@{quota}/fine"] == pytest.approx(hit / total, rel=1e-6)
    assert "retrieval/weighted_recall@3/like" not in found
    rated = np.concatenate([r.ratings for r in slow])
    for head in ("pre_ranking", "ranking"):
        expected = np.exp(np.concatenate([r.logits[head][r.candidates, 1] for r in slow])).sum()
        assert found[f"{head}/calibration/fine"] == pytest.approx(expected / rated[rated >= 5].sum(), rel=1e-5)
        assert f"{head}/log_loss/fine" not in found
    assert "retrieval/calibration/fine" not in found


def check_the_funnel(config: Config, found: dict[str, float], slow: list[Request]) -> None:
    left = dict.fromkeys(HEADS, 0)
    order: dict[str, list[float]] = {"retrieval": [], "pre_ranking": []}
    for r in slow:
        kept = np.flatnonzero(r.eligible).tolist()
        for head, quota in config.evaluation.quotas.items():
            kept = r.best(head, kept, quota)
            left[head] += len(set(kept) & set(r.relevant))
            if head == "retrieval":
                for student, shares in order.items():
                    shares.append(discordant_share(r.fused(student)[kept], r.fused("ranking")[kept]))
    total = sum(len(r.relevant) for r in slow)
    for head, quota in config.evaluation.quotas.items():
        assert found[f"funnel/{head}/recall@{quota}"] == pytest.approx(left[head] / total)
    assert 0 < left["ranking"] < left["retrieval"] < total
    for student, shares in order.items():
        quota = config.evaluation.quotas["retrieval"]
        assert found[f"alignment/nktd@{quota}/{student}"] == pytest.approx(np.mean(shares))


def test_the_funnel_by_brute_force(measured):
    config, _, found, slow = measured
    check_the_funnel(config, found, slow)


def test_items_that_are_not_eligible_are_never_served_but_still_count_as_missed(measure, monkeypatch):
    """Here each request's first candidate is not, relevant or not; and retrieval may keep more than there are."""

    in_histories = Eligibility.taken

    def first_too(self, requests):
        first = Ragged(requests.lists("candidates").values, requests.lists("candidates").offsets)
        first = first.slices(first.offsets[:-1], np.minimum(first.lengths, 1))
        return side_by_side(in_histories(self, requests), first.with_values(first.values.astype(np.int64)))[0]

    monkeypatch.setattr(Eligibility, "taken", first_too)
    config, _, found, slow = measure("evaluation.quotas.retrieval=55", "evaluation.baselines=false")
    for request in slow:
        request.eligible[request.candidates[0]] = False
    assert any(not r.eligible[r.relevant].all() for r in slow)
    assert min(r.eligible.sum() for r in slow) < 55
    check_the_funnel(config, found, slow)
    for head, k in itertools.product(HEADS, config.evaluation.k):
        assert found[f"{head}/recall@{k}"] == pytest.approx(recall_over_the_catalogue(slow, head, k)), (head, k)


def auc_of(scores: np.ndarray, positive: np.ndarray) -> float:
    """NaN where a class is missing."""
    wins = np.sign(scores[positive][:, None] - scores[~positive][None])
    return float((wins / 2 + 0.5).mean()) if wins.size else np.nan


def test_metrics_on_the_logged_candidates(measured):
    _, _, found, slow = measured
    for (index, at_least), head in itertools.product([(0, 4), (1, 3)], HEADS):
        task = ("like", "fine")[index]
        s = np.concatenate([r.logits[head][r.candidates, index] for r in slow])
        y = np.concatenate([r.ratings >= at_least for r in slow])
        assert found[f"{head}/auc/{task}"] == pytest.approx(auc_of(s, y))
        within = [auc_of(r.logits[head][r.candidates, index], r.ratings >= at_least) for r in slow]
        assert found[f"{head}/grouped_auc/{task}"] == pytest.approx(np.nanmean(within))
        assert (f"{head}/log_loss/{task}" in found) == (head != "retrieval")
        if head != "retrieval":
            p = 1 / (1 + np.exp(-s))
            assert found[f"{head}/log_loss/{task}"] == pytest.approx(-np.log(np.where(y, p, 1 - p)).mean(), rel=1e-5)
            assert found[f"{head}/calibration/{task}"] == pytest.approx(p.mean() / y.mean(), rel=1e-5)


def test_the_order_of_the_students_against_the_teacher_s(measured):
    _, _, found, slow = measured
    several = [r for r in slow if len(r.candidates) > 1]
    assert several
    for head, name in (("pre_ranking", "reverse_rate"), ("retrieval", "retrieval_reverse_rate")):
        for index, task in enumerate(("like", "fine")):
            shares = [discordant_share(*(r.logits[h][r.candidates, index] for h in (head, "ranking"))) for r in several]
            assert found[f"alignment/{name}/{task}"] == pytest.approx(np.mean(shares))
        fused = [discordant_share(*(r.fused(h)[r.candidates] for h in (head, "ranking"))) for r in several]
        assert found[f"alignment/{name}/fused"] == pytest.approx(np.mean(fused))


def test_the_size_of_the_pieces_does_not_matter_and_a_quick_look_is_part_of_the_whole(
    measured, configure, assemble, group
):
    _, model, found, _ = measured
    other = assemble.assembler(configure("data.requests_per_batch=6", "evaluation.candidates_per_batch=70"))
    assert evaluator_of(model, other, group).full("test").numbers == pytest.approx(found, rel=1e-6)
    quick = evaluator_of(model, other, group)("test", whole_catalogue=False).numbers
    assert quick == {name: pytest.approx(found[name], rel=1e-6) for name in quick}
    costly = ("baselines/", "ranking/recall", "pre_ranking/recall")
    assert {name for name in found if name not in quick} == {
        name for name in found if re.sub(r"^group/\d+/", "", name).startswith(costly)
    }


def test_ratios_by_request_give_the_whole_and_the_user_groups(measured, assemble, group):
    config, model, found, slow = measured
    requests = pd.DataFrame(evaluator_of(model, assemble.assembler(config), group).full("test").requests)
    assert requests.user_id.tolist() == [request.user for request in slow]
    names = [name.removesuffix(".total") for name in requests.columns if name.endswith(".total")]
    assert {"retrieval/recall@3", "funnel/ranking/recall@3", "alignment/reverse_rate/fused"} <= set(names)
    for name in names:
        assert requests[f"{name}.total"].sum() / requests[f"{name}.count"].sum() == pytest.approx(found[name])
        for which, own in requests.groupby("group"):
            expected = own[f"{name}.total"].sum() / own[f"{name}.count"].sum() if own[f"{name}.count"].sum() else np.nan
            assert found[f"group/{which}/{name}"] == pytest.approx(expected, nan_ok=True)


def test_the_baselines_are_measured_on_the_same_requests(measured, tiny_data):
    _, _, found, slow = measured
    before = read(tiny_data, "train")  # what the config trains on
    flat = before[["user_id", "candidates", "rating"]].explode(["candidates", "rating"]).astype(float)
    liked = flat[flat.rating >= 4]
    x = np.zeros((flat.user_id.astype(int).max() + 1, ITEMS))
    x[liked.user_id.astype(int), liked.candidates.astype(int)] = 1
    gram = x.T @ x
    norm = np.sqrt(np.maximum(np.diag(gram), 1))
    knn = gram / np.outer(norm, norm) * (1 - np.eye(ITEMS))
    inverse = np.linalg.inv(gram + 300 * np.eye(ITEMS))
    ease = -inverse / np.diag(inverse) * (1 - np.eye(ITEMS))
    for name, weights in (("popularity", None), ("item_knn", knn), ("ease", ease)):
        scored = [
            Request(r.user, r.candidates, r.ratings, r.eligible, {"retrieval": scores[:, None].round(12)})
            for r in slow
            for scores in [x.sum(0) if weights is None else x[r.user] @ weights]
        ]
        for k in (3, 10):
            assert found[f"baselines/{name}/recall@{k}"] == pytest.approx(
                recall_over_the_catalogue(scored, "retrieval", k)
            ), (name, k)
    y = (flat.rating >= 4).astype(float)
    mean, item, user = y.mean(), flat.candidates.astype(int), flat.user_id.astype(int)
    by_item = (y - mean).groupby(item).sum() / (y.groupby(item).size() + 5)
    by_user = (y - mean - item.map(by_item)).groupby(user).sum() / (y.groupby(user).size() + 5)
    scores = [mean + by_user.get(r.user, 0) + by_item.get(c, 0) for r in slow for c in r.candidates]
    wanted = np.concatenate([r.ratings >= 4 for r in slow])
    s = np.array(scores)
    wins = np.sign(s[wanted][:, None] - s[~wanted][None])
    # A sum that is equal in exact arithmetic may be a tie or not: allow for one pair.
    assert found["baselines/means/auc/like"] == pytest.approx((wins / 2 + 0.5).mean(), abs=1 / wins.size)
    assert {name.split("/")[1] for name in found if name.startswith("baselines/")} == {
        "popularity", "item_knn", "ease", "means",
    }  # fmt: skip


def test_a_metric_without_units_is_nan(configure, group, assemble):
    """Nobody likes anything here: recalls have nothing to be measured on, and an AUC only one class."""
    config = configure("tasks.like.at_least=9", "evaluation.baselines=false")
    assembler = assemble.assembler(config)
    found = evaluator_of(build_task(assembler.plan, group), assembler, group).full("test").numbers
    for name in ("retrieval/recall@3", "ranking/recall@3", "funnel/ranking/recall@3", "ranking/auc/like"):
        assert math.isnan(found[name]), name
    assert 0 < found["ranking/auc/fine"] < 1


def test_the_k_best_of_each_request():
    scores = torch.tensor([1.0, 3.0, 2.0, 5.0, 5.0, 5.0, -torch.inf])
    offsets = torch.tensor([0, 3, 3, 6, 7])
    assert top_k(scores, offsets, 2).tolist() == [False, True, True, True, True, False, True]
    assert top_k(scores, offsets, 9).all()
    assert top_k(scores[:0], torch.tensor([0, 0]), 1).tolist() == []


def test_a_stage_chooses_among_what_the_stage_before_left():
    offsets = torch.tensor([0, 4, 6])
    scores = {
        "retrieval": torch.tensor([4.0, 3.0, 2.0, 1.0, 1.0, 2.0]),
        "pre_ranking": torch.tensor([1.0, 2.0, 3.0, 9.0, 2.0, 1.0]),
        "ranking": torch.tensor([7.0, 1.0, 2.0, 9.0, -1.0, -2.0]),
    }
    stages = dict(funnel(scores, {"retrieval": 3, "pre_ranking": 2, "ranking": 1}, offsets))
    assert {name: alive.nonzero().flatten().tolist() for name, alive in stages.items()} == {
        "retrieval": [0, 1, 2, 4, 5],
        "pre_ranking": [1, 2, 4, 5],
        "ranking": [2, 4],
    }
    assert list(stages) == ["retrieval", "pre_ranking", "ranking"]
    (only,) = funnel(scores, {"ranking": 1}, offsets)
    assert only[1].nonzero().flatten().tolist() == [3, 4]
