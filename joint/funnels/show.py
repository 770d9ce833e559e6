"""Finished runs opened, their funnels measured, printed and written down."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from joint.cost import head_costs
from joint.distributed import rank
from joint.errors import ConfigError, UserError
from joint.funnels.measure import Quotas, Thirds, funnel_numbers, popularity_thirds, read_grid, sweep_quotas
from joint.funnels.shares import KINDS, lost
from joint.funnels.writing import STARS, starred, write_comparison, write_funnel
from joint.measure import Opened, open_model
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
        points = sweep_quotas(evaluator, split, grid, costs) if grid else []
        if rank() == 0:
            said = [f"{run.path}, step {step}, on {split}:"]
            said += [funnel_table(config, numbers, costs, corpus=len(evaluator.eligibility.corpus))]
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
        UserError: two runs have one name, other datasets or other stages; or the report cannot be written.
    """
    found: dict[str, tuple[Mapping[str, float], Quotas]] = {}
    data: dict[str, str] = {}
    for path in paths:
        with open_model(path, overrides) as opened:
            name, evaluator = opened.run.path.name, opened.evaluator
            if name in found:
                raise UserError(f"two runs are named {name}; give each another run.name")
            part = split or evaluator.config.evaluation.test
            data[name] = f"{evaluator.assembler.dataset.schema.hash}/{part}/{list(_quotas(opened))}"
            if len(set(data.values())) > 1:
                raise UserError(f"{path}: of another dataset, split or other stages than {paths[0]}")
            found[name] = _measured(opened, part)[1], _quotas(opened)
    if rank() == 0:
        print("\n".join(aligned(_lost_cells(found))))
        write_comparison(out, found)
        print(f"\n{out}/report.md has the table and the picture")


def _quotas(opened: Opened) -> Quotas:
    quotas = opened.evaluator.config.evaluation.quotas
    if not quotas:
        raise ConfigError(f"{opened.run.path}: evaluation.quotas names no stage, so there is no funnel")
    if "retrieval" not in quotas:
        raise ConfigError(f"{opened.run.path}: no retrieval head, so its funnel is in joint.evaluate's table alone")
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
