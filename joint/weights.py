"""`python -m joint.weights RUN`: the learned weights of a run's negatives as a table, and as a picture over time.

SDCL's Table 7 (by user group, task and stage of origin) and Figure 3. Beside the weight the table has what its size is
made of: what is left without the even share of n negatives, which is 1/n of delta whatever was learned, and the weight
over the task's base rate, since a rare task's weights are small whatever its negatives.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from joint.commands import run_command
from joint.errors import UserError
from joint.versions import check_versions


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table and draw the picture; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="joint.weights", description="What a run's adaptive weights of negatives were."
    )
    parser.add_argument("run", type=Path, help="run directory")
    parsed = parser.parse_args(arguments)
    if missing := [name for name in ("scipy", "matplotlib") if find_spec(name) is None]:
        raise UserError(f"a picture needs {' and '.join(missing)}: pip install {' '.join(missing)} (or .[report])")
    check_versions()
    # Imported only now: with a wrong combination of versions, or without the extra, these imports fail less clearly.
    from joint.comparison.weights import late, picture, read_weights, table
    from joint.run import RunDirectory

    run = RunDirectory(parsed.run)
    weights = read_weights(run)
    chosen = late(weights)
    print(f"{run.path}, means of what was logged from step {chosen['step'].min()} to {chosen['step'].max()}:")
    print(table(chosen).to_string(float_format="{:.4f}".format, na_rep="-"))
    picture(weights, run.negative_weights)
    print(f"\n{run.negative_weights} shows the weights over time")
    return 0


if __name__ == "__main__":
    raise SystemExit(run_command(main))
