"""Softmax over a corpus or pool of items."""

import itertools
import math

import torch
from torch import Tensor

from losses.blocks import block_cells
from losses.segments import ranges, segment_sum, segment_sum_exp
from losses.term import LossTerm, attach, forming_gradients, in_full


def multi_class(
    logits: Tensor,
    target: Tensor,
    *,
    sample_weight: Tensor | None = None,
    log_q: Tensor | None = None,
    mask: Tensor | None = None,
) -> LossTerm:
    """-w log softmax(logits - log_q)[target] per row of `logits [M, C]`; a unit is a row of any weight.

    `target [M]` is a column. False in `mask [M, C]` leaves a column out for a row, never the row's target.
    `log_q [C]` is the log of each column's sampling rate; +inf leaves the column out (never a target). What
    is left out may be NaN. No gradient reaches weights and log_q.

    Source: RRA Eq 3 (w = 1 clicked, alpha only shown) and Eq 4 (w = minutes); log_q: Yi et al. 2019.
    """
    if logits.dim() != 2 or target.shape != logits.shape[:1]:
        raise ValueError(f"logits {list(logits.shape)} and target {list(target.shape)} must be [M, C] and [M]")
    s, keep = in_full(logits), torch.ones_like(logits, dtype=torch.bool) if mask is None else mask.bool()
    keep = keep.scatter(1, target.unsqueeze(1), True)
    if log_q is not None and len(s):
        keep = keep & (log_q < math.inf)
        peak = s.detach().where(keep, -math.inf).amax(1, keepdim=True)
        s = s - peak - log_q.detach().to(s.dtype)  # in this order: a large logit would round log_q away
    loss = -s.where(keep, -math.inf).log_softmax(1).gather(1, target.unsqueeze(1)).squeeze(1)
    weight = _weights(sample_weight, s, len(loss))
    return LossTerm((weight * loss).sum(), s.new_tensor(float(len(loss))))


def multi_class_vectors(
    queries: Tensor,
    items: Tensor,
    row: Tensor,
    target: Tensor,
    *,
    item_ids: Tensor | None = None,
    sample_weight: Tensor | None = None,
    log_q: Tensor | None = None,
    scale: float | Tensor = 1.0,
    excluded: Tensor | None = None,
) -> LossTerm:
    """`multi_class` on logits scale * queries @ items.T - log_q, never held as a whole; a unit is a row.

    Row m is query `row[m]` of `queries [Q, D]` with the right answer in column `target[m]` of `items [P, D]`.
    Rows of one query share its normaliser; queries of no row, or of rows of weight 0 alone, are not computed.
    Left out of a row's normaliser are: other columns with the target's id in `item_ids [P]` (accidental hits),
    columns with log_q = +inf (padding, never a target; their vectors may be NaN), and the (query, column) pairs
    `excluded [E, 2]` (say, items watched before), but never the row's own target. `scale` is the inverse
    temperature.
    ValueError for shapes that do not fit and for a row, a target or an excluded column out of range.

    Source: RRA Eq 3-4 over the whole corpus; in-batch with log_q: Yi et al. 2019.
    """
    if items.shape[1:] != queries.shape[1:] or row.shape != target.shape or row.dim() != 1:
        raise ValueError("expected queries [Q, D], items [P, D], row [M] and target [M]")
    _check_range(row, len(queries), "row")
    _check_range(target, len(items), "target")
    weight, count = _weights(sample_weight, in_full(queries), len(row)), len(row)
    weighing = weight.nonzero().squeeze(1)  # the others have a unit each and nothing to add
    used, row = row[weighing].unique(return_inverse=True)
    row, order = row.sort(stable=True)
    target, weight = target[weighing][order], weight[weighing][order]
    q = in_full(queries)[used] * scale
    real = torch.ones(len(items), dtype=torch.bool, device=q.device) if log_q is None else log_q < math.inf
    bias = q.new_zeros(len(items)) if log_q is None else -log_q.detach().to(q.dtype)
    v = items.to(q.dtype).where(real.unsqueeze(1), 0)
    ids = torch.arange(len(items), device=items.device) if item_ids is None else item_ids
    hidden = _cells(excluded, used, len(items))
    # Cells that rows of one query see differently leave its common normaliser, and each row adds back those
    # that it keeps. Subtracting from a full normaliser instead would cancel where such a cell dominates.
    special = _special_cells(ids, real, hidden, row, target)
    at, column = special // max(len(items), 1), special % max(len(items), 1)
    logit = (q[at] * v[column]).sum(1) + bias[column]
    owner, cell = _kept_cells(special, hidden, ids, row, target)
    beside = segment_sum_exp(logit[cell], owner, len(row))
    own = (q[row] * v[target]).sum(1) + bias[target]
    apart = torch.cat([special, hidden]).unique()
    total = _blocked(q, v, bias, apart, row, target, own, beside, weight)
    return LossTerm(total, total.new_tensor(float(count)))


