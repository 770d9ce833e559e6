"""Writes what a comparison found: report.md, report.csv, summary.csv and figures/."""

from __future__ import annotations

import re

from joint.comparison.analysis import Metric, analyse, metric_names
from joint.comparison.comparison import Comparison
from joint.comparison.figures import STAGE, funnel_figure, metric_figure
from joint.comparison.report import markdown, rows_csv, summary_csv
from joint.errors import UserError
from joint.files import write_whole

FUNNEL = "figures/funnel.png"  # drawn whatever metrics the tables have


def write_report(comparison: Comparison) -> list[Metric]:
    """Analyse a comparison and write its report into its folder; returns what was found, the primary metric first.

    Raises:
        UserError: a file cannot be written.
    """
    metrics = [analyse(comparison, name) for name in metric_names(comparison)]
    untuned = analyse(comparison, comparison.primary, comparison.untuned) if comparison.untuned else None
    folder = comparison.folder
    try:
        (folder / "figures").mkdir(parents=True, exist_ok=True)
        figures = {}
        for metric in metrics:
            if any(summary.values for summary in metric.summaries.values()):
                figures[metric.name] = f"figures/{re.sub('[^A-Za-z0-9_]+', '-', metric.name)}.png"
                metric_figure(comparison, metric, folder / figures[metric.name])
        stages = {name for result in comparison.results for name in result.metrics if STAGE.fullmatch(name)}
        if funnel_figure(comparison, [analyse(comparison, name) for name in sorted(stages)], folder / FUNNEL):
            figures["funnel"] = FUNNEL
        write_whole(folder / "report.md", markdown(comparison, metrics, untuned, figures))
        write_whole(folder / "report.csv", rows_csv(comparison))
        write_whole(folder / "summary.csv", summary_csv(comparison, metrics))
    except OSError as error:
        raise UserError(f"{folder}: the report cannot be written ({error.strerror})") from error
    return metrics
