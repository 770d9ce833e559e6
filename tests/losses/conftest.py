"""Ragged random inputs for the within-request losses."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor


class Ragged(NamedTuple):
    """Seven requests: empty, one candidate, two, many; logits and priorities with ties; [N] numpy float64."""

    offsets: NDArray[np.int64]
    logits: NDArray[np.float64]
    teacher: NDArray[np.float64]
    priority: NDArray[np.int64]
    first: NDArray[np.bool_]
    second: NDArray[np.bool_]
    weight: NDArray[np.float64]
    features: NDArray[np.float64]

    def tensors(self, *names: str) -> list[Tensor]:
        """The named fields as (float64) tensors."""
        return [torch.as_tensor(getattr(self, name)) for name in names]


@pytest.fixture(params=range(4))
def ragged(request: pytest.FixtureRequest) -> Ragged:
    rng = np.random.default_rng(request.param)
    lengths = rng.permutation([0, 1, 2, 5, 9, 0, 17])
    n = lengths.sum()
    features = rng.normal(size=(n, 6))
    features[rng.random(n) < 0.1] = 0
    return Ragged(
        offsets=np.concatenate([[0], lengths.cumsum()]),
        logits=rng.normal(size=n).round(1) * 3,
        teacher=rng.normal(size=n).round(1) * 2,
        priority=rng.integers(0, 4, n),
        first=rng.random(n) < 0.4,
        second=rng.random(n) < 0.6,
        weight=rng.random(n) * 2,
        features=features,
    )


@pytest.fixture
def numeric_gradient() -> Callable[[Callable[[NDArray[np.float64]], float], NDArray[np.float64]], Tensor]:
    """Central differences of an oracle."""

    def differences(oracle: Callable[[NDArray[np.float64]], float], x: NDArray[np.float64]) -> Tensor:
        steps = 1e-6 * np.eye(len(x))
        return torch.tensor([(oracle(x + h) - oracle(x - h)) / 2e-6 for h in steps], dtype=torch.float64)

    return differences
