"""Metrics of ordering and of probabilities, as states that merge over batches and ranks.

Shapes: R requests, N candidates of all requests, those of one request contiguous, `offsets [R+1]`; a request
may be empty and K may exceed it. Scores only order, so ±inf is allowed; NaN raises ValueError. The K best are
found pessimistically (see `ranks`): among equal scores the irrelevant come first. Sums are in float64.

Every function returns a state: `state.value` is the metric, `state.merge(other)` that of both data sets
together, so a list of batches or of ranks is folded by `merge_all`.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, pad

from joint.ranks import (
    check_order,
    check_ragged,
    inversions,
    order_within,
    positions,
    ranks,
    request_of,
    request_sums,
    row_sums,
    run_positions,
    top_k,
)


@dataclass(frozen=True)
class Ratio:
    """A sum and what it is divided by; both add up over batches and ranks."""

    total: float
    count: float

    def merge(self, *others: "Ratio") -> "Ratio":
        """The ratio of all units together."""
        parts = (self, *others)
        return Ratio(sum(part.total for part in parts), sum(part.count for part in parts))

    @property
    def value(self) -> float:
        """total / count; nan when there is no unit."""
        return self.total / self.count if self.count else float("nan")


@dataclass(frozen=True, eq=False)
class PerRequest:
    """A `Ratio` request by request: `total [R]` and `count [R]`, float64 on the CPU; 0 / 0 is a request without units.

    Users and user groups are sums of it; a paired bootstrap draws from it.
    """

    total: Tensor
    count: Tensor

    @classmethod
    def of(cls, total: Tensor, count: Tensor) -> "PerRequest":
        """From `[R]` of any kind, on any device."""
        return cls(total.double().cpu(), count.double().cpu())

    def merge(self, *others: "PerRequest") -> "PerRequest":
        """The requests of all states, one after another."""
        parts = (self, *others)
        return PerRequest(torch.cat([part.total for part in parts]), torch.cat([part.count for part in parts]))

    @property
    def ratio(self) -> Ratio:
        """Of all requests together."""
        return Ratio(float(self.total.sum()), float(self.count.sum()))

    @property
    def value(self) -> float:
        """Σ total / Σ count; nan when there is no unit."""
        return self.ratio.value


@dataclass(frozen=True, eq=False)
class AucState:
    """All scores `[M]` and labels `[M]` (bool), on the CPU: the exact AUC is no sum over batches."""

    scores: Tensor
    labels: Tensor

    def merge(self, *others: "AucState") -> "AucState":
        """The units of all states."""
        parts = (self, *others)
        return AucState(torch.cat([part.scores for part in parts]), torch.cat([part.labels for part in parts]))

    @property
    def value(self) -> float:
        """Share of (positive, negative) pairs in the right order, ties ½; nan when a class is missing."""
        return float(_auc_by_request(self.scores, self.labels, torch.tensor([0, len(self.scores)]))[0])


State = TypeVar("State", Ratio, PerRequest, AucState)


def merge_all(states: Iterable[State]) -> State:
    """One state of many (of batches, or of ranks); ValueError when there is none."""
    parts = list(states)
    if not parts:
        raise ValueError("there is no state to merge")
    return parts[0].merge(*parts[1:])


def recall_at_k(scores: Tensor, relevant: Tensor, offsets: Tensor, k: int, *, average: str = "micro") -> Ratio:
    """Relevant candidates among the K best of their request, over all relevant candidates.

    scores, relevant (bool) `[N]`. Unit: relevant candidate (`average="micro"`: RRA, RecFlow); "macro" takes
    the recall of each request, and the mean over those that have a relevant candidate.
    """
    if average not in ("micro", "macro"):
        raise ValueError(f"average must be 'micro' or 'macro', got {average!r}")
    rank, row = _relevant_ranks(scores, relevant, offsets)
    return recall_of_ranks(rank, k, row=row if average == "macro" else None)


def precision_at_k(scores: Tensor, relevant: Tensor, offsets: Tensor, k: int) -> Ratio:
    """Relevant candidates among the K best, over min(K, candidates); mean over requests with a candidate.

    scores, relevant (bool) `[N]`. Unit: non-empty request (SDCL's Precision@K).
    """
    offsets = check_ragged(offsets, scores=scores, relevant=relevant)
    rank, row = _relevant_ranks(scores, relevant, offsets)
    return precision_by_request(rank, row, offsets.diff(), k).ratio


def precision_by_request(rank: Tensor, row: Tensor, lengths: Tensor, k: int) -> PerRequest:
    """`precision_at_k` of the ranks `[M]` of relevant candidates of requests `row [M]`, by request of `lengths [R]`."""
    _check_k(k)
    hits = row_sums(rank < k, row, len(lengths))
    return _per_request(hits / lengths.clamp(max=k), lengths > 0)


def weighted_recall_at_k(scores: Tensor, relevant: Tensor, weight: Tensor, offsets: Tensor, k: int) -> Ratio:
    """Weight of the relevant candidates among the K best of their request, over that of all relevant ones.

    scores, relevant (bool), weight `[N]`, weight read where relevant, finite and not negative. Unit: weight
    (RRA: delayed minutes watched). Among relevant candidates of equal score the lighter come first.
    """
    rank, _ = _relevant_ranks(scores, relevant, offsets, weight)
    own = weight[relevant.bool()]
    if not (own.isfinite() & (own >= 0)).all():
        raise ValueError("weight must be finite and not negative where relevant")
    return recall_of_ranks(rank, k, weight=own)


def ndcg_at_k(scores: Tensor, relevant: Tensor, offsets: Tensor, k: int) -> Ratio:
    """DCG / ideal DCG of a request with gain 1 for relevant; mean over requests with a relevant candidate.

    DCG = Σ 1/log2(rank+2) over the relevant of rank < K (after Järvelin and Kekäläinen 2002); in the ideal
    order all relevant come first. scores, relevant (bool) `[N]`. Unit: request with a relevant candidate.
    """
    rank, row = _relevant_ranks(scores, relevant, offsets)
    return ndcg_of_ranks(rank, row, k)


def dcg_per_positive_at_k(scores: Tensor, relevant: Tensor, offsets: Tensor, k: int) -> Ratio:
    """Σ 1/log2(rank+2) over relevant candidates of rank < K, over the number of relevant candidates.

    What the tables of RecFlow call NDCG: no ideal, so it can fall short of 1 in the best order.
    scores, relevant (bool) `[N]`. Unit: relevant candidate.
    """
    rank, _ = _relevant_ranks(scores, relevant, offsets)
    return dcg_of_ranks(rank, k)


def recall_of_ranks(rank: Tensor, k: int, *, row: Tensor | None = None, weight: Tensor | None = None) -> Ratio:
    """Recall@K of relevant items given their ranks `[M]`, as from `corpus_ranks`.

    Unit: relevant item, or its `weight [M]`; with `row [M]` the recall of each row, and the mean over those
    with some weight (macro).
    """
    _check_k(k)
    weight = torch.ones_like(rank, dtype=torch.float64) if weight is None else weight.double()
    hit = weight.where(rank < k, 0)
    if row is None:
        return _ratio(hit, weight)
    rows, row = torch.unique(row, return_inverse=True)
    total = row_sums(weight, row, len(rows))
    return _mean(row_sums(hit, row, len(rows)) / total, total > 0)


def recall_by_request(rank: Tensor, row: Tensor, requests: int, k: int, *, weight: Tensor | None = None) -> PerRequest:
    """`recall_of_ranks` of ranks `[M]` and the requests `row [M]` they are of, request by request."""
    _check_k(k)
    weight = torch.ones_like(rank, dtype=torch.float64) if weight is None else weight.double()
    hit = weight.where(rank < k, 0)
    return PerRequest.of(row_sums(hit, row, requests), row_sums(weight, row, requests))


def dcg_of_ranks(rank: Tensor, k: int) -> Ratio:
    """DCG per relevant item given the ranks `[M]` (see `dcg_per_positive_at_k`). Unit: relevant item."""
    gain = _gain(rank, k)
    return _ratio(gain, torch.ones_like(gain))


def dcg_by_request(rank: Tensor, row: Tensor, requests: int, k: int) -> PerRequest:
    """`dcg_of_ranks` of ranks `[M]` and the requests `row [M]` they are of, request by request."""
    return PerRequest.of(row_sums(_gain(rank, k), row, requests), torch.bincount(row, minlength=requests))


def ndcg_of_ranks(rank: Tensor, row: Tensor, k: int) -> Ratio:
    """NDCG@K given the ranks `[M]` of relevant items and their `row [M]`. Unit: row with a relevant item."""
    rows, row = torch.unique(row, return_inverse=True)
    return ndcg_by_request(rank, row, len(rows), k).ratio


def ndcg_by_request(rank: Tensor, row: Tensor, requests: int, k: int) -> PerRequest:
    """`ndcg_of_ranks` of ranks `[M]` and the requests `row [M]` they are of, request by request."""
    relevant = torch.bincount(row, minlength=requests)
    best_ranks = torch.arange(int(relevant.max()) if len(relevant) else 0, device=rank.device)
    ideal = pad(_gain(best_ranks, k).cumsum(0), (1, 0))[relevant]
    return _per_request(row_sums(_gain(rank, k), row, requests) / ideal, relevant > 0)


def kendall_distance(a: Tensor, b: Tensor, offsets: Tensor) -> Ratio:
    """Share of a request's candidate pairs that the two scores order differently; mean over requests.

    (discordant + ½ · tied in exactly one) / (K(K−1)/2); a pair tied in both counts 0. With all pairs below it
    is Kendall's distance K^(1/2) of Fagin et al. 2004, normalised; without ties (1 − τ)/2. SDCL's reverse
    rate; over the N best of retrieval RRA's NKTD@N. a, b `[N]`. Unit: request with ≥ 2 candidates.
    O(N log N), after Knight 1966.
    """
    return kendall_by_request(a, b, offsets).ratio


def kendall_by_request(a: Tensor, b: Tensor, offsets: Tensor) -> PerRequest:
    """`kendall_distance` request by request."""
    offsets = check_ragged(offsets, a=a, b=b)
    by_a = order_within(a, offsets, order_within(b, offsets, torch.arange(len(b), device=b.device)))
    by_b = order_within(b, offsets, by_a)
    # Ties of either list stand in the order of the other, so that no tied pair is an inversion.
    position = torch.empty_like(by_a).scatter_(0, by_a, positions(offsets))
    tied_once = (
        run_positions(offsets, a[by_a]) + run_positions(offsets, b[by_b]) - 2 * run_positions(offsets, a[by_a], b[by_a])
    )
    discordant = inversions(position[by_b], offsets) + request_sums(tied_once, offsets) / 2
    lengths = offsets.diff().double()
    return _per_request(discordant / (lengths * (lengths - 1) / 2), lengths >= 2)


def overlap_at_k(a: Tensor, b: Tensor, offsets: Tensor, k: int) -> Ratio:
    """|K best by a ∩ K best by b| / min(K, candidates); mean over requests with a candidate.

    a, b `[N]`; among equal scores the lower index comes first. Unit: non-empty request.
    """
    return overlap_by_request(a, b, offsets, k).ratio


def overlap_by_request(a: Tensor, b: Tensor, offsets: Tensor, k: int) -> PerRequest:
    """`overlap_at_k` request by request."""
    _check_k(k)
    offsets = check_ragged(offsets, a=a, b=b)
    lengths = offsets.diff()
    both = top_k(a, offsets, k) & top_k(b, offsets, k)
    return _per_request(request_sums(both, offsets) / lengths.clamp(max=k), lengths > 0)


def auc(logits: Tensor, labels: Tensor, *, mask: Tensor | None = None) -> AucState:
    """Area under the ROC curve: P(positive above negative) + ½ P(tied), exact, over all units together.

    logits, labels (0 or 1), mask (bool, True = a unit) `[N]`. Unit: (positive, negative) pair.
    """
    logits, labels = _units(logits, labels, mask)
    return AucState(logits.cpu(), _binary(labels).cpu())


def grouped_auc(logits: Tensor, labels: Tensor, offsets: Tensor, *, mask: Tensor | None = None) -> Ratio:
    """AUC (ties ½) within each request; mean over requests that hold both classes.

    logits, labels (0 or 1), mask (bool, True = a unit) `[N]`. Unit: request with both classes.
    """
    return grouped_auc_by_request(logits, labels, offsets, mask=mask).ratio


def grouped_auc_by_request(
    logits: Tensor, labels: Tensor, offsets: Tensor, *, mask: Tensor | None = None
) -> PerRequest:
    """`grouped_auc` request by request."""
    kept, labels = _units(logits, labels, mask)
    if mask is None:
        offsets = check_ragged(offsets, logits=logits)
    else:
        offsets = pad(mask.cumsum(0), (1, 0))[check_ragged(offsets, mask=mask)]
    value = _auc_by_request(kept, _binary(labels), offsets)
    return _per_request(value, ~value.isnan())


def log_loss(logits: Tensor, labels: Tensor, *, mask: Tensor | None = None) -> Ratio:
    """Mean of −y·log σ(s) − (1−y)·log(1−σ(s)), in float64.

    logits, labels (in [0, 1], soft allowed), mask (bool, True = a unit) `[N]`. Unit: candidate. An infinite
    logit costs 0 when right and infinity when wrong.
    """
    logits, labels = _units(logits, labels, mask)
    logits, labels = logits.double(), labels.double()
    positive = torch.where(labels > 0, labels * logsigmoid(logits), 0)  # 0 · −inf is 0 here
    negative = torch.where(labels < 1, (1 - labels) * logsigmoid(-logits), 0)
    return _ratio(-(positive + negative), torch.ones_like(logits))


def calibration(logits: Tensor, labels: Tensor, *, mask: Tensor | None = None) -> Ratio:
    """Mean predicted probability over mean label: Σ σ(s) / Σ y; 1 is calibrated on average.

    logits, labels (in [0, 1], soft allowed), mask (bool, True = a unit) `[N]`. Unit: Σ y; nan when that is 0.
    """
    logits, labels = _units(logits, labels, mask)
    return _ratio(logits.double().sigmoid(), labels)


def _check_k(k: int) -> None:
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")


def _ratio(total: Tensor, count: Tensor) -> Ratio:
    return Ratio(float(total.sum(dtype=torch.float64)), float(count.sum(dtype=torch.float64)))


def _mean(values: Tensor, keep: Tensor) -> Ratio:
    return _ratio(values[keep], keep)


def _per_request(values: Tensor, keep: Tensor) -> PerRequest:
    return PerRequest.of(values.where(keep, 0), keep)


def _gain(rank: Tensor, k: int) -> Tensor:
    _check_k(k)
    return torch.where(rank < k, 1 / (rank.double() + 2).log2(), 0)


def _relevant_ranks(
    scores: Tensor, relevant: Tensor, offsets: Tensor, weight: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Rank `[M]` and request `[M]` of the relevant candidates."""
    offsets = check_ragged(offsets, scores=scores, relevant=relevant)
    relevant = relevant.bool()
    return ranks(scores, relevant, offsets, weight)[relevant], request_of(offsets)[relevant]


def _units(logits: Tensor, labels: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """The logits and labels that `mask` selects, checked; copies, so that a state holds no batch alive."""
    shapes = [column.shape for column in (logits, labels, mask) if column is not None]
    if logits.dim() != 1 or len(set(shapes)) > 1:
        raise ValueError(f"logits, labels and mask must all be [N], got {[list(shape) for shape in shapes]}")
    mask = torch.ones_like(logits, dtype=torch.bool) if mask is None else mask
    logits, labels = logits.detach()[mask], labels.detach()[mask]
    check_order("logits", logits)
    if not ((labels >= 0) & (labels <= 1)).all():
        raise ValueError("labels must lie in [0, 1]; mask the unobserved")
    return logits, labels


def _binary(labels: Tensor) -> Tensor:
    if not ((labels == 0) | (labels == 1)).all():
        raise ValueError("labels must be 0 or 1 for an AUC")
    return labels.bool()


def _auc_by_request(scores: Tensor, labels: Tensor, offsets: Tensor) -> Tensor:
    """AUC of each request from its rank sum, ties halved, `[R]` float64; nan where a class is missing."""
    order = order_within(scores, offsets, torch.arange(len(scores), device=scores.device))
    scores, labels = scores[order], labels[order]
    tied_before = run_positions(offsets, scores)
    tied_after = run_positions(len(scores) - offsets.flip(0), scores.flip(0)).flip(0)
    twice_rank = 2 * positions(offsets) - tied_before + tied_after
    positives, negatives = request_sums(labels, offsets), request_sums(~labels, offsets)
    losses = request_sums(twice_rank * labels, offsets) / 2 - positives * (positives - 1) / 2
    return 1 - losses / (positives * negatives)
