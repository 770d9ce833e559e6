"""`python -m joint.evaluate RUN [--split test] [--choose-fusion HEAD] [key=value ...]`: the table of a run."""

from __future__ import annotations

import argparse
from pathlib import Path

from joint.commands import run_command
from joint.errors import UserError
from joint.schema import SPLITS
from joint.versions import check_versions


def main() -> int:
    """Evaluate a run and print the table; returns the exit code."""
    parser = argparse.ArgumentParser(prog="joint.evaluate", description="Measure a run's newest checkpoint.")
    parser.add_argument("run", type=Path, help="run directory")
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="key=value", help="of evaluation.* and heads.HEAD.fusion only"
    )
    parser.add_argument("--split", choices=SPLITS, help="default: the config's evaluation.test, which writes eval.json")
    parser.add_argument(
        "--choose-fusion", metavar="HEAD", help="try a grid of its tasks' weights, on evaluation.valid by default"
    )
    parser.add_argument("--by-group", action="store_true", help="with --choose-fusion: and weights for each user group")
    arguments = parser.parse_intermixed_args()
    if arguments.by_group and not arguments.choose_fusion:
        raise UserError("--by-group goes with --choose-fusion HEAD")
    check_versions()
    # Imported only now: with a wrong combination of versions this import fails, and less clearly.
    from joint.evaluating.choosing import choose_fusion
    from joint.evaluating.finished_run import evaluate_run

    if arguments.choose_fusion:
        choose_fusion(
            arguments.run, arguments.choose_fusion, arguments.split, arguments.overrides, by_group=arguments.by_group
        )
    else:
        evaluate_run(arguments.run, arguments.split, arguments.overrides)
    return 0


if __name__ == "__main__":
    raise SystemExit(run_command(main))
