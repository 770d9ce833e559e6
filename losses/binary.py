"""Pointwise log loss."""

import torch
from torch import Tensor
from torch.nn.functional import softplus

from losses.term import LossTerm, in_full, like, sum_units


def binary(
    logits: Tensor,
    labels: Tensor,
    *,
    positive_weight: Tensor | float | None = None,
    mask: Tensor | None = None,
) -> LossTerm:
    """Log loss of `logits` ([N] or [N, T]) against `labels`, 0/1 or soft; a unit is a candidate.

    -w y log sigma(s) - (1 - y) log(1 - sigma(s)). `positive_weight` w ([N], [N, T] or a number) bears on the
    positive part only: with minutes watched as w, the odds approach the expected minutes. What `mask` (bool,
    True = a unit) leaves out may be NaN or inf. No gradient reaches labels and weights.

    Source: RRA Eq 1-2; SDCL Eq 3 with y the label. A label (y + p) / 2 is Wang's mixed label.
    """
    s = in_full(logits)
    y = like(labels, logits, "labels").detach().to(s.dtype)
    w = torch.ones_like(y)
    if isinstance(positive_weight, Tensor) and positive_weight.dim():
        w = like(positive_weight, logits, "positive_weight").detach().to(s.dtype)
    elif positive_weight is not None:
        w = w * float(positive_weight)
    if mask is not None:
        mask = like(mask, logits, "mask")
        s, y, w = (x.where(mask, 0) for x in (s, y, w))
    return sum_units(log_loss(s, y * w, 1 - y), mask)


def log_loss(s: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
    """-positive log sigma(s) - negative log sigma(-s), elementwise; free of cancellation and overflow."""
    return positive * softplus(-s, threshold=40) + negative * softplus(s, threshold=40)
