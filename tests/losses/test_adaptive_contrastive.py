"""`adaptive_contrastive` against loops over positives and negatives, its identities and its edges."""

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.testing import assert_close

from losses import LossTerm, adaptive_contrastive, multi_class


def parts(s: Any, x: Any, i: int, negatives: list[int]) -> tuple[Any, Any]:
    """Similarity and confidence of positive i's negatives."""
    cosines = []
    for z in negatives:
        norm = np.linalg.norm(x[i]) * np.linalg.norm(x[z])
        cosines.append(x[i] @ x[z] / norm if norm > 0 else 0.0)
    similarity = np.exp(cosines) / np.exp(cosines).sum()
    return similarity, np.array([1 / (1 + np.exp(-s[z])) for z in negatives])


def oracle(
    s: Any, positive: Any, negative: Any, x: Any, offsets: Any, tau: float, delta: float, fixed: Any = None
) -> tuple[float, int]:
    """`fixed`: the logits that weights are made from, so that differences see detached weights."""
    total, units = 0.0, 0
    for start, end in itertools.pairwise(offsets):
        for i in range(start, end):
            negatives = [z for z in range(start, end) if negative[z] and z != i]
            if positive[i] and negatives:
                weight = delta * sum(parts(s if fixed is None else fixed, x, i, negatives))
                rest = np.log(weight) + s[negatives] / tau
                total += np.logaddexp.reduce([*rest, s[i] / tau]) - s[i] / tau
                units += 1
    return float(total), units


def gradient(term: LossTerm, x: Tensor) -> Tensor:
    return torch.autograd.grad(term.total.sum(), x, retain_graph=True)[0]


FIELDS = ("logits", "first", "second", "features", "offsets")


@pytest.mark.parametrize(("tau", "delta"), [(1.0, 1.0), (0.2, 3.0)])
@pytest.mark.parametrize("disjoint", [True, False])
def test_value_and_gradient(
    ragged: Any, tau: float, delta: float, disjoint: bool, numeric_gradient: Callable[..., Tensor]
) -> None:
    ragged = ragged._replace(second=ragged.second & ~(ragged.first & disjoint))
    s, *rest = ragged.tensors(*FIELDS)
    s.requires_grad_()
    term = adaptive_contrastive(s, *rest, temperature=tau, delta=delta)
    arguments = (ragged.first, ragged.second, ragged.features, ragged.offsets, tau, delta)
    total, count = oracle(ragged.logits, *arguments)
    assert count > 3
    assert_close(term.total.item(), total, rtol=1e-12, atol=0)
    assert term.count.item() == count
    expected = numeric_gradient(lambda x: oracle(x, *arguments, ragged.logits)[0], ragged.logits)
    assert_close(gradient(term, s), expected, rtol=1e-6, atol=1e-6)
    single = adaptive_contrastive(s.float(), *rest, temperature=tau, delta=delta)
    assert single.total.dtype == torch.float32
    assert_close(single.total.item(), total, rtol=1e-5, atol=0)


def test_fixed_weights_over_all_others_are_multi_class_on_the_request(ragged: Any) -> None:
    s, positive, offsets = ragged.tensors("logits", "first", "offsets")
    everyone = torch.ones_like(positive)
    term = adaptive_contrastive(s, positive, everyone, s, offsets, adaptive=False)
    total = torch.tensor(0.0, dtype=torch.float64)
    for start, end in itertools.pairwise(offsets.tolist()):
        target = positive[start:end].nonzero().squeeze(1)
        if end - start >= 2:
            total += multi_class(s[start:end].expand(len(target), -1), target).total
    assert_close(term.total, total)


def test_one_positive_beside_its_negatives_is_cross_entropy() -> None:
    s = torch.tensor([0.5, -1.0, 2.0])
    one = torch.tensor([False, True, False])
    term = adaptive_contrastive(s, one, ~one, s, torch.tensor([0, 3]), temperature=0.5, adaptive=False)
    assert_close(tuple(term), (cross_entropy(s / 0.5, torch.tensor(1)), torch.tensor(1.0)))


def test_hand_computed_weights() -> None:
    features = torch.tensor([[2.0, 0.0], [5.0, 0.0], [0.0, 0.0]])
    one = torch.tensor([True, False, False])
    term, weights = adaptive_contrastive(
        torch.zeros(3), one, ~one, features, torch.tensor([0, 3]), delta=2.0, return_weights=True
    )
    near = math.e / (math.e + 1)
    assert_close(weights.similarity, torch.tensor([near, 1 - near]))
    assert_close(weights.confidence, torch.tensor([0.5, 0.5]))
    assert_close(term.total.item(), math.log(1 + 2 * (near + 0.5) + 2 * (1 - near + 0.5)))


