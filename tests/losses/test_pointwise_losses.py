"""`binary` and `distillation` against loops, their identities and their edges."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from losses import LossTerm, binary, distillation


def oracle(s: Any, y: Any, w: Any, mask: Any) -> tuple[float, int]:
    units = [i for i in range(len(s)) if mask[i]]
    total = sum(w[i] * y[i] * np.logaddexp(0, -s[i]) + (1 - y[i]) * np.logaddexp(0, s[i]) for i in units)
    return float(total), len(units)


def gradient(term: LossTerm, x: Tensor) -> Tensor:
    return torch.autograd.grad(term.total.sum(), x, retain_graph=True)[0]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_binary_is_the_sum_over_units(ragged: Any, dtype: torch.dtype) -> None:
    s, w, mask = ragged.tensors("logits", "weight", "first")
    y = torch.rand(len(s), dtype=torch.float64)
    term = binary(s.to(dtype), y.to(dtype), positive_weight=w.to(dtype), mask=mask)
    total, count = oracle(ragged.logits, y.numpy(), ragged.weight, ragged.first)
    assert term.total.dtype == term.count.dtype == dtype
    assert_close(term.total.item(), total, rtol=1e-12 if dtype == torch.float64 else 1e-6, atol=0)
    assert term.count.item() == count


def test_binary_hand_computed() -> None:
    s, y = torch.zeros(4), torch.tensor([1, 0, 1, 0])
    assert_close(binary(s, y, positive_weight=3.0), LossTerm(torch.tensor(8 * math.log(2)), torch.tensor(4.0)))
    assert_close(binary(s, y.bool()), LossTerm(torch.tensor(4 * math.log(2)), torch.tensor(4.0)))


def test_binary_gradient_is_sigma_minus_label() -> None:
    s = torch.randn(9, dtype=torch.float64, requires_grad=True)
    y = torch.rand(9, dtype=torch.float64)
    assert_close(gradient(binary(s, y), s), (s.sigmoid() - y).detach())


def test_weighted_positives_make_the_odds_the_expected_weight() -> None:
    weight, y = torch.tensor([30.0, 90.0, 7.0, 7.0], dtype=torch.float64), torch.tensor([1, 1, 0, 0])
    s = torch.full((4,), math.log(60.0), dtype=torch.float64, requires_grad=True)  # (30 + 90) / 2 negatives
    assert_close(gradient(binary(s, y, positive_weight=weight), s).sum().item(), 0.0)


def test_log_loss_is_linear_in_the_label(ragged: Any) -> None:
    s, t = ragged.tensors("logits", "teacher")
    y = (t > 0).double()
    label = (y + t.sigmoid()) / 2
    mixed = binary(s, label).total
    assert_close(binary(s, y).total + distillation(s, t).total, 2 * mixed)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_distillation_is_log_loss_against_the_teachers_probability(ragged: Any, temperature: float) -> None:
    s, t, mask = ragged.tensors("logits", "teacher", "first")
    soft = 1 / (1 + np.exp(-ragged.teacher / temperature))
    total, count = oracle(ragged.logits / temperature, soft, np.ones_like(soft), ragged.first)
    term = distillation(s, t, temperature=temperature, mask=mask)
    assert_close((term.total.item(), term.count.item()), (total, float(count)))


def test_distillation_is_smallest_at_the_teacher_and_never_moves_it() -> None:
    t = torch.randn(5, requires_grad=True)
    s = t.detach().clone().requires_grad_()
    distillation(s, t).total.backward()
    assert_close(s.grad, torch.zeros(5), atol=1e-7, rtol=0)
    assert t.grad is None


def test_no_gradient_reaches_labels_and_weights() -> None:
    s, y, w = (torch.rand(5, requires_grad=True) for _ in range(3))
    binary(s, y, positive_weight=w).total.backward()
    assert s.grad is not None
    assert y.grad is None
    assert w.grad is None


def test_tasks_have_their_own_sums_and_one_mask_spreads(ragged: Any) -> None:
    s, t, mask = ragged.tensors("logits", "teacher", "first")
    logits, masks = torch.stack([s, t], 1), torch.stack([mask, ~mask], 1)
    for loss in (binary, distillation):
        for chosen in (mask, masks):
            term = loss(logits, t.sigmoid(), mask=chosen)
            assert term.total.shape == term.count.shape == (2,)
            for task in (0, 1):
                alone = loss(logits[:, task], t.sigmoid(), mask=chosen if chosen.dim() == 1 else chosen[:, task])
                assert_close((term.total[task], term.count[task]), tuple(alone))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_the_mask_hides_changes_nothing(bad: float) -> None:
    mask = torch.tensor([True, False, True, False])
    clean = torch.tensor([0.5, 0.2, 0.1, 0.9])
    dirty = clean.where(mask, bad)
    for loss in (
        lambda s, other: binary(s, other, positive_weight=other, mask=mask),
        lambda s, other: distillation(s, other, mask=mask),
    ):
        s = dirty.clone().requires_grad_()
        term = loss(s, dirty)
        assert_close(tuple(term), tuple(loss(clean, clean)))
        assert gradient(term, s)[mask].abs().min() > 0
        assert not gradient(term, s)[~mask].any()


@pytest.mark.parametrize("size", [1e4, 1e30])
@pytest.mark.parametrize("loss", [binary, distillation])
def test_extreme_logits_stay_finite(size: float, loss: Any) -> None:
    s = torch.tensor([size, -size, size, -size], requires_grad=True)
    term = loss(s, torch.tensor([1.0, 0.0, 0.0, 1.0]) if loss is binary else -s.detach())
    assert term.total.isfinite()
    assert gradient(term, s).isfinite().all()
    certain = torch.tensor([1.0, 0.0, 1.0, 0.0]) if loss is binary else s
    assert loss(s, certain).total == 0


@pytest.mark.parametrize("loss", [binary, distillation])
@pytest.mark.parametrize("shape", [(0,), (0, 3), (4,), (4, 3)])
def test_no_units_is_zero_and_tied_to_the_graph(loss: Any, shape: tuple[int, ...]) -> None:
    s = torch.randn(shape, requires_grad=True)
    term = loss(s, torch.full(shape, math.nan), mask=torch.zeros(shape, dtype=torch.bool))
    assert_close(tuple(term), (torch.zeros(shape[1:]), torch.zeros(shape[1:])))
    assert not gradient(term, s).any()


def test_ranks_add_up() -> None:
    s, y, mask = torch.randn(9, 2), torch.rand(9, 2), torch.rand(9, 2) < 0.5
    parts = [binary(s[part], y[part], mask=mask[part]) for part in (slice(0, 2), slice(2, 9))]
    assert_close(tuple(sum(x) for x in zip(*parts, strict=True)), tuple(binary(s, y, mask=mask)))


def test_positive_weight_takes_every_unambiguous_form() -> None:
    s, y = torch.randn(4, 3), torch.rand(4, 3)
    by_candidate, by_task = torch.rand(4), torch.rand(3)
    for given, full in (
        (2.0, torch.full((4, 3), 2.0)),
        (torch.tensor(2.0), torch.full((4, 3), 2.0)),
        (by_candidate, by_candidate.unsqueeze(1).expand(4, 3)),
        (by_task, by_task.expand(4, 3)),
        (by_task.unsqueeze(0), by_task.expand(4, 3)),
    ):
        assert_close(binary(s, y, positive_weight=given), binary(s, y, positive_weight=full))
    square, labels = s[:3], y[:3]  # as many candidates as tasks: one dimension means the candidates
    for given, full in ((by_task, by_task.unsqueeze(1).expand(3, 3)), (by_task.unsqueeze(0), by_task.expand(3, 3))):
        term = binary(square, labels, positive_weight=given)
        assert_close(term, binary(square, labels, positive_weight=full))
    with pytest.raises(ValueError, match=r"positive_weight has shape \[2\]"):
        binary(s, y, positive_weight=torch.ones(2))
    with pytest.raises(ValueError, match=r"positive_weight has shape \[1, 4\]"):
        binary(s[:, 0], y[:, 0], positive_weight=torch.ones(1, 4))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.float32])
def test_masks_of_0_and_1_may_have_any_dtype(ragged: Any, dtype: torch.dtype) -> None:
    s, t, mask = ragged.tensors("logits", "teacher", "first")
    for loss in (binary, distillation):
        assert_close(loss(s, t.sigmoid(), mask=mask.to(dtype)), loss(s, t.sigmoid(), mask=mask))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_certain_and_right_costs_nothing(dtype: torch.dtype) -> None:
    s = torch.tensor([-math.inf, math.inf], dtype=dtype, requires_grad=True)
    for term in (binary(s, torch.tensor([0, 1])), distillation(s, s.detach())):
        assert term.total == 0
        assert not gradient(term, s).any()
    assert binary(s, torch.tensor([1, 0])).total > 1e38
    assert binary(s.detach() * 0, torch.tensor([1, 0])).total.isnan()


def test_misuse_is_a_value_error() -> None:
    with pytest.raises(ValueError, match=r"labels has shape \[2\], expected \[3\]"):
        binary(torch.zeros(3), torch.zeros(2))
    with pytest.raises(ValueError, match="temperature"):
        distillation(torch.zeros(3), torch.zeros(3), temperature=0.0)
