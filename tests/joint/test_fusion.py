"""Fused scores by hand, and the grid of weights."""

import math

import pytest
import torch

from joint.evaluating.choosing import Trial, best, best_by_group, fusion_grid
from joint.fusion import fuse, fuse_users, fusion_weights
from joint.metrics import PerRequest
from towers.pre_ranking import PreRanking
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


GROUP = torch.tensor([0, 3])
FUSION = {"click": 2.0, "minutes": 0.5}


@pytest.mark.parametrize("kind", [Retrieval, PreRanking, Ranking])
def test_a_group_s_own_weights_and_those_of_the_others(kind):
    head = kind(features=(), fusion=FUSION, fusion_by_group={"3": {"like": 4.0}, "5": {"click": -1.0}})
    torch.testing.assert_close(fuse(head, TASKS, LOGITS, GROUP), torch.tensor([1.0, 2.0]))
    torch.testing.assert_close(fuse(head, TASKS, LOGITS, torch.tensor([5, 0])), torch.tensor([0.0, -2.0]))
    assert fusion_weights(head, TASKS, "3") == [0, 4, 0]
    assert fusion_weights(head, TASKS, "4") == fusion_weights(head, TASKS) == [2, 0, 0.5]


def test_groups_of_equal_weights_are_no_groups_to_the_bit():
    generator = torch.Generator().manual_seed(0)
    logits, group = torch.randn(999, 3, generator=generator), torch.randint(0, 4, (999,), generator=generator)
    users = torch.randn(999, 3, 7, generator=generator)
    by_group = {str(g): FUSION for g in range(3)}
    for of in ({}, {"click": "sigmoid", "minutes": "exp"}):
        plain, grouped = (Ranking(features=(), fusion=FUSION, fusion_of=of, fusion_by_group=g) for g in ({}, by_group))
        assert torch.equal(fuse(plain, TASKS, logits), fuse(grouped, TASKS, logits, group))
    plain, grouped = (Retrieval(features=(), fusion=FUSION, fusion_by_group=g) for g in ({}, by_group))
    assert torch.equal(fuse_users(plain, TASKS, users, group), fuse_users(grouped, TASKS, users, group))


def test_a_user_s_one_vector_is_of_the_weights_of_its_group():
    users = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [3.0, 3.0]]]).repeat(2, 1, 1)
    head = Retrieval(features=(), fusion=FUSION, fusion_by_group={"3": {"like": 4.0}})
    expected = torch.tensor([[3.5, 1.5], [0.0, 4.0]])
    torch.testing.assert_close(fuse_users(head, TASKS, users, GROUP), expected)
    item = torch.tensor([2.0, -1.0])
    torch.testing.assert_close(fuse_users(head, TASKS, users, GROUP) @ item, fuse(head, TASKS, users @ item, GROUP))


def test_the_best_weights_of_all_and_of_a_group_that_gains():
    first = Trial({"a": 1.0}, PerRequest(torch.tensor([3.0, 0.0, 1.0]), torch.tensor([4.0, 1.0, 0.0])))
    second = Trial({"a": 2.0}, PerRequest(torch.tensor([1.0, 1.0, 1.0]), torch.tensor([4.0, 1.0, 0.0])))
    assert best([second, first]).fusion == best([second, first]).fusion == {"a": 1.0}
    found = best_by_group([first, second], torch.tensor([0, 1, 2]))
    assert {group: (own.fusion, own.found.value, other.found.value) for group, (own, other) in found.items()} == {
        1: ({"a": 2.0}, 1.0, 0.0)
    }
