"""The pictures of an audit, as PNG; needs matplotlib."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullFormatter, PercentFormatter, StrMethodFormatter

from joint.auditing.summary import number, percent
from joint.colours import LIGHT, MIDDLE, SERIES
from joint.schema import SPLITS

Rows = list[dict[str, Any]]
MARKERS = "osD^vPX*<>"
WIDTH = 10.0  # inches of a page; 11 pt letters are read without zooming
STYLE: dict[Any, Any] = {"font.size": 11, "axes.titlesize": 12, "axes.spines.top": False, "axes.spines.right": False}
BARS = 16  # features of a picture, at most; the tables have all


def stage_rows(rows: Rows) -> bytes:
    """Candidates of every stage: a line a stage over days, or bars for a single day."""
    stages = [name for name in rows[0] if name not in ("day", "split", "candidates")]
    days = sorted({row["day"] for row in rows})
    totals = {name: [sum(row[name] for row in rows if row["day"] == day) for day in days] for name in stages}
    if len(days) > 1:
        figure, ((axes,),) = _figure(4.2)
        for place, name in enumerate(stages):
            # Stages of equal numbers lie on each other: the later ones are smaller, so that the earlier ones show.
            size = 12 - 8 * place / len(stages)
            style = {"color": SERIES[place % len(SERIES)], "marker": MARKERS[place % len(MARKERS)], "markersize": size}
            axes.plot(range(len(days)), [t or np.nan for t in totals[name]], label=name, **style)
        known = [total for row in totals.values() for total in row if total]
        axes.set(yscale="log", ylabel="rows (log scale)")
        axes.set_ylim(10 ** np.floor(np.log10(min(known))), 10 ** np.ceil(np.log10(max(known) + 1)))
        _plain_log_ticks(axes)
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
        _day_ticks(axes, days)
    else:
        figure, ((axes,),) = _figure(1.2 + 0.4 * len(stages))
        bars = axes.barh(stages, [totals[name][0] for name in stages], color=SERIES[0])
        axes.bar_label(bars, [f"{totals[name][0]:,}" for name in stages], padding=4)
        axes.invert_yaxis()
        axes.set(xlabel=f"rows on {days[0]}")
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        axes.margins(x=0.12)
    return _png(figure)


def label_rates(labels: Rows) -> bytes:
    """A panel a label: the share above 0 (the mean, where all are) by day, or by split on a single day."""
    names = list(dict.fromkeys(row["label"] for row in labels))
    days = sorted({row["day"] for row in labels})
    columns = min(len(names), 3)
    figure, panels = _figure(0.4 + 2.8 * -(-len(names) // columns), -(-len(names) // columns), columns)
    for panel, name in zip(panels.flat, names, strict=False):
        rows = [row for row in labels if row["label"] == name and row["observed"]]
        what = "mean" if all(row["positive_rate"] == 1 for row in rows) else "positive_rate"
        for place, split in enumerate(SPLITS):
            some = [row for row in rows if row["split"] == split]
            x = [days.index(row["day"]) if len(days) > 1 else place for row in some]
            style = {"color": SERIES[place], "marker": MARKERS[place], "markersize": 8}
            panel.plot(x, [row[what] for row in some], label=split if some else None, **style)
        highest = max((row[what] for row in rows), default=0)
        panel.set(title=f"{name}: {'mean' if what == 'mean' else 'share above 0'}")
        panel.set_ylim(min(0, *panel.get_ylim()), 1.1 * highest if highest > 0 else None)
        if len(days) > 1:
            _day_ticks(panel, days, most=3)
        else:
            panel.set_xticks(range(len(SPLITS)), SPLITS)
            panel.set_xlim(-0.5, len(SPLITS) - 0.5)
    for panel in panels.flat[len(names) :]:
        panel.set_visible(False)
    if len(days) > 1:
        figure.legend(*_split_handles(panels.flat[: len(names)]), loc="outside lower center", ncols=3, frameon=False)
    return _png(figure)


def long_tails(tails: dict[str, dict[str, Any]]) -> bytes:
    """How many things have how many rows, in ranges that double; RecFlow (Liu et al. 2025), Figures 3 and 4."""
    figure, panels = _figure(3.6 * len(tails), len(tails), 1)
    for place, (panel, (name, tail)) in enumerate(zip(panels.flat, tails.items(), strict=True)):
        ranges = tail["ranges"]
        bars = panel.bar([f"{r['from']:,}" for r in ranges], [r["things"] for r in ranges], color=SERIES[place])
        shares = [r["things"] / max(tail["seen"], 1) for r in ranges]
        panel.bar_label(bars, [f"{s:.0%}" if s >= 0.01 else "<1%" if s else "" for s in shares], padding=2)
        thing, what = name.split("_by_")
        rows = {"exposure": "exposures", "all_stages": "rows of all stages"}[what]
        never = f"; {tail['things'] - tail['seen']:,} {thing} have none" if tail["things"] > tail["seen"] else ""
        panel.set(title=f"{thing} by their number of {rows}{never}", ylabel=thing, yscale="log")
        panel.set_xlabel(f"{rows}: from this number up to the next bar's")
        panel.margins(y=0.15)
        panel.set_ylim(bottom=0.8)  # a bar of one thing shows
        _plain_log_ticks(panel)
    return _png(figure)


def overlap_maps(pairs: Rows) -> bytes:
    """Four maps of spaces by spaces: items in common, then distances. Dark is always 'alike'."""
    names = list(dict.fromkeys(name for pair in pairs for name in pair["spaces"]))
    other = [np.mean([v for v in p["features_js"].values() if v is not None] or [np.nan]) for p in pairs]
    maps = {
        "items in common (Jaccard)": ([pair["jaccard"] for pair in pairs], "cividis_r"),
        "the same by popularity (weighted Jaccard)": ([pair["weighted_jaccard"] for pair in pairs], "cividis_r"),
        "distance of popularity (JS)": ([pair["popularity_js"] for pair in pairs], "cividis"),
        "distance of item features (JS, mean)": (other, "cividis"),
    }
    figure, panels = _figure(2 * (1.6 + 0.42 * len(names)), 2, 2)
    for panel, (title, (values, colours)) in zip(panels.flat, maps.items(), strict=True):
        same = 1.0 if colours.endswith("_r") else 0.0
        matrix = np.full((len(names), len(names)), same)
        for pair, value in zip(pairs, values, strict=True):
            row, column = (names.index(name) for name in pair["spaces"])
            matrix[row, column] = matrix[column, row] = np.nan if value is None else value
        panel.imshow(matrix, cmap=colours, vmin=0, vmax=1, aspect="auto")
        for (row, column), value in np.ndenumerate(matrix):
            dark = value > 0.5 if same else value < 0.5
            panel.text(column, row, f"{value:.2f}", ha="center", va="center", color="white" if dark else "black")
        panel.set_xticks(range(len(names)), names, rotation=40, ha="right", rotation_mode="anchor")
        panel.set_yticks(range(len(names)), names)
        panel.set_title(title)
    return _png(figure)


def feature_gaps(gaps: Rows) -> bytes:
    """A panel a comparison: distance of every feature, and beside it what chance alone would show."""
    heights = [0.9 + 0.3 * min(len(gap["features"]), BARS) for gap in gaps]
    figure, panels = _figure(0.6 + sum(heights), len(gaps), 1, height_ratios=heights, sharex=True)
    for panel, gap in zip(panels.flat, gaps, strict=True):
        features = dict(list(gap["features"].items())[:BARS])
        js, chance = ([said[kind] for said in features.values()] for kind in ("js", "chance_js"))
        panel.hlines(range(len(features)), chance, js, color=MIDDLE, linewidth=2, zorder=1)
        panel.scatter(js, range(len(features)), color=SERIES[0], s=55, label="JS distance")
        panel.scatter(
            chance, range(len(features)), facecolors="white", edgecolors=SERIES[1], s=55, marker="D", label="chance"
        )
        panel.set_yticks(range(len(features)), list(features))
        panel.set(title=f"{gap['from']} → {gap['to']}", xlim=(-0.02, 1.02), ylim=(len(features) - 0.4, -0.6))
        panel.grid(axis="x", color=LIGHT)
        panel.set_axisbelow(True)
    panels.flat[-1].set_xlabel("Jensen-Shannon distance (0 the same, 1 nothing in common)")
    figure.legend(*panels.flat[0].get_legend_handles_labels(), loc="outside upper center", ncols=2, frameon=False)
    return _png(figure)


def missing_rates(missing: Rows) -> bytes | None:
    """The features with the most missing values; None where nothing is missing."""
    some = sorted((said for said in missing if said["missing"]), key=lambda said: -said["rate"])[:BARS]
    if not some:
        return None
    figure, ((axes,),) = _figure(1.1 + 0.36 * len(some))
    bars = axes.barh(
        [f"{said['feature']} ({said['of']})" for said in some], [said["rate"] for said in some], color=SERIES[0]
    )
    axes.bar_label(bars, [percent(said["rate"]) for said in some], padding=4)
    axes.invert_yaxis()
    axes.xaxis.set_major_formatter(PercentFormatter(1.0))
    axes.set(xlabel="missing values")
    axes.margins(x=0.12)
    return _png(figure)


def newcomer_rates(new: Rows) -> bytes:
    """Shares of a later split's items and users that training never had."""
    kinds = {"items": "items never exposed", "items_never_logged": "items never logged", "users": "users never seen"}
    kinds = {kind: name for kind, name in kinds.items() if kind in new[0]}
    figure, ((axes,),) = _figure(3.2)
    width = 0.8 / len(new)
    for place, said in enumerate(new):
        shares = [said[kind]["new"] / max(said[kind]["all"], 1) for kind in kinds]
        at = np.arange(len(kinds)) + (place - (len(new) - 1) / 2) * width
        bars = axes.bar(at, shares, width * 0.92, color=SERIES[SPLITS.index(said["split"])], label=said["split"])
        axes.bar_label(
            bars, [f"{percent(s)} ({number(said[kind]['new'])})" for s, kind in zip(shares, kinds, strict=True)]
        )
    axes.set_xticks(range(len(kinds)), list(kinds.values()))
    axes.set(ylabel="share that training never had", ylim=(0, 1.15 * max(axes.get_ylim()[1], 0.01)))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    return _png(figure)


def _figure(height: float, rows: int = 1, columns: int = 1, **options: Any) -> tuple[Figure, Any]:
    """A figure and its panels [rows, columns]."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, max(height, 2.2)), layout="constrained")
        return figure, figure.subplots(rows, columns, squeeze=False, **options)


def _day_ticks(axes: Axes, days: Sequence[str], most: int = 8) -> None:
    shown = [int(x) for x in MaxNLocator(most, integer=True).tick_values(0, len(days) - 1) if 0 <= x < len(days)]
    axes.set_xticks(shown, [days[place][5:] for place in shown])
    pad = len(days) / 20
    axes.set(xlim=(-pad, len(days) - 1 + pad), xlabel=f"{days[0]} to {days[-1]}")


def _plain_log_ticks(axes: Axes) -> None:
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _split_handles(panels: Sequence[Axes]) -> tuple[list[Any], list[str]]:
    found = {
        label: handle for panel in panels for handle, label in zip(*panel.get_legend_handles_labels(), strict=True)
    }
    return list(found.values()), list(found)


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    with mpl.rc_context(STYLE):
        figure.savefig(buffer, format="png", dpi=110, metadata={"Software": None})
    return buffer.getvalue()
