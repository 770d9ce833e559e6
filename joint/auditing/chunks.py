"""A dataset as a stream of chunks: what an audit holds in memory at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from joint.data.dataset import Dataset
from joint.data.ragged import Ragged
from joint.data.requests import Requests
from joint.schema import Part, Stage, day_number, table_rows

CHUNK = 8192  # requests; with 500 candidates each and ten labels some hundred MiB
USER = "user_id"  # the request feature that says who asked


@dataclass(frozen=True)
class Chunk:
    """Some requests of one file, with their timed histories and `split`; N candidates of R requests."""

    dataset: Dataset
    part: Part
    requests: Requests

    @cached_property
    def items(self) -> Ragged:
        """The candidates, item indices."""
        return self.requests.lists("candidates")

    @cached_property
    def rows(self) -> np.ndarray:
        """The request of every candidate, int64 [N]."""
        return self.items.rows

    @cached_property
    def stages(self) -> np.ndarray:
        """Stage flags, uint16 [N]."""
        return self.requests.lists("stages").values

    @cached_property
    def exposed(self) -> np.ndarray:
        """Which candidates were shown, bool [N]."""
        return (self.stages & Stage.EXPOSED) != 0

    @cached_property
    def users(self) -> np.ndarray | None:
        """The user of every request, 0 for an unknown one, int64 [R]; None without a feature `user_id`."""
        size = user_count(self.dataset)
        return table_rows(self.requests.scalars(USER), size)[0] if size else None

    @property
    def day(self) -> int:
        """The number of the day."""
        return day_number(self.part.day)

    @property
    def ids(self) -> np.ndarray:
        """Request ids, [R]."""
        return self.requests.scalars("request_id")

    @property
    def timestamps(self) -> np.ndarray:
        """Seconds since 1970 of every request, [R]."""
        return self.requests.scalars("timestamp")

    def label(self, name: str) -> np.ndarray:
        """A label of every candidate, NaN where it was not observed, float32 [N]."""
        return self.requests.lists(name).values


def user_count(dataset: Dataset) -> int:
    """Ids of the feature `user_id`, the unknown one included; 0 without such a feature of requests."""
    return sum(f.size for f in dataset.schema.features if (f.name, f.level, f.kind) == (USER, "request", "id"))


def chunks(dataset: Dataset, part: Part) -> Iterator[Chunk]:
    """A file's requests in their order, about CHUNK at a time."""
    times = [f"{history.name}.timestamp" for history in dataset.schema.histories if history.timed]
    starts = np.cumsum([0, *part.groups])[:-1] // CHUNK
    for number in np.unique(starts):
        groups = np.flatnonzero(starts == number).tolist()
        yield Chunk(dataset, part, dataset.read(part, groups, further=[*times, "split"]))
