"""`multi_class` and its blocked form against loops over rows and columns, and against each other."""

import math
from importlib import import_module
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from losses import LossTerm, multi_class, multi_class_vectors
from losses.blocks import block_cells


def oracle(s: Any, target: Any, w: Any, log_q: Any, keep: Any) -> float:
    total = 0.0
    for m, own in enumerate(target):
        kept = [c for c in range(s.shape[1]) if c == own or (keep[m, c] and log_q[c] < np.inf)]
        terms = {c: s[m, c] - log_q[c] for c in kept}
        total += w[m] * (np.logaddexp.reduce(list(terms.values())) - terms[own])
    return float(total)


def gradients(term: LossTerm, *inputs: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(term.total, inputs, retain_graph=True)


class LargestTensor(TorchDispatchMode):
    """Notes the size of the largest tensor that any operation makes."""

    size = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.size = max(self.size, *(x.numel() for x in tree_leaves(out) if isinstance(x, Tensor)), 0)
        return out


class Pool(NamedTuple):
    """9 queries of which 5 have rows, 14 rows, 20 columns: repeated ids, padding, excluded pairs."""

    queries: Tensor
    items: Tensor
    row: Tensor
    target: Tensor
    item_ids: Tensor
    log_q: Tensor
    excluded: Tensor
    weight: Tensor

    def keep(self) -> Tensor:
        """[M, P]: the columns of each row's normaliser, by loops."""
        keep = torch.ones(len(self.row), len(self.items), dtype=torch.bool)
        pairs = set(map(tuple, self.excluded.tolist()))
        for m, (query, own) in enumerate(zip(self.row.tolist(), self.target.tolist(), strict=True)):
            for column in range(len(self.items)):
                hit = self.item_ids[column] == self.item_ids[own] or (query, column) in pairs
                keep[m, column] = column == own or not hit
        return keep

    def blocked(self, queries: Tensor, items: Tensor, scale: Any = 1.0) -> LossTerm:
        """The function under test with all its options."""
        options = {"item_ids": self.item_ids, "log_q": self.log_q, "excluded": self.excluded}
        return multi_class_vectors(
            queries, items, self.row, self.target, sample_weight=self.weight, scale=scale, **options
        )


@pytest.fixture(params=range(4))
def pool(request: pytest.FixtureRequest) -> Pool:
    g = torch.Generator().manual_seed(request.param)

    def draw(high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=g)

    log_q = torch.randn(20, generator=g, dtype=torch.float64)
    log_q[[3, 17]] = math.inf
    columns = log_q.isfinite().nonzero().squeeze(1)
    return Pool(
        queries=torch.randn(9, 4, generator=g, dtype=torch.float64),
        items=torch.randn(20, 4, generator=g, dtype=torch.float64),
        row=torch.tensor([7, 0, 3, 4, 8])[draw(5, 14)],
        target=columns[draw(18, 14)],
        item_ids=draw(9, 20) * 1000,
        log_q=log_q,
        excluded=torch.stack([draw(9, 25), draw(20, 25)], 1),
        weight=torch.rand(14, generator=g, dtype=torch.float64),
    )


def test_blocked_form_is_the_loop(pool: Pool) -> None:
    term = pool.blocked(pool.queries, pool.items, scale=2.0)
    s = 2.0 * (pool.queries[pool.row] @ pool.items.t()).numpy()
    expected = oracle(s, pool.target.numpy(), pool.weight.numpy(), pool.log_q.numpy(), pool.keep().numpy())
    assert_close(term.total.item(), expected, rtol=1e-12, atol=0)
    assert term.count.item() == 14


def test_rows_of_no_weight_count_and_do_nothing_else(pool: Pool) -> None:
    q, v = pool.queries.requires_grad_(), pool.items.requires_grad_()
    pool.weight[::2] = 0
    kept = pool.weight > 0
    few = pool._replace(row=pool.row[kept], target=pool.target[kept], weight=pool.weight[kept])
    term, without = pool.blocked(q, v), few.blocked(q, v)
    assert (term.count.item(), without.count.item()) == (14, 7)
    assert term.total.item() == without.total.item()
    expected = torch.autograd.grad(without.total, (q, v))
    for one, other in zip(torch.autograd.grad(term.total, (q, v)), expected, strict=True):
        assert torch.equal(one, other)
    nothing = few._replace(weight=torch.zeros_like(few.weight)).blocked(q, v)
    assert (nothing.total.item(), nothing.count.item()) == (0, 7)
    assert not torch.autograd.grad(nothing.total, q)[0].any()


def test_plain_form_is_the_loop(pool: Pool) -> None:
    s = pool.queries[pool.row] @ pool.items.t()
    term = multi_class(s, pool.target, sample_weight=pool.weight, log_q=pool.log_q, mask=pool.keep())
    expected = oracle(s.numpy(), pool.target.numpy(), pool.weight.numpy(), pool.log_q.numpy(), pool.keep().numpy())
    assert_close(term.total.item(), expected, rtol=1e-12, atol=0)
    assert term.count.item() == 14


@pytest.mark.parametrize("cells", [1, 10**6])
def test_both_forms_have_equal_gradients(pool: Pool, cells: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(import_module("losses.multi_class"), "block_cells", lambda device: cells)
    q, v = pool.queries.requires_grad_(), pool.items.requires_grad_()
    scale = torch.tensor(1.7, dtype=torch.float64, requires_grad=True)  # a learnt temperature
    logits = scale * q[pool.row] @ v.t()
    plain = multi_class(logits, pool.target, sample_weight=pool.weight, log_q=pool.log_q, mask=pool.keep())
    blocked = pool.blocked(q, v, scale)
    assert_close(tuple(blocked), tuple(plain))
    assert_close(gradients(blocked, q, v, scale), gradients(plain, q, v, scale))


def test_blocks_of_few_queries_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    q, v = torch.randn(70, 3, dtype=torch.float64), torch.randn(5, 3, dtype=torch.float64)
    row, target = torch.randint(70, (90,)), torch.randint(5, (90,))
    whole = multi_class_vectors(q, v, row, target)
    monkeypatch.setattr(import_module("losses.multi_class"), "block_cells", lambda device: 1)
    assert_close(multi_class_vectors(q, v, row, target), whole)
    assert_close(whole.total, cross_entropy((q @ v.t())[row], target, reduction="sum"))


def test_gradcheck(pool: Pool) -> None:
    inputs = pool.queries.requires_grad_(), pool.items.requires_grad_()
    assert torch.autograd.gradcheck(lambda q, v: pool.blocked(q, v).total, inputs)


def test_in_float32_large_logits_keep_their_precision() -> None:
    g = torch.Generator().manual_seed(0)
    q, v = (torch.randn(64, 16, generator=g) for _ in range(2))
    row, target = torch.arange(64), torch.arange(64)
    blocked = multi_class_vectors(q, v, row, target, scale=10.0)
    plain = multi_class(10.0 * q.double() @ v.double().t(), target)
    assert blocked.total.dtype == blocked.count.dtype == torch.float32
    assert_close(blocked.total.item(), plain.total.item(), rtol=1e-6, atol=0)


def test_multi_class_hand_computed() -> None:
    logits, target = torch.zeros(2, 4), torch.tensor([0, 3])
    mask = torch.tensor([[False, True, True, True], [True, True, False, True]])
    term = multi_class(logits, target, sample_weight=torch.tensor([1.0, 0.0]), mask=mask)
    assert_close(term, LossTerm(torch.tensor(math.log(4)), torch.tensor(2.0)))  # the target stays; weight 0 counts
    q = torch.tensor([0.5, 0.25, 0.125, 0.125]).log()
    assert_close(multi_class(q.expand(2, 4), target, log_q=q).total.item(), 2 * math.log(4))


def test_impressions_of_one_query_leave_each_other_in() -> None:
    q, v = torch.zeros(1, 2), torch.randn(3, 2)
    term = multi_class_vectors(q, v, torch.tensor([0, 0]), torch.tensor([0, 1]))
    assert_close(term, LossTerm(torch.tensor(2 * math.log(3)), torch.tensor(2.0)))
    same = multi_class_vectors(q, v, torch.tensor([0, 0]), torch.tensor([0, 1]), item_ids=torch.tensor([5, 5, 6]))
    assert_close(same.total.item(), 2 * math.log(2))


def test_a_target_is_never_excluded_but_is_for_its_siblings() -> None:
    q, v = torch.zeros(1, 2), torch.randn(4, 2)
    excluded = torch.tensor([[0, 0], [0, 3], [0, 3]])
    term = multi_class_vectors(q, v, torch.tensor([0, 0]), torch.tensor([0, 1]), excluded=excluded)
    assert_close(term.total.item(), math.log(3) + math.log(2))


def test_padding_with_the_id_of_a_hidden_target_adds_nothing() -> None:
    q, v, log_q = torch.zeros(1, 2, requires_grad=True), torch.randn(3, 2), torch.tensor([0.0, 0.0, math.inf])
    options = {"item_ids": torch.tensor([1, 2, 2]), "log_q": log_q, "excluded": torch.tensor([[0, 1]])}
    term = multi_class_vectors(q, v, torch.tensor([0, 0]), torch.tensor([0, 1]), **options)
    assert_close(term.total.item(), math.log(2))  # alone, and beside the other row's target
    assert gradients(term, q)[0].isfinite().all()


def test_nothing_but_the_target_left_is_zero() -> None:
    q, v = torch.randn(1, 2, requires_grad=True), torch.randn(3, 2)
    excluded = torch.tensor([[0, 0], [0, 1], [0, 2]])
    term = multi_class_vectors(q, v, torch.tensor([0]), torch.tensor([1]), excluded=excluded)
    assert term.total.item() == 0
    assert not gradients(term, q)[0].any()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_left_out_may_be_anything(bad: float) -> None:
    log_q, target = torch.tensor([0.0, 0.5, math.inf]), torch.tensor([0, 1])
    clean = torch.randn(2, 3)
    padding = torch.tensor([False, False, True])
    logits = clean.masked_fill(padding, bad).requires_grad_()
    term = multi_class(logits, target, log_q=log_q)
    assert_close(term.total, cross_entropy(clean[:, :2] - log_q[:2], target, reduction="sum"))
    assert gradients(term, logits)[0].isfinite().all()
    masked = multi_class(logits, target, mask=~padding.expand(2, 3))
    assert_close(masked.total, cross_entropy(clean[:, :2], target, reduction="sum"))
    q = torch.eye(2, requires_grad=True)
    v = clean.t().masked_fill(padding.unsqueeze(1), bad).requires_grad_()  # q @ v.t() is clean
    ids = torch.tensor([1, 0, 0])  # the padding shares an id with a target
    blocked = multi_class_vectors(q, v, torch.tensor([0, 1]), target, log_q=log_q, item_ids=ids)
    assert_close(blocked.total, term.total)
    assert all(gradient.isfinite().all() for gradient in gradients(blocked, q, v))


def test_no_rounding_makes_a_loss_negative() -> None:
    q = torch.randn(256, 64, generator=torch.Generator().manual_seed(0))
    at = torch.arange(256)
    for m in range(0, 256, 16):
        total = multi_class_vectors(q, q, at[m : m + 1], at[m : m + 1], scale=1e3).total
        assert total >= 0


def test_many_rows_of_one_query_take_memory_by_rows() -> None:
    q, v = torch.randn(1, 4, requires_grad=True), torch.randn(5000, 4)
    row, target = torch.zeros(5000, dtype=torch.long), torch.arange(5000)
    with LargestTensor() as largest:
        term = multi_class_vectors(q, v, row, target)
    assert largest.size <= 16 * 5000
    assert_close(term.total, cross_entropy((q @ v.t()).expand(5000, -1), target, reduction="sum"))


def test_the_matrix_of_logits_is_never_held() -> None:
    q, v, at = torch.randn(2000, 4, requires_grad=True), torch.randn(3000, 4), torch.arange(2000)
    with LargestTensor() as largest:
        multi_class_vectors(q, v, at, at).total.backward()
    assert largest.size <= block_cells(q.device) < 2000 * 3000 // 20


def test_no_gradient_reaches_weights_and_rates() -> None:
    w, log_q = torch.rand(3, requires_grad=True), torch.rand(3, requires_grad=True)
    x, at = torch.randn(3, 3, requires_grad=True), torch.arange(3)
    multi_class(x, at, sample_weight=w, log_q=log_q).total.backward()
    multi_class_vectors(x, x, at, at, sample_weight=w, log_q=log_q).total.backward()
    assert w.grad is None
    assert log_q.grad is None


@pytest.mark.parametrize("size", [1e2, 1e15])
def test_extreme_logits_stay_finite(size: float) -> None:
    q = torch.tensor([[size, 0.0], [-size, size]], requires_grad=True)
    v = torch.tensor([[size, 0.0], [-size, 0.0], [0.0, -size]], requires_grad=True)
    row, target = torch.tensor([0, 0, 1]), torch.tensor([0, 1, 1])
    term = multi_class_vectors(q, v, row, target)
    assert_close(term.total, multi_class((q @ v.t())[row], target).total)
    for gradient in gradients(term, q, v):
        assert gradient.isfinite().all()


@pytest.mark.parametrize(("queries", "columns"), [(0, 0), (0, 4), (3, 0), (3, 4)])
def test_no_rows_is_zero_and_tied_to_the_graph(queries: int, columns: int) -> None:
    q, v = torch.randn(queries, 2, requires_grad=True), torch.randn(columns, 2, requires_grad=True)
    none = torch.zeros(0, dtype=torch.long)
    term = multi_class_vectors(q, v, none, none, excluded=torch.zeros(0, 2, dtype=torch.long))
    assert_close(term, LossTerm(torch.tensor(0.0), torch.tensor(0.0)))
    assert not any(gradient.any() for gradient in gradients(term, q, v))
    x = torch.randn(0, columns, requires_grad=True)
    assert_close(multi_class(x, none), LossTerm(torch.tensor(0.0), torch.tensor(0.0)))
    assert gradients(multi_class(x, none), x)[0].shape == (0, columns)


def test_rows_may_come_in_any_order_and_split_over_ranks(pool: Pool) -> None:
    q, v = pool.queries.requires_grad_(), pool.items.requires_grad_()
    whole = pool.blocked(q, v)
    parts = [
        pool._replace(row=pool.row[part], target=pool.target[part], weight=pool.weight[part]).blocked(q, v)
        for part in (slice(9, 14), slice(0, 9))
    ]
    assert_close(tuple(sum(x) for x in zip(*parts, strict=True)), tuple(whole))
    split = [sum(x) for x in zip(*(gradients(part, q, v) for part in parts), strict=True)]
    assert_close(split, list(gradients(whole, q, v)))


def test_queries_without_rows_are_not_touched(pool: Pool) -> None:
    idle = torch.isin(torch.arange(9), pool.row, invert=True).unsqueeze(1)
    q = pool.queries.masked_fill(idle, math.nan).requires_grad_()
    term = pool.blocked(q, pool.items)
    assert_close(term.total, pool.blocked(pool.queries, pool.items).total)
    assert gradients(term, q)[0].isfinite().all()


def test_autocast_and_bf16_leave_reductions_in_float32(pool: Pool) -> None:
    q, v = pool.queries.float(), pool.items.float()
    with torch.autocast("cpu", torch.bfloat16):
        mixed = pool.blocked(q, v)
    assert torch.equal(mixed.total, pool.blocked(q, v).total)
    low = q.bfloat16().requires_grad_()
    term = pool.blocked(low, v.bfloat16())
    assert term.total.dtype == torch.float32
    assert_close(term.total, pool.blocked(low.float(), v.bfloat16().float()).total)
    assert gradients(term, low)[0].dtype == torch.bfloat16


def test_equal_huge_logits_share_the_gradient() -> None:
    q, v = torch.ones(1, 1, requires_grad=True), torch.full((2, 1), 1e30, requires_grad=True)
    for ids in (None, torch.tensor([1, 2])):
        term = multi_class_vectors(q, v, torch.tensor([0]), torch.tensor([0]), item_ids=ids)
        assert_close(term.total.item(), math.log(2))
        assert_close(gradients(term, q, v), (torch.zeros(1, 1), torch.tensor([[-0.5], [0.5]])))


@pytest.mark.parametrize("size", [1.0, 1e4, 1e6, 1e8])
@pytest.mark.parametrize("apart", [False, True])
def test_in_float32_the_shares_of_a_thousand_equal_items_add_up(size: float, apart: bool) -> None:
    q, v = torch.full((1, 1), size), torch.ones(1000, 1, requires_grad=True)
    row, target = torch.tensor([0, 0]), torch.tensor([0, 1])
    ids = torch.arange(1000) // 2 if apart else None  # targets beside their normaliser; each hides the other
    term = multi_class_vectors(q, v, row, target, item_ids=ids)
    assert_close(term.total.item(), 2 * math.log(999 if apart else 1000), rtol=1e-6, atol=0)
    slope = gradients(term, v)[0] / size
    assert_close(slope.sum().item(), 0.0, atol=1e-5, rtol=0)
    assert_close(slope[2:], torch.full((998, 1), 2 / (999 if apart else 1000)))


@pytest.mark.parametrize("size", [1e4, -1e8, 1e30])
def test_in_float32_large_logits_do_not_round_log_q_away(size: float) -> None:
    log_q, target = torch.tensor([-1.1, -2.3, -0.7]), torch.tensor([1])
    logits = torch.full((1, 3), size, requires_grad=True)
    exact = -log_q.double().requires_grad_()
    term, expected = multi_class(logits, target, log_q=log_q), multi_class(exact.unsqueeze(0), target)
    assert_close(term.total.double(), expected.total, rtol=1e-6, atol=0)
    assert_close(gradients(term, logits)[0].double(), gradients(expected, exact)[0].unsqueeze(0), rtol=1e-5, atol=0)


def test_the_level_of_a_row_is_that_of_what_it_keeps() -> None:
    logits, log_q = torch.tensor([[1e30, 1.0, 2.0], [0.5, math.nan, 0.25]]), torch.tensor([math.inf, -0.2, -0.3])
    mask = torch.tensor([[True, True, True], [True, False, True]])
    term = multi_class(logits, torch.tensor([1, 2]), log_q=log_q, mask=mask)
    assert_close(term.total.item(), float(np.logaddexp(0, 2.3 - 1.2)))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.float32])
