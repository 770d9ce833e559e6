"""The towers as graphs: the trainer's own modules, on padded ids instead of TorchRec's jagged look-ups.

A graph takes one dict of named inputs (`joint.serving.inputs` makes them). Shapes: B requests, N items, L events, M ids
of a multi-valued feature, K competitors of an event, W numbers of a float or vector feature:

    user_id [B]                        genres [B, M] and genres.length [B]            a float or vector [B, W]
    liked.item_id [B, L]               liked.genres [B, L, M] and its .length [B, L]   liked.length [B]
    liked.competitors.item_id [B, L, K], and which are some: liked.competitors [B, L, K]
    candidate.item_id [N]              candidate.genres [N, M] and its .length [N]     a cross feature [N, 1]
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional

from joint.data.cross import Cross
from joint.encoding import HistoryEncoder, Rows
from joint.experiment import HEADS, Encoder
from joint.exporting.tables import QUANTISED, Precision, placeholder
from joint.features import Plan
from joint.keys import Key, Reads
from joint.model import JointModel
from towers.embeddings import TableShape
from towers.pre_ranking import MlpHead, TwoTowerHead
from towers.ranking import RankingHead
from towers.retrieval import RetrievalHead

Inputs = dict[str, Tensor]


def input_name(key: Key) -> str:
    """What a graph calls a key: heads with tables of their own look the same ids up."""
    return key.name.partition("@")[0]


def keys_of(plan: Plan, heads: Iterable[str], *, item_side: bool) -> tuple[Key, ...]:
    """What the item side of these heads looks up, or what their other side does with all histories; each once."""
    keys: list[Key] = []
    for head in heads:
        keys += plan.head_keys(head, "candidate" if item_side else "request")
        if not item_side:
            for encoder in plan.head_encoders(head):
                keys += plan.reading_keys(plan.reading_name(head, encoder))
    return tuple(dict.fromkeys(keys))


def reads_of(plan: Plan, heads: Sequence[str]) -> Reads:
    """What the graphs of these heads read; of every history no more than their encoders do."""
    keys = (*keys_of(plan, heads, item_side=False), *keys_of(plan, heads, item_side=True))
    names = {plan.reading_name(head, encoder) for head in heads for encoder in plan.head_encoders(head)}
    crosses = {key.feature.name: plan.crosses[key.feature.name] for key in keys if key.side == "cross"}
    lengths: dict[str, int] = {}
    readers: list[Encoder | Cross] = [plan.readings[name].encoder for name in sorted(names)]
    for reader in [*readers, *crosses.values()]:
        lengths[reader.history] = max(reader.length, lengths.get(reader.history, 0))
    competed = sorted({key.history for key in keys if key.side == "competitors"})
    competitors = {name: plan.schema.history(name).competitors for name in competed}
    return Reads(tuple(dict.fromkeys(keys)), lengths, competitors, crosses)


def as_inputs(reads: Reads) -> Reads:
    """The same as what a graph takes: each once, whosever tables it is looked up in."""
    keys = tuple(dict.fromkeys(replace(key, owner="") for key in reads.keys))
    return replace(reads, keys=keys)


class Lookup(nn.Module):
    """Keys' rows from tables that an exported graph reads out of `tables.bin`; here they are placeholders.

    The row of an id outside of its table is row 0, the unknown. With `tables`, the real ones, it can be run in torch.
    """

    def __init__(self, shapes: Iterable[TableShape], precision: Precision, tables: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.sizes = {shape.name: shape.rows for shape in shapes}
        self.quantised = precision == "int8"
        for shape in shapes:
            for name, tensor in placeholder(shape, precision, tables.get(shape.name)).items():
                self.register_buffer(name, tensor)

    def forward(self, key: Key, inputs: Inputs) -> Tensor:
        """`[..., D]` of the key's ids or numbers, multi-valued ones as the mean of their rows."""
        values = inputs[input_name(key)]
        if not key.embedded:
            return values
        rows = self._embedded(key.table, values)
        if key.feature.kind == "id":
            return rows
        length = inputs[f"{input_name(key)}.length"].unsqueeze(-1)
        there = torch.arange(values.shape[-1], device=values.device) < length
        total = rows.masked_fill(~there.unsqueeze(-1), 0.0).sum(dim=-2)
        return total / length.clamp(min=1)

    def _embedded(self, table: str, ids: Tensor) -> Tensor:
        known = torch.where((ids < 0) | (ids >= self.sizes[table]), 0, ids)
        rows = functional.embedding(known, getattr(self, table)).float()
        if not self.quantised:
            return rows
        scale, least = functional.embedding(known, getattr(self, table + QUANTISED)).unbind(-1)
        return rows * scale.unsqueeze(-1) + least.unsqueeze(-1)


