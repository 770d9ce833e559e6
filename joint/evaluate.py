"""`python -m joint.evaluate RUN [--split test]`: the table of a run, from its newest checkpoint."""

from __future__ import annotations

import argparse
from pathlib import Path

from joint.commands import run_command
from joint.schema import SPLITS
from joint.versions import check_versions


def main() -> int:
    """Evaluate a run and print the table; returns the exit code."""
    parser = argparse.ArgumentParser(prog="joint.evaluate", description="Measure a run's newest checkpoint.")
    parser.add_argument("run", type=Path, help="run directory")
    parser.add_argument("--split", choices=SPLITS, help="default: the config's evaluation.test, which writes eval.json")
    arguments = parser.parse_args()
    check_versions()
    # Imported only now: with a wrong combination of versions this import fails, and less clearly.
    from joint.evaluation import evaluate_run

    evaluate_run(arguments.run, arguments.split)
    return 0


if __name__ == "__main__":
    raise SystemExit(run_command(main))
