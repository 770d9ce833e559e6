"""Which ids are looked up under which key: the plan that loader, tables and model share."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from joint.data.cross import Cross
from joint.experiment import Config, Encoder, Table, heads_of
from joint.ids import collision_rate
from joint.keys import HeadSide, Key, Reads, Side
from joint.objectives import ItemViews, MultiClass
from joint.schema import Feature, Schema
from towers.embeddings import TableShape, width_name
from towers.sequence import Pooling, TargetAttention


@dataclass(frozen=True)
class Reading:
    """An encoder as one or more heads use it: whose tables it reads, and its settings."""

    encoder: Encoder
    owner: str

    @property
    def per_candidate(self) -> bool:
        """Whether it gives a vector a candidate, and not one a request."""
        return isinstance(self.encoder.by, TargetAttention)


@dataclass(frozen=True)
class Plan:
    """What one config reads of one dataset."""

    config: Config
    schema: Schema

    @cached_property
    def keys(self) -> tuple[Key, ...]:
        """Every key, each once, in a fixed order."""
        return tuple(dict.fromkeys(self._keys()))

    @cached_property
    def readings(self) -> dict[str, Reading]:
        """The encoders that some head names, each once for all heads that share it."""
        return {
            self.reading_name(head, name): Reading(self.config.encoders[name], self.owner(head))
            for head in heads_of(self.config)
            for name in self.head_encoders(head)
        }

    @cached_property
    def readers(self) -> dict[str, tuple[str, ...]]:
        """Reading -> the heads that share it."""
        heads = [(head, name) for head in heads_of(self.config) for name in self.head_encoders(head)]
        return {
            reading: tuple(head for head, name in heads if self.reading_name(head, name) == reading)
            for reading in self.readings
        }

    def reading_name(self, head: str, encoder: str) -> str:
        """What the reading of an encoder by a head is called."""
        shared = self.config.sharing.mode == "tables_and_encoders"
        return encoder if shared else f"{encoder}@{head}"

    def owner(self, head: str) -> str:
        """Whose tables a head reads: its own, or '' for the shared ones."""
        return head if self.config.sharing.mode == "none" else ""

    @cached_property
    def history_lengths(self) -> dict[str, int]:
        """History -> events the loader keeps: the longest that an encoder or a cross feature reads."""
        lengths: dict[str, int] = {}
        readers: list[Encoder | Cross] = [reading.encoder for reading in self.readings.values()]
        for reader in [*readers, *self.crosses.values()]:
            lengths[reader.history] = max(reader.length, lengths.get(reader.history, 0))
        return lengths

    @cached_property
    def averaged(self) -> frozenset[tuple[str, str]]:
        """The histories, as (history, owner), that nothing but plain means read: the look-up averages their ids."""
        readings = self.readings.values()
        others = {(r.encoder.history, r.owner) for r in readings if not self._only_averages(r.encoder)}
        return frozenset((r.encoder.history, r.owner) for r in readings) - others

    def _only_averages(self, encoder: Encoder) -> bool:
        """Whether an encoder is the mean of one id a feature over all the events that are kept."""
        mean = isinstance(encoder.by, Pooling) and encoder.by.kind == "mean"
        whole = encoder.length == self.history_lengths[encoder.history]
        plain = all(self.schema.feature(name).kind == "id" for name in encoder.features)
        return mean and whole and plain and not encoder.events and not encoder.competing

    @cached_property
    def reads(self) -> Reads:
        """What the loader reads for all heads."""
        competed = {key.history for key in self.keys if key.side == "competitors"}
        competitors = {name: self.schema.history(name).competitors for name in sorted(competed)}
        return Reads(self.keys, self.history_lengths, competitors, self.crosses)

    @cached_property
    def pool_spaces(self) -> frozenset[str]:
        """The spaces that softmaxes and item views of training are of: `corpus`, or some of `in_batch` and `random`."""
        objectives = self.config.objectives.values()
        return frozenset(token for o in objectives if isinstance(o, MultiClass | ItemViews) for token in o.space)

    @cached_property
    def item_views(self) -> ItemViews | None:
        """The objective on two views of items, if there is one."""
        return next((o for o in self.config.objectives.values() if isinstance(o, ItemViews)), None)

    @cached_property
    def crosses(self) -> dict[str, Cross]:
        """The cross features that some head names."""
        named = {name for head in heads_of(self.config).values() for name in head.features}
        return {name: cross for name, cross in self.config.cross.items() if name in named}

    @cached_property
    def tables(self) -> tuple[TableShape, ...]:
        """The tables that some key looks up."""
        keys: dict[str, list[Key]] = {}
        for key in self.keys:
            if key.embedded:
                keys.setdefault(key.table, []).append(key)
        sizes, shapes = self.id_spaces, []
        for name, readers in keys.items():
            space = readers[0].feature.space
            table = self.config.tables[space]
            rows = sizes[space] if table.rows == "auto" else table.rows
            shapes.append(TableShape(name=name, rows=rows, dim=table.dim, keys=tuple(key.name for key in readers)))
        return tuple(shapes)

    def _key(self, side: Side, feature: Feature, history: str = "", owner: str = "") -> Key:
        table = self.config.tables.get(feature.space) if feature.kind in ("id", "ids") else None
        rows = table.rows if table and table.hash and table.rows != "auto" else 0
        return Key(side, feature, history, owner, rows)

    @cached_property
    def id_spaces(self) -> dict[str, int]:
        """Id space -> its size: ids are 1 .. size - 1, and 0 is unknown."""
        sizes: dict[str, int] = {}
        for feature in self.schema.features:
            sizes[feature.space] = max(feature.size, sizes.get(feature.space, 0))
        return sizes

    @cached_property
    def collisions(self) -> dict[str, float]:
        """Hashed id space -> the share of its ids that share their row with another."""
        hashed = {space: table.rows for space, table in self.config.tables.items() if table.hash}
        return {
            space: collision_rate(self.id_spaces[space] - 1, rows)
            for space, rows in hashed.items()
            if space in self.id_spaces and rows != "auto"
        }

    @cached_property
    def table_settings(self) -> dict[str, Table]:
        """Table -> its settings, which the copies of several heads share."""
        return {key.table: self.config.tables[key.feature.space] for key in self.keys if key.embedded}

    @cached_property
    def keys_by_width(self) -> dict[str, tuple[Key, ...]]:
        """Name of an embedding collection -> the keys of its KeyedJaggedTensor, in order."""
        widths = sorted({table.dim for table in self.tables})
        return {
            width_name(width): tuple(key for key in self.keys if key.embedded and self.dim(key.feature) == width)
            for width in widths
        }

    def dim(self, feature: Feature) -> int:
        """Columns of a feature in a head's input."""
        match feature.kind:
            case "float":
                return 1
            case "vector":
                return feature.size
            case _:
                return self.config.tables[feature.space].dim

    def head_keys(self, head: str, side: HeadSide) -> tuple[Key, ...]:
        """A head's plain features of its request or item side, in its order; cross features come last."""
        level, owner = "request" if side == "request" else "item", self.owner(head)
        known = {feature.name: feature for feature in self.schema.features if feature.level == level}
        names = heads_of(self.config)[head].features
        found = [known[name] for name in names if name in known]
        keys = [self._key(side, f, owner=owner if f.kind in ("id", "ids") else "") for f in found]
        if side == "candidate":
            keys += [
                self._key("cross", Feature(name=n, level="item", kind="float")) for n in names if n in self.crosses
            ]
        return tuple(keys)

    def head_encoders(self, head: str, *, per_candidate: bool | None = None) -> tuple[str, ...]:
        """The encoders a head names: those with one vector a request, those with one a candidate, or (None) all."""
        encoders = self.config.encoders
        names = [name for name in heads_of(self.config)[head].features if name in encoders]
        return tuple(
            n for n in names if per_candidate is None or isinstance(encoders[n].by, TargetAttention) == per_candidate
        )

    def fields(self, head: str, side: Literal["request", "candidate"]) -> dict[str, int]:
        """The columns of one side of a head's input by what they hold, in order."""
        plain = {key.feature.name: self.dim(key.feature) for key in self.head_keys(head, side)}
        encoders = self.head_encoders(head, per_candidate=side == "candidate")
        return plain | {name: self.encoder_dim(self.config.encoders[name]) for name in encoders}

    def encoder_dim(self, encoder: Encoder) -> int:
        """Columns of a past item, and of what an encoder makes of them."""
        return sum(self.dim(self.schema.feature(name)) for name in encoder.features)

    def _keys(self) -> Iterator[Key]:
        for head in heads_of(self.config):
            yield from self.head_keys(head, "request")
            yield from self.head_keys(head, "candidate")
            if head == "retrieval":
                yield from self.head_keys(head, "pool")
        for name in self.readings:
            yield from self.reading_keys(name)

    def reading_keys(self, name: str) -> Iterator[Key]:
        """What an encoder looks up, and where it sees the candidate, of the candidate too."""
        encoder, owner = self.readings[name].encoder, self.readings[name].owner
        for feature_name in encoder.features:
            feature = self.schema.feature(feature_name)
            yield self._key("history", feature, encoder.history, owner)
            if self.readings[name].per_candidate:
                yield self._key("candidate", feature, owner=owner)
            if encoder.competing:
                yield self._key("competitors", feature, encoder.history, owner)
        for event in encoder.events:
            yield self._key("history", self.schema.feature(event), encoder.history, owner)