def test_returned_weights_are_those_of_every_pair(ragged: Any) -> None:
    s, *rest = ragged.tensors(*FIELDS)
    term, weights = adaptive_contrastive(s, *rest, return_weights=True)
    expected = []
    for start, end in itertools.pairwise(ragged.offsets):
        for i in np.arange(start, end)[ragged.first[start:end]]:
            negatives = [z for z in range(start, end) if ragged.second[z] and z != i]
            if negatives:
                similarity, confidence = parts(ragged.logits, ragged.features, i, negatives)
                expected += [(0, i, *x) for x in zip(negatives, similarity, confidence, strict=True)]
    assert_close(torch.stack([x.double() for x in weights], 1), torch.tensor(np.array(expected)))
    assert_close(tuple(term), tuple(adaptive_contrastive(s, *rest)))


@pytest.mark.parametrize("per_task", [True, False])
def test_tasks_are_independent(ragged: Any, per_task: bool) -> None:
    s, t, first, second, x, offsets = ragged.tensors("logits", "teacher", *FIELDS[1:])
    logits, positive = torch.stack([s, t], 1).requires_grad_(), torch.stack([first, ~first], 1)
    features = torch.stack([x, x.flip(1) ** 2], 1) if per_task else x
    term, weights = adaptive_contrastive(logits, positive, second, features, offsets, return_weights=True)
    for task in (0, 1):
        one = logits.detach()[:, task].clone().requires_grad_()
        alone, its = adaptive_contrastive(
            one, positive[:, task], second, features[:, task] if per_task else x, offsets, return_weights=True
        )
        assert_close((term.total[task], term.count[task]), tuple(alone))
        assert_close(gradient(term, logits)[:, task], gradient(alone, one))
        mine = weights.task == task
        assert_close(tuple(part[mine] for part in weights[1:]), tuple(its[1:]))


def test_the_weights_carry_no_gradient(ragged: Any) -> None:
    s, first, second, x, offsets = ragged.tensors(*FIELDS)
    second &= ~first
    adaptive_contrastive(s.requires_grad_(), first, second, x.requires_grad_(), offsets).total.backward()
    assert x.grad is None
    _, weights = adaptive_contrastive(s, first, second, x, offsets, return_weights=True)
    assert not any(part.requires_grad for part in weights)
    # A negative is pushed by its softmax share alone: shares of a request's negatives sum to what its
    # positives gain, which the path through sigma(s_z) would break.
    assert_close(s.grad.sum().item(), 0.0, atol=1e-12, rtol=0)


def test_who_is_not_selected_may_be_nan(ragged: Any) -> None:
    s, first, second, x, offsets = ragged.tensors(*FIELDS)
    used = first | second
    dirty = s.where(used, math.nan).requires_grad_()
    term = adaptive_contrastive(dirty, first, second, x.where(used.unsqueeze(1), math.nan), offsets)
    assert_close(tuple(term), tuple(adaptive_contrastive(s, first, second, x, offsets)))
    assert gradient(term, dirty).isfinite().all()


@pytest.mark.parametrize("adaptive", [True, False])
@pytest.mark.parametrize("size", [1e4, 1e30])
def test_extremes_stay_finite(size: float, adaptive: bool) -> None:
    s = torch.tensor([size, -size, 0.0, size, -size], requires_grad=True)
    x = torch.tensor([[size, 0.0], [1 / size, 0.0], [0.0, 0.0], [-size, size], [1.0, 1.0]])
    positive = torch.tensor([True, True, True, False, False])
    term = adaptive_contrastive(s, positive, ~positive, x, torch.tensor([0, 5]), adaptive=adaptive)
    assert term.total.isfinite()
    assert gradient(term, s).isfinite().all()


def test_cosines_do_not_depend_on_the_length_of_vectors() -> None:
    x, one = torch.randn(4, 3), torch.tensor([True, False, False, False])
    s, offsets = torch.randn(4), torch.tensor([0, 4])
    scale = torch.tensor([[1e30], [1e-30], [1.0], [1e-38]])
    plain, scaled = (adaptive_contrastive(s, one, ~one, y, offsets) for y in (x, x * scale))
    assert_close(tuple(scaled), tuple(plain), rtol=1e-5, atol=0)


@pytest.mark.parametrize("tasks", [(), (2,)])
@pytest.mark.parametrize(
    ("lengths", "positive", "negative"),
    [([], 1, 1), ([0, 0], 1, 1), ([1, 1], 1, 1), ([3, 2], 1, 0), ([3, 2], 0, 1)],
)
def test_no_units_is_zero_and_tied_to_the_graph(
    tasks: tuple[int, ...], lengths: list[int], positive: int, negative: int
) -> None:
    offsets = torch.tensor([0, *np.cumsum(lengths)]).long()
    s = torch.randn(sum(lengths), *tasks, requires_grad=True)
    first, second = (torch.full((len(s),), bool(x)) for x in (positive, negative))
    x = torch.randn(len(s), 3)
    term, weights = adaptive_contrastive(s, first, second, x, offsets, return_weights=True)
    assert_close(tuple(term), (torch.zeros(tasks), torch.zeros(tasks)))
    assert not gradient(term, s).any()
    assert all(len(part) == 0 for part in weights)


