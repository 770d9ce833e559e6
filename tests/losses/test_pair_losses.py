"""`pairwise` and `soft_pairwise` against loops over pairs, their identities and their edges."""

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from losses import LossTerm, adaptive_contrastive, pairwise, soft_pairwise
from losses.blocks import block_cells


def softplus(x: float) -> float:
    return float(np.logaddexp(0, x))


def pairwise_oracle(s: Any, p: Any, offsets: Any, win: Any, lose: Any, w: Any) -> tuple[float, int]:
    total, pairs = 0.0, 0
    for start, end in itertools.pairwise(offsets):
        for i in range(start, end):
            for j in range(start, end):
                if win[i] and lose[j] and p[i] > p[j]:
                    total, pairs = total + w[i] * softplus(s[j] - s[i]), pairs + 1
    return total, pairs


def soft_oracle(s: Any, t: Any, offsets: Any, mask: Any) -> tuple[float, int]:
    total, pairs = 0.0, 0
    for start, end in itertools.pairwise(offsets):
        for i in range(start, end):
            for j in range(i + 1, end):
                if mask[i] and mask[j]:
                    x, label = s[i] - s[j], 1 / (1 + np.exp(t[j] - t[i]))
                    total, pairs = total + label * softplus(-x) + (1 - label) * softplus(x), pairs + 1
    return total, pairs


class LargestTensor(TorchDispatchMode):
    """Notes the size of the largest tensor that any operation makes."""

    size = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.size = max(self.size, *(x.numel() for x in tree_leaves(out) if isinstance(x, Tensor)), 0)
        return out


def gradient(term: LossTerm, x: Tensor) -> Tensor:
    return torch.autograd.grad(term.total.sum(), x, retain_graph=True)[0]


def test_pairwise_is_the_sum_over_pairs(ragged: Any, numeric_gradient: Callable[..., Tensor]) -> None:
    s, p, offsets, win, lose, w = ragged.tensors("logits", "priority", "offsets", "first", "second", "weight")
    s.requires_grad_()
    term = pairwise(s, p, offsets, winner=win, loser=lose, weight=w)
    arguments = (ragged.priority, ragged.offsets, ragged.first, ragged.second, ragged.weight)
    total, count = pairwise_oracle(ragged.logits, *arguments)
    assert count > 5
    assert_close(term.total.item(), total, rtol=1e-12, atol=0)
    assert term.count.item() == count
    expected = numeric_gradient(lambda x: pairwise_oracle(x, *arguments)[0], ragged.logits)
    assert_close(gradient(term, s), expected, rtol=1e-6, atol=1e-6)


def test_pairwise_without_masks_takes_every_pair(ragged: Any) -> None:
    s, p, offsets = ragged.tensors("logits", "priority", "offsets")
    term = pairwise(s.float(), p, offsets)
    ones = np.ones_like(ragged.logits)
    total, count = pairwise_oracle(ragged.logits, ragged.priority, ragged.offsets, ones, ones, ones)
    assert term.total.dtype == term.count.dtype == torch.float32
    assert_close(term.total.item(), total, rtol=1e-5, atol=0)
    assert term.count.item() == count


def test_soft_pairwise_is_the_sum_over_unordered_pairs(ragged: Any, numeric_gradient: Callable[..., Tensor]) -> None:
    s, t, offsets, mask = ragged.tensors("logits", "teacher", "offsets", "second")
    s.requires_grad_()
    term = soft_pairwise(s, t, offsets, mask=mask)
    arguments = (ragged.teacher, ragged.offsets, ragged.second)
    total, count = soft_oracle(ragged.logits, *arguments)
    assert_close(term.total.item(), total, rtol=1e-12, atol=0)
    assert term.count.item() == count
    expected = numeric_gradient(lambda x: soft_oracle(x, *arguments)[0], ragged.logits)
    assert_close(gradient(term, s), expected, rtol=1e-6, atol=1e-6)


