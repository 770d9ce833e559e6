"""Fused scores by hand, and the grid of weights."""

import math

import pytest
import torch

from joint.choosing import fusion_grid
from joint.fusion import fuse, fusion_weights
from towers.ranking import Ranking
from towers.retrieval import Retrieval

TASKS = ("click", "like", "minutes")
LOGITS = torch.tensor([[0.0, 1.0, 2.0], [-1.0, 0.5, 0.0]])


def test_no_weights_are_all_one():
    for head in (Retrieval(features=()), Ranking(features=())):
        assert fusion_weights(head, TASKS) == [1, 1, 1]
        torch.testing.assert_close(fuse(head, TASKS, LOGITS), torch.tensor([3.0, -0.5]))


def test_tasks_that_are_not_weighed_count_nothing():
    head = Retrieval(features=(), fusion={"minutes": 2.0, "click": -1.0})
    assert fusion_weights(head, TASKS) == [-1, 0, 2]
    torch.testing.assert_close(fuse(head, TASKS, LOGITS), torch.tensor([4.0, 1.0]))


def test_probabilities_and_odds():
    head = Ranking(features=(), fusion={"click": 1.0, "minutes": 0.5}, fusion_of={"click": "sigmoid", "minutes": "exp"})
    expected = [0.5 + 0.5 * math.e**2, 1 / (1 + math.e) + 0.5]
    torch.testing.assert_close(fuse(head, TASKS, LOGITS), torch.tensor(expected))
    torch.testing.assert_close(fuse(head, TASKS, LOGITS.view(1, 2, 3)), torch.tensor([expected]))


@pytest.mark.parametrize(("tasks", "count"), [(1, 1), (2, 11), (3, 15), (4, 35)])
def test_the_grid_is_the_simplex(tasks, count):
    grid = fusion_grid(tasks)
    assert len(set(grid)) == len(grid) == count
    assert all(sum(weights) == pytest.approx(1) and min(weights) >= 0 for weights in grid)
