"""Metrics against loops in plain Python, scipy and torchmetrics, on ragged requests full of ties."""

import math
import pickle
from collections.abc import Callable
from itertools import combinations
from typing import Any

import pytest
import torch
from scipy.stats import kendalltau
from torch import Tensor
from torchmetrics.functional import auroc
from torchmetrics.functional.retrieval import retrieval_normalized_dcg

from joint import metrics
from joint.metrics import AucState, Ratio, merge_all
from joint.ranks import NEVER, corpus_ranks, inversions, order_within, ranks, top_k

LENGTHS = [5, 0, 1, 12, 33, 2, 0, 7, 1, 64, 3, 0]
Request = list[tuple[Any, ...]]


def ragged(seed: int, levels: int = 4, lengths: list[int] = LENGTHS) -> tuple[Tensor, ...]:
    """scores, other scores, relevant, weight, offsets; few score levels make many ties."""
    generator = torch.Generator().manual_seed(seed)
    num = sum(lengths)
    a, b, weight = (torch.randint(levels, (num,), generator=generator).float() for _ in range(3))
    if levels > 2:
        a[a == 0], b[b == levels - 1] = -math.inf, math.inf
    relevant = torch.rand(num, generator=generator) < 0.3
    return a, b, relevant, weight, torch.tensor([0, *lengths]).cumsum(0)


def requests(offsets: Tensor, *columns: Tensor) -> list[Request]:
    rows = list(zip(*(column.tolist() for column in columns), strict=True))
    return [rows[start:end] for start, end in zip(offsets.tolist(), offsets.tolist()[1:], strict=False)]


def best_first(request: Request) -> Request:
    """(score, relevant, weight) in pessimistic order."""
    return sorted(request, key=lambda row: (-row[0], row[1], row[2]))


def mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else math.nan


def discount(rank: int) -> float:
    return 1 / math.log2(rank + 2)


def expected(name: str, lists: list[Request], k: int) -> float:
    """Each metric of K read off sorted lists, one request at a time."""
    lists = [best_first(request) for request in lists]
    hits = [sum(row[1] for row in request[:k]) for request in lists]
    total = [sum(row[1] for row in request) for request in lists]
    dcg = [sum(discount(i) for i, row in enumerate(request[:k]) if row[1]) for request in lists]
    ideal = [sum(discount(i) for i in range(min(n, k))) for n in total]
    heavy = sum(row[2] for request in lists for row in request[:k] if row[1])
    return {
        "recall": lambda: sum(hits) / sum(total),
        "macro": lambda: mean([h / n for h, n in zip(hits, total, strict=True) if n]),
        "precision": lambda: mean([h / min(k, len(q)) for h, q in zip(hits, lists, strict=True) if q]),
        "weighted": lambda: heavy / sum(row[2] for request in lists for row in request if row[1]),
        "ndcg": lambda: mean([d / i for d, i in zip(dcg, ideal, strict=True) if i]),
        "dcg": lambda: sum(dcg) / sum(total),
    }[name]()


AT_K: dict[str, Callable[..., Ratio]] = {
    "recall": lambda s, y, w, o, k: metrics.recall_at_k(s, y, o, k),
    "macro": lambda s, y, w, o, k: metrics.recall_at_k(s, y, o, k, average="macro"),
    "precision": lambda s, y, w, o, k: metrics.precision_at_k(s, y, o, k),
    "weighted": metrics.weighted_recall_at_k,
    "ndcg": lambda s, y, w, o, k: metrics.ndcg_at_k(s, y, o, k),
    "dcg": lambda s, y, w, o, k: metrics.dcg_per_positive_at_k(s, y, o, k),
}


def at_3(metric: Callable[..., Ratio]) -> Callable[..., Ratio]:
    return lambda a, b, relevant, weight, offsets: metric(a, relevant, weight, offsets, 3)


