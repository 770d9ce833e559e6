"""The truth of a planted funnel: its formulas by loops over files alone, its ceilings, and the log drawn from it."""

import json
import math
from dataclasses import fields
from pathlib import Path
from typing import get_type_hints

import numpy as np
import pytest

from joint.data.dataset import Dataset
from joint.data.planted.simulate import parameters_of, simulate
from joint.data.planted.truth import Parameters, clustered, exact, open_truth, top
from joint.data.ragged import Ragged, offsets_of
from joint.data.requests import Requests
from joint.errors import DataError

LABELS = ("effective_view", "like", "minutes", "watch_ratio", "dwm")


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """A small world whose histories are full of what its cross effects count: its folder and its truth."""
    out = tmp_path_factory.mktemp("truth") / "log"
    overrides = ["users=60", "items=300", "days=6", "requests=1200", "history=60", "view_base=-2.5", "window=12"]
    overrides += ["categories=5", "subcategories=1", "items_per_author=20"]  # so that both effects reach their limits
    simulate(out, parameters_of("misled", "small", overrides), seed=7)
    return out, open_truth(out)


@pytest.fixture(scope="module")
def asked(planted):
    return Dataset(planted[0]).read_split("test")


def by_hand(folder: Path, user: int, day: int, history: list[int], item: int) -> dict[str, float]:
    """Expected labels and reward of one pair, from the files of the truth, one number at a time."""
    said = json.loads((folder / "truth/world.json").read_text())
    p = said["parameters"]
    load = {name: np.load(folder / f"truth/{name}.npy", allow_pickle=False) for name in said["arrays"]}
    nothing = dict.fromkeys((*LABELS, "reward"), 0.0)
    if item in history or load["item.first_day"][item] > day:
        return nothing

    def product(left: np.ndarray, right: np.ndarray) -> float:
        return sum(float(a) * float(b) for a, b in zip(left, right, strict=True))

    angle = p["drift"] * (day - said["start"])
    turned = math.cos(angle) * load["user.view"][user] + math.sin(angle) * load["user.view_later"][user]
    taste = [min(max(round(float(x) * 128) / 128, -4), 4) for x in turned]
    appeal = float(load["item.appeal"][item])
    logit = p["view_base"] + appeal + product(taste, load["item.view"][item])
    logit += float(load["effects"][load["user.cell"][user], load["item.category"][item]])
    recent = history[-p["window"] :]
    same_author = sum(load["item.author"][past] == load["item.author"][item] for past in recent)
    same_category = sum(load["item.subcategory"][past] == load["item.subcategory"][item] for past in recent)
    logit += p["affinity"] * min(same_author, 2) - p["fatigue"] * min(max(same_category - p["patience"], 0), 5)
    view = 1 / (1 + math.exp(-logit))
    like = 1 / (1 + math.exp(-p["like_base"] - product(load["user.like"][user], load["item.like"][item])))
    length = float(load["item.length"][item])
    held = product(load["user.minutes"][user], load["item.minutes"][item]) - p["clickbait"] * appeal
    minutes = p["minutes_mean"] * math.sqrt(length / 2) * math.exp(held)
    wish = product(load["user.returns"][user], load["item.returns"][item]) + p["series"] * load["item.series"][item]
    dwm = minutes + p["returns_mean"] * math.exp(wish) * p["visit_minutes"]
    return {
        "effective_view": view,
        "like": view * like,
        "minutes": view * minutes,
        "watch_ratio": view * minutes / length,
        "dwm": view * dwm,
        "reward": view * (1 + p["like_reward"] * like + p["minute_reward"] * dwm),
    }


def test_reward_and_expected_are_the_formulas(planted, asked):
    folder, truth = planted
    chosen = asked.take(np.arange(0, len(asked), 8))
    rng = np.random.default_rng(0)
    lengths = rng.integers(0, 9, len(chosen))
    items = Ragged(rng.integers(300, size=lengths.sum()).astype(np.int32), offsets_of(lengths))
    watched = chosen.lists("effective")
    items.values[items.offsets[:-1][lengths > 0]] = watched.values[watched.offsets[:-1][lengths > 0]]  # seen ones too
    users, days = chosen.scalars("user_id") - 1, chosen.scalars("day")
    hand = []
    for row, item in zip(items.rows, items.values, strict=True):
        history = watched.values[watched.offsets[row] : watched.offsets[row + 1]].tolist()
        hand.append(by_hand(folder, users[row], days[row], history, int(item)))
    found = truth.expected(chosen, items)
    assert set(found) == set(hand[0])
    for name, values in found.items():
        assert values.dtype == np.float64
        np.testing.assert_allclose(values, [one[name] for one in hand], rtol=1e-12, atol=0)
    assert np.array_equal(truth.reward(chosen, items), found["reward"])
    assert (found["reward"] == 0).sum() >= (lengths > 0).sum()


