"""What the heads hand to the objectives and to evaluation."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass
class Pool:
    """All ranks' pool items as columns, each item at most once where it was sampled.

    `log_q [C]`: the log of a column's chance to be here, by space; +inf leaves a column out (padding, an item of a
    later day, one that the space does not hold).
    """

    vectors: Tensor  # [C, D]
    target: Tensor  # [N] the column of each candidate, -1: none
    excluded: Tensor  # [E, 2] (request, column) that are not eligible
    log_q: dict[str, Tensor]


@dataclass
class Views:
    """Two views of items, as vectors: the first of this rank's items, the second of all ranks'."""

    first: Tensor  # [M, D]
    second: Tensor  # [P, D]
    target: Tensor  # [M] the place of each first view's item among the second ones
    item: Tensor  # [P] item index


@dataclass
class HeadOutput:
    """One head's scores and the representations that losses need."""

    logits: Tensor  # [N, T]; 0 where not computed
    computed: Tensor  # [N] bool
    features: Tensor | None = None  # [N, F] what adaptive negative weights compare: the (gated) item side
    user: Tensor | None = None  # retrieval: [R, T, D], the temperature folded in
    pool: Pool | None = None  # retrieval: what its softmax is over
    views: Views | None = None  # retrieval: in training, where an objective is about them
    corrected: Tensor | None = None  # ranking with a residual: [N, T], what is served; a gradient of the residual alone
    special: Tensor | None = None  # ranking with a residual: [N] bool, whose logits it corrects
    expected_l0: Tensor | None = None  # []: the expected number of open gates, of a head with SNR trunks


Outputs = dict[str, HeadOutput]  # by head
