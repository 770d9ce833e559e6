"""Run a benchmark by its name: `python -m benchmarks.run NAME [its own arguments]`; without a name, list them.

Folders that are not given are made under `runs/benchmarks`. What the rows mean is in benchmarks/README.md.
"""

from __future__ import annotations

import runpy
import sys
from collections.abc import Sequence

HOME = "runs/benchmarks"
# name -> what it shows, and the arguments it has if none are given
BENCHMARKS: dict[str, tuple[str, list[str]]] = {
    "apart": ("one joint run beside three trainings of one head each: cost and quality", [f"{HOME}/apart"]),
    "attention": ("DIN's attention beside its plain form", []),
    "growth": ("time and memory of a step against seven sizes, with exponents", []),
    "losses": ("every loss beside its plain form", []),
    "metrics": ("every metric beside a sort", []),
    "own_log": ("reading a user's own log", []),
    "peers": ("our trainer beside a bare TorchRec loop and other libraries on the same rows", [f"{HOME}/peers"]),
    "ranks": ("two ranks beside two runs of one", []),
    "recflow": ("reading days in RecFlow's layout", []),
    "recflow_way": ("our trainer beside training in the way of RecFlow's code", []),
    "serving": ("a request of the exported model", [f"{HOME}/serving"]),
    "startup": ("from the command to the first step", [f"{HOME}/startup"]),
    "step": (
        "the parts of a training step, and the trainer beside its own forward and backward",
        ["configs/joint.yaml"],
    ),
    "worlds": ("ceilings of the simulated worlds", [f"{HOME}/worlds"]),
}


def main(arguments: Sequence[str]) -> int:
    """The exit code."""
    if not arguments:
        print("\n".join(f"{name:13}{about}" for name, (about, _) in BENCHMARKS.items()))
        return 0
    name, *own = arguments
    if name not in BENCHMARKS:
        print(f"no benchmark {name}; there are {', '.join(BENCHMARKS)}", file=sys.stderr)
        return 2
    sys.argv = [f"benchmarks.{name}", *(own or BENCHMARKS[name][1])]
    runpy.run_module(f"benchmarks.{name}", run_name="__main__")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
