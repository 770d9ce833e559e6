"""Writes what was found of funnels: report.md, tables as CSV and pictures, each file whole."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from joint.errors import UserError
from joint.files import write_whole
from joint.funnels.figures import lost_figure, survival_figure, sweep_figure
from joint.funnels.measure import Point, Quotas, Thirds, efficient
from joint.funnels.shares import KINDS, Slice, lost, slices

Table = list[list[str]]  # the first row is the heading


def write_funnel(
    folder: Path, said: str, numbers: Mapping[str, float], quotas: Quotas, thirds: Thirds, points: Sequence[Point]
) -> None:
    """A run's funnel: `said` is its table in print; `points` is empty where nothing was swept.

    Raises:
        UserError: a file cannot be written.
    """
    rows = slices(numbers, thirds)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        survival_figure({"": (numbers, quotas)}, folder / "survival.png")
        lost_figure(numbers, quotas, rows, folder / "lost.png")
        table = lost_table(numbers, quotas, rows)
        write_whole(folder / "lost.csv", _csv(table))
        text = ["# Funnel", "", "```", said, "```", "", "## What is left after each stage", "", "![](survival.png)", ""]
        text += ["## Which stage lost the rest", "", "![](lost.png)", "", *_markdown(_shares(table))]
        if points:
            sweep_figure(points, quotas, folder / "sweep.png")
            write_whole(folder / "sweep.csv", _csv(sweep_table(points)))
            text += ["", "## Other quotas", "", "![](sweep.png)", "", STARS, "", *_markdown(starred(points))]
        write_whole(folder / "report.md", "\n".join(text) + "\n")
    except OSError as error:
        raise UserError(f"{folder}: the report cannot be written ({error.strerror})") from error


STARS = "A star: no other of these funnels gives as much at less cost, or more at the same cost."


def lost_table(numbers: Mapping[str, float], quotas: Quotas, rows: Sequence[Slice]) -> Table:
    """A row for every kind and slice: the share that each stage lost, and what came through."""
    stages = ["outside", *quotas, "left"]
    table = [["wanted", "of", *stages]]
    for kind in KINDS:
        for row in rows:
            if shares := lost(numbers, quotas, kind, row.prefix):
                table.append([kind, row.name, *(repr(shares[stage]) for stage in stages)])
    return table


def sweep_table(points: Sequence[Point]) -> Table:
    """A row for every funnel: quotas, multiply-adds a request, what comes out, and whether no other beats it."""
    measures = list(points[0].values)
    best = {measure: efficient(points, measure) for measure in measures}
    table = [[*points[0].quotas, "multiply_adds", *measures, *(f"efficient_by_{measure}" for measure in measures)]]
    for index, point in enumerate(points):
        values = [repr(point.values[measure]) for measure in measures]
        flags = [str(int(best[measure][index])) for measure in measures]
        table.append([*map(str, point.quotas.values()), str(point.cost), *values, *flags])
    return table


def starred(points: Sequence[Point]) -> Table:
    """The same table to be read: a star where no other funnel beats this one."""
    measures = [measure for measure, value in points[0].values.items() if not math.isnan(value)]
    best = {measure: efficient(points, measure) for measure in measures}
    table = [[*points[0].quotas, "multiply-adds", *measures]]
    for index, point in enumerate(points):
        cells = [f"{point.values[m]:.4f}{' *' if best[m][index] else '  '}" for m in measures]
        table.append([*(f"{quota:,}" for quota in point.quotas.values()), f"{point.cost:,}", *cells])
    return table


def write_comparison(folder: Path, runs: Mapping[str, tuple[Mapping[str, float], Quotas]]) -> None:
    """Several runs' funnels beside each other: survival.png and lost.csv.

    Raises:
        UserError: a file cannot be written.
    """
    everyone = [Slice("all", "")]
    table: Table = []
    for name, (numbers, quotas) in runs.items():
        heading, *rows = lost_table(numbers, quotas, everyone)
        table = table or [["run", *heading]]
        table += [[name, *row] for row in rows]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        survival_figure(runs, folder / "survival.png")
        write_whole(folder / "lost.csv", _csv(table))
        text = ["# Funnels", "", "![](survival.png)", "", *_markdown(_shares(table))]
        write_whole(folder / "report.md", "\n".join(text) + "\n")
    except OSError as error:
        raise UserError(f"{folder}: the report cannot be written ({error.strerror})") from error


def _shares(table: Table) -> Table:
    return [table[0], *([f"{float(c):.1%}" if "." in c else c for c in row] for row in table[1:])]


def _markdown(table: Table) -> list[str]:
    heading, *rows = ["| " + " | ".join(row) + " |" for row in table]
    return [heading, "|" + "---|" * len(table[0]), *rows]


def _csv(table: Table) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(table)
    return text.getvalue()
