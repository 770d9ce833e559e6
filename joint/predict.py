"""`python -m joint.predict RUN DATASET OUT [--split …] [--heads …] [--k 100]`: a run's scores and lists, as Parquet."""

from __future__ import annotations

import argparse
from pathlib import Path

from joint.commands import run_command
from joint.schema import SPLITS
from joint.versions import check_versions


def main() -> int:
    """Predict and write; returns the exit code."""
    parser = argparse.ArgumentParser(prog="joint.predict", description="Write what a run says of a dataset's requests.")
    parser.add_argument("run", type=Path, help="run directory")
    parser.add_argument("dataset", type=Path, help="the run's own, or another one with the same features")
    parser.add_argument("out", type=Path, help="folder to be made")
    parser.add_argument("--split", nargs="+", choices=SPLITS, help="default: all that have requests")
    parser.add_argument("--heads", nargs="+", metavar="HEAD", help="default: all")
    parser.add_argument("--k", type=int, default=100, help="items of a list; 0 writes no lists (default: %(default)s)")
    arguments = parser.parse_args()
    check_versions()
    # Imported only now: with a wrong combination of versions this import fails, and less clearly.
    from joint.predicting.writing import predict

    predict(
        arguments.run,
        arguments.dataset,
        arguments.out,
        splits=arguments.split or (),
        heads=arguments.heads or (),
        k=arguments.k,
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(run_command(main))
