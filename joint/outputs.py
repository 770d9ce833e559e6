"""What the heads hand to the objectives and to evaluation."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass
class HeadOutput:
    """One head's scores and the representations that losses need."""

    logits: Tensor  # [N, T]; 0 where not computed
    computed: Tensor  # [N] bool
    features: Tensor | None = None  # [N, F] what adaptive negative weights compare: the (gated) item side
    user: Tensor | None = None  # retrieval: [R, T, D], the temperature folded in
    corpus: Tensor | None = None  # retrieval: [C', D], all ranks' pool items in order
    corpus_log_q: Tensor | None = None  # [C'], inf on padding and on items of later days
    expected_l0: Tensor | None = None  # []: the expected number of open gates, of a head with SNR trunks


Outputs = dict[str, HeadOutput]  # by head
