"""The pictures of docs/simulate.md, from the figures of `benchmarks.worlds`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from joint.colours import BLACK, SERIES

MARKERS = ("o", "s", "^", "D", "v", "P")
SAID = {"ranked": "ranked, not shown", "exposed_neg": "shown, not viewed"}  # the other groups are called as they are
Values = Mapping[str, Mapping[str, Sequence[float]]]  # world -> name -> a value a seed


def draw_all(
    folder: Path,
    tails: Mapping[str, np.ndarray],
    hardness: Mapping[str, Mapping[str, Sequence[tuple[float, float]]]],
    values: Values,
    tasks: tuple[list[str], np.ndarray],
) -> None:
    """Write every picture."""
    folder.mkdir(parents=True, exist_ok=True)
    plt.rcParams.update({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False, "figure.dpi": 120})
    _tails(folder / "simulate-tails.png", tails)
    _hardness(folder / "simulate-hardness.png", hardness)
    bounds = ("random", "popularity", "incumbent", "light_oracle", "oracle")
    _by_world(folder / "simulate-ceilings.png", values, bounds, "true reward per item of a list of ten")
    lessons = ("incumbent", "feedback, cross features", "random negatives", "stage negatives", "imitation")
    gains = {
        world: {
            name: [100 * (x / y - 1) for x, y in zip(found[name], found["feedback"], strict=True)] for name in lessons
        }
        for world, found in values.items()
    }
    _by_world(folder / "simulate-lessons.png", gains, lessons, "gain in true reward over feedback, %")
    _tasks(folder / "simulate-tasks.png", *tasks)


def _save(path: Path) -> None:
    plt.tight_layout()
    plt.savefig(path, bbox_inches="tight")
    plt.close()


def _tails(path: Path, tails: Mapping[str, np.ndarray]) -> None:
    _, axes = plt.subplots(1, 2, figsize=(9, 3.6))
    for axis, colour, (name, counts) in zip(axes, SERIES, tails.items(), strict=False):
        rank = np.arange(1, len(counts) + 1)
        axis.loglog(rank[counts > 0], counts[counts > 0], color=colour, linewidth=2)
        top = max(1, len(counts) // 100)
        share = counts[:top].sum() / counts.sum()
        axis.set(xlabel=f"rank among {len(counts):,}", ylabel=name, title=f"{name}: top 1% has {share:.0%}")
    _save(path)


def _hardness(path: Path, hardness: Mapping[str, Mapping[str, Sequence[tuple[float, float]]]]) -> None:
    _, axes = plt.subplots(1, 2, figsize=(9, 4.2))
    names = list(next(iter(hardness.values())))
    for (world, groups), colour, marker in zip(hardness.items(), SERIES, MARKERS, strict=False):
        for axis, part in zip(axes, (0, 1), strict=True):
            means = [float(np.mean([pair[part] for pair in pairs])) for pairs in groups.values()]
            axis.plot(names, means, color=colour, marker=marker, label=world)
    axes[0].set(ylabel="AUC of the viewed against these", title="Cut later, harder to tell …")
    axes[1].set(ylabel="mean true reward", title="… because they are better")
    axes[1].legend(frameon=False)
    for axis in axes:
        axis.set_xticks(range(len(names)), [SAID.get(name, name) for name in names], rotation=25, ha="right")
    _save(path)


def _by_world(path: Path, values: Values, names: Sequence[str], what: str) -> None:
    """Worlds side by side; a marker a name at its mean, a small dot for each seed."""
    _, axis = plt.subplots(figsize=(8, 4))
    for index, (name, colour, marker) in enumerate(zip(names, SERIES, MARKERS, strict=False)):
        for place, world in enumerate(values):
            x = place + (index - (len(names) - 1) / 2) * 0.14
            seeds = values[world][name]
            label = name.replace("_", " ") if not place else None
            axis.scatter(x, np.mean(seeds), s=80, color=colour, marker=marker, edgecolor=BLACK, label=label)
            dots = axis.scatter([x] * len(seeds), seeds, s=9, color=BLACK, zorder=3)
    dots.set_label("one seed")
    axis.set_xticks(range(len(values)), list(values))
    axis.set(ylabel=what)
    axis.axhline(0, color=BLACK, linewidth=0.8)
    axis.grid(axis="y", alpha=0.3)
    axis.legend(
        title=f"mean of {len(seeds)} seeds", alignment="left", frameon=False, loc="center left", bbox_to_anchor=(1, 0.5)
    )
    _save(path)


def _tasks(path: Path, names: list[str], taus: np.ndarray) -> None:
    _, axis = plt.subplots(figsize=(6.4, 5))
    axis.imshow(taus, cmap="RdBu", vmin=-1, vmax=1)
    axis.set_xticks(range(len(names)), names, rotation=30, ha="right")
    axis.set_yticks(range(len(names)), names)
    for row in range(len(names)):
        for column in range(len(names)):
            tau = taus[row, column]
            axis.text(
                column, row, f"{tau:.2f}", ha="center", va="center", color="white" if abs(tau) > 0.58 else "black"
            )
    axis.set_title("Kendall's tau of the true orders\nof what retrieval keeps")
    axis.spines[:].set_visible(False)
    _save(path)
