"""Multi-task trunks against loops in numpy, their degenerate cases, and the hard-concrete distribution."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor, nn

from towers.mixtures import (
    HardConcrete,
    Mmoe,
    Ple,
    SharedBottom,
    Snr,
    Trunk,
    WideAndDeep,
    build_trunk,
    expected_l0,
    routing,
    set_step,
)

KINDS: list[Trunk] = [
    SharedBottom(hidden=(6, 5)),
    SharedBottom(hidden=(5,)),
    WideAndDeep(hidden=(6, 4)),
    WideAndDeep(hidden=(4,)),
    Mmoe(experts=3, hidden=(6, 5)),
    Mmoe(experts=2, hidden=(5,)),
    Ple(task_experts=2, shared_experts=1, hidden=(6, 5), layers=1),
    Ple(task_experts=1, shared_experts=2, hidden=(6, 5), layers=3),
    Ple(task_experts=0, shared_experts=2, hidden=(5,), layers=2),
    Snr(mode="trans", subnetworks=3, hidden=(6, 4, 5)),
    Snr(mode="aver", subnetworks=3, hidden=(6, 4, 5)),
    Snr(mode="trans", subnetworks=1, hidden=(5,)),
    Snr(mode="aver", subnetworks=2, hidden=(5,)),
]


def make(config: Trunk, *, tasks: int, seed: int = 0) -> Any:
    torch.manual_seed(0)
    return build_trunk(config, tasks=tasks, seed=seed).double()


def relu(x: np.ndarray) -> np.ndarray:
    return np.maximum(x, 0)


def softmax(x: np.ndarray) -> np.ndarray:
    return np.exp(x) / np.exp(x).sum(-1, keepdims=True)


def expert(mlp: Any, group: int, pre: np.ndarray) -> np.ndarray:
    """Expert `group` of a trunk after its first linear layer, one hidden layer behind it."""
    layer = mlp[0]
    weight, bias = layer.weight[group].detach().numpy(), layer.bias[group].detach().numpy()
    return relu(relu(pre) @ weight + bias)


@pytest.mark.parametrize("tasks", [1, 3])
@pytest.mark.parametrize("config", KINDS)
def test_shapes_and_gradients(config: Trunk, tasks: int) -> None:
    trunk = make(config, tasks=tasks).eval()
    pre: Any = torch.randn(64, trunk.width, dtype=torch.float64, requires_grad=True)
    out = trunk(pre)
    assert out.shape == (64, tasks, trunk.out_dim)
    assert trunk.out_dim == 5
    (out * torch.randn_like(out)).sum().backward()
    if getattr(config, "experts", 2) > 1:
        assert (pre.grad.abs().sum(0) > 0).all()  # no column of the width goes unread
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in trunk.parameters())


@pytest.mark.parametrize("config", KINDS)
def test_rows_are_independent_and_may_be_none(config: Trunk) -> None:
    trunk = make(config, tasks=2).eval()
    pre = torch.randn(6, trunk.width, dtype=torch.float64)
    order = torch.tensor([3, 1, 5, 0, 2, 4])
    torch.testing.assert_close(trunk(pre[order]), trunk(pre)[order])
    assert trunk(pre[:0]).shape == (0, 2, 5)


@pytest.mark.parametrize("config", KINDS)
def test_bfloat16_autocast(config: Trunk) -> None:
    trunk = make(config, tasks=2).float().eval()
    pre = torch.randn(16, trunk.width)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = trunk(pre)
    torch.testing.assert_close(low.float(), trunk(pre), rtol=0.05, atol=0.02)


@pytest.mark.parametrize("kind", [SharedBottom, WideAndDeep, Mmoe, Ple, Snr])
def test_dropout_acts_in_training_only(kind: type) -> None:
    trunk = make(kind(hidden=(16, 16), dropout=0.5), tasks=2)
    set_step(trunk, 0)
    pre = torch.randn(8, trunk.width, dtype=torch.float64)
    assert not torch.equal(trunk(pre), trunk(pre))
    trunk.eval()
    torch.testing.assert_close(trunk(pre), trunk(pre), rtol=0, atol=0)


def test_shared_bottom_is_one_mlp_for_all_tasks() -> None:
    trunk = make(SharedBottom(hidden=(6, 5)), tasks=3)
    pre = torch.randn(4, 6, dtype=torch.float64)
    linear = trunk.bottom[2][0]
    expected = torch.relu(linear(torch.relu(pre)))
    torch.testing.assert_close(trunk(pre), expected[:, None].expand(4, 3, 5))


def test_wide_and_deep_puts_each_tasks_linear_term_beside_the_shared_layers() -> None:
    trunk = make(WideAndDeep(hidden=(6, 4)), tasks=3)
    pre = torch.randn(7, trunk.width, dtype=torch.float64)
    linear = trunk.deep.bottom[2][0]
    weight, bias = (p.detach().numpy() for p in linear.parameters())
    deep = relu(relu(pre[:, :6].numpy()) @ weight.T + bias)
    for task in range(3):
        expected = np.column_stack([deep, pre[:, 6 + task].numpy()])  # not through a ReLU
        np.testing.assert_allclose(trunk(pre)[:, task].detach().numpy(), expected, rtol=1e-12)


def test_mmoe_is_the_gated_sum_of_its_experts() -> None:
    trunk = make(Mmoe(experts=3, hidden=(6, 5)), tasks=2)
    pre = torch.randn(4, trunk.width, dtype=torch.float64)
    raw = pre.numpy()
    outputs = [expert(trunk.experts[2], e, raw[:, 6 * e : 6 * e + 6]) for e in range(3)]
    for task in range(2):
        gate = softmax(raw[:, 18 + 3 * task : 21 + 3 * task])
        expected = sum(gate[:, e : e + 1] * outputs[e] for e in range(3))
        np.testing.assert_allclose(trunk(pre)[:, task].detach().numpy(), expected, rtol=1e-12)


def test_mmoe_of_one_expert_is_a_shared_bottom() -> None:
    trunk = make(Mmoe(experts=1, hidden=(6, 5)), tasks=3)
    pre = torch.randn(4, trunk.width, dtype=torch.float64)
    expected = expert(trunk.experts[2], 0, pre[:, :6].numpy())
    for task in range(3):
        np.testing.assert_allclose(trunk(pre)[:, task].detach().numpy(), expected, rtol=1e-12)


def test_ple_of_shared_experts_only_is_mmoe() -> None:
    ple = make(Ple(task_experts=0, shared_experts=3, hidden=(6, 5), layers=1), tasks=2)
    mmoe = make(Mmoe(experts=3, hidden=(6, 5)), tasks=2)
    mmoe.experts.load_state_dict(ple.layers[0].experts.state_dict())
    gates, first = torch.randn(4, 6, dtype=torch.float64), torch.randn(4, 18, dtype=torch.float64)
    torch.testing.assert_close(ple(torch.cat([gates, first], 1)), mmoe(torch.cat([first, gates], 1)))


def customized_gate(layer: Any, task_pre: np.ndarray, shared_pre: np.ndarray) -> list[np.ndarray]:
    """CGC by loops: 2 tasks with 2 experts each and 1 shared, width 6 -> 5; returns tasks, then shared."""
    experts: dict[Any, np.ndarray] = {
        **{
            (t, k): expert(layer.experts[2], 2 * t + k, task_pre[:, t, 6 * k : 6 * k + 6])
            for t in (0, 1)
            for k in (0, 1)
        },
        "shared": expert(layer.experts[2], 4, shared_pre[:, :6]),
    }
    outputs = []
    for t in (0, 1):
        gate = softmax(task_pre[:, t, 12:])
        seen = [experts[t, 0], experts[t, 1], experts["shared"]]
        outputs.append(sum(gate[:, [k]] * seen[k] for k in range(3)))
    if shared_pre.shape[1] > 6:
        gate = softmax(shared_pre[:, 6:])
        outputs.append(sum(gate[:, [k]] * e for k, e in enumerate(experts.values())))
    return outputs


def test_ple_is_stacked_customized_gates() -> None:
    trunk = make(Ple(task_experts=2, shared_experts=1, hidden=(6, 5), layers=2), tasks=2)
    pre = torch.randn(4, trunk.width, dtype=torch.float64)
    raw = pre.numpy()
    # 2 tasks x (2 experts x 6 + a gate of 3), then 1 expert x 6 + a gate of 5
    *tasks, shared = customized_gate(trunk.layers[0], raw[:, :30].reshape(4, 2, 15), raw[:, 30:])
    linear = trunk.to_tasks[0]
    weight, bias = linear.weight.detach().numpy(), linear.bias.detach().numpy()
    task_pre = np.stack([tasks[t] @ weight[t] + bias[t] for t in (0, 1)], axis=1)
    shared_pre = trunk.to_shared[0](torch.from_numpy(shared)).detach().numpy()
    expected = np.stack(customized_gate(trunk.layers[1], task_pre, shared_pre), axis=1)
    np.testing.assert_allclose(trunk(pre).detach().numpy(), expected, rtol=1e-10)


def test_ple_keeps_a_tasks_experts_to_itself() -> None:
    trunk = make(Ple(task_experts=2, shared_experts=1, hidden=(6, 5), layers=1), tasks=2)
    pre: Any = torch.randn(4, trunk.width, dtype=torch.float64, requires_grad=True)
    trunk(pre)[:, 0].sum().backward()
    gradient = trunk.layers[0].experts[2][0].weight.grad.abs().sum((1, 2))
    assert (gradient[[0, 1, 4]] > 0).all()
    assert (gradient[[2, 3]] == 0).all()
    assert pre.grad[:, 15:30].abs().sum() == 0  # the columns of task 1


def set_log_alpha(trunk: Any, *values: Tensor) -> list[np.ndarray]:
    """Set the log-alphas, level by level; returns the gates of evaluation by the paper's formula."""
    with torch.no_grad():
        for level, value in zip(trunk.routing, values, strict=True):
            level.gates.log_alpha.copy_(value)
    return [np.clip(1.2 / (1 + np.exp(-value.numpy())) - 0.1, 0, 1) for value in values]


