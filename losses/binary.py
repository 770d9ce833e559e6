"""Pointwise log loss."""

import torch
from torch import Tensor
from torch.nn.functional import softplus

from losses.term import LossTerm, chosen_like, in_full, like, sum_units, weight_like


def binary(
    logits: Tensor,
    labels: Tensor,
    *,
    positive_weight: Tensor | float | None = None,
    mask: Tensor | None = None,
) -> LossTerm:
    """Log loss of `logits` ([N] or [N, T]) against `labels`, 0/1 or soft; a unit is a candidate.

    -w y log sigma(s) - (1 - y) log(1 - sigma(s)). `positive_weight` w bears on the positive part only: with
    minutes watched as w, the odds approach the expected minutes. It is a number, [N], [N, T], or per task
    [1, T]; [T] too, unless N = T: then one dimension means the candidates. What `mask` (bool, True = a unit)
    leaves out may be NaN or inf. No gradient reaches labels and weights.

    Source: RRA Eq 1-2; SDCL Eq 3 with y the label. A label (y + p) / 2 is Wang's mixed label.
    """
    s = in_full(logits)
    y = like(labels, logits, "labels").detach().to(s.dtype)
    if isinstance(positive_weight, Tensor) and _per_task(positive_weight, logits):
        positive_weight = positive_weight.expand_as(logits)
    w = weight_like(1.0 if positive_weight is None else positive_weight, logits, "positive_weight")
    if mask is not None:
        mask = chosen_like(mask, logits, "mask")
        s, y, w = (x.where(mask, 0) for x in (s, y, w))
    return sum_units(log_loss(s, y * w, 1 - y), mask)


def _per_task(weight: Tensor, logits: Tensor) -> bool:
    """Whether `weight` has one value for each column of `logits`, and not one for each row."""
    if logits.dim() != 2:
        return False
    n, tasks = logits.shape
    return weight.shape == (1, tasks) or (weight.shape == (tasks,) and n != tasks)


def log_loss(s: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
    """-positive log sigma(s) - negative log sigma(-s), elementwise; free of cancellation and overflow.

    An infinite logit counts as the largest finite one: the part that weighs 0 is 0.
    """
    largest = torch.finfo(s.dtype).max
    s = s.clamp(-largest, largest)
    return positive * softplus(-s, threshold=40) + negative * softplus(s, threshold=40)
