"""The loader: positions in, batches out, the next one prepared while this one trains."""

from __future__ import annotations

import atexit
import queue
import threading
from collections.abc import Iterator
from typing import TypeVar

import numpy as np

from joint.batch import Batch
from joint.data.assemble import Assembler, logged
from joint.data.order import DayOrder, Position
from joint.data.ragged import draw
from joint.data.requests import Requests, concatenate_requests
from joint.data.sampling import Candidates, sample_stages, with_random
from joint.errors import ConfigError
from joint.experiment import Config
from joint.schema import Schema

T = TypeVar("T")
NO_POOL = np.zeros(0, np.int64)


class Loader:
    """This rank's training batches of a run, from any position on.

    Every rank yields the same number of batches; one that has run out of requests yields empty ones.

    Raises:
        ConfigError: the virtual shards cannot be shared out evenly over the ranks.
        DataError: the splits to train on hold no request.
    """

    def __init__(self, assembler: Assembler, *, rank: int, world_size: int) -> None:
        data = assembler.plan.config.data
        if data.shards % world_size:
            raise ConfigError(f"data.shards: {data.shards} is not a multiple of the number of ranks, {world_size}")
        self.assembler = assembler
        self.days = assembler.dataset.parts(data.train)
        self.data = data
        self.seed = assembler.plan.config.run.seed
        self.shards = range(rank, data.shards, world_size)
        self.latest = latest_known(assembler.plan.config, assembler.dataset.schema)
        self.pool = assembler.eligibility.slice(rank, world_size) if assembler.plan.uses_corpus else NO_POOL

    def total_batches(self) -> int:
        """Steps of the whole run; the deal, and with it the number, differs a little from epoch to epoch."""
        return sum(self._order(epoch, day).batches for epoch in range(self.data.epochs) for day in self.days)

    def from_position(self, start: Position, *, pinned: bool = False) -> Iterator[Batch]:
        """Batches from `start` to the end of the last epoch, prepared two ahead in a thread.

        `pinned` puts them in page-locked memory, from which a copy to the GPU overlaps with compute.
        """
        batches = self._batches(start)
        return prefetch((batch.pin_memory() for batch in batches) if pinned else batches, depth=2)

    def _order(self, epoch: int, day: str) -> DayOrder:
        return DayOrder(
            self.days[day],
            day,
            epoch=epoch,
            seed=self.seed,
            shards=self.data.shards,
            batch=self.data.requests_per_batch,
        )

    def _batches(self, start: Position) -> Iterator[Batch]:
        days = list(self.days)
        for epoch in range(start.epoch, self.data.epochs):
            for day in range(start.day if epoch == start.epoch else 0, len(days)):
                order = self._order(epoch, days[day])
                first = start.batch if (epoch, day) == (start.epoch, start.day) else 0
                streams = [order.shares(shard, first, self.assembler.dataset) for shard in self.shards]
                for batch, shares in enumerate(zip(*streams, strict=True), start=first):
                    following = Position(epoch, day, batch + 1)
                    if batch + 1 == order.batches:
                        following = Position(epoch, day + 1) if day + 1 < len(days) else Position(epoch + 1)
                    present = [share for share in shares if share is not None]
                    yield self._batch(present, epoch, following)

    def _batch(self, shares: list[Requests], epoch: int, following: Position) -> Batch:
        if not shares:
            return self.assembler.empty(self.pool, position=following)
        requests = concatenate_requests(shares)
        return self.assembler(requests, self._sample(requests, epoch), self.pool, position=following)

    def _sample(self, requests: Requests, epoch: int) -> Candidates:
        keys = draw(self.seed, epoch, requests.scalars("request_id"))
        candidates = self._known(logged(requests, self.assembler.dataset), requests)
        quotas = self.data.candidates
        quota = quotas.get("random", 0)
        chosen = sample_stages(candidates, quotas, keys)
        if not quota:
            return chosen
        assert quota != "all"  # a config error
        drawn = self.assembler.eligibility.random(requests, quota, keys, but=candidates.items)
        return with_random(chosen, drawn)

    def _known(self, candidates: Candidates, requests: Requests) -> Candidates:
        """With the labels that were not mature in time as not observed."""
        labels = dict(candidates.labels)
        for name, latest in self.latest.items():
            late = (requests.scalars("timestamp") > latest)[candidates.items.rows]
            labels[name] = np.where(late, np.float32(np.nan), labels[name])
        return Candidates(candidates.items, candidates.stages, labels)


def latest_known(config: Config, schema: Schema) -> dict[str, float]:
    """Label -> the latest request (UNIX seconds) whose label was known when the first held-out part began.

    Only labels that take time to mature are named. Without this, minutes watched on the test days would train.
    """
    days = schema.matures_after | {
        task.label: task.matures_after for task in config.tasks.values() if task.matures_after is not None
    }
    held_out = {config.evaluation.valid, config.evaluation.test} - set(config.data.train)
    begin = min(part.begin for part in schema.parts if part.split in held_out)
    return {label: begin - 86_400 * wait for label, wait in days.items() if wait}


def prefetch(iterator: Iterator[T], *, depth: int) -> Iterator[T]:
    """Run an iterator in a thread, `depth` items ahead; its exception is raised here, and it stops with us."""
    ready: queue.Queue[tuple[str, T | BaseException | None]] = queue.Queue(depth)
    stopped = threading.Event()

    def put(kind: str, value: T | BaseException | None) -> None:
        while not stopped.is_set():
            try:
                return ready.put((kind, value), timeout=0.1)
            except queue.Full:
                continue

    def work() -> None:
        try:
            for value in iterator:
                put("value", value)
                if stopped.is_set():
                    return
            put("end", None)
        except BaseException as error:  # handed over, whatever it is
            put("error", error)

    thread = threading.Thread(target=work, daemon=True, name="loader")

    def stop() -> None:
        stopped.set()
        thread.join()

    # A thread that still computes while the interpreter goes down takes the process with it (SIGABRT).
    atexit.register(stop)
    thread.start()
    try:
        while True:
            kind, value = ready.get()
            if kind == "error":
                assert isinstance(value, BaseException)
                raise value
            if kind == "end":
                return
            yield value  # type: ignore[misc]
    finally:
        atexit.unregister(stop)
        stop()