def test_snr_trans_sums_gated_transforms() -> None:
    trunk = make(Snr(mode="trans", subnetworks=2, hidden=(3, 4)), tasks=3).eval()
    first, second = set_log_alpha(trunk, torch.randn(2, 2).double(), torch.randn(3, 2).double())
    pre = torch.randn(5, trunk.width, dtype=torch.float64)
    u = relu(pre.numpy().reshape(5, 2, 3))
    w, b = (p.detach().numpy() for p in trunk.routing[0].transform.parameters())
    w = w.reshape(2, 4, 2, 3)  # destination, out, source, in
    v = [b.reshape(2, 4)[i] + sum(first[i, j] * u[:, j] @ w[i, :, j].T for j in range(2)) for i in range(2)]
    u = np.stack([relu(x) for x in v])
    w = trunk.routing[1].transform.weight.detach().numpy().reshape(3, 4, 2, 4)
    expected = [sum(second[i, j] * u[j] @ w[i, :, j].T for j in range(2)) for i in range(3)]
    np.testing.assert_allclose(trunk(pre).detach().numpy(), np.stack(expected, 1), rtol=1e-10)


def test_snr_aver_sums_gated_sources() -> None:
    trunk = make(Snr(mode="aver", subnetworks=2, hidden=(3, 4)), tasks=3).eval()
    first, second = set_log_alpha(trunk, torch.randn(2, 2).double(), torch.randn(3, 2).double())
    pre = torch.randn(5, trunk.width, dtype=torch.float64)
    u = relu(pre.numpy().reshape(5, 2, 3))
    w, b = (p.detach().numpy() for p in trunk.routing[0].following.parameters())
    u = np.stack([relu(sum(first[i, j] * u[:, j] for j in range(2)) @ w[i] + b[i]) for i in range(2)])
    expected = [sum(second[i, j] * u[j] for j in range(2)) for i in range(3)]
    np.testing.assert_allclose(trunk(pre).detach().numpy(), np.stack(expected, 1), rtol=1e-10)


