"""`list_net` and `list_mle` against loops over requests, their identities and their edges."""

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from losses import LossTerm, list_mle, list_net


def net_oracle(s: Any, t: Any, offsets: Any) -> tuple[float, int]:
    total, units = 0.0, 0
    for start, end in itertools.pairwise(offsets):
        if end - start >= 2:
            x, p = s[start:end], np.exp(t[start:end])
            total -= p / p.sum() @ (x - np.logaddexp.reduce(x))
            units += 1
    return float(total), units


def mle_oracle(s: Any, t: Any, offsets: Any) -> tuple[float, int]:
    total, units = 0.0, 0
    for start, end in itertools.pairwise(offsets):
        if end - start >= 2:
            order = sorted(range(start, end), key=lambda i: -t[i])  # sorted is stable
            total += sum(np.logaddexp.reduce(s[order[k:]]) - s[i] for k, i in enumerate(order))
            units += 1
    return float(total), units


def gradient(term: LossTerm, x: Tensor) -> Tensor:
    return torch.autograd.grad(term.total.sum(), x, retain_graph=True)[0]


both = pytest.mark.parametrize(("loss", "oracle"), [(list_net, net_oracle), (list_mle, mle_oracle)])
each = pytest.mark.parametrize("loss", [list_net, list_mle])


@both
def test_value_and_gradient(loss: Any, oracle: Any, ragged: Any, numeric_gradient: Callable[..., Tensor]) -> None:
    s, t, offsets = ragged.tensors("logits", "teacher", "offsets")
    s.requires_grad_()
    term = loss(s, t, offsets)
    total, count = oracle(ragged.logits, ragged.teacher, ragged.offsets)
    assert count == 4
    assert_close(term.total.item(), total, rtol=1e-12, atol=0)
    assert term.count.item() == count
    expected = numeric_gradient(lambda x: oracle(x, ragged.teacher, ragged.offsets)[0], ragged.logits)
    assert_close(gradient(term, s), expected, rtol=1e-6, atol=1e-6)
    single = loss(s.float(), t.float(), offsets)
    assert single.total.dtype == single.count.dtype == torch.float32
    assert_close(single.total.item(), total, rtol=1e-5, atol=0)


def test_list_mle_hand_computed_with_a_tie_in_given_order() -> None:
    s = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    term = list_mle(s, torch.tensor([0.0, 5.0, 5.0]), torch.tensor([0, 3]))  # order 1, 2, 0
    expected = math.log(sum(map(math.exp, (1, 2, 3)))) - 2 + math.log(math.exp(3) + math.exp(1)) - 3
    assert_close(term.total.item(), expected)


def test_list_net_is_smallest_at_the_teacher(ragged: Any) -> None:
    t, offsets = ragged.tensors("teacher", "offsets")
    s = (t + 3.0).requires_grad_()  # a shift of all logits changes nothing
    assert_close(gradient(list_net(s, t, offsets), s), torch.zeros_like(t), atol=1e-12, rtol=0)


def test_pairs_of_two_are_logistic() -> None:
    s, offsets = torch.tensor([0.3, 1.5]), torch.tensor([0, 2])
    assert_close(list_mle(s, torch.tensor([1.0, 0.0]), offsets).total.item(), float(np.logaddexp(0, 1.2)))


@each
def test_offsets_may_be_int32(loss: Any, ragged: Any) -> None:
    s, t, offsets = ragged.tensors("logits", "teacher", "offsets")
    assert_close(tuple(loss(s, t, offsets.int())), tuple(loss(s, t, offsets)))


@each
def test_no_gradient_reaches_the_teacher(loss: Any, ragged: Any) -> None:
    s, t, offsets = ragged.tensors("logits", "teacher", "offsets")
    loss(s.requires_grad_(), t.requires_grad_(), offsets).total.backward()
    assert s.grad.abs().sum() > 0
    assert t.grad is None


@each
def test_tasks_are_independent(loss: Any, ragged: Any) -> None:
    s, t, offsets = ragged.tensors("logits", "teacher", "offsets")
    logits = torch.stack([s, t], 1).requires_grad_()
    term = loss(logits, t, offsets)
    for task in (0, 1):
        one = logits.detach()[:, task].clone().requires_grad_()
        alone = loss(one, t, offsets)
        assert_close((term.total[task], term.count[task]), tuple(alone))
        assert_close(gradient(term, logits)[:, task], gradient(alone, one))


@each
@pytest.mark.parametrize("size", [1e4, 1e30])
def test_extreme_logits_stay_finite(loss: Any, size: float) -> None:
    s = torch.tensor([size, -size, 0.0, size, -size], requires_grad=True)
    for t in (s.detach(), -s.detach(), torch.zeros(5)):
        term = loss(s, t, torch.tensor([0, 5]))
        assert term.total.isfinite()
        assert gradient(term, s).isfinite().all()
        assert gradient(term, s).abs().max() <= 5


