"""Losses over the whole list of a request: imitate the teacher's distribution, or its order."""

import math

import torch
from torch import Tensor
from torch.nn.functional import pad

from losses.blocks import Ledger, list_blocks, padded
from losses.segments import by_task, from_task, list_of, list_offsets, segment_log_softmax
from losses.term import LossTerm, forming_gradients, in_full, like

LOWEST = torch.finfo(torch.float64).min


def list_net(student: Tensor, teacher: Tensor, offsets: Tensor) -> LossTerm:
    """Cross entropy of softmax(student) against softmax(teacher) within each request, the teacher detached.

    A unit is a request with two candidates or more. `student` and `teacher` are logits [N] or [N, T].
    Source: ListNet's top-one loss (Cao et al. 2007).
    """
    lists, s = list_offsets(offsets, student), in_full(student)
    t = like(teacher, student, "teacher").detach().to(s.dtype)
    segment, unit = list_of(lists), lists.diff() >= 2
    log_q, log_p = (segment_log_softmax(by_task(x).where(unit[segment], 0), segment, len(unit)) for x in (s, t))
    value, count = from_task(-log_p.exp() * log_q, student), from_task(unit, student)
    return LossTerm(value.sum(0), count.sum(0).to(value.dtype))


def list_mle(student: Tensor, teacher: Tensor, offsets: Tensor) -> LossTerm:
    """-log likelihood of the teacher's order under a Plackett-Luce model of the student's logits.

    Per request sum_k [logsumexp of s over the places from k on - s_k], in order of falling teacher scores,
    ties in their given order. A unit is a request with two candidates or more. [N] or [N, T].
    Source: ListMLE (Xia et al. 2008).
    """
    lists = list_offsets(offsets, student)
    chosen = (lists.diff() >= 2)[list_of(lists)]
    with forming_gradients(student.device):
        s, t = padded(student, student, "student"), padded(teacher, student, "teacher").double()
        book = Ledger.empty(student)
        for place, real in list_blocks(chosen, lists):
            order = t[place].masked_fill(~real, -math.inf).argsort(dim=1, descending=True, stable=True)
            place = place.gather(1, order)  # padding was last and stays last
            x = _compressed(s[place].double().masked_fill(~real, LOWEST))  # double: the sums below cancel
            rest = x.flip(1).logcumsumexp(1).flip(1)
            book.value[place] = (rest - x).where(real, 0).to(book.value.dtype)
            book.gradient[place] = (x + (-rest).logcumsumexp(1)).expm1().where(real, 0).to(book.value.dtype)
            book.units[place[:, 0]] = 1
    return book.term(student)


def _compressed(x: Tensor) -> Tensor:
    """`x` [B, length] (float64) with small numbers for large, but the same softmax over every x[:, k:].

    Where the largest logit from k on is ahead of all later ones, by 800 or by 1e30, those have no share: the
    lead is cut to 800, so that 1e30 does not round away what the later logits differ by.
    """
    peak = x.flip(1).cummax(1).values.flip(1)
    drop = pad((-peak.diff(dim=1)).clamp(max=800).cumsum(1), (1, 0))
    return x - peak - drop
