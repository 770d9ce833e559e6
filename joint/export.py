"""`python -m joint.export RUN --out DIR [--with-teacher] …`: a run's newest checkpoint, to be served without torch.

`python -m joint.export DIR --items new.parquet` adds items to the newest version in DIR, as a version of its own.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from joint.commands import run_command
from joint.errors import UserError
from joint.versions import check_versions

HEADS = ("retrieval", "pre_ranking")
PACKAGES = ("onnx", "onnxscript", "onnxruntime", "faiss")


def main(arguments: Sequence[str] | None = None) -> int:
    """Export a run, or add items to an export; returns the exit code."""
    parser = argparse.ArgumentParser(prog="joint.export", description="Hand a run over to serving.")
    parser.add_argument("run", type=Path, help="run directory; with --items, an exported folder")
    parser.add_argument("--out", type=Path, help="folder of versions; with --items, by default the same folder")
    parser.add_argument("--heads", help="of these, those that the run has (default: both)")
    parser.add_argument("--table-dtype", choices=("fp32", "fp16", "int8"), help="(default: fp32)")
    parser.add_argument(
        "--index", choices=("flat", "ivf", "hnsw"), help="flat (the default) is exact; the others are gated"
    )
    parser.add_argument("--with-teacher", action="store_true", help="export the ranking head and its features too")
    parser.add_argument("--items", type=Path, help="new items, a row each, as the log describes them")
    parsed = parser.parse_args(arguments)
    _check_packages()
    if parsed.items:
        _check_alone(parsed)
        from joint.exporting.more_items import add_items

        added = add_items(parsed.run, parsed.items, parsed.out or parsed.run)
        print(f"{added.folder}: {added.items} items added, {added.unknown} of them of an id that training did not know")
        return 0
    if not parsed.out:
        raise UserError("--out: missing; expected a folder for the versions of this export")
    check_versions()
    # Imported only now: with a wrong combination of versions these imports fail, and less clearly.
    from joint.exporting.build import Choices, export_run
    from joint.run import RunDirectory

    choices = Choices(
        heads=_heads(parsed.heads or ",".join(HEADS)),
        precision=parsed.table_dtype or "fp32",
        teacher=parsed.with_teacher,
        index=parsed.index or "flat",
    )
    folder, differences = export_run(parsed.run, parsed.out, choices)
    print(f"{folder}: exported, and answers as the training forward does; largest differences, as parts of the scale:")
    print("  " + ", ".join(f"{name} {value:.1e}" for name, value in differences.items()))
    if not choices.teacher and RunDirectory(parsed.run).load_config()[0].heads.ranking:
        print("  without the ranking head (--with-teacher adds it)")
    return 0


def _heads(text: str) -> tuple[str, ...]:
    named = text.split(",")
    if wrong := [name for name in named if name not in HEADS]:
        raise UserError(f"--heads: {wrong[0]!r}; expected {' or '.join(HEADS)} (the teacher comes by --with-teacher)")
    return tuple(name for name in HEADS if name in named)


def _check_alone(parsed: argparse.Namespace) -> None:
    given = {name: getattr(parsed, name) for name in ("heads", "table_dtype", "index", "with_teacher")}
    if wrong := [name for name, value in given.items() if value]:
        raise UserError(f"--{wrong[0].replace('_', '-')}: not with --items, which keeps the graphs of the export")


def _check_packages() -> None:
    from importlib.util import find_spec

    if missing := [name for name in PACKAGES if find_spec(name) is None]:
        raise UserError(f"not installed: {', '.join(missing)}; pip install 'joint-cascade-trainer[export]'")


if __name__ == "__main__":
    raise SystemExit(run_command(main))
