"""Which columns of requests and of the catalogue are read, and their names. No torch: serving reads them too."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from joint.data.cross import Cross
from joint.schema import Feature

Side = Literal["request", "candidate", "pool", "history", "competitors", "cross"]
HeadSide = Literal["request", "candidate", "pool"]


@dataclass(frozen=True)
class Key:
    """One list of ids (or floats) a request: a feature, seen from one side."""

    side: Side
    feature: Feature
    history: str = ""
    owner: str = ""  # the head whose own table it reads; '' is the shared one
    hashed: int = 0  # the rows of its table, if ids are hashed to them; 0: an id is a row

    @property
    def name(self) -> str:
        """`user_id`, `candidate.genres`, `pool.item_id`, `liked.item_id`, `liked.competitors.item_id`."""
        parts = [self.history, "" if self.side in ("request", "history", "cross") else self.side, self.feature.name]
        return ".".join(part for part in parts if part) + (f"@{self.owner}" if self.owner else "")

    @property
    def embedded(self) -> bool:
        """Whether a table is looked up, rather than numbers passed on."""
        return self.feature.kind in ("id", "ids")

    @property
    def table(self) -> str:
        """The table it reads."""
        return self.feature.space + (f"@{self.owner}" if self.owner else "")


@dataclass(frozen=True)
class Reads:
    """What is read of a request and its candidates: by all heads of a plan, or by exported graphs."""

    keys: tuple[Key, ...]
    lengths: Mapping[str, int]  # history -> its newest events that are read
    competitors: Mapping[str, int]  # history -> items an event won against, where they are read
    crosses: Mapping[str, Cross]
