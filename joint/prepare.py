"""`python -m joint.prepare SOURCE … OUT`: logs in, a dataset out."""

from __future__ import annotations

import argparse
from pathlib import Path

from joint.commands import run_command
from joint.data.movielens import CITATION, prepare_movielens
from joint.schema import SPLITS, Schema


def parser() -> argparse.ArgumentParser:
    """The command line."""
    command = argparse.ArgumentParser(prog="joint.prepare", description="Turn logs into a dataset.")
    sources = command.add_subparsers(dest="source", required=True, metavar="SOURCE")
    movielens = sources.add_parser("movielens", help="MovieLens 100K, 1M, 20M, 25M or 32M: a directory, zip or wheel")
    movielens.add_argument("path", type=Path, help="where the release is")
    movielens.add_argument("out", type=Path, help="folder of the dataset, made by this command")
    movielens.add_argument("--run", type=int, default=10, help="consecutive ratings that make a request (default 10)")
    movielens.add_argument("--seed", type=int, default=0, help="breaks ties of time (default 0)")
    movielens.add_argument("--overwrite", action="store_true", help="replace OUT")
    return command


def summary(out: Path, schema: Schema) -> str:
    """What was made, in three lines."""
    requests = ", ".join(f"{schema.requests(split):,} {split}" for split in SPLITS)
    features = ", ".join(f"{f.name} ({f.size:,})" for f in schema.features)
    return f"{out}: {schema.items:,} items; requests: {requests}\nfeatures (ids): {features}\nhash {schema.hash}"


def main() -> int:
    """Prepare the named source; returns the exit code."""
    command = parser()
    arguments = command.parse_args()
    if arguments.run < 1:
        command.error(f"--run is {arguments.run}; expected 1 or more")
    print(CITATION, flush=True)
    schema = prepare_movielens(
        arguments.path, arguments.out, run=arguments.run, seed=arguments.seed, overwrite=arguments.overwrite
    )
    print(summary(arguments.out, schema))
    return 0


if __name__ == "__main__":
    raise SystemExit(run_command(main))