def test_snr_trans_with_open_gates_is_dense() -> None:
    trunk = make(Snr(mode="trans", subnetworks=2, hidden=(3, 4)), tasks=3).eval()
    set_log_alpha(trunk, torch.full((2, 2), 50.0), torch.full((3, 2), 50.0))
    pre = torch.randn(5, trunk.width, dtype=torch.float64)
    first, second = (level.transform for level in trunk.routing)
    expected = second(torch.relu(first(torch.relu(pre)))).view(5, 3, 4)
    torch.testing.assert_close(trunk(pre), expected)


@pytest.mark.parametrize("mode", ["trans", "aver"])
def test_snr_closed_edge_cuts_its_source_from_one_task_alone(mode: Any) -> None:
    trunk = make(Snr(mode=mode, subnetworks=2, hidden=(3,)), tasks=2).eval()
    set_log_alpha(trunk, torch.tensor([[-9.0, 9.0], [9.0, 9.0]]))
    pre: Any = torch.rand(5, trunk.width, dtype=torch.float64, requires_grad=True)  # positive: ReLU passes it
    trunk(pre)[:, 0].sum().backward()
    assert pre.grad[:, :3].abs().sum() == 0
    assert (pre.grad[:, 3:].abs().sum(0) > 0).all()
    pre.grad = None
    trunk(pre)[:, 1].sum().backward()
    assert (pre.grad.abs().sum(0) > 0).all()


