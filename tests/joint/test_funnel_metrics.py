"""Who lost what, by hand: ties, requests with fewer candidates than a quota, empty ones, funnels without retrieval."""

from __future__ import annotations

from typing import ClassVar, cast

import numpy as np
import pytest
import torch
from torch import Tensor

from joint.cost import Cost, funnel_costs
from joint.data.ragged import Ragged
from joint.data.requests import Requests
from joint.errors import UserError
from joint.evaluating.funnel_metrics import Entrants, Wanted, best_columns, funnel, funnel_metrics, survival
from joint.experiment import Config, ItemPool
from joint.funnels.figures import lost_figure, survival_figure, sweep_figure
from joint.funnels.measure import REWARD, Point, Thirds, efficient, read_grid
from joint.funnels.shares import left, lost, slices
from joint.funnels.show import run_names
from joint.funnels.writing import lost_table, starred, sweep_table

QUOTAS = {"retrieval": 3, "pre_ranking": 2, "ranking": 1}
# Three requests: four candidates, none, and one (fewer than any quota). Item 9 is outside the pool.
ITEMS = Ragged(np.array([2, 4, 5, 7, 4]), np.array([0, 4, 4, 5]))
SCORES = {
    "retrieval": torch.tensor([4.0, 3.0, 2.0, 1.0, 0.5]),
    "pre_ranking": torch.tensor([1.0, 1.0, 3.0, 9.0, 0.0]),  # a tie: the earlier candidate stays
    "ranking": torch.tensor([7.0, 9.0, 8.0, 0.0, -3.0]),
}
OFFSETS = torch.tensor([0, 4, 4, 5])
ROW, ITEM = np.array([0, 0, 0, 0, 0, 0, 1, 2, 2]), np.array([9, 3, 7, 4, 2, 5, 4, 4, 6])
ELIGIBLE = np.array([False, True, True, True, True, True, True, True, True])
WANTED = Wanted.among(ITEMS, ROW, ITEM, ELIGIBLE)


def stages_of(quotas: dict[str, int]) -> dict[str, Tensor]:
    return dict(funnel(SCORES, quotas, OFFSETS))


def test_pairs_are_looked_up_among_ragged_candidates_in_any_order():
    assert WANTED.place.tolist() == [-1, -1, 3, 1, 0, 2, -1, 4, -1]
    mixed = Ragged(np.array([7, 2, 5, 4, 4]), ITEMS.offsets)
    assert Wanted.among(mixed, ROW, ITEM, ELIGIBLE).place.tolist() == [-1, -1, 0, 3, 1, 2, -1, 4, -1]
    nothing = Wanted.among(Ragged(np.zeros(0, np.int64), np.array([0, 0])), ROW[:1], ITEM[:1], ELIGIBLE[:1])
    assert nothing.place.tolist() == [-1]


def test_how_far_each_came():
    """Item 9 is not eligible; 3, 6 and request 1's were not retrieved, 7 is fourth; 4 ties with 2; 5 and 2 go on."""
    assert WANTED.passed(stages_of(QUOTAS)).tolist() == [0, 1, 1, 2, 3, 4, 1, 4, 1]


def test_what_each_stage_lost_and_what_is_left_by_request():
    found = dict(survival("positives", WANTED, stages_of(QUOTAS), QUOTAS, 3))
    totals = {name: state.total.tolist() for name, state in found.items()}
    assert totals == {
        "funnel/lost/outside": [1, 0, 0],
        "funnel/lost/retrieval": [2, 1, 1],
        "funnel/lost/pre_ranking": [1, 0, 0],
        "funnel/lost/ranking": [1, 0, 0],
        "funnel/retrieval/recall@3": [3, 0, 1],
        "funnel/pre_ranking/recall@2": [2, 0, 1],
        "funnel/ranking/recall@1": [1, 0, 1],
    }
    assert all(state.count.tolist() == [6, 1, 2] for state in found.values())


@pytest.mark.parametrize("quotas", [QUOTAS, {"retrieval": 9}, {"pre_ranking": 2, "ranking": 1}, {"ranking": 1}])
def test_all_that_is_lost_and_what_is_left_sum_to_one(quotas: dict[str, int]):
    found = dict(survival("positives", WANTED, stages_of(quotas), quotas, 3))
    last, quota = list(quotas.items())[-1]
    shares = [state.total for name, state in found.items() if "/lost/" in name]
    assert (sum(shares) + found[f"funnel/{last}/recall@{quota}"].total).tolist() == [6, 1, 2]
    numbers = {name: state.value for name, state in found.items()}
    read = lost(numbers, quotas, "positives")
    assert list(read) == ["outside", *quotas, "left"]
    assert sum(read.values()) == pytest.approx(1)
    assert read["left"] == pytest.approx(numbers[f"funnel/{last}/recall@{quota}"])
    assert list(left(numbers, quotas, "positives").values())[-1] == pytest.approx(read["left"])


def entrants(wanted: dict[str, Wanted]) -> Entrants:
    requests = Requests({"group": np.array([0, 1, 1])})
    orders = {"truth": torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])}
    return Entrants(requests, ITEMS, OFFSETS, torch.tensor([0, 1, 1]), {}, SCORES, orders, wanted)


def test_a_funnel_without_retrieval_begins_with_whatever_it_is_given():
    quotas = {"pre_ranking": 2, "ranking": 1}
    found = funnel_metrics(entrants({"positives": WANTED}), quotas)
    assert found["funnel/lost/pre_ranking"].total.tolist() == [3, 1, 1]
    assert found["funnel/ranking/recall@1"].total.tolist() == [1, 0, 1]
    assert found["funnel/true_reward@10"].total.tolist() == pytest.approx([0.3, 0, 0.5])
    assert not any("nktd" in name for name in found)


