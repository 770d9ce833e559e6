"""The pictures of a comparison, as PNG files; needs matplotlib."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from joint.colours import BLACK, BLUE, DARK, GREEN, HEADS, LIGHT, VERMILLION
from joint.comparison.analysis import Metric
from joint.comparison.comparison import Comparison
from joint.comparison.goals import higher_is_better, in_words, is_distance
from joint.comparison.statistics import MARGIN, Paired, paired

STYLE: dict[Any, Any] = {
    "font.size": 15,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.grid": True,
    "axes.grid.axis": "x",
    "axes.axisbelow": True,
    "grid.color": LIGHT,
    "ytick.left": False,
}
WIDTH = 13.3  # inches of a slide
# By verdict: colour and marker, so that neither alone must be told apart.
LOOKS = {"better": (BLUE, "^"), "worse": (VERMILLION, "v"), "same": (GREEN, "s")}
OTHER, BASELINE = (DARK, "o"), (BLACK, "D")

STAGE = re.compile(r"funnel/(\w+)/recall@(\d+)")  # the metric of a stage: head, quota


def metric_figure(comparison: Comparison, metric: Metric, path: Path) -> None:
    """Left: every unit, the mean and its 95 % interval; right: the difference to the baseline, with its own."""
    names = list(comparison.variants)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 2.5 + 0.72 * len(names)), layout="constrained")
        left, right = figure.subplots(1, 2, sharey=True, width_ratios=[1.1, 1])
        for y, name in enumerate(names):
            _values(left, y, metric, name)
            _difference(right, y, metric, name)
        _frame(figure, left, right, comparison, metric)
        figure.savefig(path, dpi=110, metadata={"Software": None})


def _values(axes: Axes, y: int, metric: Metric, name: str) -> None:
    values = np.array(metric.summaries[name].values)
    if not len(values):
        axes.annotate("no result", (0.5, y), xycoords=("axes fraction", "data"), ha="center", color=OTHER[0])
        return
    colour, marker = LOOKS.get(metric.contrasts[name].verdict, OTHER) if name in metric.contrasts else BASELINE
    axes.plot(values, np.full(len(values), y + 0.25), "o", color=colour, alpha=0.5, markersize=7, markeredgewidth=0)
    _mark(axes, y, paired(values, 0.0), f"{values.mean():.4f}", colour, marker)


def _difference(axes: Axes, y: int, metric: Metric, name: str) -> None:
    contrast = metric.contrasts.get(name)
    if contrast and contrast.test.n:
        said = f"{contrast.test.difference:+.4f} {contrast.verdict}"
        _mark(axes, y, contrast.test, said, *LOOKS.get(contrast.verdict, OTHER))


def _mark(axes: Axes, y: int, interval: Paired, text: str, colour: str, marker: str) -> None:
    axes.plot([interval.low, interval.high], [y, y], color=colour, linewidth=3, solid_capstyle="butt")
    axes.plot(interval.difference, y, marker, color=colour, markersize=12)
    white = {"boxstyle": "square,pad=0.1", "facecolor": "white", "edgecolor": "none", "alpha": 0.85}
    text = text.replace("-", "−")  # noqa: RUF001 - as the axis writes it
    at = (interval.difference, y)
    axes.annotate(text, at, (0, 12), textcoords="offset points", ha="center", color=colour, bbox=white)


def _frame(figure: Figure, left: Axes, right: Axes, comparison: Comparison, metric: Metric) -> None:
    """Names, limits, the baseline's line and the band in which a difference is none."""
    names = list(comparison.variants)
    several = len({result.world for result in comparison.results}) > 1
    way = "higher" if higher_is_better(metric.name) else "lower"
    what = f"Distance of {metric.name} from 1" if is_distance(metric.name) else in_words(metric.name)
    figure.suptitle(f"{what}: {way} is better", x=0.01, ha="left", fontsize=18)
    said = [f"{name}\n(placebo of {of})" if (of := comparison.placebos.get(name)) else name for name in names]
    left.set_yticks(range(len(names)), said)
    left.set_ylim(len(names) - 0.45, -0.75)
    left.set_xlabel(f"small dots: {'worlds' if several else 'seeds'}; bar: 95 % interval of the mean")
    right.set_xlabel(f"difference to {comparison.baseline} (band: ±{MARGIN:.0%})")
    scale = 1.0 if is_distance(metric.name) else abs(metric.summaries[comparison.baseline].mean)
    right.axvspan(-MARGIN * scale, MARGIN * scale, color=LIGHT, zorder=0)
    right.axvline(0, color=BLACK, linewidth=1)
    _zoom(left, [value for summary in metric.summaries.values() for value in summary.values])
    differences = [contrast.test.difference for contrast in metric.contrasts.values() if contrast.test.n]
    _zoom(right, [*differences, -1.5 * MARGIN * scale, 1.5 * MARGIN * scale])


