"""`python -m joint.cascade RUN [--split test] [evaluation.quotas={...}]`: a run's funnel, stage by stage.

What survives each stage, what the ten that are served are worth where that is known, and at what cost.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from joint.commands import run_command
from joint.schema import SPLITS
from joint.versions import check_versions


def main() -> int:
    """Print the funnel of a run; returns the exit code."""
    parser = argparse.ArgumentParser(prog="joint.cascade", description="What survives each stage of a run's funnel.")
    parser.add_argument("run", type=Path, help="run directory")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of evaluation.* and heads.HEAD.fusion only")
    parser.add_argument("--split", choices=SPLITS, help="default: the config's evaluation.test")
    arguments = parser.parse_intermixed_args()
    check_versions()
    # Imported only now: with a wrong combination of versions this import fails, and less clearly.
    from joint.measure import show_funnel

    show_funnel(arguments.run, arguments.split, arguments.overrides)
    return 0


if __name__ == "__main__":
    raise SystemExit(run_command(main))
