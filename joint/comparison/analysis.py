"""From runs to what is said of them: means per variant, and each variant held against the baseline and its placebos."""

from __future__ import annotations

import fnmatch
import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq

from joint.comparison.comparison import Comparison
from joint.comparison.folders import Result
from joint.comparison.goals import higher_is_better, is_distance, shown
from joint.comparison.statistics import MARGIN, Paired, holm, paired, percentiles, resampled, verdict

DRAWS = 1000
Key = tuple[str, str, int]  # variant, world, seed


@dataclass(frozen=True)
class Summary:
    """One metric of one variant: a value for each unit, a seed or (the mean over seeds of) a world."""

    values: list[float]
    planned: int  # units
    complete: bool  # every planned run has the metric
    measured: bool  # a run that finished has it; a variant without a ranking head has no AUC of one

    @property
    def mean(self) -> float:
        """nan where there is no value."""
        return float(np.mean(self.values)) if self.values else math.nan

    @property
    def std(self) -> float:
        """Between units (n − 1); nan below two."""
        return float(np.std(self.values, ddof=1)) if len(self.values) > 1 else math.nan


@dataclass(frozen=True)
class Contrast:
    """A variant held against another on one metric."""

    variant: str
    reference: str
    test: Paired
    adjusted: float  # Holm over the contrasts of the metric
    users: tuple[float, float] | None  # 95 % of the difference under resampled users; None: not logged
    verdict: str  # better, worse, same, unclear; incomplete, too few, not measured
    scale: float  # what the margin is a share of: the size of the reference's mean

    @property
    def relative(self) -> float:
        """The difference as a share of the reference's mean."""
        return self.test.difference / self.scale if self.scale else math.nan


@dataclass(frozen=True)
class Metric:
    """All that is said of one metric."""

    name: str
    summaries: Mapping[str, Summary]  # variant -> its values
    contrasts: Mapping[str, Contrast]  # variant -> against the baseline
    placebos: Mapping[str, Contrast]  # placebo -> its variant against it
    oddities: list[str] = field(default_factory=list)  # about eval/requests.parquet


def metric_names(comparison: Comparison) -> list[str]:
    """The primary metric, then those that the comparison's names and globs choose, in their order."""
    known = sorted({name for result in comparison.results for name in result.metrics}, key=_natural)
    chosen = [name for glob in comparison.metrics for name in known if fnmatch.fnmatchcase(name, glob)]
    asked = [name for name in comparison.metrics if not set(name) & set("*?[")]
    return list(dict.fromkeys([comparison.primary, *_in_order(comparison.metrics, [*chosen, *asked])]))


def _in_order(globs: Sequence[str], names: Sequence[str]) -> list[str]:
    def first(name: str) -> int:
        return next(place for place, glob in enumerate(globs) if name == glob or fnmatch.fnmatchcase(name, glob))

    return sorted(dict.fromkeys(names), key=first)


def _natural(name: str) -> list[Any]:
    """recall@20 before recall@100."""
    stem, _, k = name.partition("@")
    number, _, rest = k.partition("/")
    return [stem, int(number) if number.isdigit() else 0, rest]


def analyse(comparison: Comparison, metric: str, results: Sequence[Result] | None = None) -> Metric:
    """Hold every variant against the baseline, and against each of its placebos, on one metric.

    `results`: others than the comparison's own, such as those of the variants untuned.
    """
    results = comparison.results if results is None else results
    values: dict[Key, float] = {
        (r.variant, r.world, r.seed): shown(metric, r.metrics[metric]) for r in results if metric in r.metrics
    }
    several = len({result.world for result in results}) > 1
    summaries = {
        name: _summary([result for result in results if result.variant == name], values, several)
        for name in comparison.variants
    }
    draws, oddities = _user_draws(results, metric)

    def against(pairs: Sequence[tuple[str, str]]) -> list[Contrast]:
        found = []
        for variant, reference in pairs:
            scale = 1.0 if is_distance(metric) else abs(summaries[reference].mean)
            differences = _differences(values, variant, reference)
            users = _users(differences, _differences(draws, variant, reference), several)
            test = paired(_units(differences, several), MARGIN * scale)
            found.append(Contrast(variant, reference, test, math.nan, users, "", scale))
        adjusted = holm([contrast.test.p for contrast in found])
        return [_judged(metric, c, p, summaries) for c, p in zip(found, adjusted, strict=True)]

    others = [name for name in comparison.variants if name != comparison.baseline]
    pairs = [(of, placebo) for placebo, of in comparison.placebos.items()]
    return Metric(
        metric,
        summaries,
        dict(zip(others, against([(name, comparison.baseline) for name in others]), strict=True)),
        dict(zip(comparison.placebos, against(pairs), strict=True)),
        oddities,
    )


