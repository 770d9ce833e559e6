"""What a metric's name tells: which way is better, and how a picture is titled; the one table of each."""

from __future__ import annotations

import re

# Anything that is named in neither table is better higher: recall, precision, ndcg, auc, overlap, true_reward, ...
LOWER = ("reverse_rate", "inconsistency", "nktd", "kendall", "log_loss", "lost", "regret", "cost", "seconds")
BEST_AT_ONE = ("calibration",)
HEAD = "(retrieval|pre_ranking|ranking)"
WORDS = {  # the metrics that most reports are about
    r"funnel/true_reward@(\d+)": r"True reward per item of the \1 served",
    rf"{HEAD}/true_reward@(\d+)": r"True reward per item of \1's own \2",
    rf"{HEAD}/recall@(\d+)": r"Recall in \1's best \2",
    rf"{HEAD}/auc/(\w+)": r"AUC of \1 on \2",
    rf"funnel/{HEAD}/recall@(\d+)": r"Positives left when \1 has kept \2",
    rf"funnel/{HEAD}/teacher_favourites": r"The teacher's ten left after \1",
    rf"funnel/{HEAD}/true_favourites": r"The truly best ten left after \1",
    rf"funnel/lost/{HEAD}": r"Positives lost by \1",
    r"alignment/reverse_rate/fused": r"Pairs that the student orders against its teacher",
    rf"alignment/truth/reverse_rate/{HEAD}": r"Pairs that \1 orders against the truth",
}


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


def in_words(metric: str) -> str:
    """A title for a reader who does not know the names; the name itself where there are no words for it."""
    for name, said in WORDS.items():
        if found := re.fullmatch(name, metric):
            return found.expand(said).replace("pre_ranking", "pre-ranking")
    return metric
