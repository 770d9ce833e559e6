"""What a report is of: variants, their runs, and which is held against which; from an ablation or from runs at hand."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from joint.comparison.ablation import METRICS, Plan, Planned
from joint.comparison.folders import Result, notes_file, read_json, read_result, without_places
from joint.comparison.goals import goodness
from joint.comparison.runs import carry_out, standing
from joint.comparison.tuning import reach
from joint.configuring import settings
from joint.errors import UserError
from joint.experiment import Config, Run
from joint.run import RunDirectory


@dataclass(frozen=True)
class Tuning:
    """How a variant was tuned."""

    trials: list[Result]
    best: int | None  # which of them; 0 is the variant as written, None: none has finished
    skipped: list[str]  # keys that the variant lacks


@dataclass(frozen=True)
class Comparison:
    """Everything a report says, before any statistics. Variants are in the order of the tables, the baseline first."""

    name: str
    folder: Path
    baseline: str
    variants: tuple[str, ...]
    placebos: Mapping[str, str]  # placebo -> its variant
    metrics: tuple[str, ...]  # names or globs
    primary: str
    results: list[Result]  # one for every run that is planned
    differs: Mapping[str, list[str]]  # variant -> keys in which it differs from the baseline
    tuning: Mapping[str, Tuning] = field(default_factory=dict)
    untuned: list[Result] = field(default_factory=list)  # the variants as written, where they were tuned
    left_out: tuple[str, ...] = ()  # variants that --only did not run


def of_ablation(
    plan: Plan, *, jobs: int, only: Collection[str] = (), run: bool = True, out: Path | None = None
) -> Comparison:
    """Run an ablation: the tuning first, where there is one, then every variant on every world and seed.

    Args:
        only: run these variants alone; of the others, what finished before is in the comparison too.
        run: False takes what there is.
        out: folder of the report; None: that of the runs.

    Raises:
        UserError: `only` names an unknown variant.
    """
    for name in only:
        if name not in plan.configs:
            raise UserError(f"--only {name}: no such variant{settings.near_miss(name, plan.configs)}")
    chosen = [name for name in plan.configs if not only or name in only] if run else []

    def of(what: str, planned: Mapping[str, list[Planned]]) -> dict[str, list[Result]]:
        wanted = [one for name in chosen for one in planned.get(name, [])]
        done = iter(carry_out(wanted, plan.folder, what, jobs=jobs, primary=plan.ablation.claim) if wanted else [])
        return {
            name: [next(done) for _ in runs] if name in chosen else standing(runs) for name, runs in planned.items()
        }

    tuning = {}
    if plan.ablation.tune:
        trials = of("trials to tune", {name: plan.trials(name) for name in plan.configs})
        tuning = {name: _tuning(plan, name, found) for name, found in trials.items()}
    written = of("runs as written" if tuning else "runs", {name: plan.runs(name) for name in plan.configs})
    tuned = of("runs as tuned", {name: _tuned(plan, name, choice) for name, choice in tuning.items() if choice.best})
    order = _order(plan)
    best = {
        name: tuned.get(name, written[name] if not tuning or tuning[name].best == 0 else _unchosen(written[name]))
        for name in order
    }
    return Comparison(
        plan.name,
        out or plan.folder,
        plan.ablation.baseline,
        order,
        plan.placebos,
        plan.ablation.metrics,
        plan.ablation.claim,
        results=[result for name in order for result in best[name]],
        differs={name: _differences(plan.configs[plan.ablation.baseline], plan.configs[name]) for name in order},
        tuning=tuning,
        untuned=[result for name in order for result in written[name]] if tuning else [],
        left_out=tuple(name for name in plan.configs if name not in chosen),
    )


def _tuning(plan: Plan, name: str, found: Sequence[Result]) -> Tuning:
    tune, config, primary = plan.ablation.tune, plan.configs[name], plan.ablation.claim
    assert tune is not None
    results = [replace(result, values=tune.values(config, trial)) for trial, result in enumerate(found)]
    measured = [trial for trial, result in enumerate(results) if primary in result.metrics]
    best = max(measured, key=lambda trial: goodness(primary, results[trial].metrics[primary]), default=None)
    over = all(result.state in ("finished", "failed") for result in results)
    return Tuning(results, best if over else None, [key for key in tune.over if key not in reach(config, tune)])


def _tuned(plan: Plan, name: str, choice: Tuning) -> list[Planned]:
    assert choice.best is not None
    return plan.runs(name, choice.trials[choice.best].values)


def _unchosen(written: Sequence[Result]) -> list[Result]:
    """The runs of a variant whose tuning has not ended, or ended without a value: there are none yet."""
    note = "no trial of its tuning is chosen yet"
    return [Result(result.variant, result.world, result.seed, result.path, "missing", note=note) for result in written]


def _order(plan: Plan) -> tuple[str, ...]:
    """The baseline, then the variants as written, each with its placebos behind it."""
    baseline, placebos = plan.ablation.baseline, plan.placebos
    own = [baseline, *(name for name in plan.configs if name != baseline and name not in placebos)]
    return tuple(one for name in own for one in (name, *(p for p, of in placebos.items() if of == name)))


def _differences(a: Config, b: Config) -> list[str]:
    return settings.differences(_settings_alone(a), _settings_alone(b))


def _settings_alone(config: Config) -> Config:
    return replace(without_places(config), run=Run(name="anywhere"))


def of_runs(paths: Sequence[Path], *, folder: Path, primary: str = "", any_data: bool = False) -> Comparison:
    """Compare runs at hand: configs that differ in seed and places only are one variant; the first is the baseline.

    Raises:
        UserError: a folder is no run, two runs are the same, or they are of different data and `any_data` is not set.
    """
    runs = [(path, RunDirectory(path).load_config()[0]) for path in paths]
    found: dict[str, Config] = {}
    results: list[Result] = []
    hashes: dict[str, Path] = {}
    for path, config in runs:
        same = [name for name, other in found.items() if not _differences(other, config)]
        name = same[0] if same else _name(path, config, taken=found)
        found.setdefault(name, config)
        result = read_result(Planned(name, "", config.run.seed, "", _at(config, path)))
        hashes.setdefault(str(result.environment.get("dataset")), path)
        results.append(replace(result, world=str(result.environment.get("dataset"))[:8] if any_data else ""))
    if len(hashes) > 1 and not any_data:
        listed = ", ".join(f"{path} of {found_[:12]}" for found_, path in hashes.items())
        raise UserError(f"the runs are of different datasets, so no difference means anything (--any-data): {listed}")
    keys = [(result.variant, result.world, result.seed) for result in results]
    for key, result in zip(keys, results, strict=True):
        if keys.count(key) > 1:
            raise UserError(f"{result.path}: given twice, or as another run of the same config and seed")
    baseline = results[0].variant
    return Comparison(
        "comparison",
        folder,
        baseline,
        tuple(found),
        {},
        METRICS,
        primary or _primary(results),
        results=results,
        differs={name: _differences(found[baseline], config) for name, config in found.items()},
    )


def _at(config: Config, path: Path) -> Config:
    return replace(config, run=replace(config.run, dir=str(path.parent), name=path.name))


def _name(path: Path, config: Config, *, taken: Collection[str]) -> str:
    """The variant that it is a run of, or else its own name; with a number where another has it."""
    name = read_json(notes_file(RunDirectory(path))).get("variant", config.run.name)
    return name if name not in taken else next(f"{name}-{n}" for n in range(2, 1000) if f"{name}-{n}" not in taken)


def _primary(results: Sequence[Result]) -> str:
    """The true reward where the data has one; else the funnel's last recall, or the first metric by name."""
    names = sorted({name for result in results for name in result.metrics})
    if not names:
        raise UserError("none of the runs has been measured (no eval.json)")
    for start in ("funnel/true_reward@", "funnel/ranking/recall@", "funnel/"):
        if chosen := [name for name in names if name.startswith(start)]:
            return chosen[0]
    return names[0]