def test_order_split_and_block_size_do_not_matter(ragged: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    s, first, second, x, offsets = ragged.tensors(*FIELDS)
    whole = adaptive_contrastive(s, first, second, x, offsets)
    spans = itertools.pairwise(ragged.offsets)
    order = np.concatenate([np.random.default_rng(0).permutation(np.arange(a, b)) for a, b in spans])
    assert_close(tuple(adaptive_contrastive(s[order], first[order], second[order], x[order], offsets)), tuple(whole))
    n = int(offsets[4])
    left = adaptive_contrastive(s[:n], first[:n], second[:n], x[:n], offsets[:5])
    right = adaptive_contrastive(s[n:], first[n:], second[n:], x[n:], offsets[4:] - n)
    assert_close((left.total + right.total, left.count + right.count), tuple(whole))
    monkeypatch.setattr("losses.blocks.block_cells", lambda device: 1)
    assert_close(tuple(adaptive_contrastive(s, first, second, x, offsets)), tuple(whole))


@pytest.mark.parametrize("size", [-1e4, 1e4, 1e8, -1e30])
def test_in_float32_large_logits_do_not_round_the_weights_away(size: float) -> None:
    s = torch.full((3,), size, requires_grad=True)
    one = torch.tensor([True, False, False])
    term = adaptive_contrastive(s, one, ~one, torch.ones(3, 2), torch.tensor([0, 3]))
    rest = 1.0 + (2.0 if size > 0 else 0.0)  # similarities 1/2 and 1/2, and the sigmoids
    assert_close(term.total.item(), math.log(1 + rest), rtol=1e-6, atol=0)
    expected = torch.tensor([-rest, rest / 2, rest / 2]) / (1 + rest)
    assert_close(gradient(term, s), expected)


def test_returned_fixed_weights_have_similarity_0_and_confidence_1(ragged: Any) -> None:
    s, *rest = ragged.tensors(*FIELDS)
    term, fixed = adaptive_contrastive(s, *rest, delta=0.5, adaptive=False, return_weights=True)
    _, adaptive = adaptive_contrastive(s, *rest, return_weights=True)
    assert_close(fixed[:3], adaptive[:3])
    assert len(fixed.positive) > 5
    assert_close(fixed[3:], (torch.zeros_like(adaptive.similarity), torch.ones_like(adaptive.confidence)))
    assert_close(tuple(term), tuple(adaptive_contrastive(s, *rest, delta=0.5, adaptive=False)))


@pytest.mark.parametrize("adaptive", [True, False])
def test_delta_0_leaves_units_without_loss(ragged: Any, adaptive: bool) -> None:
    s, *rest = ragged.tensors(*FIELDS)
    s.requires_grad_()
    term = adaptive_contrastive(s, *rest, delta=0.0, adaptive=adaptive)
    assert term.total == 0
    assert term.count == adaptive_contrastive(s, *rest).count > 3
    assert not gradient(term, s).any()


@pytest.mark.parametrize("tasks", [(), (2,)])
def test_vectors_without_dimensions_have_cosine_0(ragged: Any, tasks: tuple[int, ...]) -> None:
    s, first, second, _, offsets = ragged.tensors(*FIELDS)
    s = s if not tasks else torch.stack([s, -s], 1)
    nothing, zeros = (torch.zeros(*s.shape, width, dtype=s.dtype) for width in (0, 3))
    term, expected = (adaptive_contrastive(s, first, second, x, offsets) for x in (nothing, zeros))
    assert_close(tuple(term), tuple(expected))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.float32])
def test_masks_of_0_and_1_may_have_any_dtype(ragged: Any, dtype: torch.dtype) -> None:
    s, first, second, x, offsets = ragged.tensors(*FIELDS)
    term = adaptive_contrastive(s, first.to(dtype), second.to(dtype), x, offsets)
    assert_close(tuple(term), tuple(adaptive_contrastive(s, first, second, x, offsets)))


def test_misuse_is_a_value_error() -> None:
    s, mask, offsets = torch.zeros(3), torch.ones(3, dtype=torch.bool), torch.tensor([0, 3])
    with pytest.raises(ValueError, match="features have shape"):
        adaptive_contrastive(s, mask, mask, torch.zeros(2, 4), offsets)
    for delta in (-1.0, math.nan):
        with pytest.raises(ValueError, match="delta"):
            adaptive_contrastive(s, mask, mask, torch.zeros(3, 4), offsets, delta=delta)
    with pytest.raises(ValueError, match="temperature"):
        adaptive_contrastive(s, mask, mask, torch.zeros(3, 4), offsets, temperature=0.0)
