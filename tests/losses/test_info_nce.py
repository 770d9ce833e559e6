"""InfoNCE between two views, against a loop in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from losses import info_nce


def by_hand(first: np.ndarray, second: np.ndarray, target: list[int], ids: list[int], temperature: float) -> float:
    def unit(x: np.ndarray) -> np.ndarray:
        size = np.linalg.norm(x, axis=1, keepdims=True)
        return x / np.where(size, size, 1)

    cosine, total = unit(first) @ unit(second).T / temperature, 0.0
    for m, own in enumerate(target):
        others = [p for p in range(len(second)) if p == own or ids[p] != ids[own]]
        total += np.log(np.exp(cosine[m, others]).sum()) - cosine[m, own]
    return total


@pytest.mark.parametrize("temperature", [0.1, 1.0])
def test_a_softmax_of_cosines_without_the_item_s_other_copies(temperature: float) -> None:
    draw = np.random.default_rng(0)
    first, second = draw.normal(size=(4, 3)), draw.normal(size=(6, 3))
    second[4] = 0
    target, ids = [0, 1, 3, 4], [7, 8, 7, 9, 5, 8]
    term = info_nce(
        *(torch.tensor(x) for x in (first, second)),
        torch.tensor(target),
        item_ids=torch.tensor(ids),
        temperature=temperature,
    )
    assert term.total.item() == pytest.approx(by_hand(first, second, target, ids, temperature), rel=1e-12)
    assert term.count == 4


def test_length_is_no_matter_and_both_views_learn() -> None:
    first, second = (torch.randn(5, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    term = info_nce(first, second, torch.arange(5))
    torch.testing.assert_close(info_nce(3 * first, second / 7, torch.arange(5)).total, term.total)
    term.total.backward()
    assert first.grad.count_nonzero() == second.grad.count_nonzero() == 15
    torch.testing.assert_close((first.grad * first).sum(1), torch.zeros(5, dtype=torch.float64), atol=1e-12, rtol=0)


def test_alike_views_and_no_views() -> None:
    same = torch.eye(4)
    assert info_nce(same, same, torch.arange(4), temperature=0.01).total < 1e-6
    none = torch.zeros(0, 3, requires_grad=True)
    term = info_nce(none, none, torch.zeros(0, dtype=torch.long))
    term.total.backward()
    assert (term.total, term.count) == (0, 0)
    with pytest.raises(ValueError, match="temperature is 0"):
        info_nce(same, same, torch.arange(4), temperature=0)
