"""The first steps of a run, tried: what they lose, where gradients get to, and at what pace."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torchrec.distributed import DistributedModelParallel
from torchrec.optim.keyed import CombinedOptimizer

from joint.batch import Batch
from joint.data.loader import Loader
from joint.data.order import Position
from joint.distributed import sum_over_ranks
from joint.features import Plan
from joint.model import JointModel
from joint.outputs import Outputs
from joint.pipeline import build_pipeline
from joint.stopping import Together
from joint.task import StepOutput
from joint.training import begin_step

WARM_UP, TIMED = 3, 20  # steps
SECONDS = 20.0  # after so long no further step is tried


@dataclass(frozen=True)
class Tried:
    """What the steps showed; the pace is of those after a warm-up. Of this rank, but for the requests."""

    steps: int
    first: StepOutput
    norms: dict[str, float]  # head or encoder -> norm of its gradient in the first step
    unreached: list[str]  # tables, and parameters of heads and encoders, without any gradient in all steps
    untaught: list[tuple[str, str]]  # head and task, likewise
    unknown: int  # ids outside their tables in all steps
    requests: int  # of all ranks
    seconds: float  # for these requests
    waited: float  # seconds of these that were spent waiting for data


def try_steps(
    model: DistributedModelParallel, optimizer: CombinedOptimizer, plan: Plan, loader: Loader, device: torch.device
) -> Tried:
    """Train the first steps of a run, as `joint.train` would. Every rank takes part.

    Raises:
        UserError: a loss is not finite, or a batch cannot be read.
    """
    gradients = Gradients(model.module.dense.model, plan)
    pipeline = build_pipeline(model, optimizer, device)
    end = time.perf_counter() + SECONDS
    stream = loader.from_position(Position(), pinned=device.type == "cuda")
    batches = Together(stream, lambda: time.perf_counter() > end)
    total = min(loader.batches_left(Position()), WARM_UP + TIMED)
    first, steps, unknown, requests, waited, began = None, 0, 0, 0, 0.0, 0.0
    model.train()
    while steps < total and not batches.stopping:
        if steps <= min(WARM_UP, total - 1):
            requests, waited, began = 0, 0.0, _now(device)
        begin_step(model, optimizer, plan.config, steps)
        output = pipeline.progress(batches)
        gradients.note()
        first, steps = first or output, steps + 1
        unknown += output.batch.unknown
        requests += output.batch.requests
        waited += batches.waited()
    assert first is not None
    seconds = _now(device) - began
    everyone = int(sum_over_ranks(torch.tensor([requests], device=device)))
    unreached, untaught = sorted(gradients.unreached), sorted(gradients.untaught)
    return Tried(steps, first, gradients.norms, unreached, untaught, unknown, everyone, seconds, waited)


class Gradients:
    """Watches a model train: how large the first gradients of its parts are, and what none has reached so far."""

    def __init__(self, model: JointModel, plan: Plan) -> None:
        self.model = model
        self.tables = {key.name: f"table {key.table}" for key in plan.keys if key.embedded}
        self.unreached = {*self.tables.values(), *(name for name, _ in model.named_parameters())}
        self.untaught = {(head, task) for head in model.heads for task in plan.config.tasks}
        self.norms: dict[str, float] = {}
        model.register_forward_pre_hook(self._watch_rows)
        model.register_forward_hook(self._watch_tasks)

    def note(self) -> None:
        """Take note of the gradients that a step has left."""
        found = {name: p.grad for name, p in self.model.named_parameters() if p.grad is not None}
        self.unreached -= {name for name, gradient in found.items() if gradient.any()}
        if not self.norms:
            squares: Counter[str] = Counter()
            for name, gradient in found.items():
                squares[part_of(name)] += float(gradient.double().square().sum())  # type: ignore[assignment]
            self.norms = {part: math.sqrt(square) for part, square in squares.items()}

    def _watch_rows(self, _: object, inputs: tuple[Mapping[str, Tensor], Batch]) -> None:
        """A table's own gradient is used up in the backward pass; that of the rows looked up can be seen."""
        for key, rows in inputs[0].items():
            if key in self.tables and rows.requires_grad:
                rows.register_hook(partial(self._note_rows, self.tables[key]))

    def _note_rows(self, table: str, gradient: Tensor | None) -> None:
        if gradient is not None and gradient.any():
            self.unreached.discard(table)

    def _watch_tasks(self, _: object, __: object, outputs: Outputs) -> None:
        """Parameters of several tasks may be one tensor; the columns of what a head says are a task each."""
        for head, output in outputs.items():
            columns = output.logits if output.user is None else output.user  # [N, T] or [R, T, D]
            if columns.requires_grad:
                columns.register_hook(partial(self._note_tasks, head))

    def _note_tasks(self, head: str, gradient: Tensor) -> None:
        taught = gradient.transpose(0, 1).flatten(1).any(dim=1).tolist()
        self.untaught -= {(head, task) for task, some in zip(self.model.plan.config.tasks, taught, strict=True) if some}


def part_of(name: str) -> str:
    """What a parameter is of, such as 'ranking' or 'encoder viewed'; a table is itself."""
    kind, _, rest = name.partition(".")
    part = rest.partition(".")[0]
    return {"heads": part, "encoders": f"encoder {part}"}.get(kind, name)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
