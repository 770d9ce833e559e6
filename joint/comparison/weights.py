"""The learned weights of a run's negatives, from its metrics.jsonl: a table (SDCL Table 7) and a picture (Figure 3)."""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib as mpl
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from joint.colours import BLUE, ORANGE, VERMILLION
from joint.comparison.figures import STYLE, WIDTH
from joint.errors import UserError
from joint.run import RunDirectory
from joint.schema import GROUPS

PREFIX = "negative_weights/"
STAGES = tuple(GROUPS)  # from the easiest negatives to the hardest
SAID = {"matching_ns": "random items", "pre_ranking_ns": "retrieved, not ranked", "ranking_ns": "ranked, not shown"}
SMOOTH = 10
LINES = {"matching_ns": (BLUE, "-"), "pre_ranking_ns": (ORANGE, "--"), "ranking_ns": (VERMILLION, ":")}


def read_weights(run: RunDirectory) -> pd.DataFrame:
    """What was logged of the weights: columns step, stage (or base_rate), task, group, part and value.

    Parts are weight, similarity, confidence and even (1/n).

    Raises:
        UserError: the run has no log, or no adaptive weights in it.
    """
    if not run.metrics.is_file():
        raise UserError(f"{run.path}: not a run directory (no {run.metrics.name} in it)")
    rows = [
        (entry["step"], *_words(name), value)
        for entry in map(json.loads, run.metrics.read_text().splitlines())
        for name, value in entry.items()
        if name.startswith(PREFIX)
    ]
    if not rows:
        raise UserError(
            f"{run.path}: logged no weights of negatives; expected adaptive_contrastive with adaptive: true"
        )
    return pd.DataFrame(rows, columns=["step", "stage", "task", "group", "part", "value"])


def _words(name: str) -> tuple[str, str, str, str]:
    """Stage, task, group and part of `negative_weights/STAGE/TASK/GROUP[/PART]`."""
    stage, task, group, *part = name.removeprefix(PREFIX).split("/")
    return stage, task, group, part[0] if part else "weight"


def late(logged: pd.DataFrame) -> pd.DataFrame:
    """The second half of what was logged: weights fall for long before they settle."""
    steps = logged["step"].unique()
    return logged[logged["step"] >= steps[len(steps) // 2]]


def table(logged: pd.DataFrame) -> pd.DataFrame:
    """Means over the steps by task, user group (and all of them, a group as much as another) and stage, a row each.

    `learned` is the weight without the even share of n negatives (delta / n), `over base rate` the weight over the
    task's share of positives.
    """
    logged = pd.concat([logged.assign(group="all"), logged])
    base = logged[logged["stage"] == "base_rate"].groupby(["task", "group"])["value"].mean()
    weights = logged[logged["stage"] != "base_rate"]
    keys = ["task", "group", "stage"]
    means = weights.pivot_table(index=keys, columns="part", values="value", sort=False)
    means["base rate"] = base.reindex(means.index.droplevel("stage")).to_numpy()
    delta = means["weight"] / (means["similarity"] + means["confidence"])
    means["learned"] = means["weight"] - delta * means["even"]
    means["over base rate"] = means["weight"] / means["base rate"]
    tasks = list(logged["task"].unique())
    ordered = sorted(means.index, key=lambda at: (tasks.index(at[0]), at[1] != "all", at[1], STAGES.index(at[2])))
    return means.loc[ordered, ["weight", "similarity", "confidence", "even", "learned", "base rate", "over base rate"]]


def picture(logged: pd.DataFrame, path: Path) -> None:
    """A panel a task, a line a stage of origin: the mean weight of all user groups over the steps, as a PNG file."""
    weights = logged[logged["part"].eq("weight") & logged["stage"].ne("base_rate")]
    tasks = weights["task"].unique()
    with mpl.rc_context(STYLE | {"axes.grid.axis": "y"}):
        figure = Figure(figsize=(WIDTH, 5.5), layout="constrained")
        panels = figure.subplots(1, len(tasks), sharey=True, squeeze=False)[0]
        for axes, task in zip(panels, tasks, strict=True):
            _panel(axes, weights[weights["task"] == task], str(task))
        panels[0].set_ylim(bottom=0)
        figure.suptitle("Mean weight of a negative, by the stage it comes from", x=0.01, ha="left", fontsize=18)
        figure.supxlabel(f"step (thin: one batch; thick: mean of the last {SMOOTH} that were logged)", fontsize=15)
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right upper", frameon=False)
        figure.savefig(path, dpi=110, metadata={"Software": None})


def _panel(axes: Axes, weights: pd.DataFrame, task: str) -> None:
    axes.set_title(task, loc="left")
    for stage in (stage for stage in STAGES if (weights["stage"] == stage).any()):
        by_step = weights[weights["stage"] == stage].groupby("step")["value"].mean()
        colour, dashes = LINES[stage]
        axes.plot(by_step.index, by_step, dashes, color=colour, linewidth=1, alpha=0.4)
        smooth = by_step.rolling(SMOOTH, min_periods=1).mean()
        axes.plot(by_step.index, smooth, dashes, color=colour, linewidth=3, label=SAID[stage])
