"""Where the time of a training step goes, and how far the trainer is from its own forward and backward.

    python -m benchmarks.step CONFIG [key=value ...] [--steps 30]

One rank, one thread; shares are of processor time, which other processes disturb least. The parts are medians of a step
taken apart, on batches held in memory; what is inside of another part counts there only.

Below stands what the trainer does a second, all included (its loader's thread, log and metrics too), beside forward and
backward alone: after each of the trainer's steps the same model does them again on the same batch, now in memory, so
that both meet the same machine. FBGEMM updates the tables within the look-up's backward, so that is in both; zeroing
gradients and the dense optimizer are the trainer's alone. Last what the loader gives a second, for nobody.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import nn

import joint.task
import joint.training
from joint.batch import Batch
from joint.config import load_config
from joint.data.assemble import Assembler
from joint.data.dataset import Dataset
from joint.data.loader import Loader
from joint.data.order import Position
from joint.distributed import process_group
from joint.experiment import Config
from joint.fast_lookup import use_fast_lookup
from joint.features import Plan
from joint.optimizers import build_optimizer, set_learning_rates
from joint.pipeline import PlainPipeline
from joint.reporting import Reporter
from joint.task import StepOutput, build_task
from towers.embeddings import Averaged, rows_of
from towers.mixtures import set_step

BATCHES = 8  # in memory
WARM_UP = 3  # steps that do not count


class Clock:
    """Wall and processor seconds of named parts, by step; a part's own, without those of parts inside of it."""

    def __init__(self) -> None:
        self.steps: list[dict[str, torch.Tensor]] = []
        self.inside = [torch.zeros(2)]  # seconds of the parts inside of each part that is open

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Time what is inside as a part of the step."""
        self.inside.append(torch.zeros(2, dtype=torch.float64))
        began = _now()
        yield
        passed = _now() - began
        self.steps[-1][name] = self.steps[-1].get(name, 0) + passed - self.inside.pop()
        self.inside[-1] = self.inside[-1] + passed

    def around(self, holder: Any, name: str, part: Any) -> None:
        """Time every call of a holder's function, as the part of this name or as what `part` makes of its arguments."""
        function = getattr(holder, name)

        def timed(*arguments: Any, **named: Any) -> Any:
            with self.part(part if isinstance(part, str) else part(*arguments)):
                return function(*arguments, **named)

        setattr(holder, name, timed)

    def medians(self) -> dict[str, list[float]]:
        """Part -> median wall and processor milliseconds, without the first steps."""
        steps = self.steps[WARM_UP:]
        return {
            name: (1e3 * torch.stack([step[name] for step in steps]).median(0).values).tolist() for name in steps[0]
        }


def _now(processor: Callable[[], float] = time.process_time) -> torch.Tensor:
    return torch.tensor([time.perf_counter(), processor()], dtype=torch.float64)


