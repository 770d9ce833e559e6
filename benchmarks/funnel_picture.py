"""The README's picture: what is left after each stage, and what the ten are worth, of variants of a comparison.

    python -m joint.compare configs/ablations/one_alone.yaml data.epochs=1
    python -m benchmarks.funnel_picture runs/one_alone docs/pictures/funnel-aligned.png \\
        'none=each head alone, on its own labels' \\
        'distill=the student learns from its teacher' \\
        'retrieve=retrieval learns over the whole corpus'

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

from joint.comparison.statistics import paired
from joint.funnels.figures import COLOURS, STYLE

STAGES = {"retrieval": 100, "pre_ranking": 50, "ranking": 10}  # configs/joint.yaml's quotas
PANELS = {
    "Positives left after each stage": [f"funnel/{head}/recall@{n}" for head, n in STAGES.items()],
    "The ten truly best left after each stage": [f"funnel/{head}/true_favourites" for head in STAGES],
    "True worth of an item served": ["funnel/true_reward@10"],
}


def per_world(folder: Path, metric: str) -> np.ndarray:
    """A metric of a variant's runs, the mean over seeds for each world: float64 [worlds]."""
    found = defaultdict(list)
    for file in sorted(folder.glob("*/seed-*/eval.json")):
        found[file.parts[-3]].append(json.loads(file.read_text())[metric])
    return np.array([np.mean(values) for values in found.values()])


def draw(axes: Axes, runs: Path, variants: dict[str, str], metrics: list[str]) -> None:
    """A group of bars a metric, a bar a variant."""
    width = 0.84 / len(variants)
    for place, (variant, label) in enumerate(variants.items()):
        for x, metric in enumerate(metrics):
            interval = paired(per_world(runs / variant, metric), 0.0)
            at, mean = x + (place - (len(variants) - 1) / 2) * width, interval.difference
            axes.bar(at, mean, width * 0.94, color=COLOURS[place], label=None if x else label)
            axes.plot([at, at], [interval.low, interval.high], color="#000000", linewidth=1.2)
            said = f"{mean:.0%}" if len(metrics) > 1 else f"{mean:.2f}"
            axes.annotate(said, (at, interval.high), (0, 3), textcoords="offset points", ha="center", fontsize=10)
    axes.grid(axis="y")
    axes.tick_params(axis="x", length=0)


def main(runs: Path, out: Path, variants: dict[str, str]) -> None:
    """Draw `variants` (folder -> label) of the comparison's folder `runs`."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(12, 4.2), layout="constrained")
        panels = figure.subplots(1, len(PANELS), width_ratios=[3, 3, 2])
        for axes, (title, metrics) in zip(panels, PANELS.items(), strict=True):
            draw(axes, runs, variants, metrics)
            axes.set_title(title)
            if len(metrics) > 1:
                axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
                axes.set_xticks(range(3), [f"{head.replace('_', '-')}\nkeeps {n}" for head, n in STAGES.items()])
            axes.set_ylim(0, 1.1 * axes.get_ylim()[1])
        incumbent = per_world(runs / next(iter(variants)), "baselines/incumbent/true_reward@10").mean()
        panels[-1].axhline(incumbent, color="#595959", linestyle=(0, (4, 3)), linewidth=1)
        panels[-1].annotate("who wrote the log", (-0.42, incumbent), (0, 3), textcoords="offset points", fontsize=10)
        panels[-1].set_xticks([])
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
        figure.savefig(out, dpi=90, metadata={"Software": None}, pil_kwargs={"optimize": True})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Draw the funnels of some variants of a comparison.")
    parser.add_argument("runs", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("variants", nargs="+", metavar="VARIANT=LABEL")
    parsed = parser.parse_args()
    main(parsed.runs, parsed.out, dict(text.split("=", 1) for text in parsed.variants))