STATES: dict[str, Callable[..., Ratio | AucState]] = {
    **{name: at_3(f) for name, f in AT_K.items()},
    "kendall": lambda a, b, y, w, o: metrics.kendall_distance(a, b, o),
    "auc": lambda a, b, y, w, o: metrics.auc(a, y),
    "grouped_auc": lambda a, b, y, w, o: metrics.grouped_auc(a, y, o),
    "log_loss": lambda a, b, y, w, o: metrics.log_loss(a.clamp(-3, 3), y),
    "calibration": lambda a, b, y, w, o: metrics.calibration(a, y),
}
BY_INDEX = {"overlap": lambda a, b, y, w, o: metrics.overlap_at_k(a, b, o, 3)}  # its ties depend on the order


@pytest.mark.parametrize("name", AT_K)
@pytest.mark.parametrize("k", [1, 3, 10, 1000])
@pytest.mark.parametrize("levels", [1, 4, 1000])
def test_at_k_equals_a_loop_over_sorted_lists(name: str, k: int, levels: int) -> None:
    for seed in range(5):
        scores, _, relevant, weight, offsets = ragged(seed, levels)
        weight = weight + 1
        lists = requests(offsets, scores, relevant, weight)
        value = AT_K[name](scores, relevant, weight, offsets, k).value
        assert value == pytest.approx(expected(name, lists, k), rel=1e-12)


@pytest.mark.parametrize("lengths", [LENGTHS, [4, 4, 4], [3, 5, 0, 4], [0, 0], []], ids=str)
def test_order_within_equals_sorted_requests_in_rows_and_at_once(lengths: list[int]) -> None:
    scores, *_, offsets = ragged(5, lengths=lengths)
    lists = [
        sorted(range(start, end), key=lambda n: -float(scores[n]))
        for start, end in zip(offsets.tolist(), offsets.tolist()[1:], strict=False)
    ]
    found = order_within(scores, offsets, torch.arange(len(scores)))
    assert found.tolist() == [n for request in lists for n in request]
    assert top_k(scores, offsets, 2).nonzero().flatten().tolist() == sorted(n for r in lists for n in r[:2])


def test_ranks_by_hand() -> None:
    scores = torch.tensor([1.0, 2.0, 2.0, 2.0, math.inf, 5.0, 5.0])
    relevant = torch.tensor([1, 1, 0, 1, 0, 1, 0], dtype=torch.bool)
    offsets = torch.tensor([0, 5, 5, 7])
    assert ranks(scores, relevant, offsets).tolist() == [4, 2, 1, 3, 0, 1, 0]
    weight = torch.tensor([1.0, 9.0, math.nan, 3.0, 0.0, 1.0, 1.0])
    assert ranks(scores, relevant, offsets, weight).tolist() == [4, 3, 1, 2, 0, 1, 0]


def test_metrics_by_hand() -> None:
    """Request 1: relevant at ranks 0 and 2 of 3; request 2: none; request 3: the only candidate."""
    scores = torch.tensor([3.0, 2.0, 1.0, 1.0, 2.0, 0.0])
    relevant = torch.tensor([1, 0, 1, 0, 0, 1], dtype=torch.bool)
    weight = torch.tensor([1.0, 7.0, 3.0, 7.0, 7.0, 4.0])
    offsets = torch.tensor([0, 3, 5, 6])
    assert metrics.recall_at_k(scores, relevant, offsets, 2) == Ratio(2, 3)
    assert metrics.recall_at_k(scores, relevant, offsets, 2, average="macro") == Ratio(1.5, 2)
    assert metrics.precision_at_k(scores, relevant, offsets, 2) == Ratio(1.5, 3)
    assert metrics.weighted_recall_at_k(scores, relevant, weight, offsets, 2) == Ratio(5, 8)
    assert metrics.dcg_per_positive_at_k(scores, relevant, offsets, 3) == Ratio(2.5, 3)
    assert metrics.ndcg_at_k(scores, relevant, offsets, 3).value == pytest.approx(
        (1.5 / (1 + 1 / math.log2(3)) + 1) / 2
    )


