"""The softmax of retrieval: impressions against the items of a pool, all of them or some."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

import losses
from joint.outputs import Pool
from losses import LossTerm
from losses.blocks import block_cells


def softmax_over_pool(
    user: Tensor,
    pool: Pool,
    row: Tensor,
    target: Tensor,
    weight: Tensor,
    space: Sequence[str],
    log_q: bool,
    hard: tuple[int, int] | None,
) -> LossTerm:
    """The loss of impressions `[M]`, of one task: their requests' vectors against the items of a space.

    Args:
        user: `[R, D]`.
        row: the request of each impression; `target` its column in the pool, `weight` what it weighs.
        log_q: whether the log of a column's sampling rate comes off its logit.
        hard: of the corpus only the columns that the request itself ranks so.
    """
    if hard or tuple(space) == ("random",):
        negatives = _hardest(user, pool, *hard) if hard else _drawn(user, pool)
        return _against(user, pool, row, target, *negatives, weight)
    rates = _column_rates(pool, space, log_q)
    return losses.multi_class_vectors(
        user, pool.vectors, row, target, sample_weight=weight, log_q=rates, excluded=pool.excluded
    )


def _column_rates(pool: Pool, space: Sequence[str], taken_off: bool) -> Tensor:
    """The log_q of the pool's columns for a space: +inf outside of it, 0 inside if it is not `taken_off`."""
    log_q = pool.log_q["mixed" if len(space) > 1 else space[0]]
    return log_q if taken_off else torch.where(log_q < torch.inf, 0.0, torch.inf)


def _hardest(user: Tensor, pool: Pool, first: int, last: int) -> tuple[Tensor, Tensor]:
    """The columns that each request's own ranking of the corpus has at the ranks `first` .. `last` - 1, `[R, K]`.

    Their logits, and which columns they are; -1 where a request has no such column.
    """
    with torch.no_grad():
        step = max(1, block_cells(user.device) // max(len(pool.vectors), 1))
        column = torch.cat([_ranked(user[i : i + step], i, pool, first, last) for i in range(0, len(user), step)])
    return (user.unsqueeze(1) @ pool.vectors[column].mT).squeeze(1), column


def _ranked(user: Tensor, begin: int, pool: Pool, first: int, last: int) -> Tensor:
    """The columns at those ranks for the requests `begin`, `begin` + 1, … of vectors `user`; -1 where there is none."""
    scores = user @ pool.vectors.T - pool.log_q["corpus"]
    row, column = pool.excluded.unbind(1)
    here = (row >= begin) & (row < begin + len(user))
    scores[row[here] - begin, column[here]] = -torch.inf
    best = scores.topk(min(last, scores.shape[1]), dim=1)
    return best.indices[:, first:].where(best.values[:, first:] > -torch.inf, -1)


def _drawn(user: Tensor, pool: Pool) -> tuple[Tensor, Tensor]:
    """The random columns, the same for every request: logits and columns `[R, K]`, -1 where it is not eligible."""
    drawn = (pool.log_q["random"] < torch.inf).nonzero().flatten()
    eligible = torch.ones(len(user), len(pool.vectors), dtype=torch.bool, device=user.device)
    eligible[pool.excluded[:, 0], pool.excluded[:, 1]] = False
    return user @ pool.vectors[drawn].T, drawn.expand(len(user), -1).where(eligible[:, drawn], -1)


def _against(
    user: Tensor, pool: Pool, row: Tensor, target: Tensor, logits: Tensor, columns: Tensor, weight: Tensor
) -> LossTerm:
    """Each impression's own column against its request's `columns [R, K]`, of `logits [R, K]`."""
    own = (user[row] * pool.vectors[target]).sum(1, keepdim=True)
    others = columns[row]
    real = (others >= 0) & (others != target.unsqueeze(1))
    mask = torch.cat([real.new_ones(len(row), 1), real], dim=1)
    logits = torch.cat([own, logits[row]], dim=1)
    return losses.multi_class(logits, torch.zeros_like(target), sample_weight=weight, mask=mask)
