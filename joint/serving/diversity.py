"""Diversity: maximal marginal relevance (Carbonell & Goldstein, SIGIR'98) on the items' vectors."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, kw_only=True)
class Diversity:
    """How much an item loses by being like what was chosen before it.

    `weight` times its largest cosine with a chosen item is taken off its score (so `weight` is in units of the score).
    `keep`: the best so many are chosen by score alone, as pre-ranking should (Wang, industrial methodologies, 4.2);
    ranking, which is to diversify the whole list, takes 0 whatever is said.
    """

    weight: float
    keep: int = 10

    def __post_init__(self) -> None:
        if not 0 <= self.weight < np.inf or self.keep < 0:
            raise ValueError(f"weight and keep must not be negative, found {self.weight} and {self.keep}")


def diversified(scores: np.ndarray, vectors: np.ndarray, count: int, *, weight: float, keep: int) -> np.ndarray:
    """The places of `count` candidates in the order in which they are chosen, int64.

    Args:
        scores: `[N]`, higher is better; among equals the earlier candidate.
        vectors: `[N, D]`; a zero vector is like nothing.
    """
    order = np.argsort(-scores, kind="stable")
    count = min(count, len(scores))
    unit = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    chosen = list(order[: min(keep, count)])
    closest = (unit @ unit[chosen].T).max(axis=1, initial=-1.0) if chosen else np.zeros(len(scores), np.float32)
    free = np.ones(len(scores), bool)
    free[chosen] = False
    while len(chosen) < count:
        worth = np.where(free, scores - weight * closest, -np.inf)
        best = int(order[np.argmax(worth[order])])
        chosen.append(best)
        free[best] = False
        similar = unit @ unit[best]
        closest = np.maximum(closest, similar) if len(chosen) > 1 else similar
    return np.array(chosen, np.int64)
