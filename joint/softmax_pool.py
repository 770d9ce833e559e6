"""The pool of a softmax, from all ranks: the corpus, or in-batch and shared random negatives."""

from __future__ import annotations

import zlib

import torch
from torch import Tensor, nn

from joint.batch import Batch
from joint.distributed import gather_rows, gather_uneven, rank
from joint.outputs import Pool, Views

RATE = 0.05  # how fast the estimate of an item's frequency follows


def corpus_pool(vectors: Tensor, batch: Batch) -> Pool:
    """The whole corpus, a slice from each rank, in order; the loader has said which column is which."""
    log_q = torch.where(gather_rows(batch.pool_open), 0.0, torch.inf)
    return Pool(gather_rows(vectors), batch.column, batch.excluded, {"corpus": log_q})


def sampled_pool(vectors: Tensor, batch: Batch, frequency: StreamingFrequency, drawn: int) -> Pool:
    """The impressions and shared random items of all ranks, each item as one column, in order of item index.

    `log_q` is of being in a batch: among its impressions as `frequency` estimates it, among its `drawn` random items
    of those available on the day as it is from drawing, or among either (mixed negatives: Yang et al., WWW'20).
    """
    item, in_batch, available = (gather_uneven(x) for x in (batch.pool_item, batch.pool_in_batch, batch.pool_open))
    items, column = torch.where(available, item, -1).unique(return_inverse=True)
    place = torch.arange(len(column), device=column.device)
    first = place.new_full((len(items),), len(column)).scatter_reduce(0, column, place, "amin")
    members = {"in_batch": in_batch & available, "random": ~in_batch & available}
    held = {
        space: torch.zeros_like(items, dtype=torch.bool).index_put((column[m],), m[m]) for space, m in members.items()
    }
    seen = frequency(items, held["in_batch"])
    by_draw = torch.full_like(seen, drawn / max(1, batch.pool_available))
    log_q = {
        space: rate.log().where(held[space], torch.inf) for space, rate in (("in_batch", seen), ("random", by_draw))
    }
    log_q["mixed"] = (seen + by_draw).log().where(held["in_batch"] | held["random"], torch.inf)
    excluded = torch.stack([batch.excluded[:, 0], _place(items, batch.excluded[:, 1])], dim=1)
    return Pool(
        gather_uneven(vectors).index_select(0, first),
        _place(items, batch.item),
        excluded[excluded[:, 1] >= 0],
        log_q,
    )


def item_views(vectors: Tensor, chosen: Tensor, batch: Batch) -> Views:
    """The views `vectors [2, M, D]` of the `chosen` pool items of this rank, beside the second ones of all ranks."""
    before = gather_uneven(torch.tensor([len(chosen)], device=chosen.device))[: rank()].sum()
    target = torch.arange(len(chosen), device=chosen.device) + before
    first, second = vectors
    return Views(first, gather_uneven(second), target, gather_uneven(batch.pool_item[chosen]))


def uniform_items(batch: Batch, share: float, catalogue: int, *, seed: int, step: int) -> Tensor:
    """The places of this rank's pool items, of the day and no impressions, of which `share` is drawn: int64 [M].

    By (seed, step) and item, so the draw is the same for any number of ranks.
    """
    key = zlib.crc32(f"{seed}/items/{step}".encode())
    drawn = torch.rand(catalogue, generator=torch.Generator().manual_seed(key)).to(batch.pool_item.device) < share
    return (batch.pool_open & ~batch.pool_in_batch & drawn[batch.pool_item.clamp(min=0)]).nonzero().flatten()


def _place(items: Tensor, wanted: Tensor) -> Tensor:
    """Where each of `wanted` is among the ascending `items`; -1 if nowhere."""
    place = torch.searchsorted(items, wanted.contiguous()).clamp(max=max(len(items) - 1, 0))
    return place.where(items[place] == wanted, -1) if len(items) else torch.full_like(wanted, -1)


class StreamingFrequency(nn.Module):
    """How often an item is among a batch's impressions, estimated from the steps between (Yi et al., RecSys'19).

    `interval [items]` follows the number of steps between two batches that hold an item, `last [items]` is the step of
    the latest; both are part of a checkpoint, and equal on all ranks, which see the same global batches.
    """

    interval: Tensor
    last: Tensor

    def __init__(self, items: int) -> None:
        super().__init__()
        self.register_buffer("interval", torch.zeros(items))
        self.register_buffer("last", torch.zeros(items, dtype=torch.long))
        self.step: int | None = None

    @torch.no_grad()
    def forward(self, items: Tensor, present: Tensor) -> Tensor:
        """The chance `[C]` of each of `items [C]` (-1: none) to be in a batch, after those `present` have been."""
        known = items.clamp(min=0)
        if self.training:
            assert self.step is not None, "call set_step before a training forward"
            seen = known[present]
            waited = (self.step + 1 - self.last[seen]).to(self.interval.dtype)
            before = self.interval[seen]
            self.interval[seen] = torch.where(before > 0, before + RATE * (waited - before), waited)
            self.last[seen] = self.step + 1
        # Items that no batch has held yet came by chance only.
        return torch.where(self.interval[known] > 0, 1 / self.interval[known].clamp(min=1), 0)
