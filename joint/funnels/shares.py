"""Reading a funnel's metrics by name: what is left after each stage, and which stage lost the rest."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import NamedTuple

from joint.evaluating.funnel_metrics import OUTSIDE
from joint.funnels.measure import THIRDS, Quotas, Thirds

# kind of what is wanted -> what it is called
KINDS = {"positives": "positives", "teacher_favourites": "teacher's ten", "true_favourites": "true ten"}


class Slice(NamedTuple):
    """Some users or items: how a page calls them, and what their metrics' names begin with."""

    name: str
    prefix: str


def slices(numbers: Mapping[str, float], thirds: Thirds) -> list[Slice]:
    """All requests, then every user group, then items by popularity."""
    groups = sorted({int(found[1]) for name in numbers if (found := re.match(r"group/(\d+)/funnel/", name))})
    low, high = thirds.bounds
    said = (f"≤ {low:,}", f"{low + 1:,} to {high:,}", f"> {high:,}")
    return [
        Slice("all", ""),
        *(Slice(f"user group {group}", f"group/{group}/") for group in groups),
        *(Slice(f"{name} items ({has})", f"popularity/{name}/") for name, has in zip(THIRDS, said, strict=True)),
    ]


def lost(numbers: Mapping[str, float], quotas: Quotas, kind: str, prefix: str = "") -> dict[str, float]:
    """Stage -> the share that it lost, `outside` first; and last `left`, what came through: the shares sum to 1.

    Empty where nothing of the kind is wanted, or it is not known what is.
    """
    of = "" if kind == "positives" else f"/{kind}"
    found = {stage: numbers.get(f"{prefix}funnel/lost/{stage}{of}", math.nan) for stage in (OUTSIDE, *quotas)}
    if of:
        found[OUTSIDE] = 0.0  # favourites are chosen among what could be served
    if any(math.isnan(value) for value in found.values()):
        return {}
    return found | {"left": 1 - sum(found.values())}


def left(numbers: Mapping[str, float], quotas: Quotas, kind: str) -> dict[str, float]:
    """Stage -> the share that is left after it; empty where that is not known."""
    shares, remaining = lost(numbers, quotas, kind), 1.0
    found = {}
    for stage in (OUTSIDE, *quotas) if shares else ():
        remaining -= shares[stage]
        found[stage] = max(remaining, 0.0)
    return found
