"""What every loss returns, and the arithmetic they share."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor


class LossTerm(NamedTuple):
    """A sum over units and the number of units, so that ranks of uneven size can be added before dividing.

    `total` and `count` are [] or, one per task, [T], in float32 (float64 for float64 input). Weights enter
    `total`, never `count`. Without units both are 0 and the gradient is 0.
    """

    total: Tensor
    count: Tensor  # type: ignore[assignment]  # hides tuple.count, which nobody needs here


def in_full(x: Tensor) -> Tensor:
    """`x` in the dtype of reductions: float64 stays, everything else becomes float32."""
    return x if x.dtype == torch.float64 else x.float()


def like(x: Tensor, logits: Tensor, name: str) -> Tensor:
    """`x` ([N], or [N, T] as `logits`) in the shape of `logits`; a ValueError names what does not fit."""
    if x.shape == logits.shape:
        return x
    if x.dim() == 1 and logits.dim() == 2 and len(x) == len(logits):
        return x.unsqueeze(1).expand_as(logits)
    expected = f"{list(logits.shape)}" + (f" or [{len(logits)}]" if logits.dim() == 2 else "")
    raise ValueError(f"{name} has shape {list(x.shape)}, expected {expected}")


def check_positive(**settings: float) -> None:
    """A ValueError naming the first setting that is not above 0."""
    for name, value in settings.items():
        if not value > 0:
            raise ValueError(f"{name} is {value}, expected a number above 0")


@contextmanager
def forming_gradients(device: torch.device) -> Iterator[None]:
    """No graph, no autocast: for code that computes a value and, by hand, its gradient in full precision."""
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        yield


class _Attach(torch.autograd.Function):
    """The identity on `total`, with gradients given instead of derived."""

    @staticmethod
    def forward(ctx: Any, total: Tensor, *inputs_then_gradients: Tensor) -> Tensor:
        half = len(inputs_then_gradients) // 2
        ctx.save_for_backward(*inputs_then_gradients[half:])
        return total.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        gradients = [upstream * gradient for gradient in ctx.saved_tensors]
        return None, *gradients, *[None] * len(gradients)


def attach(total: Tensor, *inputs: tuple[Tensor, Tensor]) -> Tensor:
    """`total` ([] or [T]) as a node of the graph, from (input, d total / d input) pairs formed beside it.

    Formed while a block is in cache, the gradient spares a backward that recomputes, and nothing of the size
    of all pairs outlives its block. A [T] total goes with inputs [N, T]. No second derivative.
    """
    return _Attach.apply(total, *(x for x, _ in inputs), *(gradient for _, gradient in inputs))


def sum_units(value: Tensor, mask: Tensor | None) -> LossTerm:
    """The term of values per candidate ([N] or [N, T]) whose units `mask` selects (None: all of them)."""
    if mask is None:
        return LossTerm(value.sum(0), value.new_full(value.shape[1:], len(value)))
    return LossTerm(value.where(mask, 0).sum(0), mask.sum(0).to(value.dtype))
