"""What may be recommended: by day, by pool, and not what the named histories hold."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace

import numpy as np
import pytest
from scipy import stats

from joint.data.eligibility import Eligibility
from joint.data.ragged import Ragged, draw, offsets_of
from joint.data.requests import Requests
from joint.experiment import Data
from joint.schema import NEVER


def rule(first_day: Sequence[int], *histories: str) -> Eligibility:
    """A rule over a catalogue whose items join on these days."""
    dataset = SimpleNamespace(first_day={"": np.array(first_day, np.int32)})
    return Eligibility(dataset, Data(path="", candidates={}, not_eligible=histories))  # type: ignore[arg-type]


def lists(*rows: Sequence[int]) -> Ragged:
    return Ragged(np.array([x for row in rows for x in row], np.int64), offsets_of(np.array([len(r) for r in rows])))


def requests(days: Sequence[int], **histories: Ragged) -> Requests:
    return Requests({"day": np.array(days, np.int32), **histories})


def keys(count: int) -> np.ndarray:
    return draw(0, 0, np.arange(count))


def rows_of(ragged: Ragged) -> list[list[int]]:
    return [ragged.values[a:b].tolist() for a, b in zip(ragged.offsets, ragged.offsets[1:], strict=False)]


def test_by_day_pool_and_history() -> None:
    eligibility = rule([3, NEVER, 0, 5, 3], "seen", "saved")
    log = requests([2, 3, 5], seen=lists([2, 1], [], [4]), saved=lists([], [0, 0], [1]))
    assert eligibility.corpus.tolist() == [0, 2, 3, 4]
    assert eligibility.columns(np.array([0, 1, 2, 3, 4])).tolist() == [0, -1, 1, 2, 3]
    assert rows_of(eligibility.taken(log)) == [[2, 1], [0, 0], [4, 1]]
    assert rows_of(eligibility.eligible(log)) == [[], [2, 4], [0, 2, 3]]
    np.testing.assert_array_equal(
        eligibility.mask(log), [[False] * 4, [False, True, False, True], [True, True, True, False]]
    )
    assert eligibility.is_open(np.array([-1, 0, 1, 2, 3]), 3).tolist() == [False, True, False, True, False]
    assert [eligibility.available(day) for day in (-1, 2, 3, 5)] == [0, 1, 3, 4]


@pytest.mark.parametrize(("items", "world"), [(10, 1), (10, 4), (3, 8), (0, 2), (8, 4)])
def test_slices_are_equally_long_and_padded(items: int, world: int) -> None:
    eligibility = rule([NEVER, *range(items), NEVER])
    slices = [eligibility.slice(rank, world) for rank in range(world)]
    assert len({len(part) for part in slices}) == 1
    whole = np.concatenate(slices)
    assert whole[:items].tolist() == list(range(1, items + 1))
    assert (whole[items:] == -1).all()
    assert len(whole) - items < world


def test_random_items_are_uniform_over_what_is_free() -> None:
    count, quota = 2000, 10
    eligibility = rule([0, 7] * 20 + [NEVER] * 5, "seen")  # half of them join too late
    log = requests([6] * count, seen=lists(*[range(30, 40)] * count))
    drawn = eligibility.random(log, quota, keys(count), but=lists(*[[2, 4]] * count))
    assert drawn.lengths.min() >= quota - 1
    free = [item for item in range(0, 30, 2) if item not in (2, 4)]
    assert sorted(set(drawn.values.tolist())) == free
    place = np.searchsorted(free, drawn.values)
    assert stats.chisquare(np.bincount(place)).pvalue > 1e-3
    full = np.searchsorted(free, drawn.take(np.flatnonzero(drawn.lengths == quota)).values.reshape(-1, quota))
    pairs = np.bincount(full[:, 0] * len(free) + full[:, 1], minlength=len(free) ** 2)
    assert stats.chisquare(pairs).pvalue > 1e-3  # slots do not follow each other


def test_random_items_never_hit_taken_ones_and_may_be_fewer() -> None:
    rng = np.random.default_rng(0)
    held = [rng.permutation(12)[:n] for n in (0, 6, 11, 12, 12, 3)]
    drawn = rule([0] * 12).random(requests([0] * 6), 40, keys(6), but=lists(*held))
    for found, taken in zip(rows_of(drawn), held, strict=True):
        assert not set(found) & set(taken.tolist())
    assert drawn.lengths[0] == 40
    assert 0 < drawn.lengths[2] < 40  # one item is free: a slot finds it with chance 1 - (11/12)^8
    assert drawn.lengths[[3, 4]].tolist() == [0, 0]


def test_random_items_do_not_depend_on_the_batch() -> None:
    eligibility, but = rule([0] * 9), lists([1, 2], [], [3, 4, 5])
    whole = eligibility.random(requests([0] * 3), 20, keys(3), but=but)
    alone = eligibility.random(requests([0]), 20, keys(3)[2:], but=but.take(np.array([2])))
    np.testing.assert_array_equal(whole.take(np.array([2])).values, alone.values)
    more = eligibility.random(requests([0] * 3), 25, keys(3), but=but)
    np.testing.assert_array_equal(more.newest(25).values[:20], whole.values[:20])  # a slot does not know the quota
    assert len(eligibility.random(requests([0] * 3), 0, keys(3), but=but).values) == 0
    assert len(eligibility.random(requests([]), 5, keys(0), but=lists())) == 0
    assert rows_of(rule([4] * 9).random(requests([3, 4]), 2, keys(2), but=lists([], range(9)))) == [[], []]
