"""A finished run, measured again: from its newest checkpoint, on any split."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch

from joint import checkpoint
from joint.data.assemble import Assembler
from joint.data.dataset import Dataset
from joint.distributed import process_group, rank
from joint.errors import CheckpointError
from joint.evaluating.evaluator import Evaluator, evaluator_of
from joint.experiment import Config
from joint.features import Plan
from joint.fit import check_against, check_groups
from joint.model import JointModel
from joint.run import RunDirectory, write_metrics
from joint.summary import tables
from joint.task import build_task


class Opened(NamedTuple):
    """A run's newest checkpoint, ready to be measured."""

    run: RunDirectory
    evaluator: Evaluator
    model: JointModel
    step: int


@contextmanager
def open_model(
    path: Path, overrides: Sequence[str], other: Dataset | None = None, *, reference: bool = True
) -> Iterator[Opened]:
    """A run's newest checkpoint.

    Args:
        other: a dataset to measure it on; None: its own.
        reference: open the run that `evaluation.reference` names too; not where only the model's own word is wanted.

    Raises:
        ConfigError: an override is of something that training depends on.
        CheckpointError: there is no complete checkpoint, or the run's dataset is another one.
    """
    run = RunDirectory(path)
    config, tree = run.load_config(overrides)
    dataset = Dataset(config.data.path)
    check_against(config, tree, dataset.schema, training=False)
    check_groups(config, tree, dataset)
    run.check_dataset(dataset.schema)
    plan = Plan(config, dataset.schema)
    torch.set_num_threads(config.train.threads)
    with process_group() as device:
        model = build_task(plan, device)
        progress = checkpoint.load_latest(run.checkpoints, model)
        if not progress.step:
            raise CheckpointError(f"{run.checkpoints}: no complete checkpoint in it; train the run first")
        evaluator = evaluator_of(model, Assembler(plan, other or dataset), device)
        evaluator.reference = reference_of(config, dataset, device) if reference else None
        yield Opened(run, evaluator, model.module.dense.model, progress.step)


def reference_of(config: Config, dataset: Dataset, device: torch.device) -> Evaluator | None:
    """The run that `evaluation.reference` names, ready to score; None where it names none.

    Raises:
        CheckpointError: it is no finished run on this dataset with a ranking head.
    """
    if not config.evaluation.reference:
        return None
    run = RunDirectory(Path(config.evaluation.reference))
    other, _ = run.load_config()
    run.check_dataset(dataset.schema)
    if other.heads.ranking is None:
        raise CheckpointError(f"{run.path}: has no ranking head to be held against (evaluation.reference)")
    plan = Plan(other, dataset.schema)
    model = build_task(plan, device)
    if not checkpoint.load_latest(run.checkpoints, model).step:
        raise CheckpointError(f"{run.checkpoints}: no complete checkpoint in it (evaluation.reference)")
    return evaluator_of(model, Assembler(plan, dataset), device)


def evaluate_run(path: Path, split: str | None, overrides: Sequence[str] = ()) -> None:
    """Measure a run's newest checkpoint on a split (None: the config's test part) and print the table.

    The test part writes eval.json, unless something was overridden.
    """
    with open_model(path, overrides) as (run, evaluator, _, step):
        config = evaluator.config
        split = split or config.evaluation.test
        found = evaluator.full(split)
        if rank() == 0:
            if split == config.evaluation.test and not overrides:
                write_metrics(run, found.numbers, found.requests)
            seen = " (which it was trained on)" if split in config.data.train else ""
            print(f"{run.path}, step {step}, on {split}{seen}:\n{tables(config, found.numbers)}")
