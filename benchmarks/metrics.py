"""Time of every metric on a million candidates, in units of one `torch.sort` of their scores.

    python -m benchmarks.metrics

One thread, the best of three; requests of 100 candidates each, and of long-tailed length (log-normal).
"""

import time
from collections.abc import Callable

import torch
from torch import Tensor

from joint import metrics
from joint.ranks import corpus_ranks

NUM = 1_000_000
REQUESTS = 10_000
K = 10


def seconds(call: Callable[[], object], repeats: int = 3) -> float:
    """The shortest of some runs."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)


def long_tailed_offsets() -> Tensor:
    """Offsets `[REQUESTS+1]` of NUM candidates in requests of log-normal length."""
    share = torch.randn(REQUESTS).mul(1.5).exp().double().cumsum(0)
    return torch.cat([torch.zeros(1), share / share[-1] * NUM]).round().long()


def calls(offsets: Tensor) -> dict[str, Callable[[], object]]:
    """Every metric by name, on random scores with 5 % relevant."""
    a, b, weight = torch.randn(3, NUM)
    relevant = torch.rand(NUM) < 0.05
    labels = relevant.float()
    return {
        "torch.sort": lambda: torch.sort(a),
        "recall_at_k": lambda: metrics.recall_at_k(a, relevant, offsets, K),
        "recall_at_k macro": lambda: metrics.recall_at_k(a, relevant, offsets, K, average="macro"),
        "precision_at_k": lambda: metrics.precision_at_k(a, relevant, offsets, K),
        "weighted_recall_at_k": lambda: metrics.weighted_recall_at_k(a, relevant, weight.abs(), offsets, K),
        "ndcg_at_k": lambda: metrics.ndcg_at_k(a, relevant, offsets, K),
        "dcg_per_positive_at_k": lambda: metrics.dcg_per_positive_at_k(a, relevant, offsets, K),
        "kendall_distance": lambda: metrics.kendall_distance(a, b, offsets),
        "overlap_at_k": lambda: metrics.overlap_at_k(a, b, offsets, K),
        "auc": lambda: metrics.auc(a, labels).value,
        "grouped_auc": lambda: metrics.grouped_auc(a, labels, offsets),
        "log_loss": lambda: metrics.log_loss(a, labels),
        "calibration": lambda: metrics.calibration(a, labels),
    }


def corpus_call() -> Callable[[], object]:
    """Ranks of 1,000 targets among 100,000 items: 100 million comparisons."""
    scores, row, target = (
        torch.randn(100, 100_000),
        torch.randint(100, (1000,)),
        torch.randint(100_000, (1000,)),
    )
    return lambda: corpus_ranks(scores, row, target)


def main() -> None:
    """Prints the table."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    uniform = calls(torch.arange(0, NUM + 1, NUM // REQUESTS))
    tailed = calls(long_tailed_offsets())
    print(f"{NUM:,} candidates, {REQUESTS:,} requests    uniform (of a sort)    long-tailed")
    unit = seconds(uniform["torch.sort"])
    for name in uniform:
        times = [seconds(lists[name]) for lists in (uniform, tailed)]
        print(f"{name:36}" + "".join(f"{t:12.3f} s ({t / unit:4.1f})" for t in times))
    t = seconds(corpus_call())
    print(f"{'corpus_ranks, 1,000 of 100,000':36}{t:12.3f} s ({t / unit:4.1f})")


if __name__ == "__main__":
    main()