def test_equal_scores_earn_the_least() -> None:
    scores, relevant = torch.zeros(10), torch.arange(10) < 3
    offsets = torch.tensor([0, 10])
    assert metrics.recall_at_k(scores, relevant, offsets, 7).value == 0
    assert metrics.recall_at_k(scores, relevant, offsets, 8).value == 1 / 3
    weight = torch.arange(10.0)
    assert metrics.weighted_recall_at_k(scores, relevant, weight, offsets, 9).value == 1 / 3


def test_ndcg_equals_torchmetrics_without_ties() -> None:
    _, _, relevant, _, offsets = ragged(1)
    scores = torch.randperm(len(relevant), generator=torch.Generator().manual_seed(3)).float()
    parts = [slice(*pair) for pair in zip(offsets.tolist(), offsets.tolist()[1:], strict=False)]
    values = [
        float(retrieval_normalized_dcg(scores[part], relevant[part].long(), top_k=min(4, part.stop - part.start)))
        for part in parts
        if relevant[part].any()
    ]
    assert metrics.ndcg_at_k(scores, relevant, offsets, 4).value == pytest.approx(mean(values), rel=1e-6)


@pytest.mark.parametrize("levels", [1, 2, 4, 1000])
def test_kendall_distance_equals_all_pairs(levels: int) -> None:
    for seed in range(5):
        a, b, _, _, offsets = ragged(seed, levels)
        values = []
        for request in requests(offsets, a, b):
            pairs = list(combinations(request, 2))
            order = [((x[0] > y[0]) - (x[0] < y[0]), (x[1] > y[1]) - (x[1] < y[1])) for x, y in pairs]
            if pairs:
                values.append(mean([abs(in_a - in_b) / 2 for in_a, in_b in order]))
        assert metrics.kendall_distance(a, b, offsets).value == pytest.approx(mean(values), rel=1e-12)


def test_kendall_distance_equals_scipy_without_ties() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = torch.rand(501, generator=generator), torch.rand(501, generator=generator)
    distance = metrics.kendall_distance(a, b, torch.tensor([0, 501])).value
    assert distance == pytest.approx((1 - kendalltau(a.numpy(), b.numpy()).statistic) / 2, rel=1e-12)


def test_kendall_distance_by_hand() -> None:
    offsets = torch.tensor([0, 3, 4, 6])
    a = torch.tensor([1.0, 2.0, 3.0, 0.0, 1.0, 1.0])
    assert metrics.kendall_distance(a, a, offsets) == Ratio(0, 2)
    assert metrics.kendall_distance(a, -a, offsets) == Ratio(1, 2)  # the tied pair is tied in both: 0
    one_tie = torch.tensor([1.0, 1.0, 0.0, 0.0, 2.0, 1.0])  # ½ + 1 + 1 of 3, and ½ of 1
    assert metrics.kendall_distance(a, one_tie, offsets).total == pytest.approx(2.5 / 3 + 0.5)


def test_inversions_of_permutations() -> None:
    offsets = torch.tensor([0, 0, 5, 6, 6, 9])
    position = torch.tensor([4, 3, 2, 1, 0, 0, 1, 2, 0])
    assert inversions(position, offsets).tolist() == [0, 10, 0, 0, 2]


@pytest.mark.parametrize("k", [1, 3, 1000])
def test_overlap_equals_sets(k: int) -> None:
    for seed in range(5):
        a, b, _, _, offsets = ragged(seed)
        values = []
        for request in requests(offsets, a, b):
            tops = [
                {i for _, i in sorted((-score, i) for i, score in enumerate(column))[:k]}
                for column in zip(*request, strict=True)
            ]
            if request:
                values.append(len(tops[0] & tops[1]) / min(k, len(request)))
        assert metrics.overlap_at_k(a, b, offsets, k).value == pytest.approx(mean(values), rel=1e-12)


