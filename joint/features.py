"""Which ids are looked up under which key: the plan that loader, tables and model share."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from joint.config import Config, Encoder, heads_of
from joint.objectives import MultiClass
from joint.schema import Feature, Schema
from towers.embeddings import TableShape, width_name
from towers.sequence import TargetAttention

Side = Literal["request", "candidate", "pool", "history"]


@dataclass(frozen=True)
class Key:
    """One list of ids (or floats) a request: a feature, seen from one side."""

    side: Side
    feature: Feature
    history: str = ""

    @property
    def name(self) -> str:
        """`user_id`, `candidate.genres`, `pool.item_id`, `liked.item_id`."""
        return self.feature.name if self.side == "request" else f"{self.history or self.side}.{self.feature.name}"


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
    def encoders(self) -> dict[str, Encoder]:
        """The encoders that some head names; others are neither looked up nor run."""
        named = {name for head in heads_of(self.config).values() for name in head.features}
        return {name: encoder for name, encoder in self.config.encoders.items() if name in named}

    @cached_property
    def history_lengths(self) -> dict[str, int]:
        """History -> events the loader keeps: the longest that an encoder reads."""
        lengths: dict[str, int] = {}
        for encoder in self.encoders.values():
            lengths[encoder.history] = max(encoder.length, lengths.get(encoder.history, 0))
        return lengths

    @property
    def uses_corpus(self) -> bool:
        """Whether training scores the corpus."""
        return any(isinstance(objective, MultiClass) for objective in self.config.objectives.values())

    @cached_property
    def tables(self) -> tuple[TableShape, ...]:
        """The tables that some key looks up."""
        keys: dict[str, list[str]] = {}
        for key in self.keys:
            if key.feature.kind != "float":
                keys.setdefault(key.feature.space, []).append(key.name)
        sizes: dict[str, int] = {}
        for feature in self.schema.features:
            sizes[feature.space] = max(feature.size, sizes.get(feature.space, 0))
        shapes = []
        for space, names in keys.items():
            table = self.config.tables[space]
            rows = sizes[space] if table.rows == "auto" else table.rows
            shapes.append(TableShape(name=space, rows=rows, dim=table.dim, keys=tuple(names)))
        return tuple(shapes)

    @cached_property
    def keys_by_width(self) -> dict[str, tuple[Key, ...]]:
        """Name of an embedding collection -> the keys of its KeyedJaggedTensor, in order."""
        widths = sorted({table.dim for table in self.tables})
        return {
            width_name(width): tuple(
                key for key in self.keys if key.feature.kind != "float" and self.dim(key.feature) == width
            )
            for width in widths
        }

    def dim(self, feature: Feature) -> int:
        """Columns of a feature in a head's input."""
        return 1 if feature.kind == "float" else self.config.tables[feature.space].dim

    def head_features(self, head: str, level: Literal["request", "item"]) -> tuple[Feature, ...]:
        """A head's plain features of one level, in its order."""
        names = heads_of(self.config)[head].features
        known = {feature.name: feature for feature in self.schema.features if feature.level == level}
        return tuple(known[name] for name in names if name in known)

    def head_encoders(self, head: str, *, per_candidate: bool) -> tuple[str, ...]:
        """A head's encoders: those with one vector a request, or those with one a candidate."""
        encoders = self.encoders
        names = [name for name in heads_of(self.config)[head].features if name in encoders]
        return tuple(n for n in names if isinstance(encoders[n].by, TargetAttention) == per_candidate)

    def _keys(self) -> Iterator[Key]:
        for head in heads_of(self.config):
            for feature in self.head_features(head, "request"):
                yield Key("request", feature)
            for feature in self.head_features(head, "item"):
                yield Key("candidate", feature)
                if head == "retrieval":
                    yield Key("pool", feature)
        for encoder in self.encoders.values():
            for name in encoder.features:
                yield Key("history", self.schema.feature(name), encoder.history)
                if isinstance(encoder.by, TargetAttention):
                    yield Key("candidate", self.schema.feature(name))
            for name in encoder.events:
                yield Key("history", self.schema.feature(name), encoder.history)