def _zoom(axes: Axes, values: Sequence[float]) -> None:
    """Room for the labels; an interval that is much wider than the values (of two units, say) runs out of the frame."""
    low, high = axes.get_xlim()
    room = max(1.2 * (max(values) - min(values)), 1e-9)
    low, high = max(low, min(values) - room), min(high, max(values) + room)
    axes.set_xlim(low - 0.18 * (high - low), high + 0.18 * (high - low))
    axes.locator_params(axis="x", nbins=5)


def funnel_figure(comparison: Comparison, metrics: Sequence[Metric], path: Path) -> bool:
    """A panel a stage: the share of the positives that is left, per variant; False where none was measured."""
    stages: dict[str, dict[str, Metric]] = {}
    for metric in metrics:
        found = STAGE.fullmatch(metric.name)
        if found and any(summary.values for summary in metric.summaries.values()):
            stages.setdefault(found[1], {})[found[2]] = metric
    heads = [head for head in HEADS if head in stages]
    if not heads:
        return False
    names = list(comparison.variants)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 2.2 + 0.6 * len(names)), layout="constrained")
        panels = figure.subplots(1, len(heads), sharey=True, sharex=True, squeeze=False)[0]
        highest = max(_stage(axes, head, names, stages[head]) for axes, head in zip(panels, heads, strict=True))
        panels[0].set_yticks(range(len(names)), names)
        panels[0].set_ylim(len(names) - 0.5, -0.5)
        panels[0].set_xlim(0, 1.4 * highest)
        panels[0].locator_params(axis="x", nbins=3)
        panels[0].xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        figure.suptitle("Share of the positives left after each stage", x=0.01, ha="left", fontsize=18)
        figure.supxlabel("bar: mean; line: its 95 % interval", fontsize=15)
        figure.savefig(path, dpi=110, metadata={"Software": None})
    return True


def _stage(axes: Axes, head: str, names: Sequence[str], by_quota: dict[str, Metric]) -> float:
    """One head's bars, a variant being measured at its own quota; returns how high the highest value reaches."""
    axes.set_title(head.replace("_", "-") + " keeps " + " or ".join(by_quota), loc="left")
    highest = 0.0
    for y, name in enumerate(names):
        values = next((m.summaries[name].values for m in by_quota.values() if m.summaries[name].values), [])
        if not values:
            axes.annotate("no result", (0, y), (6, 0), textcoords="offset points", va="center", color=OTHER[0])
            continue
        mean, interval = float(np.mean(values)), paired(values, 0.0)
        low, high = np.clip(np.nan_to_num([interval.low, interval.high], nan=mean), 0.0, 1.0)
        axes.barh(y, mean, height=0.6, color=HEADS[head])
        axes.plot([low, high], [y, y], color=BLACK, linewidth=2)
        axes.annotate(f"{mean:.1%}", (max(mean, high), y), (7, 0), textcoords="offset points", va="center")
        highest = max(highest, mean, high)
    return highest
