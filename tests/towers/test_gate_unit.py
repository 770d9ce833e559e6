"""Gates against numpy: SDCL's on its own input, EPNet's with a prior, PPNet's on the tasks' hidden layers."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from towers.gate import Gate, GateUnit, TaskGates, check_prior

FIELDS = {"user": 2, "age": 1, "liked": 3}  # user 0:2, age 2:3, liked 3:6
USER_AND_LIKED = [0, 1, 3, 4, 5]
PRIOR = Gate(prior=("liked", "user"))
LHUC = Gate(prior=("liked", "user"), reads_input=False)
KINDS = [Gate(), PRIOR, LHUC, Gate(hidden=2, alpha=3.0, prior=("age",))]


def make(config: Gate) -> Any:
    torch.manual_seed(0)
    return GateUnit(config, fields=FIELDS).double()


def inputs() -> Any:
    torch.manual_seed(1)
    return torch.randn(7, 6, dtype=torch.float64, requires_grad=True)


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


@pytest.mark.parametrize(("alpha", "hidden"), [(2.0, None), (3.0, 2)])
def test_gate_is_equation_6(alpha: float, hidden: int | None) -> None:
    unit, x = make(Gate(alpha=alpha, hidden=hidden)), inputs()
    w1, b1, w2, b2 = (p.detach().numpy() for p in unit.parameters())
    assert w1.shape == (hidden or 6, 6)
    raw = x.detach().numpy()
    weights = alpha * sigmoid(np.maximum(raw @ w1.T + b1, 0) @ w2.T + b2)
    np.testing.assert_allclose(unit(x).detach().numpy(), raw * weights, rtol=1e-10)


@pytest.mark.parametrize("reads_input", [True, False])
def test_prior_fields_decide(reads_input: bool) -> None:
    unit, x = make(Gate(prior=("liked", "user"), hidden=4, reads_input=reads_input)), inputs()
    w1, b1, w2, b2 = (p.detach().numpy() for p in unit.parameters())
    raw = x.detach().numpy()
    seen = np.concatenate([raw[:, 3:6], raw[:, 0:2], *([raw] if reads_input else [])], axis=1)
    weights = 2 * sigmoid(np.maximum(seen @ w1.T + b1, 0) @ w2.T + b2)
    np.testing.assert_allclose(unit(x).detach().numpy(), raw * weights, rtol=1e-10)


@pytest.mark.parametrize("reads_input", [True, False])
def test_beside_a_prior_the_input_is_read_without_gradient(reads_input: bool) -> None:
    unit, x = make(Gate(prior=("liked", "user"), reads_input=reads_input)), inputs()
    out = unit(x)
    jacobian = torch.stack([torch.autograd.grad(out[:, i].sum(), x, retain_graph=True)[0] for i in range(6)], dim=1)
    weights = out.detach() / x.detach()  # [7, 6]
    torch.testing.assert_close(jacobian[:, :, 2], torch.eye(6)[2].double() * weights[:, 2:3])  # age: its product alone
    assert (jacobian[:, 2, USER_AND_LIKED].abs().sum(0) > 0).all()  # the prior moves the weights of age
    changed = x.detach().clone()
    changed[:, 2] += 1
    assert torch.allclose(unit(changed) / changed, weights) is not reads_input


def test_a_gate_without_prior_learns_from_its_whole_input() -> None:
    x = inputs()
    gradient = torch.autograd.grad(make(Gate())(x)[:, 2].sum(), x)[0]
    assert (gradient.abs().sum(0) > 0).all()


@pytest.mark.parametrize("reads_input", [True, False])
def test_a_side_that_has_none_of_the_prior_reads_its_own_input(reads_input: bool) -> None:
    unit, x = make(Gate(prior=("item",), reads_input=reads_input)), inputs()
    torch.testing.assert_close(unit(x), make(Gate())(x), rtol=0, atol=0)
    some = make(Gate(prior=("item", "user"), reads_input=reads_input))
    torch.testing.assert_close(some(x), make(Gate(prior=("user",), reads_input=reads_input))(x), rtol=0, atol=0)


@pytest.mark.parametrize("config", KINDS)
def test_weights_stay_between_zero_and_alpha(config: Gate) -> None:
    unit = make(config)
    with torch.no_grad():
        for parameter in unit.parameters():
            parameter.mul_(50)
    x = torch.randn(200, 6, dtype=torch.float64)
    weights = unit(x) / x
    assert weights.min() >= 0
    assert weights.max() <= config.alpha + 1e-6
    assert weights.min() < 0.1  # and they use the whole range
    assert weights.max() > 0.95 * config.alpha


@pytest.mark.parametrize("config", [Gate(), PRIOR, LHUC])
def test_without_weights_the_gate_of_alpha_2_lets_the_input_through(config: Gate) -> None:
    unit, x = make(config), inputs()
    with torch.no_grad():
        for parameter in unit.parameters():
            parameter.zero_()
    torch.testing.assert_close(unit(x), x)
    assert unit(x[:0]).shape == (0, 6)
    torch.testing.assert_close(unit(x.view(7, 1, 6)), x.view(7, 1, 6))


@pytest.mark.parametrize("config", KINDS)
def test_bfloat16_autocast_of_gates(config: Gate) -> None:
    unit, x = make(config).float(), inputs().detach().float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = unit(x)
    torch.testing.assert_close(low.float(), unit(x), rtol=0.03, atol=0.03)


REQUEST, CANDIDATE = {"user": 2, "age": 1}, {"item": 3}
ROW = torch.tensor([0, 0, 2, 2, 1])


def task_gates(config: Gate, tasks: int = 2) -> tuple[Any, Any, Any]:
    torch.manual_seed(0)
    gates = TaskGates(config, request_fields=REQUEST, candidate_fields=CANDIDATE, tasks=tasks, widths=(4, 5))
    request, candidate = (torch.randn(n, 3, dtype=torch.float64, requires_grad=True) for n in (3, 5))
    return gates.double(), request, candidate


@pytest.mark.parametrize("hidden", [None, 3])
@pytest.mark.parametrize("reads_input", [True, False])
def test_every_task_and_layer_has_its_own_gate(reads_input: bool, hidden: int | None) -> None:
    config = Gate(alpha=3.0, hidden=hidden, prior=("item", "user"), reads_input=reads_input)
    gates, request, candidate = task_gates(config)
    u, i = request[ROW].detach().numpy(), candidate.detach().numpy()
    seen = np.concatenate([u[:, :2], *([u] if reads_input else []), i, *([i] if reads_input else [])], axis=1)
    first = np.maximum(seen @ gates.first.joint.weight.detach().numpy().T + gates.first.joint.bias.detach().numpy(), 0)
    start = 0
    for out, layer, width in zip(gates(request, candidate, ROW), gates.last, (4, 5), strict=True):
        assert out.shape == (5, 2, width)
        for task in (0, 1):
            part = first[:, start : start + (hidden or width)]
            weights = sigmoid(part @ layer.weight[task].detach().numpy() + layer.bias[task].detach().numpy())
            np.testing.assert_allclose(out[:, task].detach().numpy(), 3 * weights, rtol=1e-10)
            start += hidden or width


def test_only_the_prior_learns_from_task_gates() -> None:
    gates, request, candidate = task_gates(Gate(prior=("user",)))
    sum(w.square().sum() for w in gates(request, candidate, ROW)).backward()
    assert (request.grad[:, :2] != 0).all()
    assert (request.grad[:, 2] == 0).all()
    assert candidate.grad is None
    changed = [w + 1 for w in (candidate, request[:, 2:])]
    for moved in (gates(request, changed[0], ROW), gates(torch.cat([request[:, :2], changed[1]], 1), candidate, ROW)):
        assert not torch.equal(moved[0], gates(request, candidate, ROW)[0])  # the rest is read all the same


def test_without_input_a_request_prior_gates_its_candidates_alike() -> None:
    gates, request, candidate = task_gates(Gate(prior=("user",), reads_input=False), tasks=1)
    for out in gates(request, candidate, ROW):
        torch.testing.assert_close(out[0], out[1])
        assert not torch.allclose(out[1], out[2])
    assert [w.shape for w in gates(request, candidate[:0], ROW[:0])] == [(0, 1, 4), (0, 1, 5)]


def test_task_gates_in_bfloat16() -> None:
    gates, *args = task_gates(Gate(prior=("user",)))
    gates, args = gates.float(), [x.detach().float() for x in args]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low: list[Tensor] = gates(*args, ROW)
    for a, b in zip(low, gates(*args, ROW), strict=True):
        torch.testing.assert_close(a.float(), b, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("wrong", [{"alpha": 0.0}, {"alpha": -1.0}, {"alpha": float("nan")}, {"hidden": 0}])
def test_config_refuses(wrong: dict) -> None:
    with pytest.raises(ValueError, match=f"^{next(iter(wrong))}"):
        Gate(**wrong)


def test_a_gate_reads_something() -> None:
    with pytest.raises(ValueError, match=r"^reads_input .* prior"):
        Gate(reads_input=False)


def test_a_prior_must_be_a_field() -> None:
    check_prior(FIELDS, gate=PRIOR, task_gate=None)
    with pytest.raises(ValueError, match=r"^task_gate: prior item, city is none of the fields user, age, liked"):
        check_prior(FIELDS, gate=PRIOR, task_gate=Gate(prior=("item", "user", "city")))


def test_the_placebo_adds_what_the_gate_would_weigh_by() -> None:
    torch.manual_seed(0)
    gate = GateUnit(Gate(hidden=5), fields={"a": 3, "b": 1})
    placebo = GateUnit(Gate(hidden=5, adds=True), fields={"a": 3, "b": 1})
    placebo.load_state_dict(gate.state_dict())  # the same parameters
    x = torch.randn(7, 4)
    logits = placebo(x) - x
    torch.testing.assert_close(gate(x), x * 2 * logits.sigmoid())