def test_masks_of_0_and_1_may_have_any_dtype(pool: Pool, dtype: torch.dtype) -> None:
    s = pool.queries[pool.row] @ pool.items.t()
    term = multi_class(s, pool.target, log_q=pool.log_q, mask=pool.keep().to(dtype))
    assert_close(term, multi_class(s, pool.target, log_q=pool.log_q, mask=pool.keep()))


def test_a_second_derivative_is_an_error_of_the_blocked_form_alone(pool: Pool) -> None:
    q, v = pool.queries.requires_grad_(), pool.items.requires_grad_()
    for x in (q, v):
        slope = torch.autograd.grad(pool.blocked(q, v).total, x, create_graph=True)[0]
        with pytest.raises(RuntimeError, match="second derivative"):
            torch.autograd.grad((slope + x).sum(), x)  # beside another term, too
    logits = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    log_q = torch.randn(3, dtype=torch.float64)
    assert torch.autograd.gradgradcheck(lambda x: multi_class(x, torch.tensor([0, 2]), log_q=log_q).total, logits)


def test_misuse_is_a_value_error() -> None:
    x, at = torch.zeros(3, 2), torch.arange(3)
    with pytest.raises(ValueError, match=r"\[M, C\]"):
        multi_class(x, at[:2])
    with pytest.raises(ValueError, match="sample_weight"):
        multi_class(x, at % 2, sample_weight=torch.ones(2))
    with pytest.raises(ValueError, match="queries"):
        multi_class_vectors(x, torch.zeros(3, 4), at, at)
    for row, target, name in (([-1], [0], "row"), ([3], [0], "row"), ([0], [-1], "target"), ([0], [3], "target")):
        with pytest.raises(ValueError, match=f"{name} runs from"):
            multi_class_vectors(x, x, torch.tensor(row), torch.tensor(target))
    with pytest.raises(ValueError, match="excluded column"):
        multi_class_vectors(x, x, at, at, excluded=torch.tensor([[0, -1]]))
