"""The funnel over logged candidates, by hand: three requests of four candidates, none, and two."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor

from joint.data.requests import Requests
from joint.evaluating.funnel_metrics import Entrants
from joint.evaluating.logged_funnel import logged_entrants, logged_funnel
from joint.experiment import Task

STUDENT = torch.tensor([4.0, 3, 2, 1, 1, 2])
TEACHER = torch.tensor([1.0, 2, 3, 4, 2, 1])
WORTH = torch.tensor([8.0, 4, 2, 1, 16, 32])
CONFIG = SimpleNamespace(
    tasks={"view": Task(label="view"), "minutes": Task(label="minutes", kind="weighted")},
    evaluation=SimpleNamespace(task="view"),
)
BATCH = SimpleNamespace(
    item=torch.tensor([5, 2, 9, 7, 5, 1]),
    offsets=torch.tensor([0, 4, 4, 6]),
    group=torch.tensor([0, 1, 1]),
    positive=torch.tensor([[1, 1], [1, 0], [0, 0], [1, 1], [0, 0], [0, 0]], dtype=torch.bool),
    weight=torch.tensor([[1, 3.0], [1, 1], [1, 1], [1, 1.5], [1, 1], [1, 1]]),
)


def entrants(scores: dict[str, Tensor], orders: dict[str, Tensor]) -> Entrants:
    requests = Requests({"group": np.array([0, 1, 1])})
    return logged_entrants(CONFIG, requests, BATCH, {}, scores, orders)  # type: ignore[arg-type]


def test_what_is_left_who_lost_the_rest_and_what_it_is_worth() -> None:
    scores = {"pre_ranking": STUDENT, "ranking": TEACHER}
    found = logged_funnel(entrants(scores, {"truth": WORTH}), {"pre_ranking": 2, "ranking": 1})
    assert found["logged/candidates"].total.tolist() == [4, 0, 2]
    assert found["funnel/pre_ranking/recall@2"].total.tolist() == [2, 0, 0]
    assert found["funnel/pre_ranking/recall@2"].count.tolist() == [3, 0, 0]
    assert found["funnel/ranking/recall@1"].total.tolist() == [1, 0, 0]  # of items 0 and 1 the teacher keeps 1
    lost = [found[f"funnel/lost/{stage}"].total.tolist() for stage in ("outside", "pre_ranking", "ranking")]
    assert lost == [[0, 0, 0], [1, 0, 0], [1, 0, 0]]
    assert found["funnel/true_reward@10"].total.tolist() == [0.4, 0, 1.6]
    assert found["pre_ranking/true_reward@10"].total.tolist() == [1.5, 0, 4.8]  # ten of four are all of them
    assert found["funnel/ranking/true_favourites"].total.tolist() == [1, 0, 1]
    assert found["funnel/ranking/teacher_favourites"].count.tolist() == [4, 0, 2]
    assert found["funnel/lost/pre_ranking/teacher_favourites"].total.tolist() == [2, 0, 0]


def test_positives_weigh_their_value_of_a_weighted_task() -> None:
    found = logged_funnel(entrants({"pre_ranking": STUDENT}, {}), {"pre_ranking": 2})
    weighted = found["funnel/pre_ranking/weighted_recall@2/minutes"]
    assert weighted.total.tolist() == [3, 0, 0]  # of the second, which is no positive of minutes, nothing
    assert weighted.count.tolist() == [4.5, 0, 0]


def test_without_a_truth_or_a_teacher_or_quotas() -> None:
    found = logged_funnel(entrants({"pre_ranking": STUDENT}, {}), {"pre_ranking": 3})
    assert not any("favourites" in name or "true" in name for name in found)
    alone = logged_funnel(entrants({"pre_ranking": STUDENT}, {"truth": WORTH}), {})
    assert list(alone) == ["logged/candidates", "pre_ranking/true_reward@10"]
