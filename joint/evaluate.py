"""`python -m joint.evaluate RUN [--split test]`: the table of a run, from its newest checkpoint."""

from __future__ import annotations

import argparse
from pathlib import Path

from joint import checkpoint
from joint.commands import run_command
from joint.config import check_against
from joint.data.assemble import Assembler
from joint.data.dataset import Dataset
from joint.distributed import process_group, rank
from joint.errors import CheckpointError
from joint.evaluation import evaluate
from joint.features import Plan
from joint.run import RunDirectory, write_metrics
from joint.schema import PARTS
from joint.tables import table
from joint.task import build_task
from joint.versions import check_versions


def main() -> int:
    """Evaluate a run and print the table; returns the exit code."""
    parser = argparse.ArgumentParser(prog="joint.evaluate", description="Measure a run's newest checkpoint.")
    parser.add_argument("run", type=Path, help="run directory")
    parser.add_argument("--split", choices=PARTS, help="default: the config's evaluation.test, which writes eval.json")
    arguments = parser.parse_args()
    check_versions()
    run = RunDirectory(arguments.run)
    config, tree = run.load_config()
    dataset = Dataset(config.data.path)
    check_against(config, tree, dataset.schema)
    plan = Plan(config, dataset.schema)
    with process_group() as device:
        model = build_task(plan, device)
        progress = checkpoint.load_latest(run.checkpoints, model)
        if not progress.step:
            raise CheckpointError(f"{run.checkpoints}: no complete checkpoint in it; train the run first")
        split = arguments.split or config.evaluation.test
        found = evaluate(model, Assembler(plan, dataset), device, split)
        if rank() == 0:
            if split == config.evaluation.test:
                write_metrics(run, found)
            print(f"{run.path}, step {progress.step}, on {split}:\n{table(config, found)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(run_command(main))
