"""`torchrun -m joint.train CONFIG [key=value ...]` (or `python -m joint.train`): train, resume, and evaluate."""

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
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument(
        "--continue", dest="continues", type=Path, metavar="RUN", help="begin where another run ended, on later days"
    )
    parsed = parser.parse_intermixed_args(arguments)
    check_versions()
    # Imported only now: with a wrong combination of versions these imports fail, and less clearly.
    from joint.config import load_config
    from joint.data.dataset import Dataset
    from joint.fit import check_against, check_groups, check_windows, predictions_of
    from joint.training import train

    config, tree = load_config(parsed.config, parsed.overrides)
    dataset = Dataset(config.data.path, predictions=predictions_of(config.data))
    check_against(config, tree, dataset.schema)
    check_groups(config, tree, dataset)
    check_windows(config, tree, dataset)
    train(config, dataset, continues=parsed.continues)
    return 0


if __name__ == "__main__":
    raise SystemExit(run_command(main))