def _summary(own: Sequence[Result], values: Mapping[Key, float], several: bool) -> Summary:
    keys = [(result.variant, result.world, result.seed) for result in own]
    found = {key[1:]: values[key] for key in keys if key in values}
    planned = len({world for _, world, _ in keys}) if several else len(keys)
    not_measured = not found and any(result.state == "finished" for result in own)
    return Summary(_units(found, several), planned, len(found) == len(own) > 0, not not_measured)


def _units(values: Mapping[tuple[str, int], Any], several: bool) -> list[Any]:
    """One value a unit: a world's mean over its seeds where there are several worlds, else each seed's."""
    units: dict[object, list[Any]] = {}
    for key, value in values.items():
        units.setdefault(key[0] if several else key, []).append(value)
    return [sum(found) / len(found) for found in units.values()]


def _differences(values: Mapping[Key, Any], variant: str, reference: str) -> dict[tuple[str, int], Any]:
    """(world, seed) -> the difference, where both have a value."""
    return {
        (world, seed): value - values[reference, world, seed]
        for (name, world, seed), value in values.items()
        if name == variant and (reference, world, seed) in values
    }


def _users(
    pairs: Mapping[tuple[str, int], float], drawn: Mapping[tuple[str, int], np.ndarray], several: bool
) -> tuple[float, float] | None:
    """The interval of the mean difference under resampled users; None where a pair of runs has not logged them."""
    if not pairs or not drawn.keys() >= pairs.keys():
        return None
    return percentiles(np.mean(_units({key: drawn[key] for key in pairs}, several), axis=0))


def _judged(metric: str, contrast: Contrast, adjusted: float, summaries: Mapping[str, Summary]) -> Contrast:
    pair = summaries[contrast.variant], summaries[contrast.reference]
    if not all(summary.measured for summary in pair):
        said = "not measured"
    elif not all(summary.complete for summary in pair):
        said = "incomplete"  # the runs that failed might have been the bad ones
    elif contrast.test.n < 2:
        said = "too few"
    else:
        said = verdict(contrast.test, adjusted, higher_is_better=higher_is_better(metric))
    return replace(contrast, adjusted=adjusted, verdict=said)


def _user_draws(results: Sequence[Result], metric: str) -> tuple[dict[Key, np.ndarray], list[str]]:
    """The metric of every run under the same resampled users, `[DRAWS]` each; and what is odd about the files."""
    found: dict[Key, np.ndarray] = {}
    oddities: list[str] = []
    for world in dict.fromkeys(result.world for result in results):
        frames = {}
        for result in results:
            frame = _by_request(result, metric) if result.world == world else None
            if frame is None:
                continue
            total, count = frame["total"].sum(), frame["count"].sum()
            if not (count and math.isclose(total / count, result.metrics[metric], rel_tol=1e-5, abs_tol=1e-9)):
                oddities.append(f"{result.path}/eval/requests.parquet does not add up to eval.json's {metric}")
            else:
                frames[result.variant, world, result.seed] = frame
        found |= _draw_users(metric, world, frames)
    return found, oddities


def _draw_users(metric: str, world: str, frames: Mapping[Key, pd.DataFrame]) -> dict[Key, np.ndarray]:
    """Of runs on one dataset: resample its users, the same for all runs; none where the runs' requests differ."""
    if not frames:
        return {}
    first = next(iter(frames.values()))
    if not first.index.is_unique or not all(
        frame.index.sort_values().equals(first.index.sort_values()) for frame in frames.values()
    ):
        return {}
    users, names = pd.factorize(first["user_id"])
    sums = []
    for column in ("total", "count"):
        by_run = np.stack([frame[column].reindex(first.index).to_numpy() for frame in frames.values()], axis=1)
        sums.append(np.stack([np.bincount(users, run, minlength=len(names)) for run in by_run.T], axis=1))
    draws = resampled(*sums, draws=DRAWS, seed=zlib.crc32(world.encode()))
    return {key: np.abs(run - 1.0) if is_distance(metric) else run for key, run in zip(frames, draws.T, strict=True)}


def _by_request(result: Result, metric: str) -> pd.DataFrame | None:
    """total, count and user_id by request; None where the run has not logged them."""
    path, columns = result.path / "eval" / "requests.parquet", [f"{metric}.total", f"{metric}.count"]
    if metric not in result.metrics or not path.is_file():
        return None
    if not set(columns) <= set(pq.read_schema(path).names):
        return None
    frame = pq.read_table(path, columns=["request_id", "user_id", *columns]).to_pandas()
    return frame.rename(columns=dict(zip(columns, ("total", "count"), strict=True))).set_index("request_id")
