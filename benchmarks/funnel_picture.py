"""The README's picture: what is left after each stage, and what the ten are worth, of variants of a comparison.

    python -m joint.compare configs/ablations/recommended_held_out.yaml
    python -m benchmarks.funnel_picture runs/recommended_held_out docs/pictures/funnel-aligned.png \\
        'unaligned=unaligned: own losses only' "recommended=aligned: the student learns its teacher's order"

A bar is the mean over worlds (of their seeds' means), its line the 95 % interval of that mean, as in joint.compare.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from joint.colours import BLACK, SERIES
from joint.comparison.statistics import paired
from joint.funnels.figures import STYLE

NAMES = ["retrieval\nkeeps 100", "pre-ranking\nkeeps 50", "ranking\nkeeps 10"]  # configs/joint.yaml's quotas
PANELS = {  # title -> metric of each group of bars, and its name
    "Positives left after each stage": dict(
        zip(
            ("funnel/retrieval/recall@100", "funnel/pre_ranking/recall@50", "funnel/ranking/recall@10"),
            NAMES,
            strict=True,
        )
    ),
    "The teacher's ten left": {"funnel/pre_ranking/teacher_favourites": NAMES[1]},
    "True reward per item": {
        "pre_ranking/true_reward@10": "pre-ranking's\nown ten",
        "funnel/true_reward@10": "the ten\nserved",
    },
}


def per_world(folder: Path, metric: str) -> np.ndarray:
    """A metric of a variant's runs, the mean over seeds for each world: float64 [worlds]."""
    found = defaultdict(list)
    for file in sorted(folder.glob("*/seed-*/eval.json")):
        found[file.parts[-3]].append(json.loads(file.read_text())[metric])
    return np.array([np.mean(values) for values in found.values()])


def draw(axes: Axes, runs: Path, variants: dict[str, str], metrics: dict[str, str]) -> None:
    """A group of bars a metric, a bar a variant."""
    width = 0.84 / len(variants)
    for place, (variant, label) in enumerate(variants.items()):
        for x, metric in enumerate(metrics):
            interval = paired(per_world(runs / variant, metric), 0.0)
            at, mean = x + (place - (len(variants) - 1) / 2) * width, interval.difference
            axes.bar(at, mean, width * 0.94, color=SERIES[place], label=None if x else label)
            axes.plot([at, at], [interval.low, interval.high], color=BLACK, linewidth=1.2)
            said = f"{mean:.2f}" if "reward" in metric else f"{mean:.0%}"
            axes.annotate(said, (at, interval.high), (0, 3), textcoords="offset points", ha="center", fontsize=10)
    axes.set_xticks(range(len(metrics)), list(metrics.values()))
    axes.set_ylim(0, 1.1 * axes.get_ylim()[1])
    axes.grid(axis="y")
    axes.tick_params(axis="x", length=0)


def main(runs: Path, out: Path, variants: dict[str, str]) -> None:
    """Draw `variants` (folder -> label) of the comparison's folder `runs`."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(11.5, 4.0), layout="constrained")
        panels = figure.subplots(1, len(PANELS), width_ratios=[3, 1.3, 2])
        for axes, (title, metrics) in zip(panels, PANELS.items(), strict=True):
            draw(axes, runs, variants, metrics)
            axes.set_title(title)
        for axes in panels[:2]:
            axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
        figure.savefig(out, dpi=90, metadata={"Software": None}, pil_kwargs={"optimize": True})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Draw the funnels of some variants of a comparison.")
    parser.add_argument("runs", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("variants", nargs="+", metavar="VARIANT=LABEL")
    parsed = parser.parse_args()
    main(parsed.runs, parsed.out, dict(text.split("=", 1) for text in parsed.variants))
