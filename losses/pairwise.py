"""Losses over the pairs of candidates of one request."""

import math

import torch
from torch import Tensor
from torch.nn.functional import softplus

from losses.blocks import Ledger, padded, pair_blocks
from losses.segments import by_task, list_of, list_offsets, segment_max
from losses.term import LossTerm, chosen_like, forming_gradients, in_full, weight_like


def pairwise(
    logits: Tensor,
    priority: Tensor,
    offsets: Tensor,
    *,
    winner: Tensor | None = None,
    loser: Tensor | None = None,
    weight: Tensor | float | None = None,
) -> LossTerm:
    """Logistic loss of the pairs in which one candidate of a request should beat another; a unit is a pair.

    Sum of weight_i softplus(-(o_i - o_j)) over the pairs with priority_i > priority_j (equal priorities make
    no pair), i in `winner`, j in `loser`. `offsets` is [R+1], all else [N], or [N, T] as `logits`; `weight`
    may be a number; `winner` and `loser` are bool, None = all. Logits of candidates in no pair may be NaN.

    Source: FS-LTR (RecFlow Eq 1). Winners = positives: its PositiveRank (3.2.2); losers = stage samples: its
    auxiliary ranking loss (Eq 2); losers = random samples: BPR.
    """
    lists = list_offsets(offsets, logits)
    p = padded(priority if priority.is_floating_point() else priority.long(), logits, "priority")
    above, below = _not_last_nor_first(p[:-1], lists)
    winners, losers = above & _chosen(winner, logits, "winner"), below & _chosen(loser, logits, "loser")
    with forming_gradients(logits.device):
        s, book = in_full(padded(logits, logits, "logits")), Ledger.empty(logits)
        w = padded(weight_like(1.0 if weight is None else weight, logits, "weight"), logits, "weight")
        for i, j, real in pair_blocks(winners, losers, lists):
            pair = (p[i].unsqueeze(2) > p[j].unsqueeze(1)).logical_and_(real)
            deficit = (s[j].unsqueeze(1) - s[i].unsqueeze(2)).masked_fill_(~pair, -math.inf)
            book.units[i] = pair.sum(2).to(s.dtype)
            book.value[i] = w[i] * softplus(deficit, threshold=40).sum(2)
            slope = deficit.sigmoid_()
            book.gradient[i] -= w[i] * slope.sum(2)
            book.gradient[j] += (w[i].unsqueeze(1) @ slope).squeeze(1)
    return book.term(logits)


def soft_pairwise(student: Tensor, teacher: Tensor, offsets: Tensor, *, mask: Tensor | None = None) -> LossTerm:
    """Log loss of sigma(s_i - s_j) against sigma(t_i - t_j) over the unordered pairs within a request.

    A unit is a pair. `student` and `teacher` are logits [N] or [N, T], the teacher detached; `mask` (bool)
    selects the candidates, the others may be NaN. Ties of the teacher are pairs with the label one half.

    Source: RankNet (Burges et al. 2005) with the teacher's probabilities as labels, as in CRR (RecSys 2026).
    """
    lists, chosen = list_offsets(offsets, student), _chosen(mask, student, "mask")
    with forming_gradients(student.device):
        s, book = in_full(padded(student, student, "student")), Ledger.empty(student)
        t = padded(teacher, student, "teacher").to(s.dtype)
        for i, j, real in pair_blocks(chosen, chosen, lists):
            pair = (i.unsqueeze(2) < j.unsqueeze(1)).logical_and_(real)
            ahead, label = s[i].unsqueeze(2) - s[j].unsqueeze(1), t[i].unsqueeze(2) - t[j].unsqueeze(1)
            size, doubt = ahead.abs(), label.where(ahead < 0, -label).sigmoid_()
            loss = softplus(-size, threshold=40).addcmul_(size, doubt)  # log loss, free of cancellation
            slope = (ahead.sigmoid_() - label.sigmoid_()).masked_fill_(~pair, 0)
            book.units[i] = pair.sum(2).to(s.dtype)
            book.value[i] = loss.masked_fill_(~pair, 0).sum(2)
            book.gradient[i] += slope.sum(2)
            book.gradient[j] -= slope.sum(1)
    return book.term(student)


def _chosen(mask: Tensor | None, logits: Tensor, name: str) -> Tensor:
    """[n] bool by task; None chooses everyone."""
    everyone = torch.ones_like(logits, dtype=torch.bool)
    return by_task(everyone if mask is None else chosen_like(mask, logits, name))


def _not_last_nor_first(p: Tensor, lists: Tensor) -> tuple[Tensor, Tensor]:
    """[n] bool each: who does not have the lowest priority of its list, and who does not have the highest.

    Nobody else wins, or loses, a pair: a list with 5 positives among zeros costs 5 rows, not all. Beside a
    NaN there is no lowest and no highest, and everyone stays.
    """
    segment, segments = list_of(lists), len(lists) - 1
    lowest, highest = -segment_max(-p, segment, segments), segment_max(p, segment, segments)
    return ~(p <= lowest[segment]), ~(p >= highest[segment])
