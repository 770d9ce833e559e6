"""Pointwise distillation."""

from torch import Tensor

from losses.binary import log_loss
from losses.term import LossTerm, check_positive, chosen_like, in_full, like, sum_units


def distillation(student: Tensor, teacher: Tensor, *, temperature: float = 1.0, mask: Tensor | None = None) -> LossTerm:
    """Log loss of sigma(student / T) against sigma(teacher / T), both logits ([N] or [N, T]).

    A unit is a candidate that `mask` (bool) selects; the others may be NaN or inf. The teacher is detached.
    The value is not scaled by T^2. Source: RRA Eq 5-6, SDCL Eq 5 (there T = 1).
    """
    check_positive(temperature=temperature)
    s = in_full(student)
    t = like(teacher, student, "teacher").detach().to(s.dtype)
    if mask is not None:
        mask = chosen_like(mask, student, "mask")
        s, t = s.where(mask, 0), t.where(mask, 0)
    s, t = s / temperature, t / temperature
    return sum_units(log_loss(s, t.sigmoid(), (-t).sigmoid()), mask)
