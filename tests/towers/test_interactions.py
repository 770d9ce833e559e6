"""Interactions of fields against loops in numpy, their degenerate cases, bfloat16 and export."""

from itertools import combinations
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from towers.interactions import Bilinear, DcnV2, Interaction, Pnn, build_interaction

FIELDS = {"user": 4, "age": 2, "item": 4, "genres": 3}
KINDS: list[Interaction] = [
    Pnn(dim=4),
    Bilinear(dim=4),
    Bilinear(dim=4, product="inner"),
    DcnV2(layers=2),
    DcnV2(layers=3, rank=2),
]


def make(config: Interaction, fields: dict[str, int] = FIELDS) -> Any:
    torch.manual_seed(0)
    return build_interaction(config, fields=fields).double()


def inputs(width: int = 13) -> Any:
    torch.manual_seed(1)
    return torch.randn(6, width, dtype=torch.float64, requires_grad=True)


def vectors(module: Any, x: Tensor) -> list[np.ndarray]:
    """Each field in width 4: user and item as they are, age and genres mapped."""
    parts = [part.numpy() for part in x.detach().split(list(FIELDS.values()), dim=1)]
    age, genres = (module.vectors.maps[k].weight.detach().numpy() for k in (1, 3))
    return [parts[0], parts[1] @ age.T, parts[2], parts[3] @ genres.T]


def test_pnn_appends_the_inner_products_of_all_pairs() -> None:
    module, x = make(Pnn(dim=4)), inputs()
    f = vectors(module, x)
    products = [(f[i] * f[j]).sum(1) for i, j in combinations(range(4), 2)]
    expected = np.column_stack([x.detach().numpy(), *products])
    np.testing.assert_allclose(module(x).detach().numpy(), expected, rtol=1e-12)
    assert module.out_dim == 13 + 6


def test_pnn_of_fields_of_its_width_has_no_parameters() -> None:
    module = make(Pnn(dim=2), {"a": 2, "b": 2, "c": 2})
    assert not list(module.parameters())
    out = module(torch.tensor([[1.0, 2.0, 3.0, 4.0, -1.0, 0.5]]))
    torch.testing.assert_close(out[:, 6:], torch.tensor([[3 + 8.0, -1 + 1.0, -3 + 2.0]]))


@pytest.mark.parametrize("product", ["hadamard", "inner"])
def test_bilinear_turns_the_left_field_of_every_pair(product: Any) -> None:
    module, x = make(Bilinear(dim=4, product=product)), inputs()
    f, w = vectors(module, x), module.weight.detach().numpy()
    products = [(f[i] @ w[i]) * f[j] for i, j in combinations(range(4), 2)]
    if product == "inner":
        products = [p.sum(1) for p in products]
    expected = np.column_stack([x.detach().numpy(), *products])
    np.testing.assert_allclose(module(x).detach().numpy(), expected, rtol=1e-12)
    assert module.out_dim == 13 + (6 if product == "inner" else 24)


def test_bilinear_of_unit_matrices_is_pnn() -> None:
    pnn, bilinear, x = make(Pnn(dim=4)), make(Bilinear(dim=4, product="inner")), inputs()
    bilinear.vectors.load_state_dict(pnn.vectors.state_dict())
    with torch.no_grad():
        bilinear.weight.copy_(torch.eye(4))
    torch.testing.assert_close(bilinear(x), pnn(x))


@pytest.mark.parametrize("rank", [None, 2])
def test_cross_layers(rank: int | None) -> None:
    module, x = make(DcnV2(layers=3, rank=rank)), inputs()
    first = crossed = x.detach().numpy()
    for layer in module.layers:
        if rank:
            v, u = layer
            assert v.weight.shape == (2, 13)
            weight, bias = u.weight @ v.weight, u.bias
        else:
            weight, bias = layer.weight, layer.bias
        crossed = first * (crossed @ weight.detach().numpy().T + bias.detach().numpy()) + crossed
    np.testing.assert_allclose(module(x).detach().numpy(), crossed, rtol=1e-10)
    assert module.out_dim == 13


def test_one_cross_layer_by_hand() -> None:
    module = make(DcnV2(layers=1), {"a": 1, "b": 1})
    with torch.no_grad():
        module.layers[0].weight.copy_(torch.tensor([[0.0, 1.0], [2.0, 0.0]]))
        module.layers[0].bias.copy_(torch.tensor([0.5, -1.0]))
    # 3·(5 + .5) + 3 and 5·(6 - 1) + 5
    out = module(torch.tensor([[3.0, 5.0]], dtype=torch.float64))
    torch.testing.assert_close(out, torch.tensor([[19.5, 30.0]], dtype=torch.float64))


@pytest.mark.parametrize("config", KINDS)
def test_rows_are_independent_and_all_parameters_learn(config: Interaction) -> None:
    module, x = make(config), inputs()
    out = module(x)
    assert out.shape == (6, module.out_dim)
    order = torch.tensor([3, 1, 5, 0, 2, 4])
    torch.testing.assert_close(module(x[order]), out[order])
    assert module(x[:0]).shape == (0, module.out_dim)
    out.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in module.parameters())


@pytest.mark.parametrize("config", [Pnn(dim=4), Bilinear(dim=4), Bilinear(dim=4, product="inner")])
def test_one_field_has_no_pair_and_leaves_no_parameter_out_of_the_graph(config: Interaction) -> None:
    module, x = make(config, {"item": 3}), inputs(3)
    torch.testing.assert_close(module(x), x, rtol=0, atol=0)
    module(x).sum().backward()
    assert all(p.grad is not None for p in module.parameters())


@pytest.mark.parametrize("config", KINDS)
def test_bfloat16_autocast_of_interactions(config: Interaction) -> None:
    module, x = make(config).float(), inputs().detach().float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = module(x)
    torch.testing.assert_close(low.float(), module(x), rtol=0.05, atol=0.1)


@pytest.mark.parametrize("config", KINDS)
def test_export_with_any_number_of_rows(config: Interaction) -> None:
    module, x = make(config), inputs().detach()
    program = torch.export.export(module, (x,), dynamic_shapes=({0: torch.export.Dim("rows", min=1)},)).module()
    torch.testing.assert_close(program(x[:2]), module(x[:2]))


def test_parameters_alone_are_saved() -> None:
    module = make(Pnn(dim=4))
    assert set(module.state_dict()) == {name for name, _ in module.named_parameters()}


@pytest.mark.parametrize(
    ("kind", "wrong"),
    [
        (Pnn, {"dim": 0}),
        (Bilinear, {"dim": 0}),
        (Bilinear, {"product": "outer"}),
        (DcnV2, {"layers": 0}),
        (DcnV2, {"rank": 0}),
    ],
)
def test_interaction_configs_refuse(kind: type, wrong: dict) -> None:
    with pytest.raises(ValueError, match=f"^{next(iter(wrong))}"):
        kind(**wrong)


def test_an_interaction_needs_a_field() -> None:
    with pytest.raises(ValueError, match="interaction"):
        build_interaction(Pnn(), fields={})
