"""Which candidates of a request are trained on: quotas per stage, then what was sampled.

Every draw is a hash of (seed, epoch, request, slot): the same for any number of ranks, any batch and any restart.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from joint.data.ragged import Ragged, draw, offsets_of, side_by_side
from joint.schema import STAGES, Stage

Quota = int | Literal["all"]
SHUFFLE = -1  # among the keys of draws: no stage has this flag


@dataclass(frozen=True)
class Candidates:
    """Candidates of some requests: item indices, and per candidate its stage flags and label columns."""

    items: Ragged
    stages: np.ndarray  # uint16 [N]
    labels: Mapping[str, np.ndarray]  # float32 [N], NaN where not observed; logged scores too

    def keep(self, mask: np.ndarray) -> Candidates:
        """Without the candidates where `mask` [N] is False."""
        labels = {name: values[mask] for name, values in self.labels.items()}
        return Candidates(self.items.keep(mask), self.stages[mask], labels)

    def take(self, rows: np.ndarray) -> Candidates:
        """Those of these requests, in this order."""
        index = Ragged(np.arange(len(self.stages)), self.items.offsets).take(rows).values
        labels = {name: values[index] for name, values in self.labels.items()}
        return Candidates(self.items.take(rows), self.stages[index], labels)


def unlabelled(items: Ragged, labels: tuple[str, ...], stage: Stage = Stage.RANDOM) -> Candidates:
    """Candidates of which nothing is known: sampled ones, or a whole catalogue to be scored."""
    nothing = np.full(len(items.values), np.nan, np.float32)
    return Candidates(items, np.full(len(items.values), stage, np.uint16), dict.fromkeys(labels, nothing))


def sample_stages(logged: Candidates, quotas: Mapping[str, Quota], keys: np.ndarray) -> Candidates:
    """At most `quotas[stage]` logged candidates of each request and stage, drawn without replacement.

    Args:
        quotas: stage or group name -> how many, or 'all'. Stages not named are left out; a stage name does not
            count exposed candidates, `exposed` does. Each stage draws by itself, so a candidate of several named
            stages may come by any of them.
        keys: uint64 [R], a hash of (seed, epoch, request).
    """
    kept = np.zeros(len(logged.stages), bool)
    exposed = (logged.stages & Stage.EXPOSED) != 0
    rows = logged.items.rows
    place = np.arange(len(rows)) - logged.items.offsets[:-1][rows]
    for name, quota in quotas.items():
        if name == "random":
            continue
        flags = STAGES[name]
        member = exposed if flags == Stage.EXPOSED else ((logged.stages & int(flags)) != 0) & ~exposed
        if quota == "all" or np.bincount(rows[member], minlength=1).max() <= quota:  # nothing to draw
            kept |= member
        else:
            kept |= _first(member, rows, draw(keys[rows], int(flags), place), quota)
    return logged.keep(kept)


def shuffle_stages(logged: Candidates, keys: np.ndarray) -> Candidates:
    """The same candidates, the stage flags of those not exposed dealt anew within each request (uint64 keys [R])."""
    rows = logged.items.rows
    hidden = np.flatnonzero((logged.stages & Stage.EXPOSED) == 0)
    place = np.arange(len(rows)) - logged.items.offsets[:-1][rows]
    order = hidden[np.lexsort((draw(keys[rows], SHUFFLE, place)[hidden], rows[hidden]))]
    stages = logged.stages.copy()
    stages[hidden] = logged.stages[order]
    return Candidates(logged.items, stages, logged.labels)


def _first(member: np.ndarray, rows: np.ndarray, order: np.ndarray, quota: int) -> np.ndarray:
    """The `quota` members of each request that come first by `order`."""
    index = np.flatnonzero(member)
    index = index[np.lexsort((order[index], rows[index]))]
    counts = np.bincount(rows[index], minlength=1)
    nth = np.arange(len(index)) - np.repeat(offsets_of(counts)[:-1], counts)
    first = np.zeros(len(member), bool)
    first[index[nth < quota]] = True
    return first


def with_random(logged: Candidates, drawn: Ragged) -> Candidates:
    """Logged candidates followed, within each request, by sampled ones."""
    more = unlabelled(drawn, tuple(logged.labels))
    items, index = side_by_side(logged.items, more.items)
    labels = {name: np.concatenate([logged.labels[name], more.labels[name]])[index] for name in logged.labels}
    return Candidates(items, np.concatenate([logged.stages, more.stages])[index], labels)
