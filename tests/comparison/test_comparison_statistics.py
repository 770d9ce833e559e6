"""The tests of differences: against scipy, by hand, and by how often they are wrong where the truth is known."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from joint.comparison.statistics import Paired, holm, paired, percentiles, resampled, verdict

A = np.array([0.412, 0.398, 0.431, 0.405, 0.420])
B = np.array([0.401, 0.399, 0.415, 0.396, 0.411])


def test_the_paired_test_and_its_interval_are_scipys():
    found, theirs = paired(A - B, 0.004), stats.ttest_rel(A, B)
    interval = theirs.confidence_interval(0.95)
    assert found.p == pytest.approx(theirs.pvalue, rel=1e-12)
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high), rel=1e-12)
    assert (found.n, found.difference) == (5, pytest.approx(0.0088))


@pytest.mark.parametrize("shift", [-0.012, -0.003, 0.0, 0.002, 0.02])
def test_equivalence_is_the_worse_of_two_one_sided_tests(shift):
    d = A - B - (A - B).mean() + shift
    above = stats.ttest_1samp(d, -0.01, alternative="greater").pvalue
    below = stats.ttest_1samp(d, 0.01, alternative="less").pvalue
    assert paired(d, 0.01).p_same == pytest.approx(max(above, below), rel=1e-12)


def test_the_paired_test_by_hand():
    found = paired([1.0, 2.0, 3.0], 0.5)  # mean 2, std 1, t = 2 √3 with 2 degrees of freedom
    t = 2 * math.sqrt(3)
    assert found.p == pytest.approx(1 - t / math.sqrt(t * t + 2))  # Student's distribution in closed form
    assert found.high - found.difference == pytest.approx(4.302652729911275 / math.sqrt(3))


@pytest.mark.parametrize(
    ("d", "p", "p_same"),
    [([0.0] * 5, 1.0, 1 / 32), ([0.5, 0.5, 0.5], 0.25, 1.0), ([0.25] * 6, 1 / 32, 1.0), ([0.0078125] * 2, 0.5, 0.25)],
)
def test_differences_that_are_all_equal_are_left_to_the_sign_test(d, p, p_same):
    found = paired(d, 0.01)
    assert (found.p, found.p_same) == (p, p_same)
    assert math.isnan(found.low)
    assert math.isnan(found.high)


def test_whole_counts_on_little_data_do_not_make_differences():
    rng = np.random.default_rng(7)  # two seeds, three positives to find: every eighth pair of differences is equal
    found = [paired(rng.binomial(3, 0.5, 2) / 3 - rng.binomial(3, 0.5, 2) / 3, 0.0).p < 0.05 for _ in range(1000)]
    assert np.mean(found) < 0.05


def test_below_two_units_there_is_no_test():
    one = paired([0.3], 0.1)
    assert (one.n, one.difference) == (1, 0.3)
    assert all(math.isnan(x) for x in (one.low, one.high, one.p, one.p_same, paired([], 0.1).difference))


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.5]) == [1.0, 1.0]
    assert holm([]) == []


def test_holm_passes_over_tests_that_were_not_made():
    found = holm([0.01, math.nan, 0.04])
    assert math.isnan(found[1])
    assert [found[0], found[2]] == pytest.approx([0.02, 0.04])


@pytest.mark.parametrize(
    ("difference", "p", "p_same", "higher", "lower"),
    [
        (0.1, 0.04, 0.9, "better", "worse"),
        (-0.1, 0.04, 0.9, "worse", "better"),
        (0.1, 0.04, 0.01, "better", "worse"),  # small and real: real comes first
        (0.1, 0.06, 0.01, "same", "same"),
        (0.1, 0.06, 0.05, "unclear", "unclear"),
        (0.1, math.nan, math.nan, "unclear", "unclear"),
    ],
)
def test_verdicts(difference, p, p_same, higher, lower):
    test = Paired(5, difference, 0, 0, p, p_same)
    assert verdict(test, p, higher_is_better=True) == higher
    assert verdict(test, p, higher_is_better=False) == lower


# How often they are wrong


def wrong(rng: np.random.Generator, *, variants: int, units: int, base: float, own: float) -> bool:
    """Whether any variant seems better or worse where none is: all share the baseline's own noise."""
    baseline = rng.normal(0, base, units)
    tests = [paired(rng.normal(0, own, units) - baseline, 0.0) for _ in range(variants)]
    adjusted = holm([test.p for test in tests])
    return any(p < 0.05 for p in adjusted)


