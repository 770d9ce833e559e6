"""Which way is better, by a metric's name; the one table of it."""

from __future__ import annotations

# Anything that is named in neither table is better higher: recall, precision, ndcg, auc, overlap, true_reward, ...
LOWER = ("reverse_rate", "inconsistency", "nktd", "kendall", "log_loss", "lost", "regret", "cost", "seconds")
BEST_AT_ONE = ("calibration",)


def higher_is_better(metric: str) -> bool:
    """Whether more of what `shown` gives is better."""
    return not any(word in metric for word in (*LOWER, *BEST_AT_ONE))


def shown(metric: str, value: float) -> float:
    """The number that is compared: the metric, or its distance from 1 where that is best."""
    return abs(value - 1.0) if is_distance(metric) else value


def is_distance(metric: str) -> bool:
    """Whether the metric is compared by its distance from 1."""
    return any(word in metric for word in BEST_AT_ONE)


def goodness(metric: str, value: float) -> float:
    """The number of which more is better."""
    return shown(metric, value) if higher_is_better(metric) else -shown(metric, value)
