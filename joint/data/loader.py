"""The loader: positions in, batches out, the next one prepared while this one trains."""

from __future__ import annotations

import atexit
import queue
import threading
from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import TypeVar

from joint.batch import Batch
from joint.data.assemble import Assembler, logged
from joint.data.narrow import narrowed
from joint.data.order import DayOrder, Position
from joint.data.ragged import draw
from joint.data.requests import Requests, concatenate_requests
from joint.data.sampling import Candidates, sample_stages, shuffle_stages, with_random
from joint.data.softmax_pool import NO_POOL, PoolItems, sampled_items, shared_random
from joint.errors import CheckpointError, ConfigError
from joint.experiment import Config, logged_scores
from joint.schema import SECONDS_A_DAY, Schema, day_number

T = TypeVar("T")


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
        self.dataset = narrowed(assembler.dataset, assembler.plan)
        wanted = self.dataset.schema.days(data.train, data.days)
        self.days = {day: parts for day, parts in self.dataset.parts(data.train).items() if day in wanted}
        self.requests = sum(part.rows for parts in self.days.values() for part in parts)  # of an epoch, of all ranks
        self.data = data
        self.seed = assembler.plan.config.run.seed
        self.shards = range(rank, data.shards, world_size)
        self.latest = latest_known(assembler.plan.config, assembler.dataset.schema)
        self.rank, self.world_size = rank, world_size
        self.scores = logged_scores(assembler.plan.config)
        over_corpus = "corpus" in assembler.plan.pool_spaces
        self.corpus = PoolItems.corpus(assembler.eligibility.slice(rank, world_size)) if over_corpus else NO_POOL

    def batches_left(self, start: Position) -> int:
        """Steps from `start` to the end; the deal, and with it a day's number, differs a little by epoch."""
        days = [(epoch, place) for epoch in range(self.data.epochs) for place in range(len(self.days))]
        left = [(epoch, place) for epoch, place in days if (epoch, place) >= (start.epoch, start.day)]
        return sum(self._order(epoch, [*self.days][place]).batches for epoch, place in left) - start.batch

    @cached_property
    def mean_requests(self) -> float:
        """Requests that a batch of all ranks holds on average: fewer than asked for, since no batch is of two days."""
        return self.requests * self.data.epochs / self.batches_left(Position())

    def check_seen(self, seen: Mapping[tuple[int, int], int]) -> None:
        """Whether a run, by its (epoch, day number) -> requests trained on, saw every request of every epoch once.

        Raises:
            CheckpointError: it did not, so its checkpoints are not those of one pass over the data an epoch.
        """
        for epoch in range(self.data.epochs):
            for number, (day, parts) in enumerate(self.days.items()):
                expected, found = sum(part.rows for part in parts), seen.get((epoch, number), 0)
                if found != expected:
                    raise CheckpointError(
                        f"epoch {epoch + 1} of {day}: trained on {found} requests, the dataset has {expected}"
                    )

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
                streams = [order.shares(shard, first, self.dataset, self.scores) for shard in self.shards]
                for batch, shares in enumerate(zip(*streams, strict=True), start=first):
                    following = Position(epoch, day, batch + 1)
                    if batch + 1 == order.batches:
                        following = Position(epoch, day + 1) if day + 1 < len(days) else Position(epoch + 1)
                    present = [share for share in shares if share is not None]
                    if not present:
                        pool = self._pool(None, days[day], epoch, batch)
                        yield self.assembler.empty(pool, position=following, day=day_number(days[day]))
                        continue
                    requests = concatenate_requests(present)
                    sampled = self._sample(requests, epoch)
                    pool = self._pool(sampled, days[day], epoch, batch)
                    yield self.assembler(requests, sampled, pool, position=following, latest=self.latest)

    def _pool(self, candidates: Candidates | None, day: str, epoch: int, batch: int) -> PoolItems:
        if self.assembler.plan.pool_spaces <= {"corpus"}:
            return self.corpus
        number = day_number(day)
        drawn = shared_random(
            *(self.assembler.eligibility, self.data.shared_random, self.rank, self.world_size, number),
            *(self.seed, epoch, number, batch),
        )
        return sampled_items(candidates, drawn)

    def _sample(self, requests: Requests, epoch: int) -> Candidates:
        keys = draw(self.seed, epoch, requests.scalars("request_id"))
        candidates = logged(requests, self.dataset)
        if self.data.shuffle_stages:
            candidates = shuffle_stages(candidates, keys)
        quotas = self.data.candidates
        quota = quotas.get("random", 0)
        chosen = sample_stages(candidates, quotas, keys)
        if not quota:
            return chosen
        assert quota != "all"  # a config error
        drawn = self.assembler.eligibility.random(requests, quota, keys, but=candidates.items)
        return with_random(chosen, drawn)


def latest_known(config: Config, schema: Schema) -> dict[str, float]:
    """Task -> the latest request (UNIX seconds) whose label was known when the first held-out part began.

    Only tasks whose label takes time to mature are named. Without this, minutes watched on the test days would train.
    """
    held_out = {config.evaluation.valid, config.evaluation.test} - set(config.data.train)
    begin = min(part.begin for part in schema.parts if part.split in held_out)
    found = {}
    for name, task in config.tasks.items():
        days = schema.matures_after.get(task.label, 0.0) if task.matures_after is None else task.matures_after
        if days:
            found[name] = begin - SECONDS_A_DAY * days
    return found


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