def test_list_mle_of_large_float32_logits_does_not_cancel() -> None:
    s = (torch.randn(50) + 1e5).requires_grad_()
    t, offsets = torch.randn(50), torch.tensor([0, 50])
    exact = (s.detach().double() - 1e5).requires_grad_()  # a shift of all logits changes nothing
    term, expected = list_mle(s, t, offsets), list_mle(exact, t, offsets)
    assert_close(term.total.double(), expected.total, rtol=1e-6, atol=0)
    assert_close(gradient(term, s).double(), gradient(expected, exact), rtol=1e-5, atol=1e-5)


@each
@pytest.mark.parametrize("lengths", [[], [0, 0], [1, 0, 1]])
@pytest.mark.parametrize("tasks", [(), (2,)])
def test_no_units_is_zero_and_tied_to_the_graph(loss: Any, lengths: list[int], tasks: tuple[int, ...]) -> None:
    offsets = torch.tensor([0, *np.cumsum(lengths)]).long()
    s = torch.full((sum(lengths), *tasks), math.nan, requires_grad=True)
    term = loss(s, s.detach(), offsets)
    assert_close(tuple(term), (torch.zeros(tasks), torch.zeros(tasks)))
    assert not gradient(term, s).any()


@each
def test_order_within_a_request_and_split_over_ranks_do_not_matter(loss: Any, ragged: Any) -> None:
    s, offsets = ragged.tensors("logits", "offsets")
    t = torch.randn_like(s)  # without ties, which list_mle takes in their given order
    whole = loss(s, t, offsets)
    spans = itertools.pairwise(ragged.offsets)
    order = np.concatenate([np.random.default_rng(0).permutation(np.arange(a, b)) for a, b in spans])
    assert_close(tuple(loss(s[order], t[order], offsets)), tuple(whole))
    n = int(offsets[4])
    left, right = loss(s[:n], t[:n], offsets[:5]), loss(s[n:], t[n:], offsets[4:] - n)
    assert_close((left.total + right.total, left.count + right.count), tuple(whole))


@pytest.mark.parametrize("size", [1e30, -1e30])
def test_list_mle_of_equal_huge_logits(size: float) -> None:
    s = torch.full((2,), size, requires_grad=True)
    term = list_mle(s, torch.zeros(2), torch.tensor([0, 2]))
    assert_close(term.total.item(), math.log(2))
    assert_close(gradient(term, s), torch.tensor([-0.5, 0.5]))


def test_list_mle_of_small_logits_behind_a_huge_one() -> None:
    offsets, t = torch.tensor([0, 5]), torch.tensor([5.0, 4.0, 3.0, 2.0, 1.0])
    s = torch.tensor([1e30, 5.0, 5.5, -1e4, 2.0], requires_grad=True)
    rest = s.detach()[1:].double().requires_grad_()  # the first one is as good as sure
    term, expected = list_mle(s, t, offsets), list_mle(rest, t[1:], torch.tensor([0, 4]))
    assert_close(term.total.double(), expected.total, rtol=1e-6, atol=0)
    assert_close(gradient(term, s), torch.cat([torch.zeros(1), gradient(expected, rest).float()]))
    late = list_mle(s, -t, offsets)  # in its way now
    assert_close(late.total.item(), 4e30, rtol=1e-6, atol=0)
    assert_close(gradient(late, s), torch.tensor([4.0, -1.0, -1.0, -1.0, -1.0]))


@each
def test_an_integer_teacher_is_its_numbers(loss: Any, ragged: Any) -> None:
    s, t, offsets = ragged.tensors("logits", "priority", "offsets")
    assert_close(tuple(loss(s, t, offsets)), tuple(loss(s, t.double(), offsets)))


def test_list_mle_has_no_second_derivative_and_list_net_has_its_own(ragged: Any) -> None:
    s, t, offsets = ragged.tensors("logits", "teacher", "offsets")
    s.requires_grad_()
    slope = torch.autograd.grad(list_mle(s, t, offsets).total, s, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="second derivative"):
        torch.autograd.grad((slope + s).sum(), s)  # beside another term, too
    assert torch.autograd.gradgradcheck(lambda x: list_net(x, t, offsets).total, s)


def test_misuse_is_a_value_error() -> None:
    with pytest.raises(ValueError, match="teacher has shape"):
        list_net(torch.zeros(3), torch.zeros(2), torch.tensor([0, 3]))
    with pytest.raises(ValueError, match="offsets"):
        list_mle(torch.zeros(3), torch.zeros(3), torch.tensor([1, 3]))
    for offsets in ([], [0, 2, 1, 3], [0, 3, 2], [[0, 3]]):
        with pytest.raises(ValueError, match=r"offsets must be \[R \+ 1\] and rise from 0 to the 3"):
            list_net(torch.zeros(3), torch.zeros(3), torch.tensor(offsets, dtype=torch.long))
    with pytest.raises(ValueError, match="offsets must be"):
        list_net(torch.zeros(0), torch.zeros(0), torch.zeros(0, dtype=torch.long))