def all_pairs_auc(request: Request) -> float:
    pairs = [(x[0], y[0]) for x in request for y in request if x[1] > y[1]]
    return mean([(p > n) + (p == n) / 2 for p, n in pairs])


def test_auc_equals_all_pairs_and_torchmetrics() -> None:
    for seed in range(3):
        a, _, relevant, _, offsets = ragged(seed)
        whole = metrics.auc(a, relevant).value
        assert whole == pytest.approx(all_pairs_auc(requests(torch.tensor([0, len(a)]), a, relevant)[0]), rel=1e-12)
        finite = a.clamp(min=-9)
        peer = auroc(finite, relevant.long(), task="binary")
        assert peer is not None
        assert whole == pytest.approx(float(peer), abs=1e-6)
        values = [all_pairs_auc(request) for request in requests(offsets, a, relevant)]
        grouped = metrics.grouped_auc(a, relevant, offsets)
        assert grouped.count == sum(not math.isnan(v) for v in values)
        assert grouped.value == pytest.approx(mean([v for v in values if not math.isnan(v)]), rel=1e-12)


def test_log_loss_and_calibration_equal_plain_python() -> None:
    generator = torch.Generator().manual_seed(0)
    logits, labels = 3 * torch.randn(200, generator=generator), torch.rand(200, generator=generator)
    p = [1 / (1 + math.exp(-s)) for s in logits.tolist()]
    losses = [-y * math.log(q) - (1 - y) * math.log(1 - q) for q, y in zip(p, labels.tolist(), strict=True)]
    assert metrics.log_loss(logits, labels).value == pytest.approx(mean(losses), rel=1e-9)
    assert metrics.calibration(logits, labels).value == pytest.approx(sum(p) / sum(labels.tolist()), rel=1e-9)


def test_log_loss_of_infinite_logits() -> None:
    logits = torch.tensor([math.inf, -math.inf])
    assert metrics.log_loss(logits, torch.tensor([1.0, 0.0])) == Ratio(0, 2)
    assert metrics.log_loss(logits, torch.tensor([0.0, 0.0])).value == math.inf


def test_mask_equals_leaving_out() -> None:
    a, _, relevant, _, offsets = ragged(0)
    mask = torch.rand(len(a), generator=torch.Generator().manual_seed(5)) < 0.5
    labels = relevant.float().where(mask, math.nan)
    kept = torch.tensor([0, *(int(mask[:end].sum()) for end in offsets[1:].tolist())])
    logits = a.where(mask, math.nan)
    for metric in (metrics.auc, metrics.log_loss, metrics.calibration):
        assert metric(logits, labels, mask=mask).value == metric(a[mask], relevant[mask]).value
    masked = metrics.grouped_auc(logits, labels, offsets, mask=mask)
    assert masked == metrics.grouped_auc(a[mask], relevant[mask], kept)


@pytest.mark.parametrize("name", STATES)
def test_candidate_order_does_not_matter(name: str) -> None:
    a, b, relevant, weight, offsets = ragged(2)
    generator = torch.Generator().manual_seed(0)
    shuffle = torch.cat(
        [
            start + torch.randperm(end - start, generator=generator)
            for start, end in zip(offsets.tolist(), offsets.tolist()[1:], strict=False)
        ]
    )
    shuffled = STATES[name](a[shuffle], b[shuffle], relevant[shuffle], weight[shuffle], offsets)
    assert shuffled.value == pytest.approx(STATES[name](a, b, relevant, weight, offsets).value, rel=1e-12)


