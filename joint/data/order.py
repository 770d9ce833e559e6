"""The order of training: which requests make up batch b of day d of epoch e, for any number of ranks.

Each day's row groups are dealt into V virtual shards; a shard is read in windows of a few row groups, permuted inside
the window; every global batch takes its share from each shard, and rank r of W reads the shards r, r + W, … . So a
global batch holds the same requests whatever W is, the number of batches is known from the schema alone, and any
position can be reached without reading what comes before its windows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from joint.data.dataset import Dataset
from joint.data.ragged import draw
from joint.data.requests import Requests, concatenate_requests
from joint.schema import Part

WINDOW_GROUPS = 8  # row groups a shard holds in memory and shuffles together


@dataclass(frozen=True)
class Position:
    """Where training stands: the next batch to be trained is number `batch` of day number `day` of `epoch`."""

    epoch: int = 0
    day: int = 0
    batch: int = 0


@dataclass(frozen=True)
class Window:
    """Row groups that are read and permuted together, and the place of their requests in the shard's stream."""

    groups: tuple[tuple[Part, int], ...]
    begin: int
    end: int


class DayOrder:
    """The order of one day in one epoch."""

    def __init__(self, parts: list[Part], day: str, *, epoch: int, seed: int, shards: int, batch: int) -> None:
        self.key = draw(seed, epoch, int(day.replace("-", "")))
        self.share = batch // shards
        groups = [(part, index) for part in parts for index in range(len(part.groups))]
        dealt = np.argsort(draw(self.key, np.arange(len(groups))), kind="stable")
        self.windows = [_windows([groups[i] for i in dealt[shard::shards]]) for shard in range(shards)]
        longest = max((windows[-1].end for windows in self.windows if windows), default=0)
        self.batches = -(-longest // self.share)

    def shares(
        self, shard: int, first: int, dataset: Dataset, further: Sequence[str] = ()
    ) -> Iterator[Requests | None]:
        """The shard's share of batch `first`, `first` + 1, …; None once the shard has run out.

        `further` names columns to read beyond those of all training.
        """
        held: list[tuple[Window, Requests]] = []
        for begin in range(first * self.share, self.batches * self.share, self.share):
            end = begin + self.share
            held = [pair for pair in held if pair[0].end > begin]
            for window in self.windows[shard]:
                if window.begin < end and window.end > begin and all(window is not pair[0] for pair in held):
                    held.append((window, self._read(window, dataset, further)))
            pieces = [
                requests.between(max(begin - window.begin, 0), min(end, window.end) - window.begin)
                for window, requests in held
                if window.begin < end
            ]
            yield concatenate_requests(pieces) if pieces else None

    def _read(self, window: Window, dataset: Dataset, further: Sequence[str]) -> Requests:
        by_part: dict[str, tuple[Part, list[int]]] = {}
        for part, group in window.groups:
            by_part.setdefault(part.path, (part, []))[1].append(group)
        requests = concatenate_requests(
            [dataset.read(part, sorted(groups), further=further) for part, groups in by_part.values()]
        )
        return requests.take(np.argsort(draw(self.key, requests.scalars("request_id")), kind="stable"))


def _windows(groups: list[tuple[Part, int]]) -> list[Window]:
    windows = []
    begin = 0
    for start in range(0, len(groups), WINDOW_GROUPS):
        chosen = tuple(groups[start : start + WINDOW_GROUPS])
        end = begin + sum(part.groups[group] for part, group in chosen)
        windows.append(Window(chosen, begin, end))
        begin = end
    return windows
