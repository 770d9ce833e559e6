"""Operations within a request, on ragged candidates: those of request r lie at offsets[r] : offsets[r + 1].

Losses over [N, T] logits see T x R independent lists: tasks are laid end to end (`by_task`), so that
everything else knows only flat values [n] and offsets.
"""

import math

import torch
from torch import Tensor
from torch.nn.functional import pad


def by_task(x: Tensor) -> Tensor:
    """[N] as it is; [N, T] as [T * N], one task after another."""
    return x if x.dim() == 1 else x.t().reshape(-1)


def from_task(x: Tensor, logits: Tensor) -> Tensor:
    """Undo `by_task`: flat values in the shape of `logits`."""
    return x if logits.dim() == 1 else x.view(logits.shape[1], -1).t()


def list_offsets(offsets: Tensor, logits: Tensor) -> Tensor:
    """`offsets [R+1]` of `logits` ([N] or [N, T]) for the layout of `by_task`: [T * R + 1]. Checks both."""
    if logits.dim() not in (1, 2):
        raise ValueError(f"logits have shape {list(logits.shape)}, expected [N] or [N, T]")
    if offsets.dim() != 1 or not len(offsets) or not _partition(offsets, len(logits)):
        raise ValueError(f"offsets must be [R + 1] and rise from 0 to the {len(logits)} candidates")
    if logits.dim() == 1:
        return offsets
    starts = len(logits) * torch.arange(logits.shape[1], device=offsets.device).unsqueeze(1) + offsets[:-1]
    return pad(starts.flatten(), (0, 1), value=logits.numel())


def _partition(offsets: Tensor, candidates: int) -> bool:
    """Whether `offsets` cut 0 : candidates into requests; one wait for the device."""
    ends = offsets[0] == 0, offsets[-1] == candidates
    return bool(torch.stack([*ends, (offsets.diff() >= 0).all()]).all())


def ranges(start: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    """All (k, p) with start[k] <= p < start[k] + count[k], in order: two [sum of count] tensors."""
    owner = torch.arange(len(count), device=count.device).repeat_interleave(count)
    first = count.cumsum(0) - count
    return owner, torch.arange(len(owner), device=count.device) + (start - first)[owner]


def list_of(offsets: Tensor) -> Tensor:
    """[n]: the list that each flat candidate belongs to."""
    return ranges(offsets[:-1], offsets.diff())[0]


def segment_sum(x: Tensor, segment: Tensor, segments: int) -> Tensor:
    """[segments]: sums of `x [n]` by `segment [n]`; 0 where a segment is empty."""
    return x.new_zeros(segments).index_add(0, segment, x)


def segment_max(x: Tensor, segment: Tensor, segments: int) -> Tensor:
    """[segments]: maxima of `x [n]` by `segment [n]`, without gradient; 0 where a segment is empty."""
    return x.new_zeros(segments).scatter_reduce(0, segment, x.detach(), "amax", include_self=False)


def segment_sum_exp(x: Tensor, segment: Tensor, segments: int) -> tuple[Tensor, Tensor]:
    """[segments] each: the sum of exp(x) by segment as exp(peak) * total; (-inf, 0) where one is empty.

    Apart, because peak + log(total) rounds the total away where the peak is large. No gradient by the peak.
    """
    peak = segment_max(x, segment, segments)
    total = segment_sum((x - peak[segment]).exp(), segment, segments)
    return peak.masked_fill(total == 0, -math.inf), total


def segment_log_softmax(x: Tensor, segment: Tensor, segments: int) -> Tensor:
    """[n]: log softmax of `x` within each segment; exact for logits of any finite size."""
    shifted = x - segment_max(x, segment, segments)[segment]
    return shifted - segment_sum(shifted.exp(), segment, segments).log()[segment]
