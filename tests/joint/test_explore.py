"""Chance in retrieval: how much, for whom, and always the same for the same request."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

from joint.data.ragged import Ragged, draw, offsets_of
from joint.data.requests import Requests
from joint.evaluating.explore import narrowness, noisy, thinned
from joint.evaluating.variety import Coverage, variety
from joint.schema import History


def ragged(*lists: list[int]) -> Ragged:
    return Ragged(np.array([x for one in lists for x in one], np.int64), offsets_of(np.array([len(x) for x in lists])))


def test_narrowness_is_of_few_different_values() -> None:
    found = narrowness(ragged([3, 3, 3, 3], [1, 2, 3, 4], [], [7], [5, 9, 5, 9]))
    assert found.tolist() == [0.75, 0, 0, 0, 0.5]
    assert narrowness(ragged()).shape == (0,)


def test_noise_is_gaussian_of_the_asked_size_and_stronger_for_the_narrow() -> None:
    rng = np.random.default_rng(0)
    vectors = (rng.normal(size=(2000, 8)) * 5).astype(np.float32)
    keys, narrow = draw(0, np.arange(2000)), np.repeat([0.0, 1.0], 1000)
    noise = noisy(vectors, keys, narrow, noise=0.1) - vectors
    relative = noise / np.linalg.norm(vectors, axis=1, keepdims=True) * np.sqrt(8) / 0.1 / (1 + narrow[:, None])
    assert stats.kstest(relative.ravel(), "norm").pvalue > 0.01
    assert abs(np.corrcoef(relative.T)[np.triu_indices(8, 1)]).max() < 0.1
    assert noisy(vectors, keys, narrow, noise=0.1).dtype == np.float32
    assert np.array_equal(noisy(vectors, keys, narrow, noise=0.0), vectors)


def test_the_same_request_has_the_same_noise_in_any_company() -> None:
    vectors, keys, narrow = np.ones((5, 4), np.float32), draw(3, np.arange(5)), np.zeros(5)
    whole = noisy(vectors, keys, narrow, noise=0.5)
    some = np.array([4, 1])
    assert np.array_equal(noisy(vectors[some], keys[some], narrow[some], noise=0.5), whole[some])
    assert not np.allclose(noisy(vectors, draw(4, np.arange(5)), narrow, noise=0.5), whole)
    assert noisy(vectors[:0], keys[:0], narrow[:0], noise=0.5).shape == (0, 4)


def history_of(lengths: list[int]) -> tuple[Requests, History]:
    """A history in which every event is its own number, with all columns that run beside it."""
    events = np.arange(sum(lengths))
    past = Ragged(events, offsets_of(np.array(lengths)))
    columns = {
        "request_id": np.arange(len(lengths)),
        "seen": past,
        "seen.minutes": past.with_values(events * 10),
        "seen.timestamp": past.with_values(events * 100),
        "seen.competitors": Ragged(np.repeat(events, 2), past.offsets * 2),
    }
    return Requests(columns), History(name="seen", events=("minutes",), timed=True, competitors=2)


def test_the_newest_events_stay_and_a_share_of_the_older_ones() -> None:
    requests, history = history_of([40, 3, 0, 60] * 50)
    keys = draw(0, requests.scalars("request_id"))
    few = thinned(requests, [history], keys, keep=0.3, newest=5)
    left = few.lists("seen")
    for row, length in enumerate([40, 3, 0, 60] * 50):
        own = left.values[left.offsets[row] : left.offsets[row + 1]]
        last = (
            requests.lists("seen").values[: requests.lists("seen").offsets[row + 1]][-min(length, 5) :]
            if length
            else own
        )
        assert own[len(own) - len(last) :].tolist() == last.tolist()
        assert (np.diff(own) > 0).all()
    older = 50 * (35 + 55)
    kept = len(left.values) - 50 * (5 + 3 + 5)
    assert kept == pytest.approx(0.3 * older, abs=4 * np.sqrt(older * 0.21))
    assert (few.lists("seen.minutes").values == left.values * 10).all()
    assert (few.lists("seen.timestamp").values == left.values * 100).all()
    assert (few.lists("seen.competitors").values == np.repeat(left.values, 2)).all()
    assert (few.lists("seen.competitors").offsets == 2 * left.offsets).all()


def test_everything_or_only_the_newest() -> None:
    requests, history = history_of([6, 2])
    keys = draw(0, requests.scalars("request_id"))
    assert thinned(requests, [history], keys, keep=1.0, newest=0).lists("seen").lengths.tolist() == [6, 2]
    assert thinned(requests, [history], keys, keep=0.0, newest=3).lists("seen").values.tolist() == [3, 4, 5, 6, 7]
    again = thinned(requests.take(np.array([1, 0])), [history], keys[::-1], keep=0.5, newest=1)
    first = thinned(requests, [history], keys, keep=0.5, newest=1)
    assert again.lists("seen").take(np.array([1, 0])).values.tolist() == first.lists("seen").values.tolist()


def test_variety_of_lists() -> None:
    values = torch.tensor([1, 1, 2, 3, 3])
    scores = torch.tensor([[5.0, 4, 3, 2, 1], [-torch.inf, 9, -torch.inf, -torch.inf, -torch.inf]])
    found = variety(scores, values, "kind", 3)
    assert found["retrieval/distinct/kind@3"].total.tolist() == [2, 1]
    assert found["retrieval/distinct/kind@3"].value == 1.5
    assert found["retrieval/coverage@3"].value == pytest.approx(3 / 5)
    other = Coverage(torch.tensor([False, False, False, False, True]))
    assert found["retrieval/coverage@3"].merge(other).value == pytest.approx(4 / 5)
    assert variety(scores, values, "kind", 99)["retrieval/distinct/kind@99"].total.tolist() == [3, 1]
