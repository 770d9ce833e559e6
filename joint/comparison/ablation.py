"""What an ablation file says, and the experiments it stands for, each of them checked before anything runs."""

from __future__ import annotations

import glob
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, TypeVar

from joint.comparison.tuning import TRIAL_SEED, Tune, applied, reach
from joint.config import config_of, mistakes
from joint.configuring import settings
from joint.configuring.settings import Tree
from joint.errors import ConfigError, UserError
from joint.experiment import Config, Run
from joint.fit import check_against, schema_of
from joint.schema import read_schema

METRICS = ("funnel/*", "alignment/*", "retrieval/recall@*", "pre_ranking/recall@*", "ranking/recall@*")


@dataclass(frozen=True, kw_only=True)
class Ablation:
    """The keys of an ablation file; all others in it, and its `base:`, are the experiment that is varied."""

    baseline: str
    variants: dict[str, Tree]  # overlays on the base, merged leaf by leaf; `placebo: X` makes one the placebo of X
    seeds: int = 5
    worlds: str | tuple[str, ...] = ()  # datasets, or globs of them, on each of which everything is run
    tune: Tune | None = None
    metrics: tuple[str, ...] = METRICS  # names or globs, in the order of the report
    primary: str = ""  # the one that is claimed; by default the first of `metrics`

    def __post_init__(self) -> None:
        wrong = [f"seeds must be at least 1, found {self.seeds}"] if self.seeds < 1 else []
        if self.baseline not in self.variants:
            wrong.append(f"baseline: no variant {self.baseline!r}{settings.near_miss(self.baseline, self.variants)}")
        if not self.primary and (not self.metrics or "*" in self.metrics[0]):
            wrong.append("primary: missing; expected the metric that the claim is about")
        wrong += [line for name, overlay in self.variants.items() for line in self._variant_mistakes(name, overlay)]
        if wrong:
            raise ValueError("\n".join(wrong))

    def _variant_mistakes(self, name: str, overlay: Tree) -> Iterator[str]:
        if Path(name).name != name:
            yield f"variants.{name}: must be one plain folder name"
        if not isinstance(overlay.value, dict):
            yield f"variants.{name}: must be a mapping; write {{}} for the base itself"
            return
        if "run" in overlay.value:
            yield f"variants.{name}: sets run, but names, folders and seeds of runs are the comparison's"
        if self.worlds and "path" in (settings.plain(overlay).get("data") or {}):
            yield f"variants.{name}: sets data.path, but the datasets are those of worlds"
        real = [other for other, of in self.variants.items() if other != self.baseline and not placebo_of(of)]
        of = placebo_of(overlay)
        if of and name == self.baseline:
            yield f"variants.{name}: the baseline cannot be a placebo"
        elif of and of not in real:
            yield f"variants.{name}: no variant {of!r} to be a placebo of{settings.near_miss(of, real)}"

    @property
    def claim(self) -> str:
        """The primary metric."""
        return self.primary or self.metrics[0]


@dataclass(frozen=True)
class Planned:
    """One run that is asked for."""

    variant: str
    world: str  # '' where there is one dataset only
    seed: int
    arm: str  # '' is the variant as written, 'tuned', or 'trial-0', 'trial-1', ... of its tuning
    config: Config


@dataclass(frozen=True)
class Plan:
    """All variants of an ablation, resolved."""

    name: str
    folder: Path  # of its runs and its report
    ablation: Ablation
    configs: dict[str, Config]  # variant -> its experiment as written, on the first world
    placebos: dict[str, str]  # placebo -> the variant it is one of
    worlds: dict[str, str]  # world -> path of its dataset; {'': path} where there is one

    def runs(self, variant: str, tuned: Mapping[str, float] | None = None) -> list[Planned]:
        """The runs that count of a variant, as written, or with these tuned values."""
        arm = "" if tuned is None else "tuned"
        written = applied(self.configs[variant], tuned or {})
        return [
            self._planned(variant, world, seed, arm, self.folder / variant / arm / world, f"seed-{seed}", written)
            for world in self.worlds
            for seed in range(self.ablation.seeds)
        ]

    def trials(self, variant: str) -> list[Planned]:
        """The runs that tune a variant: on the first world, with a seed of their own, judged on the validation part."""
        tune, world = self.ablation.tune, next(iter(self.worlds))
        if tune is None:
            return []
        return [
            self._planned(variant, world, TRIAL_SEED, name, self.folder / variant / "tune", name, config)
            for name, config in tune.configs(self.configs[variant]).items()
        ]

    def _planned(
        self, variant: str, world: str, seed: int, arm: str, folder: Path, name: str, config: Config
    ) -> Planned:
        data = replace(config.data, path=self.worlds[world] if world else config.data.path)
        run = Run(dir=str(folder), name=name, seed=seed)
        return Planned(variant, world, seed, arm, replace(config, data=data, run=run))