class _Side(nn.Module):
    """What the graphs of several heads share: the look-up, and the encoders that they read."""

    def __init__(self, plan: Plan, model: JointModel, heads: Sequence[str], lookup: Lookup) -> None:
        super().__init__()
        self.plan, self.names = plan, tuple(heads)
        self.lengths = reads_of(plan, heads).lengths
        self.lookup = lookup
        self.heads = nn.ModuleDict({name: model.heads[name] for name in heads})
        readings = {plan.reading_name(head, encoder) for head in heads for encoder in plan.head_encoders(head)}
        self.encoders = nn.ModuleDict({name: model.encoders[name] for name in sorted(readings)})

    def reading(self, name: str) -> HistoryEncoder:
        """An encoder: the trainer's own module."""
        encoder = self.encoders[name]
        assert isinstance(encoder, HistoryEncoder)
        return encoder

    def request(self, head: str, inputs: Inputs) -> Tensor:
        """`[B, request_dim]`, the request side of a head's input."""
        plain = [self.lookup(key, inputs) for key in self.plan.head_keys(head, "request")]
        names = [self.plan.reading_name(head, e) for e in self.plan.head_encoders(head, per_candidate=False)]
        return torch.cat([*plain, *(self.reading(n).encoder(*self.history(n, inputs)) for n in names)], dim=1)

    def item(self, head: str, inputs: Inputs) -> Tensor:
        """`[N, item_dim]`, the item side of a head's input, without what attends from it."""
        return torch.cat([self.lookup(key, inputs) for key in self.plan.head_keys(head, "candidate")], dim=1)

    def history(self, reading: str, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """`[B, L, D]`, the newest events that an encoder reads, oldest first, and lengths `[B]`."""
        encoder = self.reading(reading)
        name, longest = encoder.config.history, encoder.config.length
        keys = [key for key in self.plan.reading_keys(reading) if key.side != "candidate"]
        rows = {key.name: self.lookup(key, inputs) for key in keys}
        lengths = inputs[f"{name}.length"]
        places = next(rows[key.name] for key in keys if key.side == "history").shape[:2]
        # Every place is an event here, padding too, whose content never matters.
        flat: Rows = {key.name: rows[key.name].flatten(0, 1 if key.side == "history" else 2) for key in keys}
        competes = inputs[f"{name}.competitors"].flatten(0, 1) if encoder.competing is not None else None
        past = encoder.events(flat, competes).unflatten(0, places)
        if longest < self.lengths[name]:
            past = newest(past, lengths, longest)
        return past, lengths  # encoders read a length above L as L


def newest(past: Tensor, lengths: Tensor, length: int) -> Tensor:
    """The newest `length` events `[B, length, D]` of `[B, L, D]`, of which `lengths [B]` are there."""
    first = (lengths - length).clamp(min=0).unsqueeze(1)
    place = (first + torch.arange(length, device=past.device)).clamp(max=past.shape[1] - 1)
    return past.gather(1, place.unsqueeze(2).expand(-1, -1, past.shape[2]))


class UserTower(_Side):
    """Requests to `u [B, T, D]`, the retrieval head's vectors, and `pu`, the user side of the pre-ranking head."""

    def forward(self, inputs: Inputs) -> dict[str, Tensor]:
        """The outputs of those of the two heads that are exported."""
        found = {}
        for name, head in self.heads.items():
            match head:
                case RetrievalHead():
                    found["u"] = head.user_vectors(self.request(name, inputs))
                case TwoTowerHead():
                    found["pu"] = head.user_vectors(self.request(name, inputs))
                case MlpHead():  # nothing of it can be cached but its input
                    found["pu"] = self.request(name, inputs)
        return found


class ItemTower(_Side):
    """Items to `v [N, D]`, the retrieval head's vectors, and `pi`, the item side of the pre-ranking head."""

    def forward(self, inputs: Inputs) -> dict[str, Tensor]:
        """The outputs of those of the two heads that are exported."""
        found = {}
        for name, head in self.heads.items():
            match head:
                case RetrievalHead():
                    found["v"] = head.item_vectors(self.item(name, inputs))
                case TwoTowerHead():
                    found["pi"] = head.item_vectors(self.item(name, inputs))
                case MlpHead():
                    found["pi"] = self.item(name, inputs)
        return found


class PreRankingScorer(nn.Module):
    """`pu` of one request and `pi` of its candidates to `logits [N, T]`; it looks nothing up."""

    def __init__(self, head: TwoTowerHead | MlpHead) -> None:
        super().__init__()
        self.head = head

    def forward(self, inputs: Inputs) -> dict[str, Tensor]:
        """`logits [N, T]`."""
        user, item = inputs["pu"], inputs["pi"]
        if isinstance(self.head, TwoTowerHead):
            return {"logits": self.head.logits(user, item, None)}
        row = torch.zeros(item.shape[0], dtype=torch.long, device=item.device)
        return {"logits": self.head(user, item, row)[0]}


class Teacher(_Side):
    """One request and its candidates to the ranking head's `logits [N, T]`."""

    def forward(self, inputs: Inputs) -> dict[str, Tensor]:
        """`logits [N, T]`."""
        name = HEADS[-1]
        head = self.heads[name]
        assert isinstance(head, RankingHead)
        item = self.item(name, inputs)
        row = torch.zeros(item.shape[0], dtype=torch.long, device=item.device)
        attended = [self._attended(e, inputs, row) for e in self.plan.head_encoders(name, per_candidate=True)]
        return {"logits": head(self.request(name, inputs), torch.cat([item, *attended], dim=1), row)}

    def _attended(self, encoder: str, inputs: Inputs, row: Tensor) -> Tensor:
        reading = self.plan.reading_name(HEADS[-1], encoder)
        module = self.reading(reading)
        keys = [key for key in self.plan.reading_keys(reading) if key.side == "candidate"]
        target = module.targets({key.name: self.lookup(key, inputs) for key in keys})
        return module.encoder(*self.history(reading, inputs), target, row)
