"""Classic recommenders, to stand beside every figure of a trained model.

Positives are pairs `users [M], items [M]` (int64) over C items; a pair given twice counts once. Histories of
R requests are ragged: `history [H]` items, `offsets [R+1]`. Items already seen are scored like any other;
leaving them out is the part of the caller's eligibility mask.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from joint.ranks import check_ragged, request_of, row_sums

MAX_ITEMS = 30_000  # item-item weights are dense float64: 7.2 GB at this size, and a few copies on the way
USERS_AT_A_TIME = 1024


def popularity(users: Tensor, items: Tensor, num_items: int) -> Tensor:
    """Number of users of each item, `[C]` float64: its score for everyone. ValueError on ids out of range."""
    _, items = _distinct(users, items, num_items)
    return torch.bincount(items, minlength=num_items).double()


def item_knn(users: Tensor, items: Tensor, num_items: int, *, neighbours: int | None = None) -> Tensor:
    """Cosine similarity of items as binary vectors over users, `[C, C]` float64 with zero diagonal.

    Column j holds what each history item adds to the score of item j (see `history_scores`); `neighbours`
    keeps its most similar items only, default all (Sarwar et al. 2001). Of equally similar items any stay.
    Raises ValueError on ids out of range and above 30,000 items.
    """
    weights = _co_occurrences(users, items, num_items)
    norm = weights.diagonal().clamp(min=1).sqrt()  # an item without users is similar to none
    weights /= norm[:, None] * norm
    weights.fill_diagonal_(0)
    if neighbours is None or neighbours >= num_items:
        return weights
    similarity, nearest = weights.topk(neighbours, dim=0)
    return torch.zeros_like(weights).scatter_(0, nearest, similarity)


def ease(users: Tensor, items: Tensor, num_items: int, *, ridge: float = 300.0) -> Tensor:
    """EASE: argmin_B |X − XB|² + ridge·|B|² with diag B = 0, X the binary users × items, `[C, C]` float64.

    B = I − P / diag(P) by columns, P = (XᵀX + ridge·I)⁻¹ (Steck 2019). Score with `history_scores`.
    Raises ValueError on ids out of range, above 30,000 items and unless ridge > 0.
    """
    if ridge <= 0:
        raise ValueError(f"ridge must be positive, got {ridge}")
    gram = _co_occurrences(users, items, num_items)
    gram.diagonal().add_(ridge)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(gram))
    return (inverse / -inverse.diagonal()).fill_diagonal_(0)


def history_scores(weights: Tensor, history: Tensor, offsets: Tensor) -> Tensor:
    """Σ of `weights [C, C]` rows over the distinct items of each request's history, `[R, C]`.

    history `[H]` items, offsets `[R+1]`. ValueError on ids out of range and on offsets that do not fit.
    """
    offsets = check_ragged(offsets, history=history)
    _check_range("history", history, len(weights))
    binary = weights.new_zeros(len(offsets) - 1, len(weights))
    binary[request_of(offsets), history] = 1
    return binary @ weights


@dataclass(frozen=True, eq=False)
class SmoothedMeans:
    """mean + offset of the user + offset of the item: `user_offset [U]`, `item_offset [C]`, float64."""

    mean: float
    user_offset: Tensor
    item_offset: Tensor

    def score(self, users: Tensor, items: Tensor) -> Tensor:
        """Expected label of each pair, `[N]` float64; a user or item beyond those fitted has offset 0."""
        user = pad(self.user_offset, (0, 1))[users.clamp(max=len(self.user_offset))]
        item = pad(self.item_offset, (0, 1))[items.clamp(max=len(self.item_offset))]
        return self.mean + user + item


def smoothed_means(users: Tensor, items: Tensor, labels: Tensor, *, smoothing: float) -> SmoothedMeans:
    """Means of items, then of users on what the items leave, each drawn to 0 by `smoothing` pseudo-labels.

    item_offset = Σ(y − mean) / (n_item + smoothing), user_offset = Σ(y − mean − item_offset) / (n_user +
    smoothing) (the decoupled estimates of Koren 2010). users, items, labels `[M]`, repeated pairs kept.
    Raises ValueError without labels, on one that is not finite, on negative ids and unless smoothing > 0.
    """
    if smoothing <= 0:
        raise ValueError(f"smoothing must be positive, got {smoothing}")
    if len(labels) == 0 or not labels.isfinite().all():
        raise ValueError("labels must be finite and at least one")
    labels = labels.double()
    mean = labels.mean()
    item_offset = _shrunk(labels - mean, items, smoothing)
    user_offset = _shrunk(labels - mean - item_offset[items], users, smoothing)
    return SmoothedMeans(float(mean), user_offset, item_offset)


def _shrunk(residual: Tensor, ids: Tensor, smoothing: float) -> Tensor:
    if ids.shape != residual.shape or (ids < 0).any():
        raise ValueError("users and items must be [M] like labels, none negative")
    count = torch.bincount(ids)
    return row_sums(residual, ids, len(count)) / (count + smoothing)


def _check_range(name: str, ids: Tensor, size: int) -> None:
    if ((ids < 0) | (ids >= size)).any():
        raise ValueError(f"{name} must lie in 0..{size - 1}, got {int(ids.min())}..{int(ids.max())}")


def _distinct(users: Tensor, items: Tensor, num_items: int) -> tuple[Tensor, Tensor]:
    """The distinct pairs by user, users renumbered from 0 without gaps."""
    if users.dim() != 1 or users.shape != items.shape:
        raise ValueError("users and items must both be [M]")
    _check_range("items", items, num_items)
    _, users = users.unique(return_inverse=True)
    pairs = (users * num_items + items).unique()
    return pairs // num_items, pairs % num_items


def _co_occurrences(users: Tensor, items: Tensor, num_items: int) -> Tensor:
    """XᵀX of the binary users × items, `[C, C]` float64, by blocks of users."""
    if num_items > MAX_ITEMS:
        raise ValueError(f"item-item weights are dense: at most {MAX_ITEMS:,} items, got {num_items:,}")
    users, items = _distinct(users, items, num_items)
    gram = torch.zeros(num_items, num_items, dtype=torch.float64, device=items.device)
    blocks = torch.bincount(users // USERS_AT_A_TIME).tolist()
    for user, item in zip(users.split(blocks), items.split(blocks), strict=True):
        binary = torch.zeros(USERS_AT_A_TIME, num_items, device=items.device)
        binary[user % USERS_AT_A_TIME, item] = 1
        gram += binary.T @ binary  # whole numbers: exact in float32
    return gram