def test_pairwise_of_one_positive_against_random_losers_is_bpr() -> None:
    s = torch.tensor([0.3, -1.0, 2.0, 0.5], dtype=torch.float64)
    random = torch.tensor([False, True, True, True])
    term = pairwise(s, torch.tensor([6, 0, 0, 0]), torch.tensor([0, 4]), loser=random)
    assert_close(term.total, -logsigmoid(s[0] - s[1:]).sum())
    assert term.count == 3


def test_pairs_hand_computed() -> None:
    s, offsets = torch.zeros(3), torch.tensor([0, 3])
    term = pairwise(s, torch.tensor([5.0, 5.0, 1.0]), offsets, weight=torch.tensor([1.0, 3.0, 7.0]))
    assert_close(term, LossTerm(torch.tensor(4 * math.log(2)), torch.tensor(2.0)))
    term = soft_pairwise(s, torch.tensor([1.0, 2.0, 3.0]), offsets)
    assert_close(term, LossTerm(torch.tensor(3 * math.log(2)), torch.tensor(3.0)))


def test_tasks_are_independent_and_masks_spread_over_them(ragged: Any) -> None:
    s, t, p, offsets, win, lose = ragged.tensors("logits", "teacher", "priority", "offsets", "first", "second")
    logits, winner = torch.stack([s, t], 1), torch.stack([win, lose], 1)
    both = pairwise(logits, p, offsets, winner=winner, loser=lose, weight=s.exp())
    for task in (0, 1):
        alone = pairwise(logits[:, task], p, offsets, winner=winner[:, task], loser=lose, weight=s.exp())
        assert_close((both.total[task], both.count[task]), tuple(alone))
    both = soft_pairwise(logits, t, offsets, mask=winner)
    for task in (0, 1):
        alone = soft_pairwise(logits[:, task], t, offsets, mask=winner[:, task])
        assert_close((both.total[task], both.count[task]), tuple(alone))


def test_gradient_of_a_task_stays_in_its_column(ragged: Any) -> None:
    s, t, p, offsets = ragged.tensors("logits", "teacher", "priority", "offsets")
    logits = torch.stack([s, t], 1).requires_grad_()
    first, second = torch.autograd.grad(pairwise(logits, p, offsets).total[1], logits)[0].unbind(1)
    alone = t.clone().requires_grad_()
    assert not first.any()
    assert_close(second, gradient(pairwise(alone, p, offsets), alone))


def test_no_gradient_reaches_the_teacher(ragged: Any) -> None:
    s, t, offsets = ragged.tensors("logits", "teacher", "offsets")
    soft_pairwise(s.requires_grad_(), t.requires_grad_(), offsets).total.backward()
    assert s.grad.abs().sum() > 0
    assert t.grad is None


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_who_is_in_no_pair_may_be_anything(ragged: Any, bad: float) -> None:
    s, t, p, offsets, win, lose = ragged.tensors("logits", "teacher", "priority", "offsets", "first", "second")

    def check(loss: Callable[[Tensor, Tensor], LossTerm], used: Tensor) -> None:
        dirty = s.where(used, bad).requires_grad_()
        term = loss(dirty, t.where(used, bad))
        assert_close(tuple(term), tuple(loss(s, t)))
        assert gradient(term, dirty).isfinite().all()

    check(lambda x, weight: pairwise(x, p, offsets, winner=win, loser=lose, weight=weight), win | lose)
    check(lambda x, teacher: soft_pairwise(x, teacher, offsets, mask=win), win)


def test_a_nan_priority_makes_no_pair_and_hides_none() -> None:
    s, p = torch.tensor([0.0, 1.0, 0.0]), torch.tensor([math.nan, 0.0, 1.0])
    assert_close(pairwise(s, p, torch.tensor([0, 3])), LossTerm(torch.tensor(softplus(1.0)), torch.tensor(1.0)))


