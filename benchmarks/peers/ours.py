"""Our trainer as it is, its loader, log, metrics and checkpoints on: from its set-up to the last step."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import torch

import joint.training
from benchmarks.peers import common
from joint.config import load_config
from joint.data.dataset import Dataset
from joint.evaluating.evaluator import Evaluator
from joint.reporting import Reporter

HEAD = {"mmoe": "ranking", "dssm": "retrieval"}


class Timing(Reporter):
    """The trainer's reporter, with a stopwatch that runs from when it is made to the last step."""

    timed: common.Timed

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        Timing.timed = common.Timed()

    def step(self, *arguments: Any, **named: Any) -> None:
        """As the trainer's."""
        super().step(*arguments, **named)
        self.timed.stop()

    def say(self, text: str) -> None:
        """To the log alone: the result is the output."""
        self.log.write(text + "\n")


def main() -> None:
    """Train an epoch and measure the test rows."""
    run = common.asked(*HEAD)
    torch.set_num_threads(1)
    joint.training.Reporter = Timing  # type: ignore[misc]
    Evaluator._retrieval = lambda *_: {}  # type: ignore[method-assign]  # nobody here asks what it finds in the catalogue
    with tempfile.TemporaryDirectory() as folder:
        overrides = [f"data.path={run.data / 'dataset'}", f"data.requests_per_batch={run.batch}", f"run.dir={folder}"]
        overrides.append(f"run.seed={run.seed}")
        precision = "bfloat16" if run.bf16 else "float32"
        config, _ = load_config(
            Path(__file__).parent / f"{run.model}.yaml", [*overrides, f"train.precision={precision}"]
        )
        dataset = Dataset(config.data.path)
        joint.training.train(config, dataset)
        numbers = json.loads((Path(folder) / config.run.name / "eval.json").read_text())
    Timing.timed.done(dataset.schema.requests("train"), numbers[f"{HEAD[run.model]}/auc/click"])


if __name__ == "__main__":
    main()
