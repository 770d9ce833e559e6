"""`python -m joint.prepare SOURCE … OUT`: logs in, a dataset out."""

from __future__ import annotations

import argparse
from pathlib import Path

from joint.commands import run_command
from joint.data import movielens
from joint.data.flat import reader as flat
from joint.data.planted import simulate
from joint.data.recflow import reader as recflow
from joint.schema import SPLITS, Schema

SOURCES = {
    "recflow": (recflow, "the public RecFlow layout: feather files, one a day"),
    "parquet": (flat, "your own flat log: one row per (request, item), any column names"),
    "movielens": (movielens, "MovieLens 100K, 1M, 20M, 25M or 32M: a directory, zip or wheel"),
    "simulate": (simulate, "a planted funnel whose truth is known"),
}


def parser() -> argparse.ArgumentParser:
    """The command line."""
    command = argparse.ArgumentParser(prog="joint.prepare", description="Turn logs into a dataset.")
    sources = command.add_subparsers(dest="source", required=True, metavar="SOURCE")
    for name, (source, about) in SOURCES.items():
        form = argparse.RawDescriptionHelpFormatter
        source.add_arguments(sources.add_parser(name, help=about, description=source.__doc__, formatter_class=form))
    return command


def summary(out: Path, schema: Schema) -> str:
    """What was made, in three lines."""
    requests = ", ".join(f"{schema.requests(split):,} {split}" for split in SPLITS)
    features = ", ".join(f.name + (f" ({f.size:,})" if f.kind in ("id", "ids") else "") for f in schema.features)
    return f"{out}: {schema.items:,} items; requests: {requests}\nfeatures (ids): {features}\nhash {schema.hash}"


def main() -> int:
    """Prepare the named source; returns the exit code."""
    command = parser()
    arguments, rest = command.parse_known_args()
    if rest and not (hasattr(arguments, "overrides") and all("=" in text and text[0] != "-" for text in rest)):
        command.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:  # argparse takes a list of positionals from one place only
        arguments.overrides += rest
    source, _ = SOURCES[arguments.source]
    print(summary(arguments.out, source.prepare(arguments)))
    return 0


if __name__ == "__main__":
    raise SystemExit(run_command(main))