def _check_range(index: Tensor, size: int, name: str) -> None:
    """A ValueError unless all of `index` lie in 0 : size."""
    if index.numel():
        low, high = torch.stack(index.aminmax()).tolist()
        if low < 0 or high >= size:
            raise ValueError(f"{name} runs from {low} to {high}, expected 0 to {size - 1}")


def _weights(sample_weight: Tensor | None, x: Tensor, rows: int) -> Tensor:
    """[M] in the dtype of `x`; 1 without weights."""
    if sample_weight is None:
        return x.new_ones(rows)
    if sample_weight.shape != (rows,):
        raise ValueError(f"sample_weight has shape {list(sample_weight.shape)}, expected [{rows}]")
    return sample_weight.detach().to(x.dtype)


def _cells(excluded: Tensor | None, used: Tensor, columns: int) -> Tensor:
    """Sorted keys query * columns + column of the `excluded` pairs whose query (renumbered) is in `used`."""
    if excluded is None or not len(used):
        return used[:0]
    _check_range(excluded[:, 1], columns, "excluded column")
    place = torch.searchsorted(used, excluded[:, 0].contiguous()).clamp(max=len(used) - 1)
    return (place * columns + excluded[:, 1])[used[place] == excluded[:, 0]].unique()


def _special_cells(ids: Tensor, real: Tensor, hidden: Tensor, row: Tensor, target: Tensor) -> Tensor:
    """Sorted keys of the cells (query, column) that rows of the query see differently.

    Columns with the id of a target of the query, if other columns share that id (accidental hits of that
    target's row alone), or if the cell is `hidden` (sorted keys; kept by the row whose target it is).
    """
    wanted, (ids, by_id) = ids[target], ids.sort()
    start, end = (torch.searchsorted(ids, wanted, right=right) for right in (False, True))
    owner, place = ranges(start, end - start)
    column = by_id[place]
    cell = row[owner] * len(ids) + column
    return cell[real[column] & ((end - start > 1)[owner] | torch.isin(cell, hidden))].unique()


def _kept_cells(special: Tensor, hidden: Tensor, ids: Tensor, row: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """For every row the special cells of its query that it keeps, pair by pair: row, index into `special`."""
    start, end = (torch.searchsorted(special, (row + k) * len(ids)) for k in (0, 1))
    owner, cell = ranges(start, end - start)
    column = special[cell] % len(ids)
    other = (ids[column] != ids[target][owner]) & ~torch.isin(special, hidden)[cell]
    kept = other | (column == target[owner])
    return owner[kept], cell[kept]


def _blocked(
    q: Tensor,
    v: Tensor,
    bias: Tensor,
    apart: Tensor,
    row: Tensor,
    target: Tensor,
    own: Tensor,
    beside: tuple[Tensor, Tensor],
    weight: Tensor,
) -> Tensor:
    """Sum over rows m of w_m (log(beside_m + sum_p e^(q_row[m] v_p + bias_p)) - own_m), by query blocks.

    The sum over the columns p leaves out the cells `apart` (sorted keys); `row` is sorted too, and every
    query has one. `beside` comes as (peak, total), e^peak * total; peaks and totals stay apart throughout, so
    that shares add up to 1 beside logits of any size. Value and gradient are formed in one pass: three
    products and one exp per cell.
    """
    beside_peak, beside_total = beside
    with forming_gradients(q.device):
        step = max(16, block_cells(q.device) // max(len(v), 1))
        edges = torch.arange(0, len(q) + step, step, device=q.device).clamp(max=len(q))
        bounds = torch.stack([edges, torch.searchsorted(row, edges), torch.searchsorted(apart, edges * len(v))])
        hit, top, norm = (torch.empty_like(own) for _ in range(3))
        dq, dv = torch.empty_like(q), torch.zeros_like(v)
        for (a, m, c), (b, n, d) in itertools.pairwise(bounds.t().tolist()):
            cells, query = torch.addmm(bias, q[a:b], v.t()), row[m:n] - a
            cells.view(-1)[apart[c:d] - a * len(v)] = -math.inf
            hit[m:n] = cells[query, target[m:n]]
            peak = cells.amax(1).clamp_(min=torch.finfo(q.dtype).min)  # finite where nothing is left
            cells.sub_(peak.unsqueeze(1)).exp_()
            row_peak = peak[query]
            top[m:n] = row_peak.maximum(beside_peak[m:n])
            scale = (row_peak - top[m:n]).exp_()
            norm[m:n] = cells.sum(1)[query] * scale + beside_total[m:n] * (beside_peak[m:n] - top[m:n]).exp_()
            share = segment_sum(weight[m:n] * scale / norm[m:n], query, b - a).unsqueeze(1)
            dq[a:b] = (cells @ v).mul_(share)
            dv.addmm_(cells.t(), q[a:b] * share)
        hit = hit.where(hit > -math.inf, own)  # rounded like its normaliser: no loss falls below 0
        total = (weight * (norm.log() + (top - hit))).sum()
        dbeside = weight * (beside_peak - top).exp() / norm
    return attach(total, (q, dq), (v, dv), (beside_total, dbeside), (own, -weight))
