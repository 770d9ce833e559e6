"""Aligned to whom: a head's order of the logged candidates against its own teacher's, another's, the log's, the truth.

A student may agree with a bad teacher; so the same pool of candidates is held against every order that there is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor
from torch.nn.functional import pad

from joint import metrics
from joint.batch import Batch
from joint.experiment import Config
from joint.metrics import PerRequest
from joint.outputs import Outputs

STUDENTS = {"retrieval": "alignment/retrieval_reverse_rate", "pre_ranking": "alignment/reverse_rate"}


def to_the_teacher(
    config: Config, batch: Batch, outputs: Outputs, scores: Mapping[str, Tensor]
) -> Iterator[tuple[str, PerRequest]]:
    """SDCL's reverse rate of each student, per task and fused, and RRA's kind of overlap, against its own teacher."""
    for student, name in STUDENTS.items():
        if student in outputs and "ranking" in outputs:
            for index, task in enumerate(config.tasks):
                pair = outputs[student].logits[:, index], outputs["ranking"].logits[:, index]
                yield f"{name}/{task}", metrics.kendall_by_request(*pair, batch.offsets)
            fused = scores[student], scores["ranking"]
            yield f"{name}/fused", metrics.kendall_by_request(*fused, batch.offsets)
            for k in config.evaluation.k:
                overlap = metrics.overlap_by_request(*fused, batch.offsets, k)
                yield f"alignment/teacher/overlap@{k}/{student}", overlap


def to_order(
    whose: str, order: Tensor, scores: Mapping[str, Tensor], batch: Batch, k: tuple[int, ...]
) -> Iterator[tuple[str, PerRequest]]:
    """`alignment/WHOSE/reverse_rate/HEAD` and `…/overlap@K/HEAD`, on the candidates that have a place in the order.

    Args:
        order: `[N]`, higher is better, NaN outside of it.
        scores: head -> its fused scores `[N]`.
    """
    inside = ~order.isnan()
    offsets = pad(inside.cumsum(0), (1, 0))[batch.offsets]
    for head, score in scores.items():
        pair = score[inside].double(), order[inside].double()
        yield f"alignment/{whose}/reverse_rate/{head}", metrics.kendall_by_request(*pair, offsets)
        for cut in k:
            yield f"alignment/{whose}/overlap@{cut}/{head}", metrics.overlap_by_request(*pair, offsets, cut)


def logged_order(places: Tensor) -> Tensor:
    """A logged order as scores: `places [N]` from 0 on, negative outside of it."""
    places = places.double()
    return (-places).where(places >= 0, torch.nan)