def test_an_item_that_is_not_out_yet_is_reward_nothing(planted):
    folder, truth = planted
    first = Dataset(folder).read_split("train").take(np.zeros(1, np.int64))
    everything = Ragged(np.arange(300), np.array([0, 300]))
    reward = truth.reward(first, everything)
    assert np.array_equal(reward > 0, truth.arrays["item.first_day"] <= truth.start)


def test_the_cross_effects_reach_the_reward(planted, asked):
    truth = planted[1]
    block = asked.take(np.arange(100))
    crossed, plain = truth.rewards(block), truth.rewards(block, crossed=False)
    assert (crossed > plain).any()  # affinity
    assert (crossed < plain).any()  # fatigue
    empty = {"effective": Ragged(np.zeros(0, np.int32), np.zeros(101, np.int64))}
    fresh = Requests({**block.columns, **empty})
    assert np.array_equal(truth.rewards(fresh), truth.rewards(fresh, crossed=False))


def test_best_is_a_sort_of_everything(planted, asked):
    truth = planted[1]
    eligible = np.random.default_rng(1).random((len(asked), 300)) < 0.3
    eligible[0] = False
    eligible[1, :] = np.arange(300) < 4
    best = truth.best(asked, 6, eligible)
    assert best.lengths[0] == 0
    assert best.lengths[1] == 4
    everything = Ragged(np.tile(np.arange(300), len(asked)), np.arange(len(asked) + 1) * 300)
    reward = truth.reward(asked, everything).reshape(-1, 300)
    for row in range(len(asked)):
        allowed = [item for item in range(300) if eligible[row, item]]
        expected = sorted(allowed, key=lambda item: (-reward[row, item], item))[:6]
        assert best.values[best.offsets[row] : best.offsets[row + 1]].tolist() == expected


def test_no_requests(planted, asked):
    truth, none = planted[1], asked.take(np.zeros(0, np.int64))
    empty = Ragged(np.zeros(0, np.int32), np.zeros(1, np.int64))
    assert truth.reward(none, empty).shape == (0,)
    assert len(truth.best(none, 3, np.ones((0, 300), bool))) == 0


def test_labels_are_drawn_from_the_truth(planted):
    """Sums over exposures lie within four deviations of the truth's."""
    folder, truth = planted
    requests = Dataset(folder).read_split("train")
    candidates = requests.lists("candidates")
    exposed = ~np.isnan(requests.lists("effective_view").values)
    shown = candidates.keep(exposed)
    expected = truth.expected(requests, shown)
    label = {name: requests.lists(name).values[exposed].astype(np.float64) for name in LABELS}
    view, like = expected["effective_view"], expected["like"]
    for name, chance in (("effective_view", view), ("like", like)):
        deviation = math.sqrt((chance * (1 - chance)).sum())
        assert abs(label[name].sum() - chance.sum()) < 4 * deviation, name
        high = chance > np.median(chance)
        assert abs(label[name][high].sum() - chance[high].sum()) < 4 * deviation, name
    for name in ("minutes", "watch_ratio", "dwm"):
        error = label[name] - expected[name]
        assert abs(error.sum()) < 4 * math.sqrt((error**2).sum()), name
    minutes = label["minutes"][label["minutes"] > 0] / (expected["minutes"] / view)[label["minutes"] > 0]
    spread = truth.parameters.minutes_noise
    assert abs(np.log(minutes).std() - spread) < 4 * spread / math.sqrt(2 * len(minutes))
    assert abs(np.log(minutes).mean() + spread**2 / 2) < 4 * spread / math.sqrt(len(minutes))


