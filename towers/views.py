"""Two views of the same things, each with other fields of them."""

from __future__ import annotations

import zlib

import torch
from torch import Tensor, nn

from towers.fields import Fields


class FieldViews(nn.Module):
    """Deals the fields to two views: `[M, in_dim] -> 2 x [M, in_dim]`, zeros where a view lacks a field.

    Every field is in exactly one view, and the views have equally many, or one more. The deal is drawn from (seed,
    step): equal for all rows and all ranks, new with each step (Yao et al., CIKM'21, 3.3, there by correlation).
    ValueError for a single field.
    """

    def __init__(self, fields: Fields, *, seed: int) -> None:
        super().__init__()
        if len(fields) < 2:
            raise ValueError(f"two views need two fields or more, found {', '.join(fields) or 'none'}")
        self.widths = torch.tensor(list(fields.values()))
        self.seed = seed
        self.step: int | None = None

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Both views of this step."""
        assert self.step is not None, "call set_step before a training forward: the fields are dealt per step"
        key = zlib.crc32(f"{self.seed}/views/{self.step}".encode())
        place = torch.randperm(len(self.widths), generator=torch.Generator().manual_seed(key))
        first = (place < (len(place) + 1) // 2).repeat_interleave(self.widths).to(x.device)
        return x * first, x * ~first
