"""Views of one thing that should be alike."""

import torch
from torch import Tensor
from torch.nn.functional import normalize

from losses.multi_class import multi_class_vectors
from losses.term import LossTerm, check_positive, in_full


def info_nce(
    first: Tensor, second: Tensor, target: Tensor, *, item_ids: Tensor | None = None, temperature: float = 0.1
) -> LossTerm:
    """Softmax loss of each first view against all second ones, by their cosine; a unit is a first view.

    -log(e^(cos(f_m, g_target[m]) / T) / sum_p e^(cos(f_m, g_p) / T)) for `first [M, D]`, `second [P, D]` and
    `target [M]`, the place of its other view. Others with the target's id in `item_ids [P]` are left out. The
    cosine of a zero vector is 0. Gradients reach both views. ValueError for a temperature not above 0.

    Source: Yao et al. 2021, Eq 1; InfoNCE: van den Oord et al. 2018.
    """
    check_positive(temperature=temperature)
    f, g = normalize(in_full(first), dim=1), normalize(in_full(second), dim=1)
    row = torch.arange(len(first), device=first.device)
    return multi_class_vectors(f, g, row, target, item_ids=item_ids, scale=1 / temperature)
