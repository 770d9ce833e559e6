"""Ranks of candidates within their requests, or of items in a corpus: the core under the ranking metrics.

Shapes: R requests, N candidates of all requests, those of one request contiguous, `offsets [R+1]`.
Everything is vectorised over requests: stable sorts, runs of equal values, prefix sums.
"""

import math

import torch
from torch import Tensor

NEVER = torch.iinfo(torch.int64).max  # the rank of what cannot be retrieved: beyond any K


def check_order(name: str, values: Tensor) -> None:
    """Raises ValueError if `values [N]` is not a 1-D tensor or holds NaN, which has no place in an order."""
    if values.dim() != 1:
        raise ValueError(f"{name} must be 1-D, got shape {list(values.shape)}")
    if values.isnan().any():
        first = int(values.isnan().nonzero()[0])
        raise ValueError(f"{name} holds NaN ({int(values.isnan().sum())} of {len(values)}, first at {first})")


def check_ragged(offsets: Tensor, **columns: Tensor) -> Tensor:
    """`offsets` as int64 on the device of the columns, after checking both.

    Raises ValueError unless offsets rise from 0 to N and every named column is `[N]` without NaN.
    """
    for name, column in columns.items():
        check_order(name, column)
        if offsets.dim() != 1 or len(offsets) == 0 or int(offsets[-1]) != len(column):
            raise ValueError(f"offsets must be [R+1] and end at the length of {name}, {len(column)}")
        offsets = offsets.to(column.device, torch.int64)
    if offsets[0] != 0 or (offsets.diff() < 0).any():
        raise ValueError("offsets must start at 0 and never fall")
    return offsets


def request_of(offsets: Tensor) -> Tensor:
    """The request of each candidate, `[N]`."""
    lengths = offsets.diff()
    return torch.arange(len(lengths), device=offsets.device).repeat_interleave(lengths)


def request_sums(values: Tensor, offsets: Tensor) -> Tensor:
    """Sums of `values [N]` by request, `[R]` float64; 0 for an empty request."""
    return row_sums(values, request_of(offsets), len(offsets) - 1)


def row_sums(values: Tensor, row: Tensor, num_rows: int) -> Tensor:
    """Sums of `values [M]` by `row [M]`, `[num_rows]` float64."""
    return values.new_zeros(num_rows, dtype=torch.float64).index_add_(0, row, values.double())


def order_within(scores: Tensor, offsets: Tensor, order: Tensor) -> Tensor:
    """Candidate indices `[N]` by request, then by falling score; equal scores stay as in `order [N]`.

    `order` goes through the requests one after another.
    """
    lengths = offsets.diff()
    rows = len(lengths), int(lengths.max()) if len(lengths) else 0
    if math.prod(rows) > 2 * len(order):  # padded rows would be mostly padding: all at once, by score and by request
        order = order[scores[order].argsort(descending=True, stable=True)]
        return order[request_of(offsets)[order].argsort(stable=True)]
    starts = torch.arange(rows[0], device=order.device) * rows[1]
    place = torch.arange(len(order), device=order.device) + (starts - offsets[:-1]).repeat_interleave(lengths)
    padded = torch.full(rows, -torch.inf, dtype=torch.promote_types(scores.dtype, torch.float32), device=scores.device)
    padded.view(-1)[place] = scores[order].to(padded.dtype)
    # Stable, so that padding comes last, behind a score of -inf too.
    by_row = padded.argsort(dim=1, descending=True, stable=True) + offsets[:-1].unsqueeze(1)
    return order[by_row.view(-1)[place]]


def top_k(scores: Tensor, offsets: Tensor, k: int) -> Tensor:
    """True for the K best of each request, bool `[N]`; among equal scores the earlier candidate."""
    order = order_within(scores, offsets, torch.arange(len(scores), device=scores.device))
    place = torch.empty_like(order).scatter_(0, order, positions(offsets))
    return place < k


def ranks(scores: Tensor, relevant: Tensor, offsets: Tensor, weight: Tensor | None = None) -> Tensor:
    """Pessimistic 0-based rank of every candidate in its request, `[N]` int64.

    The order is by falling score; among equal scores the irrelevant come first, then the relevant by rising
    `weight`, then by index: a model that scores everything alike gains nothing from its ties.

    Args: scores `[N]`, ±inf allowed; relevant `[N]` bool; offsets `[R+1]`; weight `[N]`, read where relevant.
    Raises ValueError on NaN and on shapes that disagree.
    """
    offsets = check_ragged(offsets, scores=scores, relevant=relevant)
    favoured = relevant.nonzero().squeeze(1)
    if weight is not None:
        if weight.shape != scores.shape:
            raise ValueError(f"weight must be [N] like scores, got {list(weight.shape)}")
        favoured = favoured[weight[favoured].argsort(stable=True)]
    order = torch.cat([(relevant == 0).nonzero().squeeze(1), favoured])
    order = order_within(scores, offsets, order[request_of(offsets)[order].argsort(stable=True)])
    return torch.empty_like(order).scatter_(0, order, positions(offsets))


def positions(offsets: Tensor) -> Tensor:
    """0, 1, … within each request, `[N]` int64."""
    return torch.arange(int(offsets[-1]), device=offsets.device) - offsets[request_of(offsets)]


