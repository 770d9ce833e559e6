"""What two ranks do for `test_distributed`, in one start: `python two_ranks.py RANK FOLDER`, no test by itself."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

import joint.evaluating.finished_run
import joint.fast_lookup
import joint.train
import joint.training
from joint import checkpoint
from joint.checkpoint import Saver
from joint.config import load_config
from joint.data.assemble import Assembler
from joint.data.dataset import Dataset
from joint.distributed import gather_objects, gather_rows, rank
from joint.evaluating.evaluator import evaluator_of
from joint.features import Plan
from joint.optimizers import build_optimizer
from joint.predicting.writing import predict
from joint.task import build_task

CPU = torch.device("cpu")


@contextmanager
def group_of_this_process() -> Iterator[torch.device]:
    """In place of the program's own group, which would need a port each time."""
    yield CPU


def trained(folder: Path) -> None:
    for name, overrides in json.loads((folder / "runs.json").read_text()).items():
        joint.train.main([str(folder / "tiny.yaml"), f"run.name={name}", *overrides])


def saved_again(folder: Path, source: str, target: str) -> None:
    """Load a checkpoint and save it again; then evaluate it."""
    config, _ = load_config(folder / "tiny.yaml", json.loads((folder / "equal.json").read_text()))
    dataset = Dataset(config.data.path)
    model = build_task(Plan(config, dataset.schema), CPU)
    optimizer = build_optimizer(model, config.optimizer)
    progress = checkpoint.load_latest(folder / "runs" / source / "checkpoints", model, optimizer)
    Saver(folder / target, model, optimizer, keep=1).save(progress)
    found = evaluator_of(model, Assembler(Plan(config, dataset.schema), dataset), CPU).full("test").numbers
    assert gather_objects(found) == [found, found]
    if rank() == 0:
        (folder / f"{target}.json").write_text(json.dumps(found))


def gathered(folder: Path) -> None:
    """Rows and their gradient under a loss that differs by rank."""
    rows = (torch.arange(6.0).view(3, 2) + 10 * rank()).requires_grad_()
    everything = gather_rows(rows)
    ((everything * torch.arange(12.0).view(6, 2)) ** (rank() + 1)).sum().backward()
    none = gather_rows(torch.zeros(0, 2, requires_grad=True))
    none.sum().backward()
    assert none.shape == (0, 2)
    whole_numbers = gather_rows(torch.tensor([rank(), 7]))
    torch.save((everything.detach(), rows.grad, whole_numbers), folder / f"gathered-{rank()}.pt")


def main(number: int, folder: Path) -> None:
    dist.init_process_group(
        "gloo", f"file://{folder}/rendezvous", rank=number, world_size=2, timeout=timedelta(seconds=60)
    )
    joint.training.process_group = joint.evaluating.finished_run.process_group = group_of_this_process
    joint.fast_lookup.SLOW_SHARE = 10**9  # always
    joint.fast_lookup.BAGS = 4
    gathered(folder)
    trained(folder)
    saved_again(folder, "one", "one-by-two")
    config, _ = load_config(folder / "tiny.yaml")
    predict(
        folder / "runs" / "one", Path(config.data.path), folder / "predicted-by-two", splits=["test"], heads=[], k=3
    )
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
