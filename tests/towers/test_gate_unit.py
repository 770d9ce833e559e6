"""The gate of SDCL Eq 6 against numpy."""

import numpy as np
import pytest
import torch

from towers.gate import Gate, GateUnit


@pytest.mark.parametrize(("alpha", "hidden"), [(2.0, None), (3.0, 2)])
def test_gate_is_equation_6(alpha: float, hidden: int | None) -> None:
    torch.manual_seed(0)
    unit = GateUnit(Gate(alpha=alpha, hidden=hidden), in_dim=5)
    w1, b1, w2, b2 = (p.detach().double().numpy() for p in unit.parameters())
    assert w1.shape == (hidden or 5, 5)
    x = torch.randn(7, 5)
    raw = x.double().numpy()
    weights = alpha / (1 + np.exp(-(np.maximum(raw @ w1.T + b1, 0) @ w2.T + b2)))
    np.testing.assert_allclose(unit(x).detach().numpy(), raw * weights, rtol=1e-5, atol=1e-6)


def test_weights_stay_between_zero_and_alpha() -> None:
    torch.manual_seed(0)
    unit = GateUnit(Gate(), in_dim=4)
    with torch.no_grad():
        for parameter in unit.parameters():
            parameter.mul_(50)
    x = torch.randn(200, 4)
    weights = unit(x) / x
    assert weights.min() >= 0
    assert weights.max() <= 2.0 + 1e-6
    assert weights.min() < 0.1  # and they use the whole range
    assert weights.max() > 1.9


def test_without_weights_the_gate_of_alpha_2_lets_the_input_through() -> None:
    unit = GateUnit(Gate(alpha=2.0), in_dim=3)
    with torch.no_grad():
        for parameter in unit.parameters():
            parameter.zero_()
    x = torch.randn(2, 3)
    torch.testing.assert_close(unit(x), x)
    assert unit(x[:0]).shape == (0, 3)


@pytest.mark.parametrize("wrong", [{"alpha": 0.0}, {"alpha": -1.0}, {"hidden": 0}])
def test_config_refuses(wrong: dict) -> None:
    with pytest.raises(ValueError, match="gate"):
        Gate(**wrong)