def test_a_nan_that_beats_nobody_does_not_spread() -> None:
    s = torch.tensor([math.nan, 1.0, 0.0], requires_grad=True)
    term = pairwise(s, torch.tensor([0, 0, 1]), torch.tensor([0, 1, 3]))
    assert_close(term.total.item(), softplus(1.0))
    assert_close(gradient(term, s)[0].item(), 0.0)


@pytest.mark.parametrize("size", [1e4, 1e30])
def test_extreme_logits_stay_finite(size: float) -> None:
    s = torch.tensor([size, -size, 0.0, size], requires_grad=True)
    offsets = torch.tensor([0, 4])
    for term in (pairwise(s, torch.tensor([0, 1, 2, 3]), offsets), soft_pairwise(s, -s.detach(), offsets)):
        assert term.total.isfinite()
        assert gradient(term, s).isfinite().all()
    assert_close(soft_pairwise(s, s.detach(), offsets).total.item(), math.log(2))  # only the tie is in doubt


@pytest.mark.parametrize("lengths", [[], [0], [0, 0], [1, 1]])
@pytest.mark.parametrize("tasks", [(), (3,)])
def test_no_pairs_is_zero_and_tied_to_the_graph(lengths: list[int], tasks: tuple[int, ...]) -> None:
    offsets = torch.tensor([0, *np.cumsum(lengths)]).long()
    s = torch.randn(sum(lengths), *tasks, requires_grad=True)
    for term in (pairwise(s, s.detach(), offsets), soft_pairwise(s, s.detach(), offsets)):
        assert_close(tuple(term), (torch.zeros(tasks), torch.zeros(tasks)))
        assert not gradient(term, s).any()


def test_order_within_a_request_and_split_over_ranks_do_not_matter(ragged: Any) -> None:
    s, t, p, offsets, win = ragged.tensors("logits", "teacher", "priority", "offsets", "first")
    spans = itertools.pairwise(ragged.offsets)
    order = np.concatenate([np.random.default_rng(0).permutation(np.arange(a, b)) for a, b in spans])
    whole = pairwise(s, p, offsets, winner=win)
    assert_close(tuple(pairwise(s[order], p[order], offsets, winner=win[order])), tuple(whole))
    assert_close(tuple(soft_pairwise(s[order], t[order], offsets)), tuple(soft_pairwise(s, t, offsets)))
    n = int(offsets[4])
    left = pairwise(s[:n], p[:n], offsets[:5], winner=win[:n])
    right = pairwise(s[n:], p[n:], offsets[4:] - n, winner=win[n:])
    assert_close((left.total + right.total, left.count + right.count), tuple(whole))


def test_blocks_of_any_size_give_the_same(ragged: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    s, t, p, offsets = ragged.tensors("logits", "teacher", "priority", "offsets")
    whole = pairwise(s, p, offsets), soft_pairwise(s, t, offsets)
    monkeypatch.setattr("losses.blocks.block_cells", lambda device: 1)
    assert_close((pairwise(s, p, offsets), soft_pairwise(s, t, offsets)), whole)


def test_no_tensor_is_larger_than_a_block() -> None:
    offsets = torch.arange(0, 65 * 200, 200)  # 64 x 200 x 200 pairs, 10 times a block
    s = torch.randn(64 * 200, requires_grad=True)
    for loss in (
        lambda: pairwise(s, s.detach(), offsets),
        lambda: soft_pairwise(s, s.detach(), offsets),
        lambda: adaptive_contrastive(s, s < 0, s > 0, torch.randn(len(s), 8), offsets),
    ):
        with LargestTensor() as largest:
            loss().total.backward()
        assert 200**2 <= largest.size <= block_cells(s.device) + 200**2


def test_gradient_under_bf16_autocast_is_in_float32(ragged: Any) -> None:
    s, p, offsets = ragged.tensors("logits", "priority", "offsets")
    plain, mixed = (s.float().requires_grad_() for _ in range(2))
    weight = torch.rand(len(s))
    expected = gradient(pairwise(plain, p, offsets, weight=weight), plain)
    with torch.autocast("cpu", torch.bfloat16):
        term = pairwise(mixed, p, offsets, weight=weight)
    assert term.total.dtype == torch.float32
    assert torch.equal(gradient(term, mixed), expected)


def test_offsets_may_be_int32_and_priorities_bool(ragged: Any) -> None:
    s, t, p, offsets = ragged.tensors("logits", "teacher", "priority", "offsets")
    for logits in (s, torch.stack([s, t], 1)):
        term = pairwise(logits, p > 1, offsets.int())
        assert_close(tuple(term), tuple(pairwise(logits, (p > 1).double(), offsets)))


def test_bf16_logits_are_upcast() -> None:
    s = torch.tensor([1.0, 0.0], dtype=torch.bfloat16, requires_grad=True)
    term = pairwise(s, torch.tensor([1, 0]), torch.tensor([0, 2]))
    assert_close(term.total.item(), softplus(-1.0))
    assert gradient(term, s).dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.float32])
