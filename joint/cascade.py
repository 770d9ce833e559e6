"""`python -m joint.cascade RUN [--sweep retrieval=50,100 …]`, or `… RUN RUN …`: funnels, stage by stage.

What survives each stage and which stage lost the rest, what the ten that are served are worth where that is known, and
at what cost; other quotas on the same scores; or several runs' funnels beside each other.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from joint.commands import run_command
from joint.errors import UserError
from joint.schema import SPLITS
from joint.versions import check_versions


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the funnel of a run, or of several, and write the report; returns the exit code."""
    parser = argparse.ArgumentParser(prog="joint.cascade", description="What survives each stage of a run's funnel.")
    parser.add_argument("targets", nargs="+", metavar="RUN|key=value", help="of evaluation.* and fusion only")
    parser.add_argument("--split", choices=SPLITS, help="default: the config's evaluation.test")
    parser.add_argument("--sweep", nargs="+", metavar="HEAD=N,N", help="every combination of these quotas as well")
    parser.add_argument("--out", type=Path, help="the report's folder (default: RUN/cascade; of several runs: cascade)")
    parsed = parser.parse_intermixed_args(arguments)
    if find_spec("matplotlib") is None:
        raise UserError("a report needs matplotlib: pip install matplotlib (or .[report])")
    check_versions()
    # Imported only now: with a wrong combination of versions this import fails, and less clearly.
    from joint.funnels.show import compare_funnels, show_funnel

    overrides = [text for text in parsed.targets if "=" in text and not Path(text).exists()]
    runs = [Path(text) for text in parsed.targets if text not in overrides]
    if not runs or (len(runs) > 1 and parsed.sweep):
        raise UserError("expected one run directory, or several without --sweep")
    if len(runs) > 1:
        compare_funnels(runs, parsed.split, overrides, out=parsed.out or Path("cascade"))
    else:
        show_funnel(runs[0], parsed.split, overrides, sweep=parsed.sweep or (), out=parsed.out)
    return 0


if __name__ == "__main__":
    raise SystemExit(run_command(main))