def corpus_ranks(
    scores: Tensor,
    row: Tensor,
    target: Tensor,
    *,
    mask: Tensor | None = None,
    weight: Tensor | None = None,
    block: int = 1 << 20,
) -> Tensor:
    """Pessimistic 0-based rank of column `target[m]` among the eligible columns of row `row[m]`, `[M]` int64.

    The relevant columns of a row are its targets, and ties are as in `ranks`: a target comes after all
    irrelevant columns of its score. A target that is not eligible could not be served: its rank is `NEVER`.
    A pair given twice shares one rank, its weights added.

    Args: scores `[R, C]`, ±inf allowed; row, target `[M]`; mask `[R, C]`, True = eligible; weight `[M]`,
    orders tied targets; block, the score comparisons held at a time. O(M·C) time. Where `[R, C]` is too
    large, pass blocks of rows and merge the metrics of their ranks.
    Raises ValueError on NaN in `scores` and on rows or targets out of range.
    """
    _check_corpus(scores, row, target)
    num_columns = scores.shape[1]
    pair, inverse = torch.unique(row * num_columns + target, return_inverse=True)
    row, target = pair // max(num_columns, 1), pair % max(num_columns, 1)
    own = scores[row, target]
    eligible = torch.ones_like(pair, dtype=torch.bool) if mask is None else mask[row, target]
    total = own.new_zeros(len(pair), dtype=torch.float64)
    if weight is not None:
        total.index_add_(0, inverse, weight.double())
    at_least = _columns_at_least(scores, own, row, mask, max(1, block // max(num_columns, 1)))
    rank = at_least - 1 - _tied_behind(own, total, row, eligible)
    return rank.where(eligible, NEVER)[inverse]


def pool_ranks(scores: Tensor, row: Tensor, column: Tensor, *, mask: Tensor, weight: Tensor | None = None) -> Tensor:
    """`corpus_ranks` where a column of -1 is an item outside the pool, which is never found."""
    inside = column >= 0
    found = torch.full_like(column, NEVER)
    own = None if weight is None else weight[inside]
    found[inside] = corpus_ranks(scores, row[inside], column[inside], mask=mask, weight=own)
    return found


def _check_corpus(scores: Tensor, row: Tensor, target: Tensor) -> None:
    if scores.dim() != 2 or row.dim() != 1 or row.shape != target.shape:
        raise ValueError("scores must be [R, C], row and target both [M]")
    check_order("scores", scores.flatten())
    for name, index, size in (("row", row, scores.shape[0]), ("target", target, scores.shape[1])):
        if ((index < 0) | (index >= size)).any():
            raise ValueError(f"{name} must lie in 0..{size - 1}, got {int(index.min())}..{int(index.max())}")


def _columns_at_least(scores: Tensor, own: Tensor, row: Tensor, mask: Tensor | None, rows_at_a_time: int) -> Tensor:
    """How many eligible columns of `row[m]` score at least `own[m]` (an eligible target is one), `[M]`."""
    counts = []
    for rows, bar in zip(row.split(rows_at_a_time), own.split(rows_at_a_time), strict=True):
        passed = scores[rows] >= bar[:, None]
        counts.append((passed if mask is None else passed & mask[rows]).sum(1, dtype=torch.int32))
    return torch.cat(counts).long()


def _tied_behind(score: Tensor, weight: Tensor, row: Tensor, eligible: Tensor) -> Tensor:
    """For each target, how many eligible targets of its row and score are ordered behind it, `[M]`."""
    order = weight.argsort(stable=True).flip(0)  # the last of a tie first
    for key in (score, row, eligible.to(torch.uint8)):
        order = order[key[order].argsort(stable=True)]
    ends = torch.tensor([0, len(order)], device=order.device)
    behind = run_positions(ends, score[order], row[order], eligible[order])
    return torch.empty_like(order).scatter_(0, order, behind)


def run_positions(offsets: Tensor, *columns: Tensor) -> Tensor:
    """Position of each slot within its run of equal `columns [N]`, `[N]` int64; a run ends with its request.

    Summed over a run of t this is t(t−1)/2, its number of pairs.
    """
    index = torch.arange(int(offsets[-1]), device=offsets.device)
    starts = torch.zeros_like(index, dtype=torch.bool)
    starts[offsets[:-1][offsets.diff() > 0]] = True
    for column in columns:
        starts[1:] |= column[1:] != column[:-1]
    return index - index.where(starts, 0).cummax(0).values if len(index) else index


def inversions(position: Tensor, offsets: Tensor) -> Tensor:
    """Number of pairs i < j of a request with `position[i] > position[j]`, `[R]` float64 (exact below 2^53).

    `position [N]` is a permutation of 0..K−1 within each request. A radix sort from the highest bit: slots
    that agree above a bit form a group, in their first order; a pair whose first differing bit is this one is
    inverted when its 1 stands before its 0. log2(max K) passes of O(N), each over all requests at once.
    """
    base = offsets[request_of(offsets)].int()  # half the memory traffic of int64, most of the time spent
    position = position.int()
    index = torch.arange(len(position), dtype=torch.int32, device=position.device)
    count = torch.zeros_like(position)
    num_bits = int(position.max()).bit_length() if len(position) else 0
    for bit in reversed(range(num_bits)):
        one = position >> bit & 1
        # Positions are a permutation, so what precedes a group is exactly what has smaller high bits.
        group = base + (position >> bit + 1 << bit + 1)
        before = one.cumsum(0, dtype=torch.int32) - one
        ones = before - before[group]
        count += ones * (1 - one)
        slot = torch.where(one.bool(), group + (1 << bit) + ones, index - ones)
        position = torch.empty_like(position).scatter_(0, slot.long(), position)
    return request_sums(count, offsets)