def test_masks_of_0_and_1_may_have_any_dtype(ragged: Any, dtype: torch.dtype) -> None:
    s, t, p, offsets, win, lose = ragged.tensors("logits", "teacher", "priority", "offsets", "first", "second")
    term = pairwise(s, p, offsets, winner=win.to(dtype), loser=lose.to(dtype))
    assert_close(tuple(term), tuple(pairwise(s, p, offsets, winner=win, loser=lose)))
    assert_close(soft_pairwise(s, t, offsets, mask=win.to(dtype)), soft_pairwise(s, t, offsets, mask=win))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.int32, torch.bfloat16])
def test_priorities_may_have_any_dtype(ragged: Any, dtype: torch.dtype) -> None:
    s, t, p, offsets = ragged.tensors("logits", "teacher", "priority", "offsets")
    for logits in (s, torch.stack([s, t], 1)):
        assert_close(pairwise(logits, p.to(dtype), offsets), pairwise(logits, p, offsets))


@pytest.mark.parametrize("weight", [2.5, torch.tensor(2.5)])
def test_one_weight_for_all_pairs(ragged: Any, weight: Tensor | float) -> None:
    s, p, offsets = ragged.tensors("logits", "priority", "offsets")
    term, plain = pairwise(s, p, offsets, weight=weight), pairwise(s, p, offsets)
    assert_close(tuple(term), (2.5 * plain.total, plain.count))


def test_one_winner_costs_one_row_without_being_named() -> None:
    s, offsets = torch.randn(8000), torch.tensor([0, 8000])
    p = torch.zeros(8000).index_fill(0, torch.tensor([17]), 1.0)
    with LargestTensor() as largest:
        term = pairwise(s, p, offsets)
    assert largest.size <= 3 * 8001
    assert_close(tuple(term), tuple(pairwise(s, p, offsets, winner=p > 0, loser=p == 0)))
    assert term.count == 7999


def test_a_second_derivative_is_an_error(ragged: Any) -> None:
    s, t, p, offsets = ragged.tensors("logits", "teacher", "priority", "offsets")
    s.requires_grad_()
    for term in (
        pairwise(s, p, offsets),
        soft_pairwise(s, t, offsets),
        adaptive_contrastive(s, p > 1, p < 2, t.unsqueeze(1), offsets),
        pairwise(torch.stack([s, -s], 1), p, offsets),
    ):
        slope = torch.autograd.grad(term.total.sum(), s, create_graph=True)[0]
        assert slope.any()
        with pytest.raises(RuntimeError, match="second derivative"):
            torch.autograd.grad((slope + s).sum(), s)  # beside another term, too


def test_misuse_is_a_value_error() -> None:
    s, offsets = torch.zeros(3), torch.tensor([0, 3])
    with pytest.raises(ValueError, match="priority has shape"):
        pairwise(s, torch.zeros(2), offsets)
    with pytest.raises(ValueError, match="offsets"):
        pairwise(s, s, torch.tensor([0, 2]))
    with pytest.raises(ValueError, match="logits have shape"):
        soft_pairwise(torch.zeros(3, 2, 2), s, offsets)