class EnoughError(Exception):
    """The trainer has made its steps."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table and the two rates."""
    parser = argparse.ArgumentParser(prog="benchmarks.step", description="Where the time of a training step goes.")
    parser.add_argument("config", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--steps", type=int, default=30)
    parsed = parser.parse_args(arguments)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        config, _ = load_config(parsed.config, [*parsed.overrides, f"run.dir={folder}", "run.name=step"])
        dataset = Dataset(config.data.path)
        with process_group() as device:
            plan = Plan(config, dataset.schema)
            loader = Loader(Assembler(plan, dataset), rank=0, world_size=1)
            batches = [batch.to(device) for batch in islice(loader._batches(Position()), BATCHES)]
            model = build_task(plan, device)
            optimizer = build_optimizer(model, config.optimizer)
            if config.train.fast_lookup:
                use_fast_lookup(model)
            model.train()
            clock = taken_apart(model, optimizer, config, batches, parsed.steps)
        show(clock.medians())
        rates = beside(config, dataset, parsed.steps) | {"the loader alone": loading(plan, dataset, parsed.steps)}
    print(f"\n{'candidates a second of':28}{'wall':>9}{'processor':>14}{'to the trainer':>18}")
    for name, rate in rates.items():
        print(f"{name:28}{rate[0]:9.0f}{rate[1]:14.0f}{rate[1] / rates['the trainer'][1]:18.2f}")


def taken_apart(model: nn.Module, optimizer: Any, config: Config, batches: Sequence[Batch], steps: int) -> Clock:
    """Steps of which every part is timed. The looked-up rows become leaves, to split the backward at them."""
    clock, task = Clock(), model.module  # type: ignore[union-attr]
    names = {id(objective): name for name, objective in config.objectives.items()}
    clock.around(joint.task, "compute", lambda objective, *_: f"objective {names[id(objective)]}")
    clock.around(task.dense.model, "_head", lambda name, *_: f"head {name}")  # type: ignore[union-attr]
    for name, encoder in task.dense.model.encoders.items():  # type: ignore[union-attr]
        clock.around(encoder, "forward", f"encoder {name}")
    for step in range(WARM_UP + steps):
        clock.steps.append({})
        batch = batches[step % len(batches)]
        set_step(model, step)
        set_learning_rates(optimizer, config.optimizer, step)
        with clock.part("zero gradients"):
            optimizer.zero_grad()
        with clock.part("look-up, forward"):
            rows = rows_of(task.embeddings(batch.sparse, batch.inner), batch.inner)
        leaves = {key: row.detach().requires_grad_() for key, row in rows.items()}
        looked_up = {key: Averaged(leaf) for key, leaf in leaves.items()}
        with clock.part("forward, the rest"):
            loss, _ = task.dense({"": looked_up}, batch)
        with clock.part("dense, backward"):
            loss.backward()
        read = [key for key, leaf in leaves.items() if leaf.grad is not None]
        with clock.part("look-up, backward"):
            torch.autograd.backward([rows[key] for key in read], [leaves[key].grad for key in read])
        with clock.part("dense, optimizer"):
            optimizer.step()
    return clock


def show(parts: Mapping[str, Sequence[float]]) -> None:
    """Print a line a part."""
    whole = sum(processor for _, processor in parts.values())
    print(f"{'part':28}{'wall ms':>9}{'processor ms':>14}{'share':>8}")
    for name, (wall, processor) in [*parts.items(), ("sum", (sum(wall for wall, _ in parts.values()), whole))]:
        print(f"{name:28}{wall:9.1f}{processor:14.1f}{processor / whole:8.1%}")


def beside(config: Config, dataset: Dataset, steps: int) -> dict[str, torch.Tensor]:
    """Candidates a second (of wall and of processor time) of the trainer, and of forward and backward alone."""
    alone = []

    class Twice(PlainPipeline):
        def progress(self, batches: Iterator[Batch]) -> StepOutput:
            output = super().progress(batches)
            self.optimizer.zero_grad()
            began = _now(time.thread_time)  # what the loader's thread does meanwhile it does for the trainer
            self.model(output.batch)[0].backward()
            alone.append(_now(time.thread_time) - began)
            return output

    joint.training.build_pipeline = lambda model, optimizer, _: Twice(model, optimizer)
    between, counts, _ = trainer(config, dataset, steps)
    again = torch.stack(alone[WARM_UP + 1 :]).sum(0)
    return {"the trainer": sum(counts) / (between.sum(0) - again), "forward and backward alone": sum(counts) / again}


def trainer(config: Config, dataset: Dataset, steps: int) -> tuple[torch.Tensor, list[int], float]:
    """Of the trainer itself: wall and processor seconds from step to step `[steps, 2]`, the candidates of each step,
    and the share of the time that it waited for data."""
    ends, waits, counts = [], [], []

    class Counting(Reporter):
        def step(self, *arguments: Any, waited: float, candidates: int, **named: Any) -> None:
            super().step(*arguments, waited=waited, candidates=candidates, **named)
            ends.append(_now())
            waits.append(waited)
            counts.append(candidates)
            if len(ends) > WARM_UP + steps:
                raise EnoughError

        def say(self, text: str) -> None:
            """Nothing: the table is the output."""

    joint.training.Reporter = Counting  # type: ignore[misc]
    with suppress(EnoughError):
        joint.training.train(config, dataset)
    between = torch.stack(ends).diff(dim=0)[WARM_UP:]
    return between, counts[WARM_UP + 1 :], sum(waits[WARM_UP + 1 :]) / float(between[:, 0].sum())


def loading(plan: Plan, dataset: Dataset, steps: int) -> torch.Tensor:
    """Candidates a second that the loader gives, from a day's start on."""
    batches = Loader(Assembler(plan, dataset), rank=0, world_size=1)._batches(Position())
    began = _now()
    done = sum(len(batch.item) for batch in islice(batches, steps))
    return done / (_now() - began)


if __name__ == "__main__":
    main()
