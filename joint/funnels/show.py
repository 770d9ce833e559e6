"""Finished runs opened, their funnels measured, printed and written down."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from joint.cost import head_costs
from joint.distributed import rank
from joint.errors import ConfigError, UserError
from joint.evaluating.finished_run import Opened, open_model
from joint.funnels.measure import (
    Quotas,
    Thirds,
    first_scores,
    funnel_numbers,
    popularity_thirds,
    read_grid,
    sweep_quotas,
)
from joint.funnels.shares import KINDS, lost
from joint.funnels.writing import STARS, starred, write_comparison, write_funnel
from joint.summary import aligned, funnel_table


def show_funnel(
    path: Path,
    split: str | None,
    overrides: Sequence[str] = (),
    *,
    sweep: Sequence[str] = (),
    out: Path | None = None,
) -> None:
    """Print what survives each stage of a run's funnel, who lost the rest and what a request costs; write it to `out`.

    Args:
        sweep: quotas such as `retrieval=50,100`, all combinations of which are measured on the same scores.
        out: a folder; None: `cascade` in the run's own.

    Raises:
        ConfigError: the config has no quotas, and so no funnel.
        UserError: `sweep` makes no sense, or the report cannot be written.
    """
    with open_model(path, overrides) as opened:
        run, evaluator, model, step = opened
        config, split = evaluator.config, split or evaluator.config.evaluation.test
        quotas = _quotas(opened)
        grid, costs = read_grid(sweep, config) if sweep else [], head_costs(model)
        thirds, numbers = _measured(opened, split)
        scored = first_scores(evaluator, numbers)
        points = sweep_quotas(evaluator, split, grid, costs, scored=scored) if grid else []
        if rank() == 0:
            said = [f"{run.path}, step {step}, on {split}:"]
            said += [funnel_table(config, numbers, costs, corpus=scored)]
            said += ["", "lost by:", *aligned(_lost_cells({"": (numbers, quotas)}))]
            text = "\n".join(said)
            print(text)
            if points:
                print("\n".join(["", *aligned(starred(points)), STARS]))
            folder = out or run.path / "cascade"
            write_funnel(folder, text, numbers, quotas, thirds, points)
            print(f"\n{folder}/report.md has the tables and pictures")


def compare_funnels(paths: Sequence[Path], split: str | None, overrides: Sequence[str], *, out: Path) -> None:
    """Print and draw several runs' funnels beside each other.

    Raises:
        ConfigError: a config has no quotas.
        UserError: a run is given twice, or runs are of other datasets or other stages; or the report cannot be written.
    """
    found: dict[str, tuple[Mapping[str, float], Quotas]] = {}
    data: dict[str, str] = {}
    for name, path in run_names(paths).items():
        with open_model(path, overrides) as opened:
            evaluator = opened.evaluator
            part = split or evaluator.config.evaluation.test
            data[name] = f"{evaluator.assembler.dataset.schema.hash}/{part}/{list(_quotas(opened))}"
            if len(set(data.values())) > 1:
                raise UserError(f"{path}: of another dataset, split or other stages than {paths[0]}")
            found[name] = _measured(opened, part)[1], _quotas(opened)
    if rank() == 0:
        print("\n".join(aligned(_lost_cells(found))))
        write_comparison(out, found)
        print(f"\n{out}/report.md has the table and the picture")


def run_names(paths: Sequence[Path]) -> dict[str, Path]:
    """Runs by the names of their folders; where two have the same, by their paths from where these differ.

    Raises:
        UserError: a run is given twice.
    """
    absolute = [path.resolve() for path in paths]
    if twice := [path for path, where in zip(paths, absolute, strict=True) if absolute.count(where) > 1]:
        raise UserError(f"{twice[0]}: given twice; expected different runs")
    names = [where.name for where in absolute]
    if len({*names}) < len(names):
        shared = os.path.commonpath([where.parent for where in absolute])
        names = [str(where.relative_to(shared)) for where in absolute]
    return dict(zip(names, paths, strict=True))


def _quotas(opened: Opened) -> Quotas:
    quotas = opened.evaluator.config.evaluation.quotas
    if not quotas:
        raise ConfigError(f"{opened.run.path}: evaluation.quotas names no stage, so there is no funnel")
    return quotas


def _measured(opened: Opened, split: str) -> tuple[Thirds, dict[str, float]]:
    evaluator = opened.evaluator
    thirds = popularity_thirds(evaluator.config, evaluator.assembler.dataset, evaluator.eligibility.corpus)
    return thirds, funnel_numbers(evaluator, split, thirds)


def _lost_cells(runs: Mapping[str, tuple[Mapping[str, float], Quotas]]) -> list[list[str]]:
    """A row for every run and kind of what is wanted: the share that each stage lost."""
    stages = list(dict.fromkeys(stage for _, quotas in runs.values() for stage in quotas))
    table = [["", "not eligible", *stages, "came through"]]
    for run, (numbers, quotas) in runs.items():
        for kind in KINDS:
            if shares := lost(numbers, quotas, kind):
                table.append([f"{run} {kind}".strip(), *(f"{share:.4f}" for share in shares.values())])
    return table
