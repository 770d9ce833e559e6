"""The pictures of a funnel, as PNG files; needs matplotlib."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter, PercentFormatter

from joint.colours import BLUE, DARK, GREEN, HEADS, LIGHT, MIDDLE, SERIES, VERMILLION
from joint.funnels.measure import REWARD, Point, Quotas, efficient
from joint.funnels.shares import KINDS, Slice, left, lost

STYLE: dict[Any, Any] = {
    "font.size": 11,
    "axes.titlesize": 12,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": LIGHT,
}
WIDTH = 10.0  # inches of a page
STAGES = {"outside": MIDDLE, **HEADS, "left": GREEN}
SAID = {"outside": "not eligible", "left": "came through"}
APART = 0.09  # of the frame: names of points that are closer would lie on each other


def _save(figure: Figure, path: Path) -> None:
    figure.savefig(path, dpi=80, metadata={"Software": None}, pil_kwargs={"optimize": True})


def _stage(head: str) -> str:
    return SAID.get(head, head.replace("_", "-"))


def survival_figure(runs: Mapping[str, tuple[Mapping[str, float], Quotas]], path: Path) -> None:
    """What is left after each stage. Of one run a bar a kind; of several a panel a kind, and a bar a run."""
    one = len(runs) == 1
    quotas = next(iter(runs.values()))[1]
    known = {run: {kind: left(found, q, kind) for kind in KINDS} for run, (found, q) in runs.items()}
    kinds = [kind for kind in KINDS if all(shares[kind] for shares in known.values())]
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 4.2 if one else 0.5 + 3.1 * len(kinds)), layout="constrained")
        panels = figure.subplots(1 if one else len(kinds), 1, squeeze=False, sharex=True)[:, 0]
        if one:
            _bars(panels[0], {KINDS[kind]: known[next(iter(runs))][kind] for kind in kinds})
            panels[0].set_title("Share left after each stage")
        for panel, kind in zip(panels, () if one else kinds, strict=not one):
            _bars(panel, {run: shares[kind] for run, shares in known.items()})
            panel.set_title(f"{KINDS[kind]} left after each stage")
        names = [f"{_stage(head)}\nkeeps {_quotas(runs, head)}" for head in quotas]
        panels[-1].set_xticks(range(len(names) + 1), ["could be\nserved", *names])
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
        _save(figure, path)


def _quotas(runs: Mapping[str, tuple[Mapping[str, float], Quotas]], head: str) -> str:
    return " or ".join(dict.fromkeys(f"{quotas[head]:,}" for _, quotas in runs.values() if head in quotas))


def _bars(axes: Axes, shares: Mapping[str, Mapping[str, float]]) -> None:
    """A group of bars a stage, a bar of each name, its value above it."""
    width = 0.84 / len(shares)
    for place, (name, values) in enumerate(shares.items()):
        x = np.arange(len(values)) + (place - (len(shares) - 1) / 2) * width
        bars = axes.bar(x, list(values.values()), width * 0.94, color=SERIES[place % len(SERIES)], label=name)
        axes.bar_label(bars, [f"{value:.0%}" for value in values.values()], padding=2, fontsize=11)
    axes.set_ylim(0, 1.08)
    axes.set_yticks([0, 0.5, 1])
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.grid(axis="y")
    axes.tick_params(axis="x", length=0)


def lost_figure(numbers: Mapping[str, float], quotas: Quotas, rows: Sequence[Slice], path: Path) -> None:
    """A bar of 100 % for all requests, every user group and every part of the items: which stage lost which share."""
    shares = {kind: [lost(numbers, quotas, kind, row.prefix) for row in rows] for kind in KINDS}
    kinds = [kind for kind, found in shares.items() if found[0]]
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 1.5 + 0.36 * len(rows)), layout=ConstrainedLayoutEngine(wspace=0.06))
        panels = figure.subplots(1, len(kinds), sharey=True, squeeze=False)[0]
        for panel, kind in zip(panels, kinds, strict=True):
            for y, found in enumerate(shares[kind]):
                _stacked(panel, y, found)
            panel.set_title(KINDS[kind])
            panel.set_xlim(0, 1)
            panel.set_xticks([0, 0.5, 1])
            panel.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
            panel.spines["left"].set_visible(False)
            panel.tick_params(axis="y", length=0)
        panels[0].set_yticks(range(len(rows)), [row.name for row in rows])
        panels[0].set_ylim(len(rows) - 0.5, -0.5)
        parts = [part for part in STAGES if any(found.get(part) for found in itertools.chain(*shares.values()))]
        handles = [mpl.patches.Patch(color=STAGES[part]) for part in parts]
        said = [SAID.get(part, f"lost by {_stage(part)}") for part in parts]
        figure.legend(handles, said, loc="outside lower center", ncols=len(parts), frameon=False)
        _save(figure, path)


def _stacked(axes: Axes, y: int, shares: Mapping[str, float]) -> None:
    if not shares:
        axes.annotate("none is wanted", (0.02, y), va="center", color=DARK)
    begin = 0.0
    for stage, share in shares.items():
        axes.barh(y, share, left=begin, height=0.74, color=STAGES[stage], edgecolor="white", linewidth=0.8)
        if share >= 0.13:
            colour = "black" if stage in ("outside", "pre_ranking", "ranking") else "white"
            axes.annotate(f"{share:.0%}", (begin + share / 2, y), ha="center", va="center", color=colour, fontsize=9)
        begin += share


def sweep_figure(points: Sequence[Point], now: Quotas, path: Path) -> None:
    """A panel a measure: every funnel by its cost and what comes out, those that no other beats joined and named."""
    measures = [measure for measure, value in points[0].values.items() if not np.isnan(value)]
    rows = -(-len(measures) // 2)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 0.6 + 3.6 * rows), layout="constrained")
        panels = figure.subplots(rows, min(2, len(measures)), squeeze=False).flat
        for panel, measure in zip(panels, measures, strict=False):
            _frontier(panel, points, measure, now)
        for panel in list(panels)[len(measures) :]:
            panel.set_visible(False)
        names = " → ".join(_stage(head) for head in points[0].quotas)
        figure.supxlabel(f"multiply-adds of a request, in millions. Names are quotas: {names}", fontsize=12)
        _save(figure, path)


def _frontier(axes: Axes, points: Sequence[Point], measure: str, now: Quotas) -> None:
    cost = np.array([point.cost / 1e6 for point in points])
    value = np.array([point.values[measure] for point in points])
    best = np.array(efficient(points, measure))
    axes.plot(cost[~best], value[~best], "o", color=MIDDLE, markersize=6)
    axes.plot(cost[best], value[best], "o-", color=BLUE, markersize=7, linewidth=1.5)
    own = np.array([point.quotas == now for point in points])
    axes.plot(cost[own], value[own], "D", color=VERMILLION, markersize=9, label="the config's", zorder=3)
    if own.any():
        axes.legend(loc="lower right", frameon=False)
    what = KINDS.get(measure, "true reward of an item of the ten" if measure == REWARD else measure)
    axes.set_title(what if measure == REWARD else f"{what} that come through")
    if measure != REWARD:
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.3g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.margins(x=0.1, y=0.12)
    axes.grid()
    _names(axes, [(points[index], cost[index], value[index]) for index in np.flatnonzero(best)[::-1]])


def _names(axes: Axes, best: Sequence[tuple[Point, float, float]]) -> None:
    """The quotas of a frontier's points, from the highest on, without those that would lie on the one before."""
    to_frame = axes.transScale + axes.transLimits
    named = np.full(2, np.inf)
    for point, cost, value in best:
        at = to_frame.transform((cost, value))
        if abs(at[1] - named[1]) < APART and abs(at[0] - named[0]) < 3 * APART:
            continue
        side, where = ("left", (9, -4)) if at[0] < 0.5 else ("right", (-9, 3))
        name = "→".join(str(quota) for quota in point.quotas.values())
        axes.annotate(name, (cost, value), where, textcoords="offset points", ha=side, fontsize=10)
        named = at