def hard_concrete(log_alpha: float = 0.0, *, edges: int = 1, seed: int = 0, layer: int = 0) -> Any:
    return HardConcrete((edges, 1), initial_log_alpha=log_alpha, seed=seed, layer=layer)


def numpy_hard_concrete(log_alpha: float, size: int) -> np.ndarray:
    u = np.random.default_rng(0).uniform(size=size)
    s = 1 / (1 + np.exp(-(np.log(u) - np.log(1 - u) + log_alpha) / (2 / 3)))
    return np.clip(s * (1.1 - -0.1) - 0.1, 0, 1)


@pytest.mark.parametrize("log_alpha", [-1.5, 0.0, 2.0])
def test_gates_follow_the_hard_concrete_distribution(log_alpha: float) -> None:
    gates = hard_concrete(log_alpha, edges=40_000)
    set_step(gates, 3)
    drawn, oracle = gates().detach().numpy().ravel(), numpy_hard_concrete(log_alpha, 40_000)
    for share in (drawn == 0, drawn == 1):
        assert 0 < share.mean() < 1
    assert abs((drawn == 0).mean() - (oracle == 0).mean()) < 0.015
    assert abs((drawn == 1).mean() - (oracle == 1).mean()) < 0.015
    inside = [z[(z > 0) & (z < 1)] for z in (drawn, oracle)]
    assert stats.ks_2samp(*inside).pvalue > 1e-3


@pytest.mark.parametrize("log_alpha", [-1.5, 0.0, 2.0])
def test_expected_l0_is_the_probability_of_an_open_gate(log_alpha: float) -> None:
    # P(z > 0) = P(s > 1/12) = 1 - sigmoid(2/3·logit(1/12) - log_alpha), logit(1/12) = log(.1/1.1)
    closed_form = 1 / (1 + math.exp(2 / 3 * math.log(0.1 / 1.1) - log_alpha))
    assert hard_concrete(log_alpha).expected_l0().item() == pytest.approx(closed_form, abs=1e-6)
    gates = hard_concrete(log_alpha, edges=40_000)
    assert gates.expected_l0().item() == pytest.approx(40_000 * closed_form, rel=1e-5)
    assert (numpy_hard_concrete(log_alpha, 200_000) > 0).mean() == pytest.approx(closed_form, abs=0.005)
    set_step(gates, 0)
    assert (gates() > 0).double().mean().item() == pytest.approx(closed_form, abs=0.015)


@pytest.mark.parametrize(("log_alpha", "gate"), [(0.0, 0.5), (math.log(3), 0.8), (9.0, 1.0), (-9.0, 0.0)])
def test_evaluation_gates_are_deterministic(log_alpha: float, gate: float) -> None:
    gates = hard_concrete(log_alpha).eval()  # sigmoid(log 3) = .75; .75·1.2 - .1 = .8
    assert gates().item() == pytest.approx(gate, abs=1e-6)
    set_step(gates, 5)
    assert gates().item() == pytest.approx(gate, abs=1e-6)


