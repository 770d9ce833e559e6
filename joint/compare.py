"""`python -m joint.compare ABLATION [key=value ...]`, or `... RUN RUN ...`: do the variants differ, and is it real?"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from joint.commands import run_command
from joint.errors import UserError
from joint.versions import check_versions


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what is not finished and write the report; returns the exit code: 0, or 1 where a run has no result."""
    parsed = _parser().parse_intermixed_args(arguments)  # key=value may stand behind options
    if missing := [name for name in ("scipy", "matplotlib") if find_spec(name) is None]:
        raise UserError(f"a report needs {' and '.join(missing)}: pip install {' '.join(missing)} (or .[report])")
    check_versions()
    # Imported only now: with a wrong combination of versions, or without the extra, these imports fail less clearly.
    from joint.comparison.ablation import read_ablation
    from joint.comparison.comparison import of_ablation, of_runs
    from joint.comparison.report import headline
    from joint.comparison.writing import write_report

    overrides = [text for text in parsed.targets if "=" in text and not Path(text).exists()]
    paths = [Path(text) for text in parsed.targets if text not in overrides]
    if paths and all(path.is_dir() for path in paths):
        if len(paths) < 2 or overrides:
            raise UserError("expected two or more run directories and nothing else, or one ablation file")
        out = parsed.out or Path("comparison")
        comparison = of_runs(paths, folder=out, primary=parsed.primary, any_data=parsed.any_data)
    else:
        if len(paths) != 1:
            raise UserError("expected one ablation file, or two or more run directories")
        overrides += [f"seeds={parsed.seeds}"] if parsed.seeds else []
        overrides += [f"primary={parsed.primary}"] if parsed.primary else []
        plan = read_ablation(paths[0], overrides, worlds=parsed.worlds, any_data=parsed.any_data)
        only = [name for name in parsed.only.split(",") if name]
        comparison = of_ablation(plan, jobs=parsed.jobs, only=only, run=not parsed.report_only, out=parsed.out)
    primary = write_report(comparison)[0]
    print("\n".join(headline(comparison, primary)).translate(str.maketrans("", "", "*`")))
    print(f"\n{comparison.folder}/report.md has the tables and pictures")
    return 0 if all(result.state == "finished" for result in comparison.results) else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="joint.compare",
        description="Run an ablation's variants, or take finished runs, and test their differences.",
    )
    parser.add_argument("targets", nargs="+", metavar="FILE|RUN|key=value", help="an ablation file, or run directories")
    parser.add_argument("--seeds", type=_positive, help="runs of each variant (default: the file's, or 5)")
    parser.add_argument("--worlds", type=_positive, help="only the first so many of the file's worlds")
    parser.add_argument("--jobs", type=_positive, default=1, help="runs at a time (default 1)")
    parser.add_argument("--only", default="", metavar="V1,V2", help="run these variants alone")
    parser.add_argument("--primary", default="", metavar="METRIC", help="the metric that the claim is about")
    parser.add_argument("--any-data", action="store_true", help="compare runs of different datasets")
    parser.add_argument("--report-only", action="store_true", help="run nothing; report on what there is")
    parser.add_argument("--out", type=Path, help="folder of the report (default: that of the ablation's runs)")
    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of 1 or more")
    return int(text)


if __name__ == "__main__":
    raise SystemExit(run_command(main))
