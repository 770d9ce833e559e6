"""`joint COMMAND …`, or `python -m joint COMMAND …`: what `python -m joint.COMMAND …` does; `joint --version`."""

from __future__ import annotations

import sys
from importlib import import_module

from joint.commands import run_command
from joint.configuring.sources import near_miss
from joint.versions import versions_text

COMMANDS = {
    "prepare": "logs in, a dataset out",
    "audit": "is a dataset sound?",
    "config": "print a config as resolved, or every mistake in it",
    "train": "train, resume, and evaluate; under many ranks: torchrun -m joint.train",
    "evaluate": "measure a run again",
    "cascade": "a run's funnel, stage by stage",
    "predict": "a run's scores and lists, as Parquet",
    "weights": "what a run's adaptive weights of negatives were",
    "export": "a run to a folder that serves without torch",
    "serve": "check, ask or demonstrate an exported folder",
    "plan": "where the tables of a config would go on many ranks",
    "compare": "variants by seeds and worlds, with tests",
}


def main() -> int:
    """Run the command that is named first; returns the exit code."""
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name == "--version":
        print(versions_text())
        return 0
    if name not in COMMANDS:
        asked = name in ("-h", "--help")
        unknown = [] if asked or not name else [f"joint: no command {name!r}{near_miss(name, list(COMMANDS))}"]
        lines = [f"  {command:<10}{about}" for command, about in COMMANDS.items()]
        print(
            "\n".join([*unknown, "joint COMMAND …, or joint --version", *lines]),
            file=sys.stdout if asked else sys.stderr,
        )
        return 0 if asked else 2
    sys.argv = [f"joint {name}", *sys.argv[2:]]
    return run_command(import_module(f"joint.{name}").main)


if __name__ == "__main__":
    raise SystemExit(main())