@pytest.mark.parametrize("name", [*STATES, *BY_INDEX])
def test_parts_merge_to_the_whole(name: str) -> None:
    metric = {**STATES, **BY_INDEX}[name]
    *columns, offsets = ragged(3)
    states = []
    for first, last in ((0, 2), (2, 5), (5, 5), (5, 12)):
        start, end = int(offsets[first]), int(offsets[last])
        part = metric(*(column[start:end] for column in columns), offsets[first : last + 1] - start)
        states.append(pickle.loads(pickle.dumps(part)))
    whole = metric(*columns, offsets).value
    assert merge_all(states).value == pytest.approx(whole, rel=1e-12)
    assert states[0].merge(states[1]).merge(states[2].merge(states[3])).value == pytest.approx(whole, rel=1e-12)


@pytest.mark.parametrize("name", [*STATES, *BY_INDEX])
@pytest.mark.parametrize("offsets", [[0], [0, 0], [0, 0, 0]])
def test_no_candidates_give_nan(name: str, offsets: list[int]) -> None:
    empty = torch.zeros(0)
    state = {**STATES, **BY_INDEX}[name](empty, empty, empty.bool(), empty, torch.tensor(offsets))
    assert math.isnan(state.value)


def test_one_class_or_no_relevant_gives_nan() -> None:
    scores, offsets = torch.arange(4.0), torch.tensor([0, 4])
    none = torch.zeros(4, dtype=torch.bool)
    assert math.isnan(metrics.auc(scores, none).value)
    assert math.isnan(metrics.grouped_auc(scores, ~none, offsets).value)
    assert math.isnan(metrics.calibration(scores, none).value)
    assert math.isnan(metrics.ndcg_at_k(scores, none, offsets, 2).value)
    assert metrics.precision_at_k(scores, none, offsets, 2) == Ratio(0, 1)


def expected_corpus_rank(scores: Tensor, row: Tensor, target: Tensor, weight: Tensor, mask: Tensor) -> list[int]:
    pairs = list(zip(row.tolist(), target.tolist(), strict=True))
    heavy = {pair: sum(w for p, w in zip(pairs, weight.tolist(), strict=True) if p == pair) for pair in pairs}
    found = []
    for r, t in pairs:
        eligible = [c for c in range(scores.shape[1]) if mask[r, c]]
        listed = sorted(eligible, key=lambda c: (-scores[r, c].item(), (r, c) in heavy, heavy.get((r, c), 0), c))
        found.append(listed.index(t) if t in listed else NEVER)
    return found


@pytest.mark.parametrize("block", [1, 100, 1 << 24])
def test_corpus_ranks_equal_sorted_rows(block: int) -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.randint(4, (6, 25), generator=generator).float()
    scores[scores == 0] = -math.inf
    row, target = (torch.randint(n, (60,), generator=generator) for n in (6, 25))
    weight = torch.randint(1, 4, (60,), generator=generator).float()
    mask = torch.rand(6, 25, generator=generator) < 0.8
    found = corpus_ranks(scores, row, target, mask=mask, weight=weight, block=block)
    assert found.tolist() == expected_corpus_rank(scores, row, target, weight, mask)
    assert NEVER in found.tolist()
    everything = torch.ones_like(mask)
    plain = corpus_ranks(scores, row, target, block=block)
    assert plain.tolist() == expected_corpus_rank(scores, row, target, torch.zeros(60), everything)


def test_corpus_ranks_of_no_targets() -> None:
    none = torch.zeros(0, dtype=torch.int64)
    for shape in ((0, 0), (3, 0), (3, 4)):
        assert corpus_ranks(torch.zeros(shape), none, none).tolist() == []
    assert math.isnan(metrics.ndcg_of_ranks(none, none, 3).value)