def placebo_of(overlay: Tree) -> str:
    """The variant that this one is a placebo of; '' for none."""
    return overlay.value["placebo"].text if isinstance(overlay.value, dict) and "placebo" in overlay.value else ""


def read_ablation(
    path: Path, overrides: Sequence[str] = (), *, worlds: int | None = None, any_data: bool = False
) -> Plan:
    """Read an ablation file and resolve every variant. An override changes what a variant does not itself say.

    Args:
        worlds: only so many of the file's worlds, the first ones.
        any_data: variants may name datasets of different content.

    Raises:
        ConfigError: the mistakes of the file and of all its variants, one line each.
        DataError: a dataset cannot be read.
    """
    tree = settings.read(path, overrides)
    if isinstance(tree.value, dict) and not {"variants", "baseline"} & {*tree.value}:
        raise ConfigError(f"{path} is an experiment, without variants to compare: python -m joint.train {path}")
    names, others = ([item.name for item in fields(cls)] for cls in (Ablation, Config))
    unknown = [key for key in tree.value if key not in names + others]
    settings.raise_at(tree, [(key, f"unknown key{settings.near_miss(key, names + others)}") for key in unknown])
    parts = {part: settings.Tree({}, tree.place) for part in ("file", "base")}
    for key, child in tree.value.items():
        parts["file" if key in names else "base"].value[key] = child
    ablation = settings.decode(parts["file"], Ablation)
    datasets = _datasets(ablation, tree)
    named = dict(list(datasets.items())[:worlds])
    configs = _each(ablation.variants, lambda name: _resolve(parts["base"], ablation.variants[name], named.values()))
    plan = Plan(
        name=path.stem,
        folder=Path(configs[ablation.baseline].run.dir) / path.stem,
        ablation=ablation,
        configs=configs,
        placebos={name: of for name, overlay in ablation.variants.items() if (of := placebo_of(overlay))},
        worlds=named or {"": configs[ablation.baseline].data.path},
    )
    if not (any_data or named):
        _check_data(plan, tree)
    _check_tuning(plan, tree)
    return plan


def _resolve(base: Tree, overlay: Tree, datasets: Collection[str]) -> Config:
    changes = replace(overlay, value={key: child for key, child in overlay.value.items() if key != "placebo"})
    tree = settings.merge(base, changes)
    config = config_of(tree)
    for path in datasets or [config.data.path]:
        check_against(config, tree, schema_of(replace(config.data, path=path)))
    return config


def _datasets(ablation: Ablation, tree: Tree) -> dict[str, str]:
    """World -> path: every match of the file's globs, in order."""
    patterns = (ablation.worlds,) if isinstance(ablation.worlds, str) else ablation.worlds
    found: dict[str, str] = {}
    for pattern in patterns:
        matches = sorted((p for p in glob.glob(pattern) if (Path(p) / "dataset.json").is_file()), key=_natural)
        if not matches:
            settings.raise_at(tree, [("worlds", f"no prepared dataset matches {pattern}")])
        for match in matches:
            if found.setdefault(Path(match).name, match) != match:
                settings.raise_at(tree, [("worlds", f"two datasets are named {Path(match).name}")])
    return found


def _natural(path: str) -> list[tuple[int, str]]:
    """seed-2 before seed-10."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", path)]


T = TypeVar("T")


def _each(names: Mapping[str, Any], make: Callable[[str], T]) -> dict[str, T]:
    """What `make` gives for each variant; one ConfigError with the mistakes of all, each said once."""
    made: dict[str, T] = {}
    lines: dict[str, list[str]] = {}
    for name in names:
        try:
            made[name] = make(name)
        except UserError as error:
            for line in str(error).splitlines():
                lines.setdefault(line, []).append(name)
    if lines:
        everyone = len(names)
        said = [line if len(of) == everyone else f"{line} (variant {', '.join(of)})" for line, of in lines.items()]
        raise ConfigError("\n".join(said))
    return made


def _check_data(plan: Plan, tree: Tree) -> None:
    hashes = {name: read_schema(Path(config.data.path)).hash for name, config in plan.configs.items()}
    baseline = plan.ablation.baseline
    problems = [
        (f"variants.{name}", f"another dataset than that of {baseline}, so no difference means anything (--any-data)")
        for name, found in hashes.items()
        if found != hashes[baseline]
    ]
    settings.raise_at(tree, problems)


def _check_tuning(plan: Plan, tree: Tree) -> None:
    """Every draw must make a config, and something must be tuned."""
    tune = plan.ablation.tune
    if tune is None:
        return
    lacking = [key for key in tune.over if not any(key in reach(config, tune) for config in plan.configs.values())]
    settings.raise_at(tree, [(f"tune.over.{key}", "no variant has a number with a fraction there") for key in lacking])
    for config in _each(plan.configs, lambda name: [planned.config for planned in plan.trials(name)]).values():
        for trial in config:
            settings.raise_at(tree, list(mistakes(trial)))
            check_against(trial, tree, schema_of(trial.data))
