"""Aligned to whom: a head's order of the logged candidates against its own teacher's, another's, the log's, the truth.

A student may agree with a bad teacher; so the same pool of candidates is held against every order that there is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import combinations

import torch
from torch import Tensor
from torch.nn.functional import pad

from joint import metrics
from joint.batch import Batch
from joint.experiment import Config
from joint.metrics import PerRequest
from joint.outputs import Outputs
from joint.ranks import check_ragged, request_of
from joint.schema import Schema
from joint.spaces import stage_mask
from losses.blocks import pair_blocks

STUDENTS = {"retrieval": "alignment/retrieval_reverse_rate", "pre_ranking": "alignment/reverse_rate"}


def to_the_teacher(
    config: Config, schema: Schema, batch: Batch, outputs: Outputs, scores: Mapping[str, Tensor]
) -> Iterator[tuple[str, PerRequest]]:
    """SDCL's reverse rate of each student, per task and fused, and RRA's kind of overlap, against its own teacher.

    Where the log has more than exposures, overlap also among these and among the others apart: a student may agree
    with its teacher on what users saw, and not on what it has to choose from (CRR, RecSys'26). There requests of no
    more than K candidates are left out, whose overlap is 1 whatever the heads say. Where it is logged what entered
    ranking, the fused reverse rate among that as well: the pairs of SDCL Eq 9.
    """
    exposed = stage_mask(("exposed",), batch.stages)
    parts = {"exposed": exposed, "unexposed": ~exposed} if {*schema.stages} - {"exposed"} else {}
    entered = schema.input_space.get("ranking", ())
    for student, name in STUDENTS.items():
        if student in outputs and "ranking" in outputs:
            for index, task in enumerate(config.tasks):
                pair = outputs[student].logits[:, index], outputs["ranking"].logits[:, index]
                yield f"{name}/{task}", metrics.kendall_by_request(*pair, batch.offsets)
            fused = scores[student], scores["ranking"]
            yield f"{name}/fused", metrics.kendall_by_request(*fused, batch.offsets)
            if entered:
                inside = stage_mask(("exposed", *entered), batch.stages)
                pair = fused[0][inside], fused[1][inside]
                yield f"{name}/fused/entered_ranking", metrics.kendall_by_request(*pair, _offsets(inside, batch))
            for k in config.evaluation.k:
                overlap = metrics.overlap_by_request(*fused, batch.offsets, k)
                yield f"alignment/teacher/overlap@{k}/{student}", overlap
                for part, those in parts.items():
                    yield f"alignment/teacher/overlap@{k}/{student}/{part}", _overlap_in(those, *fused, batch, k)


def _overlap_in(inside: Tensor, a: Tensor, b: Tensor, batch: Batch, k: int) -> PerRequest:
    offsets = _offsets(inside, batch)
    overlap = metrics.overlap_by_request(a[inside], b[inside], offsets, k)
    more = (offsets.diff() > k).cpu()
    return PerRequest(overlap.total * more, overlap.count * more)


def _offsets(inside: Tensor, batch: Batch) -> Tensor:
    """`[R + 1]` of the candidates `inside [N]` alone."""
    return pad(inside.cumsum(0), (1, 0))[batch.offsets]


def of_fusions(batch: Batch, outputs: Outputs, scores: Mapping[str, Tensor]) -> Iterator[tuple[str, PerRequest]]:
    """`alignment/fusion_inconsistency/HEAD/LATER_HEAD`: see `fusion_inconsistency`."""
    for head, later in combinations(outputs, 2):
        logits, fused = (outputs[head].logits, outputs[later].logits), (scores[head], scores[later])
        yield f"alignment/fusion_inconsistency/{head}/{later}", fusion_inconsistency(*logits, *fused, batch.offsets)


def fusion_inconsistency(a: Tensor, b: Tensor, fused_a: Tensor, fused_b: Tensor, offsets: Tensor) -> PerRequest:
    """Share of a request's pairs that two heads order alike for every task, but fused the other way (SDCL Table 2).

    The share is of all pairs, so it is the part of the fused reverse rate that no agreement on tasks can mend. A pair
    tied for a task in both heads is alike, in one it is not; fused, a pair tied in exactly one counts ½.

    Args:
        a, b: the heads' scores by task `[N, T]`; fused_a, fused_b: as one score `[N]`. Unit: request of ≥ 2.
    """
    offsets = check_ragged(offsets, fused_a=fused_a, fused_b=fused_b)
    tasks = [(pad(x, (0, 1)), pad(y, (0, 1))) for x, y in zip(a.T, b.T, strict=True)]  # the last place is padding
    x, y = pad(fused_a, (0, 1)), pad(fused_b, (0, 1))
    everyone = torch.ones_like(fused_a, dtype=torch.bool)
    request = request_of(offsets)
    total = torch.zeros(len(offsets) - 1, dtype=torch.float64, device=a.device)
    for i, j, real in pair_blocks(everyone, everyone, offsets):  # both ways round: i and j are the same places
        alike = real
        for s, t in tasks:
            alike = alike & (_above(s, i, j) == _above(t, i, j))
        alike = alike & alike.transpose(1, 2)
        # Of the two ways round a discordant pair differs in both, one that is tied in exactly one head in one.
        total[request[i[:, 0]]] = (alike & (_above(x, i, j) != _above(y, i, j))).sum((1, 2)).double() / 2
    lengths = offsets.diff().double()
    several = lengths >= 2
    return PerRequest.of((total / (lengths * (lengths - 1) / 2)).where(several, 0), several)


def _above(x: Tensor, i: Tensor, j: Tensor) -> Tensor:
    """`x[i] > x[j]` of every pair of a block `[B, K, K]`."""
    return x[i].unsqueeze(2) > x[j].unsqueeze(1)


def to_order(
    whose: str, order: Tensor, scores: Mapping[str, Tensor], batch: Batch, k: tuple[int, ...]
) -> Iterator[tuple[str, PerRequest]]:
    """`alignment/WHOSE/reverse_rate/HEAD` and `…/overlap@K/HEAD`, on the candidates that have a place in the order.

    Args:
        order: `[N]`, higher is better, NaN outside of it.
        scores: head -> its fused scores `[N]`.
    """
    inside = ~order.isnan()
    offsets = _offsets(inside, batch)
    for head, score in scores.items():
        pair = score[inside].double(), order[inside].double()
        yield f"alignment/{whose}/reverse_rate/{head}", metrics.kendall_by_request(*pair, offsets)
        for cut in k:
            yield f"alignment/{whose}/overlap@{cut}/{head}", metrics.overlap_by_request(*pair, offsets, cut)


def logged_order(places: Tensor) -> Tensor:
    """A logged order as scores: `places [N]` from 0 on, negative outside of it."""
    places = places.double()
    return (-places).where(places >= 0, torch.nan)
