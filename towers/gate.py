"""The Negative Sample Gate Unit of SDCL: learned weights on the input features, before the first layer."""

from dataclasses import dataclass

from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class Gate:
    """Configures `GateUnit`: its largest weight `alpha`, and its hidden width (None: that of its input)."""

    alpha: float = 2.0
    hidden: int | None = None

    def __post_init__(self) -> None:
        if self.alpha <= 0.0:
            raise ValueError(f"gate alpha must be positive, got {self.alpha}")
        if self.hidden is not None and self.hidden < 1:
            raise ValueError(f"gate hidden must be positive, got {self.hidden}")


class GateUnit(nn.Module):
    """`x ⊙ alpha·sigmoid(W2 relu(W1 x + b1) + b2)`: `[..., in_dim] -> [..., in_dim]` (SDCL Eq 6).

    Its input must never tell the stage a candidate came from: serving does not know it, and in training it
    gives the answer away.
    """

    def __init__(self, config: Gate, *, in_dim: int) -> None:
        super().__init__()
        hidden = config.hidden or in_dim
        self.alpha = config.alpha
        self.weights = nn.Sequential(nn.Linear(in_dim, hidden), nn.ReLU(), nn.Linear(hidden, in_dim), nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        """`[..., in_dim]` of `x [..., in_dim]`: each feature times its weight in [0, alpha]."""
        return x * (self.alpha * self.weights(x))