def test_noise_is_a_function_of_seed_layer_and_step() -> None:
    def draw(*, seed: int = 1, layer: int = 1, step: int = 1) -> Tensor:
        gates = hard_concrete(edges=50, seed=seed, layer=layer)
        set_step(gates, step)
        return gates()

    state = torch.get_rng_state()
    torch.testing.assert_close(draw(), draw(), rtol=0, atol=0)
    for other in (draw(seed=2), draw(layer=2), draw(step=2)):
        assert (other != draw()).double().mean() > 0.5
    assert torch.equal(torch.get_rng_state(), state)  # the program's own random numbers stay as they were


def test_training_needs_a_step() -> None:
    with pytest.raises(AssertionError, match="set_step"):
        hard_concrete()()


def test_only_log_alpha_is_learned_each_edge_its_own() -> None:
    gates = hard_concrete(edges=200)
    assert [name for name, _ in gates.named_parameters()] == ["log_alpha"]
    assert set(gates.state_dict()) == {"log_alpha"}
    set_step(gates, 0)
    drawn = gates()
    drawn.sum().backward()
    inside = (drawn > 0) & (drawn < 1)
    torch.testing.assert_close(gates.log_alpha.grad > 0, inside)


def test_penalty_closes_gates() -> None:
    trunk = make(Snr(subnetworks=3, hidden=(4, 4)), tasks=2)
    before = expected_l0(trunk)
    before.backward()
    with torch.no_grad():
        for level in trunk.routing:
            assert (level.gates.log_alpha.grad > 0).all()
            level.gates.log_alpha -= level.gates.log_alpha.grad
    assert expected_l0(trunk) < before
    # 3·3 + 2·3 edges of log-alpha 0
    assert before.item() == pytest.approx(15 / (1 + (0.1 / 1.1) ** (2 / 3)), rel=1e-6)


def test_step_and_summary_reach_nested_trunks() -> None:
    model = nn.ModuleDict({"a": build_trunk(Snr(subnetworks=2, hidden=(4, 3)), tasks=3), "b": nn.Linear(1, 1)})
    set_step(model, 7)
    assert [m.step for m in model.modules() if isinstance(m, HardConcrete)] == [7, 7]
    summary = routing(model)
    assert {name: tuple(gates.shape) for name, gates in summary.items()} == {
        "a.routing.0.gates": (2, 2),
        "a.routing.1.gates": (3, 2),
    }
    assert all(torch.allclose(gates, torch.tensor(0.5)) and not gates.requires_grad for gates in summary.values())
    assert routing(model["b"]) == {}
    with pytest.raises(ValueError, match="snr"):
        expected_l0(model["b"])


def test_levels_draw_different_noise() -> None:
    trunk: Any = build_trunk(Snr(subnetworks=3, hidden=(4, 4, 4)), tasks=3)
    set_step(trunk, 0)
    drawn = [level.gates() for level in trunk.routing]
    assert not torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[1], drawn[2])


@pytest.mark.parametrize(
    ("kind", "wrong"),
    [
        (SharedBottom, {"hidden": ()}),
        (SharedBottom, {"dropout": 1.0}),
        (WideAndDeep, {"hidden": (8, 0)}),
        (WideAndDeep, {"dropout": -0.5}),
        (Mmoe, {"experts": 0}),
        (Mmoe, {"hidden": (8, -1)}),
        (Ple, {"task_experts": -1}),
        (Ple, {"shared_experts": 0}),
        (Ple, {"layers": 0}),
        (Snr, {"mode": "sum"}),
        (Snr, {"subnetworks": 0}),
    ],
)
def test_configs_refuse(kind: type, wrong: dict) -> None:
    with pytest.raises(ValueError, match=f"^{next(iter(wrong))}"):
        kind(**wrong)


def test_a_trunk_needs_a_task() -> None:
    with pytest.raises(ValueError, match="tasks"):
        build_trunk(Mmoe(), tasks=0)


def test_gates_of_different_modules_draw_different_noise() -> None:
    trunks = torch.nn.ModuleDict({name: build_trunk(Snr(hidden=(4,)), tasks=2, seed=0) for name in ("a", "b")})
    set_step(trunks, 3)
    a, b = (gate._noise() for gate in trunks.modules() if isinstance(gate, HardConcrete))
    assert not torch.equal(a, b)
