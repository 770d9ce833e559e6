"""`python -m joint.train CONFIG [key=value ...] [--check]`, or `torchrun -m …`: train, resume, and evaluate."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from joint.commands import run_command
from joint.versions import check_versions


def main(arguments: Sequence[str] | None = None) -> int:
    """Check everything that can be checked, then train; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="joint.train", description="Train an experiment; the same command resumes it."
    )
    parser.add_argument("config", type=Path)
    parser.add_argument("overrides", nargs="*", default=[], metavar="key=value")
    parser.add_argument(
        "--continue", dest="continues", type=Path, metavar="RUN", help="begin where another run ended, on later days"
    )
    parser.add_argument("--check", action="store_true", help="try some steps and say what the run would be; no file")
    parser.add_argument("--world-size", type=int, metavar="N", help="with --check: where N ranks would hold the tables")
    parsed = parser.parse_intermixed_args(arguments)
    if parsed.world_size is not None and (not parsed.check or parsed.world_size < 1):
        parser.error("--world-size is a number of ranks, 1 or more, and goes with --check")
    check_versions()
    # Imported only now: with a wrong combination of versions these imports fail, and less clearly.
    from joint.check import check
    from joint.fit import load_fitting
    from joint.training import train

    config, dataset = load_fitting(parsed.config, parsed.overrides)
    if parsed.check:
        check(config, dataset, ranks=parsed.world_size, continues=parsed.continues)
    else:
        train(config, dataset, continues=parsed.continues)
    return 0


if __name__ == "__main__":
    raise SystemExit(run_command(main))
