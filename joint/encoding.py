"""Histories as heads read them: item features side by side, events joined in, competitors in their place, encoded."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from joint.batch import Batch
from joint.features import Plan, Reading
from joint.keys import Key
from towers.sequence import CompetingEncoder, build_encoder, to_padded

Rows = dict[str, Tensor]  # key name -> its rows: [R, D], [N, D], [P, D] or [events, D] (averaged: [R, D])


class HistoryEncoder(nn.Module):
    """One reading of a history."""

    def __init__(self, reading: Reading, plan: Plan) -> None:
        super().__init__()
        config, owner = reading.encoder, reading.owner
        self.config = config
        features = [plan.schema.feature(feature) for feature in config.features]
        events = [plan.schema.feature(event) for event in config.events]
        self.item_keys = [Key("history", feature, config.history, owner).name for feature in features]
        self.event_keys = [Key("history", event, config.history, owner).name for event in events]
        self.target_keys = [Key("candidate", feature, owner=owner).name for feature in features]
        self.competitor_keys = [Key("competitors", feature, config.history, owner).name for feature in features]
        dim = plan.encoder_dim(config)
        multiplied = config.combine == "multiply"
        self.event = nn.Linear(sum(map(plan.dim, events)), dim, bias=multiplied) if events else None
        if self.event is not None and multiplied:
            nn.init.ones_(self.event.bias)  # at first the event changes its item little
        self.competing = CompetingEncoder(config.competing, dim=dim) if config.competing else None
        self.encoder = build_encoder(config.by, dim=dim)
        self.per_candidate = reading.per_candidate
        self.averaged = (config.history, owner) in plan.averaged

    def events(self, rows: Rows, competitors: Tensor | None, mirrored: Tensor | None = None) -> Tensor:
        """`[events, D]`: past items with what happened to them, or (RecFlow A.6) what each won against in its place.

        Args:
            competitors: which of each event's are some, bool `[events, K]`.
            mirrored: whose competitors each event takes, `[events]`; None: its own.
        """
        past = torch.cat([rows[key] for key in self.item_keys], dim=1)
        if self.event is not None:
            event = self.event(torch.cat([rows[key] for key in self.event_keys], dim=1))
            past = past * event if self.config.combine == "multiply" else past + event
        if self.competing is not None:
            assert competitors is not None
            others = torch.cat([rows[key] for key in self.competitor_keys], dim=1).unflatten(0, competitors.shape)
            if mirrored is not None:
                others, competitors = others.index_select(0, mirrored), competitors.index_select(0, mirrored)
            past = self.competing(past, others, competitors)
        return past

    def history(self, rows: Rows, batch: Batch) -> tuple[Tensor, Tensor]:
        """`[R, L, D]` and lengths `[R]`."""
        lengths = batch.lengths[self.config.history]
        reverse = self.config.competing is not None and self.config.competing.reverse
        competitors = batch.competitors.get(self.config.history)
        past = self.events(rows, competitors, _mirrored(lengths) if reverse else None)
        return to_padded(past, lengths, self.config.length), lengths

    def targets(self, rows: Rows) -> Tensor:
        """`[N, D]`: the candidates, in the features that past items have."""
        return torch.cat([rows[key] for key in self.target_keys], dim=1)

    def forward(self, rows: Rows, batch: Batch, chosen: Tensor | None = None) -> Tensor:
        """One vector a request `[R, D]`, or one for each of the `chosen` candidates."""
        if self.averaged:
            return torch.cat([rows[key] for key in self.item_keys], dim=1)
        history, lengths = self.history(rows, batch)
        if not self.per_candidate:
            return self.encoder(history, lengths)
        assert chosen is not None
        target = self.targets(rows).index_select(0, chosen)
        return self.encoder(history, lengths, target, batch.row.index_select(0, chosen))


def _mirrored(lengths: Tensor) -> Tensor:
    """For each event of histories of `lengths [R]`, the one as far from their other end: int64 [ΣL]."""
    ends = lengths.cumsum(0)
    first_and_last = (2 * ends - lengths - 1).repeat_interleave(lengths)
    return first_and_last - torch.arange(len(first_and_last), device=lengths.device)
