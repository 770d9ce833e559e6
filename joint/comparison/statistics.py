"""What paired differences are worth: t-test, interval, Holm, equivalence, and resampled users. Needs scipy.

A unit is what was drawn independently: a seed on one dataset, a world where there are several.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy import stats

LEVEL = 0.05
MARGIN = 0.01  # of the reference's mean: differences within it are no difference
Verdict = Literal["better", "worse", "same", "unclear"]


@dataclass(frozen=True)
class Paired:
    """The mean of n paired differences, its 95 % interval, and two p-values; nan where n < 2."""

    n: int
    difference: float
    low: float
    high: float
    p: float  # two-sided: is there a difference?
    p_same: float  # the larger of two one-sided tests (TOST): is it certainly within the margin?


def paired(differences: Sequence[float] | np.ndarray, margin: float) -> Paired:
    """Student's paired t-test on differences `[n]`, and Schuirmann's (1987) equivalence test for ±margin.

    Differences that are all equal have no spread to be judged by: theirs are the p-values of the sign test, and no
    interval. (On little data it happens by chance: recalls are whole numbers over the same count.)
    """
    d = np.round(np.asarray(differences, dtype=np.float64), 12)  # what rounding leaves of 0.1 + 0.2 - 0.3 is no spread
    if len(d) < 2:
        return Paired(len(d), float(d.mean()) if len(d) else math.nan, math.nan, math.nan, math.nan, math.nan)
    mean, error, freedom = float(d.mean()), float(d.std(ddof=1)) / math.sqrt(len(d)), len(d) - 1
    if error == 0:
        sign = 0.5 ** len(d)
        return Paired(len(d), mean, math.nan, math.nan, 2 * sign if mean else 1.0, sign if abs(mean) <= margin else 1.0)
    half = float(stats.t.ppf(1 - LEVEL / 2, freedom)) * error
    p = 2 * float(stats.t.sf(abs(mean) / error, freedom))
    p_same = float(stats.t.sf((margin - abs(mean)) / error, freedom))
    return Paired(len(d), mean, mean - half, mean + half, p, p_same)


def holm(p: Sequence[float]) -> list[float]:
    """Holm's (1979) adjusted p-values of one family; nan are tests that were not made, and count for nothing."""
    made = sorted((value, place) for place, value in enumerate(p) if not math.isnan(value))
    adjusted, highest = [math.nan] * len(p), 0.0
    for rank, (value, place) in enumerate(made):
        highest = max(highest, min(1.0, (len(made) - rank) * value))
        adjusted[place] = highest
    return adjusted


def verdict(test: Paired, adjusted: float, *, higher_is_better: bool) -> Verdict:
    """Better or worse where the adjusted p is below 5 %; else the same, where TOST says so; else unclear."""
    if adjusted < LEVEL:
        return "better" if (test.difference > 0) == higher_is_better else "worse"
    return "same" if test.p_same < LEVEL else "unclear"


def resampled(totals: np.ndarray, counts: np.ndarray, *, draws: int, seed: int) -> np.ndarray:
    """A ratio metric of each run under resampled users (the bootstrap over clusters), `[draws, runs]`.

    Args:
        totals, counts: of each user and run `[users, runs]`; the metric is Σ totals / Σ counts over users.
        seed: the same seed draws the same users, so that runs, metrics and calls are paired.
    """
    blocks = [(w @ totals, w @ counts) for w in _weights(len(totals), draws, seed)]
    total, count = (np.concatenate(part) for part in zip(*blocks, strict=True))
    return np.divide(total, count, out=np.full_like(total, np.nan), where=count != 0)


def _weights(users: int, draws: int, seed: int) -> Iterator[np.ndarray]:
    """How often each user is drawn, in blocks `[some draws, users]` of bounded memory."""
    rng = np.random.default_rng(seed)
    block = max(1, 4_000_000 // max(users, 1))
    for begin in range(0, draws, block):
        rows = min(block, draws - begin)
        chosen = rng.integers(0, users, (rows, users)) + np.arange(rows)[:, None] * users
        yield np.bincount(chosen.ravel(), minlength=rows * users).reshape(rows, users).astype(np.float64)


def percentiles(draws: np.ndarray) -> tuple[float, float]:
    """The 95 % percentile interval of bootstrap draws; nan, nan where a draw is not finite."""
    if not np.isfinite(draws).all():
        return math.nan, math.nan
    low, high = np.quantile(draws, [LEVEL / 2, 1 - LEVEL / 2])
    return float(low), float(high)
