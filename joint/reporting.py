"""What a run says: two lines or three an interval; the same numbers in metrics.jsonl and TensorBoard (first rank)."""

from __future__ import annotations

import json
import math
import resource
import time
from collections.abc import Container, Mapping, Sequence
from datetime import timedelta
from itertools import compress
from pathlib import Path
from typing import Any

import torch
from torch.utils.tensorboard import SummaryWriter

from joint.charts import Layout, drawn
from joint.distributed import rank
from joint.files import write_whole
from joint.run import RunDirectory
from joint.sizes import size_text
from joint.summary import wrapped


class Reporter:
    """Collects a run's numbers; silent on every rank but the first."""

    def __init__(self, run: RunDirectory, *, total_steps: int, resumed_from: int) -> None:
        self.speaks = rank() == 0
        self.layout: Layout = {}
        self.total_steps = total_steps
        self.started, self.first_step = time.perf_counter(), resumed_from
        if self.speaks:
            self.log = run.log.open("a")
            # What an interrupted run wrote after its last checkpoint is written again, and must not show twice.
            _rewind(run.metrics, resumed_from)
            self.metrics = run.metrics.open("a")
            self.board = SummaryWriter(str(run.tensorboard), purge_step=resumed_from + 1)
        self._start_interval()

    def say(self, text: str) -> None:
        """Print a line and keep it in the log."""
        if self.speaks:
            print(text, flush=True)
            self.log.write(text + "\n")
            self.log.flush()

    def text(self, name: str, text: str, step: int) -> None:
        """Say lines that TensorBoard's tab Text is to have too, under this name."""
        self.say(text)
        if self.speaks:
            self.board.add_text(name, f"```\n{text}\n```", step)

    def charts(self, layout: Layout) -> None:
        """Lay out TensorBoard's tab Custom Scalars (`joint.charts`)."""
        self.layout = layout
        if self.speaks:
            self.board.add_custom_scalars(layout)

    def step(
        self,
        losses: Mapping[str, torch.Tensor],
        *,
        requests: int,
        candidates: int,
        unknown: int,
        seconds: float,
        waited: float,
    ) -> None:
        """Take note of a step of this rank: what it held, its seconds, and how many of them it waited for data."""
        self._losses.append({name: value.detach() for name, value in losses.items()})
        self._requests += requests
        self._candidates += candidates
        self._unknown += unknown
        self._seconds += seconds
        self._waited += waited

    def interval(self, step: int, counts: Sequence[int], more: Mapping[str, float]) -> None:
        """Say how the steps since the last interval went; `counts` are those of all ranks, summed.

        `more` are numbers that are kept but not printed, such as learning rates.
        """
        requests, candidates, unknown = counts
        losses = {n: float(torch.stack([entry[n] for entry in self._losses]).mean()) for n in self._losses[0]}
        numbers = {f"loss/{name}": value for name, value in losses.items()} | {"data/unknown_ids": float(unknown)}
        numbers |= more
        numbers |= self._pace(step, requests, candidates)
        self.numbers(step, numbers)
        outside = f", {unknown:,} ids outside their table" if unknown else ""
        self.say(f"step {step:>6}/{self.total_steps}  {_pace_text(numbers)}{outside}")
        self.say(wrapped([f"{name} {value:.4f}" for name, value in losses.items()], first="  ", between="  "))
        self._start_interval()

    def _pace(self, step: int, requests: int, candidates: int) -> dict[str, float]:
        done = (step - self.first_step) / (self.total_steps - self.first_step)
        return {
            "speed/seconds_left": (time.perf_counter() - self.started) * (1 / done - 1),
            "speed/requests_per_second": requests / self._seconds,
            "speed/candidates_per_second": candidates / self._seconds,
            "speed/data_wait_fraction": self._waited / self._seconds,
            "memory/peak_mb": peak_memory() / 1e6,
        }

    def numbers(self, step: int, numbers: Mapping[str, float], *, only: Container[str] | None = None) -> None:
        """Write numbers to metrics.jsonl and TensorBoard; one without a unit (nan, which JSON lacks) is left out.

        `only`: the names that TensorBoard is to have; None: all.
        """
        if not self.speaks:
            return
        known = {name: value for name, value in numbers.items() if not math.isnan(value)}
        if not known:
            return
        self.metrics.write(json.dumps({"step": step} | known) + "\n")
        self.metrics.flush()
        for name, value in known.items():
            if only is None or name in only:
                self.board.add_scalar(name, value, step)
        self.board.flush()

    def measured(self, step: int, numbers: Mapping[str, float], table: str) -> None:
        """Say what a finished run measures: hundreds of points, of which TensorBoard has those of its charts.

        The table is in its tab Text, under `test`.
        """
        self.numbers(step, numbers, only=drawn(self.layout, numbers))
        self.text("test", table, step)

    def counts(self) -> tuple[int, int, int]:
        """Requests, candidates and unknown ids of this rank since the last interval."""
        return self._requests, self._candidates, self._unknown

    def close(self) -> None:
        """Close the files."""
        if self.speaks:
            self.log.close()
            self.metrics.close()
            self.board.close()

    def _start_interval(self) -> None:
        self._losses: list[dict[str, Any]] = []
        self._requests = self._candidates = self._unknown = 0
        self._seconds = self._waited = 0.0


def _pace_text(numbers: Mapping[str, float]) -> str:
    words = [
        f"{timedelta(seconds=round(numbers['speed/seconds_left']))} left",
        f"{numbers['speed/requests_per_second']:,.0f} requests/s",
        f"{numbers['speed/candidates_per_second']:,.0f} candidates/s",
        f"waiting {numbers['speed/data_wait_fraction']:.0%}",
        size_text(numbers["memory/peak_mb"] * 1e6),
    ]
    return ", ".join(words)


def _rewind(metrics: Path, step: int) -> None:
    """Drop the lines after a step (0: all), those of the test part (every end writes them) and a torn one."""
    if metrics.is_file():
        lines = [line for line in metrics.read_text().splitlines(keepends=True) if line.endswith("\n")]
        entries = [json.loads(line) for line in lines]
        kept = [0 < step >= e["step"] and not any(name.startswith("test/") for name in e) for e in entries]
        write_whole(metrics, "".join(compress(lines, kept)))


def peak_memory() -> int:
    """Peak memory in bytes: of the GPU where there is one, else of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