def test_the_order_of_what_was_retrieved_is_named_by_its_quota():
    found = funnel_metrics(entrants({}), QUOTAS)
    assert found["alignment/truth/nktd@3/retrieval"].total.tolist() == [1, 0, 0]


def test_the_best_columns_are_nested_and_ties_go_to_the_earlier():
    scores = torch.randint(0, 4, (50, 12), generator=torch.Generator().manual_seed(0)).float()
    scores[3] = -torch.inf
    scores[4, 5:] = -torch.inf
    order = scores.sort(dim=1, descending=True, stable=True).indices
    before = torch.zeros_like(scores, dtype=torch.bool)
    for k in range(1, 13):
        expected = torch.zeros_like(before).scatter_(1, order[:, :k], True)
        found = best_columns(scores, k)
        assert torch.equal(found, expected)
        assert (found | before).equal(found)
        before = found
    assert best_columns(scores[:0], 5).shape == (0, 12)


def points(*values: tuple[int, float]) -> list[Point]:
    return [Point({"retrieval": n}, cost, {"positives": value}) for n, (cost, value) in enumerate(values, 1)]


def test_a_point_is_efficient_unless_another_beats_it():
    some = points((1, 0.1), (1, 0.2), (2, 0.2), (3, 0.3), (3, 0.3), (4, 0.25), (5, float("nan")))
    assert efficient(some, "positives") == [False, True, False, True, True, False, False]
    heading, *rows = sweep_table(some)
    assert heading == ["retrieval", "multiply_adds", "positives", "efficient_by_positives"]
    assert rows[1] == ["2", "1", "0.2", "1"]
    assert starred(points((1_000, 0.1)))[1] == ["1", "1,000", "0.1000 *"]


class Told:
    """A config that tells its quotas."""

    class evaluation:  # noqa: N801 - as the config's section is called
        quotas = QUOTAS
        pools: ClassVar[dict[str, ItemPool]] = {}


def test_the_grid_has_every_combination_that_narrows():
    config = cast(Config, Told())
    assert read_grid(["retrieval=9,3,3", "pre_ranking=2,5"], config) == [
        {"retrieval": 3, "pre_ranking": 2, "ranking": 1},
        {"retrieval": 9, "pre_ranking": 2, "ranking": 1},
        {"retrieval": 9, "pre_ranking": 5, "ranking": 1},
    ]
    for text, said in [
        ("ranker=3", "no stage 'ranker'"),
        ("ranking=", "expected numbers of 1 or more"),
        ("ranking=0", "expected numbers of 1 or more"),
        ("retrieval=1", "keep more than the one before it left"),
    ]:
        with pytest.raises(UserError, match=said):
            read_grid([text], config)


def test_places_reserved_for_a_pool_are_not_swept(monkeypatch):
    monkeypatch.setattr(Told.evaluation, "pools", {"all": ItemPool(), "fresh": ItemPool(quota=2)})
    with pytest.raises(UserError, match=r"--sweep: evaluation.pools.fresh.quota reserves 2 places; set it to 0"):
        read_grid(["retrieval=3"], cast(Config, Told()))


def test_runs_are_named_by_where_they_differ(tmp_path):
    one, two, other = tmp_path / "a" / "seed-0", tmp_path / "b" / "seed-0", tmp_path / "a" / "seed-1"
    assert run_names([one, other]) == {"seed-0": one, "seed-1": other}
    assert run_names([one, two]) == {"a/seed-0": one, "b/seed-0": two}
    with pytest.raises(UserError, match="seed-0: given twice"):
        run_names([one, other, one.parent / "." / "seed-0"])


def test_a_stage_costs_its_user_side_and_every_candidate():
    costs = {"retrieval": Cost(0, 100, 7, 2), "pre_ranking": Cost(0, 10, 7, 3), "ranking": Cost(0, 5, 0, 50)}
    assert funnel_costs(costs, QUOTAS, 1000) == {"retrieval": 2100, "pre_ranking": 19, "ranking": 105}
    assert funnel_costs(costs, {"pre_ranking": 8, "ranking": 9}, 4) == {"pre_ranking": 22, "ranking": 205}


def test_pictures_and_tables_of_groups_without_anything_wanted(tmp_path):
    found = dict(survival("positives", WANTED, stages_of(QUOTAS), QUOTAS, 3))
    numbers = {name: state.value for name, state in found.items()}
    numbers |= {f"group/2/{name}": float("nan") for name in numbers}
    rows = slices(numbers, Thirds(np.zeros(10, np.int64), (0, 4)))
    assert [row.name for row in rows] == [
        "all", "user group 2", "rare items (≤ 0)", "middling items (1 to 4)", "popular items (> 4)",
    ]  # fmt: skip
    table = lost_table(numbers, QUOTAS, rows)
    assert [row[:2] for row in table] == [["wanted", "of"], ["positives", "all"]]
    assert sum(map(float, table[1][2:])) == pytest.approx(1)
    lost_figure(numbers, QUOTAS, rows, tmp_path / "lost.png")
    survival_figure({"one": (numbers, QUOTAS), "two": (numbers, QUOTAS)}, tmp_path / "both.png")
    point = Point(QUOTAS, 1_000_000, {"positives": 0.5, REWARD: 1.2, "true_favourites": float("nan")})
    sweep_figure([point], QUOTAS, tmp_path / "sweep.png")
    assert all((tmp_path / name).stat().st_size > 5_000 for name in ("lost.png", "both.png", "sweep.png"))
