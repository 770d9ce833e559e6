"""The funnel over logged candidates, by hand."""

from __future__ import annotations

import torch

from joint.logged_funnel import logged_funnel

OFFSETS = torch.tensor([0, 4, 4, 6])
STUDENT = torch.tensor([4.0, 3, 2, 1, 1, 2])
TEACHER = torch.tensor([1.0, 2, 3, 4, 2, 1])
POSITIVE = torch.tensor([True, True, False, True, False, False])
WORTH = torch.tensor([8.0, 4, 2, 1, 16, 32])


def test_what_is_left_and_what_it_is_worth() -> None:
    scores = {"pre_ranking": STUDENT, "ranking": TEACHER}
    found = logged_funnel(scores, {"pre_ranking": 2, "ranking": 1}, POSITIVE, OFFSETS, WORTH)
    assert found["funnel/pre_ranking/recall@2"].total.tolist() == [2, 0, 0]
    assert found["funnel/pre_ranking/recall@2"].count.tolist() == [3, 0, 0]
    assert found["funnel/ranking/recall@1"].total.tolist() == [1, 0, 0]  # of items 0 and 1 the teacher keeps 1
    assert found["funnel/true_reward@10"].total.tolist() == [0.4, 0, 1.6]
    assert found["pre_ranking/true_reward@10"].total.tolist() == [1.5, 0, 4.8]  # ten of four are all of them
    assert found["funnel/ranking/true_favourites"].total.tolist() == [1, 0, 1]
    assert found["funnel/ranking/teacher_favourites"].count.tolist() == [4, 0, 2]


def test_without_a_truth_or_a_teacher_or_quotas() -> None:
    found = logged_funnel({"pre_ranking": STUDENT}, {"pre_ranking": 3}, POSITIVE, OFFSETS, None)
    assert list(found) == ["logged/candidates", "funnel/pre_ranking/recall@3"]
    assert found["logged/candidates"].total.tolist() == [4, 0, 2]
    alone = logged_funnel({"pre_ranking": STUDENT}, {}, POSITIVE, OFFSETS, WORTH)
    assert list(alone) == ["logged/candidates", "pre_ranking/true_reward@10"]
