"""Dense layers against numpy and against `nn.Linear` itself."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from towers.mlp import FactoredLinear, GroupedLinear, GroupedMlp, Mlp, TaskTower


def test_mlp_ends_with_relu() -> None:
    mlp: Any = Mlp(2, [2, 1])
    with torch.no_grad():
        mlp[0].weight.copy_(torch.tensor([[1.0, 0.0], [0.0, -1.0]]))
        mlp[0].bias.zero_()
        mlp[3].weight.copy_(torch.tensor([[2.0, -1.0]]))
        mlp[3].bias.fill_(0.5)
    # relu([3, 4]) -> 2·3 - 4 + .5; relu([3, -4]) -> relu(2·3 - 0 + .5); relu([0, 4]) -> relu(-3.5)
    x = torch.tensor([[3.0, -4.0], [3.0, 4.0], [-1.0, -4.0]])
    torch.testing.assert_close(mlp(x), torch.tensor([[2.5], [6.5], [0.0]]))
    assert mlp.out_dim == 1


def test_mlp_without_hidden_is_the_identity() -> None:
    x = torch.randn(3, 5)
    assert Mlp(5, []).out_dim == 5
    torch.testing.assert_close(Mlp(5, [])(x), x)


def test_mlp_dropout_acts_in_training_only() -> None:
    torch.manual_seed(0)
    mlp = Mlp(4, [64], dropout=0.5)
    x = torch.randn(8, 4)
    torch.testing.assert_close(mlp.eval()(x), mlp.eval()(x))
    kept = mlp.eval()(x) > 0
    trained = mlp.train()(x)[kept]
    assert 0.3 < (trained == 0).double().mean() < 0.7


@pytest.mark.parametrize(("request_dim", "candidate_dim"), [(3, 4), (0, 4), (3, 0)])
def test_factored_linear_is_a_linear_on_the_concatenation(request_dim: int, candidate_dim: int) -> None:
    torch.manual_seed(0)
    plain = nn.Linear(request_dim + candidate_dim, 5).double()
    torch.manual_seed(0)
    factored = FactoredLinear(request_dim, candidate_dim, 5).double()
    row = torch.tensor([0, 0, 2, 2, 2, 1])
    sides = [torch.randn(3, request_dim).double(), torch.randn(6, candidate_dim).double()]
    request, candidate = (side.requires_grad_() for side in sides)
    request_copy, candidate_copy = (side.detach().clone().requires_grad_() for side in sides)

    out = factored(request, candidate, row)
    expected = plain(torch.cat([request_copy[row], candidate_copy], dim=1))

    torch.testing.assert_close(out, expected)  # the same seed gives the same start, so equal parameters
    weight = torch.randn_like(out)
    (out * weight).sum().backward()
    (expected * weight).sum().backward()
    for mine, theirs in [
        (request, request_copy),
        (candidate, candidate_copy),
        (factored.joint.weight, plain.weight),
        (factored.joint.bias, plain.bias),
    ]:
        torch.testing.assert_close(mine.grad, theirs.grad)


@pytest.mark.parametrize("row", [[0, 1, 2], [2, 0, 1]])
def test_factored_linear_of_a_candidate_each(row: list[int]) -> None:
    torch.manual_seed(0)
    factored = FactoredLinear(3, 4, 5).double()
    request, candidate = torch.randn(3, 3).double(), torch.randn(3, 4).double()
    expected = factored.eval()(request, candidate, torch.tensor(row))  # in two parts
    torch.testing.assert_close(factored.train()(request, candidate, torch.tensor(row)), expected)


def test_grouped_linear_gives_one_number_whatever_the_layout_in_bfloat16() -> None:
    torch.manual_seed(0)
    grouped, x = GroupedLinear(3, 8, 4).bfloat16(), torch.randn(16, 3, 8).bfloat16()
    assert torch.equal(grouped(x), grouped(x.transpose(0, 1).contiguous().transpose(0, 1)))
    plain = torch.stack([x[:, g].float() @ grouped.weight[g].float() for g in range(3)], 1) + grouped.bias.float()
    torch.testing.assert_close(grouped(x).float(), plain, rtol=0.02, atol=0.02)


def test_factored_linear_of_no_candidates() -> None:
    factored = FactoredLinear(3, 4, 5)
    out = factored(torch.randn(1, 3), torch.empty(0, 4), torch.empty(0, dtype=torch.long))
    assert out.shape == (0, 5)
    out.sum().backward()
    assert factored.joint.weight.grad is not None
    assert factored.joint.weight.grad.abs().sum() == 0


def test_factored_linear_in_bfloat16() -> None:
    torch.manual_seed(0)
    factored = FactoredLinear(32, 32, 16)
    args = torch.randn(4, 32), torch.randn(10, 32), torch.arange(10) % 4
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = factored(*args)
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low.float(), factored(*args), rtol=0.02, atol=0.02)


def test_grouped_linear_is_one_linear_per_group() -> None:
    torch.manual_seed(0)
    grouped = GroupedLinear(3, 4, 2)
    x = torch.randn(5, 3, 4)
    weight, bias = grouped.weight.detach().numpy(), grouped.bias.detach().numpy()
    expected = np.stack([x[:, g].numpy() @ weight[g] + bias[g] for g in range(3)], axis=1)
    np.testing.assert_allclose(grouped(x).detach().numpy(), expected, rtol=1e-5, atol=1e-6)
    assert grouped(x[:0]).shape == (0, 3, 2)


def test_grouped_linear_starts_as_a_linear_of_each_group() -> None:
    torch.manual_seed(0)
    grouped, plain = GroupedLinear(50, 16, 64), nn.Linear(16, 50 * 64)
    bound = 1 / math.sqrt(16)
    for mine, theirs in [(grouped.weight, plain.weight), (grouped.bias, plain.bias)]:
        assert mine.abs().max() <= bound
        quantiles = torch.linspace(0.05, 0.95, 10)
        torch.testing.assert_close(
            mine.detach().flatten().quantile(quantiles),
            theirs.detach().flatten().quantile(quantiles),
            atol=0.04 * bound * 2,
            rtol=0,
        )


def test_grouped_mlp_of_one_group_is_an_mlp() -> None:
    grouped: Any = GroupedMlp(1, 3, [4, 2])
    plain: Any = Mlp(3, [4, 2])
    with torch.no_grad():
        for k in (0, 3):
            grouped[k].weight.copy_(plain[k].weight.T[None])
            grouped[k].bias.copy_(plain[k].bias[None])
    x = torch.randn(6, 3)
    torch.testing.assert_close(grouped(x[:, None])[:, 0], plain(x))
    assert grouped.out_dim == 2


@pytest.mark.parametrize("tasks", [1, 3])
def test_task_towers_do_not_mix_tasks(tasks: int) -> None:
    torch.manual_seed(0)
    tower: Any = TaskTower(tasks, 4, [8], out_dim=2)
    x: Any = torch.randn(5, tasks, 4, requires_grad=True)
    out = tower(x)
    assert out.shape == (5, tasks, 2)
    out[:, 0].sum().backward()
    for gradient in [x.grad.transpose(0, 1), *(p.grad for p in tower.parameters())]:
        assert gradient[0].abs().sum() > 0
        assert gradient[1:].abs().sum() == 0


def test_task_tower_without_hidden_is_linear() -> None:
    tower = TaskTower(2, 3, out_dim=1)
    a, b = torch.randn(2, 4, 2, 3)
    zero = tower(torch.zeros(4, 2, 3))
    torch.testing.assert_close(tower(a + b) - zero, tower(a) + tower(b) - 2 * zero)


def test_weights_of_a_task_tower_multiply_its_hidden_layers() -> None:
    torch.manual_seed(0)
    tower: Any = TaskTower(2, 3, [4, 5], out_dim=1)
    x, ones = torch.randn(6, 2, 3), (torch.ones(6, 2, 4), torch.ones(6, 2, 5))
    torch.testing.assert_close(tower(x, ones), tower(x), rtol=0, atol=0)
    weights = torch.rand(6, 2, 4), torch.rand(6, 2, 5)
    first, _, _, second, _, _ = tower[0]
    expected = tower[1](second(first(x).relu() * weights[0]).relu() * weights[1])
    torch.testing.assert_close(tower(x, weights), expected)
