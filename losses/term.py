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


def chosen_like(mask: Tensor, logits: Tensor, name: str) -> Tensor:
    """A mask (bool, or 0 and 1 of any dtype; [N], or [N, T] as `logits`) as bool in the shape of `logits`."""
    return like(mask, logits, name).bool()


def weight_like(x: Tensor | float, logits: Tensor, name: str) -> Tensor:
    """Weights (a number, [N], or [N, T] as `logits`) in the shape of `logits`, detached, for reductions."""
    dtype = torch.promote_types(logits.dtype, torch.float32)
    x = torch.as_tensor(x, dtype=dtype, device=logits.device).detach()
    return like(x, logits, name) if x.dim() else x.expand_as(logits)


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
    def forward(ctx: Any, total: Tensor, count: int, *inputs_gradients_links: Tensor) -> Tensor:
        ctx.count = count
        ctx.save_for_backward(*inputs_gradients_links[count:])
        return total.clone()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        gradients, links = ctx.saved_tensors[: ctx.count], ctx.saved_tensors[ctx.count :]
        once = [_Once.apply(upstream * x, link) for x, link in zip(gradients, links, strict=True)]
        return None, None, *once, *[None] * (2 * ctx.count)


class _Once(torch.autograd.Function):
    """The identity on a gradient, and an error for who differentiates it.

    torch's own once_differentiable cuts the graph here: as one term of several, the second derivative would
    silently lack this one. `link` holds no numbers, only the place of the input in the graph.
    """

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, link: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, Tensor]:
        raise RuntimeError("this loss has no second derivative: its gradient is formed by hand")


def attach(total: Tensor, *inputs: tuple[Tensor, Tensor]) -> Tensor:
    """`total` ([] or [T]) as a node of the graph, from (input, d total / d input) pairs formed beside it.

    Formed while a block is in cache, the gradient spares a backward that recomputes, and nothing of the size
    of all pairs outlives its block. A [T] total goes with inputs [N, T]. A second derivative is a RuntimeError.
    """
    tensors, gradients = zip(*inputs, strict=True)
    return _Attach.apply(total, len(inputs), *tensors, *gradients, *(x[:0].clone() for x in tensors))


def sum_units(value: Tensor, mask: Tensor | None) -> LossTerm:
    """The term of values per candidate ([N] or [N, T]) whose units `mask` selects (None: all of them)."""
    if mask is None:
        return LossTerm(value.sum(0), value.new_full(value.shape[1:], len(value)))
    return LossTerm(value.where(mask, 0).sum(0), mask.sum(0).to(value.dtype))
