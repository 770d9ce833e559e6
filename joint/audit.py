"""`python -m joint.audit DATASET [--out DIR] [--sample N]`: is the data sound? Exit code 1 on leaks."""

from __future__ import annotations

import argparse
from pathlib import Path

from joint import files
from joint.auditing.measure import Report, audit, to_json
from joint.auditing.summary import summary
from joint.commands import run_command
from joint.data.dataset import Dataset
from joint.errors import DataError


def main() -> int:
    """Audit a dataset; returns the exit code: 0 clean, 1 leakage."""
    parser = argparse.ArgumentParser(prog="joint.audit", description="Check a dataset for leakage, and describe it.")
    parser.add_argument("dataset", type=Path, help="a prepared dataset")
    parser.add_argument("--out", type=Path, help="folder of audit.json and audit.html (default DATASET/audit)")
    parser.add_argument("--sample", type=int, help="requests of a file that feed the distances (default all)")
    arguments = parser.parse_args()
    if arguments.sample is not None and arguments.sample < 1:
        parser.error(f"--sample is {arguments.sample}; expected 1 or more")
    report = audit(Dataset(arguments.dataset), sample=arguments.sample)
    out = arguments.out or arguments.dataset / "audit"
    write_whole(out / "audit.json", to_json(report))
    print(summary(report))
    print(_write_page(out / "audit.html", report))
    return 1 if report["leaks"] else 0


def write_whole(path: Path, text: str) -> None:
    """`joint.files.write_whole`, and the folder before it; DataError if that cannot be done."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write_whole(path, text)
    except OSError as error:
        raise DataError(f"{path}: cannot be written ({error})") from error


def _write_page(path: Path, report: Report) -> str:
    """Write the page if matplotlib is there; returns what to say of it."""
    try:
        from joint.auditing.page import page
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] != "matplotlib":
            raise
        return f"{path.parent}/audit.json is written; no page without matplotlib: pip install matplotlib (or .[report])"
    write_whole(path, page(report))
    return f"{path} has the pictures, audit.json beside it all numbers"


if __name__ == "__main__":
    raise SystemExit(run_command(main))