def test_under_the_null_a_family_is_wrong_as_often_as_it_says():
    rng = np.random.default_rng(0)
    single = np.mean([wrong(rng, variants=1, units=5, base=1.0, own=1.0) for _ in range(3000)])
    family = np.mean([wrong(rng, variants=4, units=5, base=0.3, own=1.0) for _ in range(3000)])
    error = 3 * math.sqrt(0.05 * 0.95 / 3000)
    assert abs(single - 0.05) < error
    assert 0.025 < family < 0.05 + error  # Holm may be cautious, never bold


def test_at_the_edge_of_the_margin_sameness_is_claimed_as_often_as_it_says():
    rng = np.random.default_rng(1)
    claimed = np.mean([paired(rng.normal(0.5, 0.2, 8), 0.5).p_same < 0.05 for _ in range(4000)])
    assert abs(claimed - 0.05) < 3 * math.sqrt(0.05 * 0.95 / 4000)


def test_what_is_there_is_found():
    rng = np.random.default_rng(2)
    found = np.mean([paired(rng.normal(2.5, 1.0, 5), 0.0).p < 0.05 for _ in range(500)])
    # Noncentral t with 4 degrees of freedom: the power that the test should have.
    edge, shift = stats.t.ppf(0.975, 4), 2.5 * math.sqrt(5)
    power = stats.nct.sf(edge, 4, shift) + stats.nct.cdf(-edge, 4, shift)
    assert power > 0.95
    assert abs(found - power) < 3 * math.sqrt(power * (1 - power) / 500)
    same = np.mean([paired(rng.normal(0.0, 0.2, 8), 0.5).p_same < 0.05 for _ in range(500)])
    assert same > 0.95


# Users


def test_resampled_means_spread_as_their_standard_error_says():
    rng = np.random.default_rng(3)
    totals = rng.normal(2.0, 1.0, (400, 1))
    draws = resampled(totals, np.ones_like(totals), draws=2000, seed=0)
    assert draws.shape == (2000, 1)
    assert draws.mean() == pytest.approx(totals.mean(), abs=0.005)
    assert draws.std() == pytest.approx(totals.std() / 20, rel=0.08)


def test_resampled_ratios_against_a_loop():
    rng = np.random.default_rng(4)
    totals, counts = rng.random((7, 2)), rng.integers(0, 3, (7, 2)).astype(float)
    counts[0] = 1
    found = resampled(totals, counts, draws=3, seed=9)
    chosen = np.random.default_rng(9).integers(0, 7, (3, 7))
    for draw, users in enumerate(chosen):
        expected = totals[users].sum(axis=0) / counts[users].sum(axis=0)
        assert found[draw] == pytest.approx(expected)


def test_the_same_seed_draws_the_same_users_so_that_equal_runs_do_not_differ():
    totals = np.random.default_rng(5).random((50, 1))
    both = resampled(np.hstack([totals, totals]), np.ones((50, 2)), draws=100, seed=1)
    assert (both[:, 0] == both[:, 1]).all()
    np.testing.assert_allclose(resampled(totals, np.ones((50, 1)), draws=100, seed=1), both[:, :1], rtol=1e-12)
    assert not np.allclose(resampled(totals, np.ones((50, 1)), draws=100, seed=2), both[:, :1])


def test_percentiles_cover_the_truth_as_often_as_they_say():
    rng, covered = np.random.default_rng(6), []
    for _ in range(300):  # users of several requests each: the user is the unit
        user = rng.normal(1.0, 1.0, 150)
        counts = rng.integers(1, 6, 150).astype(float)
        totals = user * counts + rng.normal(0, 1, 150) * np.sqrt(counts)
        low, high = percentiles(resampled(totals[:, None], counts[:, None], draws=300, seed=1)[:, 0])
        covered.append(low < 1.0 < high)
    assert 0.90 < np.mean(covered) < 0.985


def test_a_draw_without_units_gives_no_interval():
    draws = resampled(np.array([[1.0], [0.0]]), np.array([[1.0], [0.0]]), draws=50, seed=0)[:, 0]
    assert np.isnan(draws).any()
    assert all(math.isnan(edge) for edge in percentiles(draws))
