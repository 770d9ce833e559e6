"""How all ranks stop at the same step: one of them was asked to (SIGTERM, Ctrl-C), or cannot read its next batch."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from joint.batch import Batch
from joint.distributed import gather_objects, new_host_group, rank, world_size
from joint.errors import UserError, first_line

SAID = b"interrupted: training stops at its next step and saves; Ctrl-C again ends it at once, without\n"


@contextmanager
def stop_signal() -> Iterator[Callable[[], bool]]:
    """Whether this process was asked to stop since: by SIGTERM, or by Ctrl-C, which ends it at once the second time.

    Raises:
        KeyboardInterrupt: it was Ctrl-C; only at the end, when all is saved.
    """
    asked: list[int] = []

    def ask(number: int, _: object) -> None:
        asked.append(number)
        if number == signal.SIGINT:
            signal.signal(number, signal.SIG_DFL)
            if rank() == 0:
                os.write(2, SAID)  # print may be what was interrupted

    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    before = {number: handler for number, handler in before.items() if handler is not signal.SIG_IGN}
    for number in before:
        signal.signal(number, ask)
    try:
        yield lambda: bool(asked)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if signal.SIGINT in asked:
        raise KeyboardInterrupt


class Together(Iterator[Batch]):
    """A rank's batches, in step with those of all ranks: with each, the ranks tell each other how they are.

    `stopping`: some rank was asked to stop before the latest batch was handed out; so all know at the same step.

    Raises:
        UserError: the next batch of some rank cannot be had; the same error on all ranks, and it names the rank.
    """

    def __init__(self, batches: Iterator[Batch], asked: Callable[[], bool]) -> None:
        self.batches = batches
        self.asked = asked
        self.stopping = False
        self.seconds = 0.0
        self.hosts = new_host_group()  # over NCCL the question would wait for the GPU

    def __next__(self) -> Batch:
        began = time.perf_counter()
        failure: Exception | None = None
        try:
            batch = next(self.batches)
        except StopIteration:  # for all ranks alike
            raise
        except Exception as error:  # whatever it is, the others must hear of it
            failure = error
        self.seconds += time.perf_counter() - began
        flags = torch.tensor([failure is not None, self.asked()], dtype=torch.int32)
        if world_size() > 1:
            dist.all_reduce(flags, group=self.hosts)
        if flags[0]:
            self._fail(failure)
        self.stopping = bool(flags[1])
        return batch

    def waited(self) -> float:
        """Seconds waited for this rank's data since the last call."""
        seconds, self.seconds = self.seconds, 0.0
        return seconds

    def _fail(self, failure: Exception | None) -> None:
        said = f"rank {rank()}: {first_line(failure)}" if failure else ""
        everyone = "\n".join(text for text in gather_objects(said) if text)
        if failure is not None and not isinstance(failure, UserError):
            raise failure  # a bug of ours, which its own traceback explains best
        raise UserError(everyone) from failure
