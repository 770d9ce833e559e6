"""Baselines against closed forms worked by hand, loops, and the optimality conditions they solve."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from joint.evaluating import baselines
from joint.evaluating.baselines import ease, history_scores, item_knn, popularity, smoothed_means

USERS = torch.tensor([7, 7, 3, 3, 3, 9, 7])  # 7 has items 0 and 1, 3 has 0, 1, 2, 9 has 2; a pair twice
ITEMS = torch.tensor([0, 1, 0, 1, 2, 2, 0])


def positives(num_users: int, num_items: int) -> tuple[Tensor, Tensor, Tensor]:
    """Random users, items and their binary matrix `[U, C]`."""
    binary = torch.rand(num_users, num_items, generator=torch.Generator().manual_seed(0)) < 0.2
    users, items = binary.nonzero().unbind(1)
    return users, items, binary.double()


def test_popularity_counts_users() -> None:
    assert popularity(USERS, ITEMS, 4).tolist() == [2, 2, 2, 0]


def test_item_knn_by_hand() -> None:
    expected = [[0, 1, 0.5, 0], [1, 0, 0.5, 0], [0.5, 0.5, 0, 0], [0, 0, 0, 0]]
    torch.testing.assert_close(item_knn(USERS, ITEMS, 4), torch.tensor(expected, dtype=torch.float64))


def test_item_knn_equals_cosine_of_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(baselines, "USERS_AT_A_TIME", 7)
    users, items, binary = positives(40, 12)
    found = item_knn(users * 1000, items, 12)  # user ids need not be dense
    for i in range(12):
        for j in range(12):
            cosine = torch.cosine_similarity(binary[:, i], binary[:, j], dim=0) if i != j else 0
            assert float(found[i, j]) == pytest.approx(float(cosine), abs=1e-12)


def test_neighbours_keep_the_most_similar_of_each_scored_item() -> None:
    users, items, _ = positives(40, 12)
    whole, kept = item_knn(users, items, 12), item_knn(users, items, 12, neighbours=3)
    for column, full in zip(kept.T, whole.T, strict=True):
        assert column.sort().values.tolist() == [0.0] * 9 + full.sort().values[-3:].tolist()
        assert torch.equal(column[column > 0], full[column > 0])
    assert torch.equal(item_knn(users, items, 12, neighbours=99), whole)


def test_ease_solves_its_least_squares() -> None:
    """Column j of the answer is the ridge regression of item j on all other items."""
    users, items, binary = positives(50, 8)
    weights = ease(users, items, 8, ridge=5.0)
    for j in range(8):
        others = [i for i in range(8) if i != j]
        x = binary[:, others]
        solution = torch.linalg.solve(x.T @ x + 5 * torch.eye(7, dtype=torch.float64), x.T @ binary[:, j])
        torch.testing.assert_close(weights[others, j], solution)
        assert weights[j, j] == 0


def test_history_scores_sum_the_rows_of_distinct_items() -> None:
    weights = torch.arange(9.0).reshape(3, 3)
    scores = history_scores(weights, torch.tensor([2, 0, 2, 1]), torch.tensor([0, 3, 3, 4]))
    assert scores.tolist() == [[6, 8, 10], [0, 0, 0], [3, 4, 5]]


def test_smoothed_means_by_hand() -> None:
    users, items = torch.tensor([0, 0, 2]), torch.tensor([0, 1, 1])
    fitted = smoothed_means(users, items, torch.tensor([2.0, 0.0, 1.0]), smoothing=1.0)
    assert fitted.mean == 1
    torch.testing.assert_close(fitted.item_offset, torch.tensor([1 / 2, -1 / 3], dtype=torch.float64))
    torch.testing.assert_close(fitted.user_offset, torch.tensor([-1 / 18, 0, 1 / 6], dtype=torch.float64))
    scores = fitted.score(torch.tensor([0, 1, 2, 99]), torch.tensor([0, 1, 99, 99]))
    expected = [1 - 1 / 18 + 1 / 2, 1 - 1 / 3, 1 + 1 / 6, 1]
    torch.testing.assert_close(scores, torch.tensor(expected, dtype=torch.float64))


def test_smoothed_means_recover_additive_labels_on_a_full_table() -> None:
    users, items = (index.flatten() for index in torch.meshgrid(torch.arange(5), torch.arange(7), indexing="ij"))
    labels = users.double() ** 2 - 3 * items.double()
    scores = smoothed_means(users, items, labels, smoothing=1e-9).score(users, items)
    torch.testing.assert_close(scores, labels)
    flat = smoothed_means(users, items, labels, smoothing=1e12).score(users, items)
    torch.testing.assert_close(flat, labels.mean().expand(35))


def test_no_positives_score_zero() -> None:
    none = torch.zeros(0, dtype=torch.int64)
    assert popularity(none, none, 3).tolist() == [0, 0, 0]
    assert not item_knn(none, none, 3).any()
    assert not ease(none, none, 3).any()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: item_knn(USERS, ITEMS, 30_001), "at most 30,000 items"),
        (lambda: ease(USERS, ITEMS, 30_001), "at most 30,000 items"),
        (lambda: ease(USERS, ITEMS, 4, ridge=0.0), "ridge must be positive"),
        (lambda: popularity(USERS, ITEMS, 2), "items must lie in 0..1"),
        (lambda: popularity(USERS[1:], ITEMS, 4), "both be"),
        (lambda: history_scores(torch.eye(3), torch.tensor([3]), torch.tensor([0, 1])), "history must lie"),
        (lambda: history_scores(torch.eye(3), torch.tensor([2]), torch.tensor([0, 2])), "offsets must be"),
        (lambda: smoothed_means(USERS, ITEMS, ITEMS.float(), smoothing=0.0), "smoothing must be"),
        (lambda: smoothed_means(USERS, ITEMS, ITEMS * math.nan, smoothing=1.0), "labels must be finite"),
        (lambda: smoothed_means(USERS, -ITEMS, ITEMS.float(), smoothing=1.0), "none negative"),
    ],
)
def test_misuse_is_a_value_error(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
