"""Quotas per stage and random negatives: how many, which, and that nothing but the names decides."""

import numpy as np
import pytest
from scipy import stats

from joint.data.ragged import Ragged, draw, offsets_of
from joint.data.sampling import Candidates, Quota, sample_stages, unlabelled, with_random
from joint.schema import Stage

KINDS = np.array(
    [
        Stage.PRERANK_NEG,
        Stage.COARSE_NEG,
        Stage.RANKED,
        Stage.RANKED | Stage.RANK_NEG,
        Stage.RANKED | Stage.EXPOSED,
        Stage.RANKED | Stage.RANK_POS | Stage.EXPOSED,
    ],
    np.uint16,
)


def logged(requests: int = 60) -> Candidates:
    """Requests of 0 to 20 candidates; item indices are unique, so that they name candidates."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(0, 21, requests)
    items = Ragged(np.arange(lengths.sum()), offsets_of(lengths))
    stages = rng.choice(KINDS, lengths.sum())
    return Candidates(items, stages, {"click": rng.random(len(stages)).astype(np.float32)})


def keys(seed: int, epoch: int, requests: int = 60) -> np.ndarray:
    return draw(seed, epoch, np.arange(requests))


def members(candidates: Candidates, row: int, name: str) -> set[int]:
    """Items of a request in a stage, the slow way."""
    begin, end = candidates.items.offsets[row : row + 2]
    flags = Stage.PRERANK_NEG | Stage.COARSE_NEG if name == "pre_ranking_ns" else Stage[name.upper()]
    found = set()
    for place in range(begin, end):
        stage = Stage(int(candidates.stages[place]))
        if stage & flags and (name == "exposed") == bool(stage & Stage.EXPOSED):
            found.add(int(candidates.items.values[place]))
    return found


@pytest.mark.parametrize("name", ["prerank_neg", "coarse_neg", "ranked", "rank_neg", "exposed", "pre_ranking_ns"])
@pytest.mark.parametrize("quota", [0, 1, 3, "all"])
def test_quota_of_one_stage(name: str, quota: Quota) -> None:
    log = logged()
    quotas: dict[str, Quota] = {name: quota}
    sampled = sample_stages(log, quotas, keys(0, 0))
    assert len(sampled.items) == len(log.items)
    for row in range(len(log.items)):
        there = members(log, row, name)
        begin, end = sampled.items.offsets[row : row + 2]
        chosen = sampled.items.values[begin:end].tolist()
        assert set(chosen) <= there
        assert len(chosen) == (len(there) if quota == "all" else min(len(there), int(quota)))
        assert chosen == sorted(chosen)  # in logged order


def test_quotas_of_several_stages_are_a_union_and_labels_go_along() -> None:
    log = logged()
    sampled = sample_stages(log, {"exposed": "all", "coarse_neg": 2, "ranked": 1, "random": 7}, keys(0, 0))
    parts: list[dict[str, Quota]] = [{"exposed": "all"}, {"coarse_neg": 2}, {"ranked": 1}]
    alone = [sample_stages(log, quotas, keys(0, 0)) for quotas in parts]
    union = np.unique(np.concatenate([part.items.values for part in alone]))
    np.testing.assert_array_equal(sampled.items.values, union)
    np.testing.assert_array_equal(sampled.stages, log.stages[union])
    np.testing.assert_array_equal(sampled.labels["click"], log.labels["click"][union])
    assert len(sample_stages(log, {}, keys(0, 0)).stages) == 0


def test_draws_depend_on_seed_epoch_and_request_only() -> None:
    log, quotas = logged(), {"exposed": 1, "coarse_neg": 1, "ranked": 2}
    whole = sample_stages(log, quotas, keys(0, 0))
    for order in (np.arange(60)[::-1], np.array([17, 3, 59])):
        index = Ragged(np.arange(len(log.stages)), log.items.offsets).take(order).values
        part = Candidates(log.items.take(order), log.stages[index], {"click": log.labels["click"][index]})
        sampled = sample_stages(part, quotas, keys(0, 0)[order])
        np.testing.assert_array_equal(sampled.items.values, whole.items.take(order).values)
        np.testing.assert_array_equal(sampled.items.offsets, whole.items.take(order).offsets)
    for other in (keys(0, 1), keys(1, 0)):
        assert not np.array_equal(sample_stages(log, quotas, other).items.values, whole.items.values)


def test_every_candidate_of_a_stage_is_as_likely() -> None:
    requests, n, quota = 3000, 8, 3
    items = Ragged(np.tile(np.arange(n), requests), offsets_of(np.full(requests, n)))
    log = Candidates(items, np.full(n * requests, Stage.RANKED, np.uint16), {})
    sampled = sample_stages(log, {"ranked": quota}, keys(0, 0, requests))
    # Drawn without replacement the counts vary less than a multinomial's, by (n - quota) / (n - 1).
    counts = np.bincount(sampled.items.values, minlength=n)
    spread = ((counts - requests * quota / n) ** 2).sum() / (requests * quota / n) * (n - 1) / (n - quota)
    assert stats.chi2.sf(spread, n - 1) > 1e-3


def test_with_random_appends_unlabelled_candidates() -> None:
    log = sample_stages(logged(4), {"ranked": 1}, keys(0, 0, 4))
    drawn = Ragged(np.array([900, 901, 902]), np.array([0, 1, 1, 3, 3]))
    both = with_random(log, drawn)
    for row in range(4):
        old = log.items.values[log.items.offsets[row] : log.items.offsets[row + 1]].tolist()
        new = drawn.values[drawn.offsets[row] : drawn.offsets[row + 1]].tolist()
        assert both.items.values[both.items.offsets[row] : both.items.offsets[row + 1]].tolist() == old + new
    sampled = both.items.values >= 900
    assert (both.stages[sampled] == Stage.RANDOM).all()
    assert np.isnan(both.labels["click"][sampled]).all()
    np.testing.assert_array_equal(both.stages[~sampled], log.stages)
    np.testing.assert_array_equal(both.labels["click"][~sampled], log.labels["click"])


def test_unlabelled_and_keep() -> None:
    candidates = unlabelled(Ragged(np.array([4, 5, 6]), np.array([0, 1, 3])), ("a", "b"))
    kept = candidates.keep(np.array([False, True, True]))
    assert kept.items.lengths.tolist() == [0, 2]
    assert kept.items.values.tolist() == [5, 6]
    assert set(kept.labels) == {"a", "b"}
    assert np.isnan(kept.labels["b"]).tolist() == [True, True]