@pytest.mark.parametrize("split", ["valid", "test"])
def test_ceilings(planted, split):
    folder, truth = planted
    dataset = Dataset(folder)
    part = next(part for part in dataset.schema.parts if part.split == split)
    requests = dataset.read(part, further=["rerank_index"])
    everything = Ragged(np.tile(np.arange(300), len(requests)), np.arange(len(requests) + 1) * 300)
    reward = truth.reward(requests, everything).reshape(-1, 300)
    before = dataset.read_split("train")
    views = np.zeros(300)
    np.add.at(views, before.lists("candidates").values, np.nan_to_num(before.lists("effective_view").values))
    watched = requests.lists("effective")
    totals = {"random": 0.0, "popularity": 0.0, "oracle": 0.0, "incumbent": 0.0}
    for row in range(len(requests)):
        seen = set(watched.values[watched.offsets[row] : watched.offsets[row + 1]].tolist())
        free = [i for i in range(300) if i not in seen and dataset.first_day[""][i] <= requests.scalars("day")[row]]
        lists = {
            "random": free,
            "popularity": sorted(free, key=lambda item: (-views[item], item))[:10],
            "oracle": sorted(free, key=lambda item: -reward[row, item])[:10],
        }
        one = slice(*requests.lists("candidates").offsets[row : row + 2])
        place = requests.lists("rerank_index").values[one]
        lists["incumbent"] = requests.lists("candidates").values[one][(place >= 0) & (place < 10)].tolist()
        for name, items in lists.items():
            totals[name] += float(np.mean([reward[row, item] for item in items]))
    for name, total in totals.items():
        assert truth.ceilings[f"{split}/{name}"] == pytest.approx(total / len(requests), rel=1e-9), name
    assert totals["random"] < totals["popularity"] < totals["incumbent"] < totals["oracle"]
    assert truth.ceilings[f"{split}/light_oracle"] < truth.ceilings[f"{split}/oracle"]


def test_a_dataset_without_truth_and_a_damaged_one(planted, tmp_path):
    assert open_truth(tmp_path) is None
    (tmp_path / "truth").mkdir()
    with pytest.raises(DataError, match="not the truth of a planted funnel"):
        open_truth(tmp_path)
    said = (planted[0] / "truth/world.json").read_text()
    (tmp_path / "truth/world.json").write_text(said)
    with pytest.raises(DataError, match=r"npy.*simulate the dataset again"):
        open_truth(tmp_path)


def test_nothing_in_the_truth_is_a_pickle(planted):
    for file in (planted[0] / "truth").glob("*.npy"):
        np.load(file, allow_pickle=False)


def test_exact_vectors_sum_exactly_in_any_order():
    rng = np.random.default_rng(0)
    left, right = exact(5 * rng.standard_normal((50, 63))), exact(5 * rng.standard_normal((70, 63)))
    whole = left.astype(np.float64) @ right.T.astype(np.float64)
    order = rng.permutation(63)
    assert np.array_equal(left @ right.T, whole)
    assert np.array_equal(left[:, order] @ right[:, order].T, whole)
    assert np.abs(left).max() == 4


def test_clustered_vectors_are_standard_and_share_what_they_should():
    rng = np.random.default_rng(0)
    parents = [np.repeat(np.arange(2000), 2), np.tile(np.arange(2), 2000)]
    vectors = clustered(rng, [parents[0]], 0.4, 5)
    assert vectors.std() == pytest.approx(1, abs=0.02)
    assert (vectors[::2] * vectors[1::2]).mean() == pytest.approx(0.6, abs=0.03)


def test_top_breaks_ties_by_place():
    scores = np.array([[1, 3, 3, 0, 3], [2, 2, 2, 2, 2], [-np.inf, -np.inf, 1, -np.inf, -np.inf]])
    assert top(scores, 2).tolist() == [[1, 2], [0, 1], [2, 0]]
    assert top(scores, 9).tolist() == [[1, 2, 4, 0, 3], [0, 1, 2, 3, 4], [2, 0, 1, 3, 4]]


def test_every_parameter_is_documented():
    page = (Path(__file__).parents[2] / "docs/simulate.md").read_text().splitlines()
    hints = get_type_hints(Parameters, include_extras=True)
    rows = [f"| `{item.name}` | {item.default} | {hints[item.name].__metadata__[0]} |" for item in fields(Parameters)]
    assert [line for line in page if line.startswith("| `") and line.split("`")[1] in hints] == rows
