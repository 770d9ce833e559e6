"""Going on from another run: its weights, both optimizers and step counter, for new days of data.

`python -m joint.train CONFIG --continue RUN run.name=tuesday 'data.days=[2026-01-06, 2026-01-06]'`. Runs of a day each
are the run of all days, bit for bit: what is random in a step is a function of names and of the step counter, which
goes on, and the order within a day does not depend on other days.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torchrec.distributed import DistributedModelParallel
from torchrec.optim.keyed import CombinedOptimizer

from joint import checkpoint
from joint.checkpoint import Progress
from joint.configuring import settings
from joint.errors import CheckpointError
from joint.experiment import Config
from joint.run import MOST_SAID, RunDirectory
from joint.schema import Schema

MAY_DIFFER = ("run.", "data.path:", "data.days", "data.train:", "evaluation.")


@dataclass(frozen=True)
class Before:
    """A run that another may go on from."""

    run: RunDirectory
    epochs: int

    def load(self, model: DistributedModelParallel, optimizer: CombinedOptimizer) -> Progress:
        """Load its newest checkpoint in place: its step, at the start of the new days.

        Tables may have grown at their end; the new rows keep their initial values, as the run of all days has them.

        Raises:
            CheckpointError: it has none, is not finished, or does not fit.
        """
        found = checkpoint.load_latest(self.run.checkpoints, model, optimizer, grown=True)
        if found.position.epoch < self.epochs:
            raise CheckpointError(f"{self.run.path}: is at step {found.step}, not at its end (--continue)")
        return Progress(found.step)


def open_before(path: Path, config: Config, schema: Schema) -> Before:
    """The run at `path`, if this config may go on from it on this dataset.

    Raises:
        CheckpointError: it is of another config in more than its name, its days and what is measured; its dataset is
            not this one, nor one that this one has grown from by appending; or the days are not later than its own.
    """
    run = RunDirectory(path)
    before, _ = run.load_config()
    differing = [line for line in settings.differences(before, config) if not line.startswith(MAY_DIFFER)]
    if differing:
        found = "; ".join(differing[:MOST_SAID]) + ("; …" if len(differing) > MOST_SAID else "")
        raise CheckpointError(f"{path}: only run.*, the data's days and evaluation.* may differ (--continue): {found}")
    environment = run.read_environment()
    if environment["dataset"] not in (schema.hash, *schema.grown_from):
        raise CheckpointError(
            f"{path}: made from a dataset of hash {environment['dataset']}; this one is {schema.hash}, and was not "
            "appended to that (--continue)"
        )
    days, seen = schema.days(config.data.train, config.data.days), environment.get("days")
    if not seen:
        raise CheckpointError(f"{run.environment}: does not say on which days the run was trained (--continue)")
    if days[0] <= seen[-1]:
        raise CheckpointError(f"{path}: has trained up to {seen[-1]}; data.days must begin later, found {days[0]}")
    return Before(run, before.data.epochs)