def test_corpus_metrics_equal_ragged_ones() -> None:
    """A corpus without a mask is a request of all items."""
    generator = torch.Generator().manual_seed(1)
    scores = torch.randint(9, (7, 40), generator=generator).float()
    relevant = torch.rand(7, 40, generator=generator) < 0.1
    relevant[3] = False
    row, target = relevant.nonzero().unbind(1)
    rank = corpus_ranks(scores, row, target)
    ragged_form = (scores.flatten(), relevant.flatten(), 40 * torch.arange(8), 9)
    assert metrics.recall_of_ranks(rank, 9) == metrics.recall_at_k(*ragged_form)
    assert metrics.recall_of_ranks(rank, 9, row=row) == metrics.recall_at_k(*ragged_form, average="macro")
    assert metrics.dcg_of_ranks(rank, 9) == metrics.dcg_per_positive_at_k(*ragged_form)
    assert metrics.ndcg_of_ranks(rank, row, 9) == metrics.ndcg_at_k(*ragged_form)
    weight = torch.rand(7, 40, generator=generator)
    rank = corpus_ranks(scores, row, target, weight=weight[relevant])
    weighted = metrics.weighted_recall_at_k(*ragged_form[:2], weight.flatten(), *ragged_form[2:])
    assert metrics.recall_of_ranks(rank, 9, weight=weight[relevant]) == weighted


def test_macro_recall_of_weighted_ranks() -> None:
    rank, row, weight = (
        torch.tensor([0, 5, 1, 0]),
        torch.tensor([4, 4, 2, 7]),
        torch.tensor([1.0, 3.0, 2.0, 0.0]),
    )
    assert metrics.recall_of_ranks(rank, 2, row=row, weight=weight) == Ratio(1.25, 2)  # row 7 weighs nothing


def test_an_ineligible_target_is_missed_at_any_k() -> None:
    rank = corpus_ranks(torch.ones(1, 2), torch.tensor([0]), torch.tensor([1]), mask=torch.tensor([[True, False]]))
    assert metrics.recall_of_ranks(rank, 10**9).value == 0
    assert metrics.dcg_of_ranks(rank, 10**9).value == 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda s, y, o: metrics.recall_at_k(s * math.nan, y, o, 1), "scores holds NaN"),
        (lambda s, y, o: metrics.kendall_distance(s, s * math.nan, o), "b holds NaN"),
        (lambda s, y, o: metrics.auc(s * math.nan, y), "logits holds NaN"),
        (lambda s, y, o: metrics.recall_at_k(s, y, o, 0), "k must be at least 1"),
        (lambda s, y, o: metrics.precision_at_k(s, y, o[:-1], 1), "offsets must be"),
        (lambda s, y, o: metrics.ndcg_at_k(s, y[:-1], o, 1), "offsets must be"),
        (lambda s, y, o: metrics.ndcg_at_k(s, y, torch.tensor([0, 3, 2, 4]), 1), "never fall"),
        (lambda s, y, o: metrics.recall_at_k(s, y, o, 1, average="mean"), "average must be"),
        (lambda s, y, o: metrics.weighted_recall_at_k(s, y, -s - 1, o, 1), "weight must be"),
        (lambda s, y, o: metrics.weighted_recall_at_k(s, y, s[:-1], o, 1), "weight must be"),
        (lambda s, y, o: merge_all([]), "no state"),
        (lambda s, y, o: metrics.auc(s, y + 0.5), "labels must lie"),
        (lambda s, y, o: metrics.auc(s, y / 2), "labels must be 0 or 1"),
        (lambda s, y, o: metrics.log_loss(s, y[:-1]), r"must all be \[N\]"),
        (lambda s, y, o: metrics.log_loss(s[None], y[None]), r"must all be \[N\]"),
        (lambda s, y, o: corpus_ranks(s[None], torch.tensor([0]), torch.tensor([4])), "target must lie"),
        (lambda s, y, o: corpus_ranks(s[None] * math.nan, torch.tensor([0]), torch.tensor([0])), "holds NaN"),
    ],
)
def test_misuse_is_a_value_error(call: Callable[..., object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(torch.arange(4.0), torch.ones(4), torch.tensor([0, 1, 4]))
