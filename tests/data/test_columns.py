"""Columns of a batch against plain Python: cross features, competitors, vectors, numbers and lists of requests."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch

from joint.batch import Batch
from joint.config import load_config
from joint.data.assemble import Assembler, logged
from joint.data.columns import Columns
from joint.data.cross import cross_values
from joint.data.dataset import Dataset, DatasetWriter
from joint.data.loader import Loader
from joint.data.order import Position
from joint.data.ragged import Ragged, offsets_of
from joint.data.requests import Requests
from joint.data.sampling import Candidates, unlabelled, with_random
from joint.data.softmax_pool import PoolItems
from joint.errors import DataError
from joint.experiment import HEADS
from joint.features import Plan
from joint.fit import check_against
from joint.schema import Feature, History, Schema, Stage

Of = Literal["count", "recency"]
ITEMS, REQUESTS, K = 30, 40, 3
CONFIG = """
run: {{name: columns}}
data: {{path: {dataset}, shards: 4, requests_per_batch: 40, candidates: {{exposed: all, random: 5}}}}
tasks: {{click: {{label: click}}}}
tables: {{item_id: {{dim: 4}}, author: {{dim: 3}}, tags: {{dim: 4}}, place: {{dim: 2}}}}
cross:
  times: {{history: seen, feature: author}}
  since: {{history: seen, feature: author, of: recency}}
  lately: {{history: seen, feature: author, length: 2}}
  saved_times: {{history: saved, feature: item_id, length: 3}}
  unnamed: {{history: far, feature: item_id}}
encoders:
  short: {{history: seen, features: [item_id, tags, picture], length: 2, competing: {{}}, by: {{kind: mean}}}}
  long: {{history: seen, features: [price, author], events: [place, share], length: 4,
          by: {{kind: target_attention, hidden: [2]}}}}
heads:
  retrieval: {{features: [tastes, profile, hour, short, item_id, picture, price], dim: 4,
              trunk: {{kind: shared_bottom, hidden: [4]}}}}
  ranking: {{features: [tastes, long, times, since, lately, saved_times, item_id, picture],
            trunk: {{kind: shared_bottom, hidden: [4]}}}}
objectives:
  teacher: {{head: ranking, loss: binary, space: [exposed, random]}}
  retrieve: {{head: retrieval, loss: multi_class, space: [corpus]}}
train: {{evaluate_every_epochs: 0}}
evaluation: {{task: click}}
"""


def catalogue(rng: np.random.Generator) -> dict[str, np.ndarray | Ragged]:
    tags = rng.integers(0, 3, ITEMS)
    return {
        "item_id": rng.permutation(ITEMS) + 1,
        "author": rng.integers(0, 4, ITEMS),  # 0 is unknown, and not rare
        "tags": Ragged(rng.integers(1, 6, tags.sum()), offsets_of(tags)),
        "price": rng.random(ITEMS),
        "picture": Ragged(rng.random(2 * ITEMS).astype(np.float32), 2 * np.arange(ITEMS + 1)),
    }


def requests_of(rng: np.random.Generator, first: int, count: int) -> Requests:
    def lists(least: int, most: int, size: int) -> Ragged:
        lengths = rng.integers(least, most + 1, count)
        return Ragged(rng.integers(0, size, lengths.sum()).astype(np.int32), offsets_of(lengths))

    seen, candidates = lists(0, 7, ITEMS), lists(1, 6, ITEMS)
    against = rng.integers(-1, ITEMS, K * len(seen.values)).astype(np.int32)
    against[rng.random(len(against)) < 0.4] = -1
    return Requests(
        {
            "request_id": np.arange(first, first + count),
            "timestamp": np.arange(first, first + count),
            "group": np.zeros(count, np.int8),
            "tastes": lists(0, 3, 6),
            "profile": Ragged(rng.random(3 * count).astype(np.float32), 3 * np.arange(count + 1)),
            "hour": rng.random(count),
            "seen": seen,
            "seen.place": seen.with_values(rng.integers(0, 4, len(seen.values))),
            "seen.share": seen.with_values(rng.random(len(seen.values)).astype(np.float32)),
            "seen.competitors": Ragged(against, K * seen.offsets),
            "saved": lists(0, 4, ITEMS),
            "far": lists(0, 4, ITEMS),
            "candidates": candidates,
            "stages": candidates.with_values(np.full(len(candidates.values), Stage.EXPOSED, np.uint16)),
            "click": candidates.with_values(rng.integers(0, 2, len(candidates.values)).astype(np.float32)),
        }
    )


def write(out: Path, change: Callable[[Requests], Requests] = lambda requests: requests) -> None:
    """Write the log to OUT, its training requests changed."""
    rng = np.random.default_rng(5)
    with DatasetWriter(out) as writer:
        writer.items(catalogue(rng))
        writer.add(change(requests_of(rng, 0, REQUESTS)), day="2024-05-01", split="train")
        writer.add(requests_of(rng, 100, 3), day="2024-05-02", split="test")
        writer.finish(
            Schema(
                name="columns",
                items=ITEMS,
                features=(
                    Feature(name="tastes", level="request", kind="ids", space="tags", size=6),
                    Feature(name="item_id", level="item", kind="id", size=ITEMS + 1),
                    Feature(name="author", level="item", kind="id", size=4),
                    Feature(name="tags", level="item", kind="ids", size=6),
                    Feature(name="place", level="event", kind="id", size=4),
                    Feature(name="profile", level="request", kind="vector", size=3),
                    Feature(name="hour", level="request", kind="float"),
                    Feature(name="price", level="item", kind="float"),
                    Feature(name="picture", level="item", kind="vector", size=2),
                    Feature(name="share", level="event", kind="float"),
                ),
                histories=(
                    History(name="seen", events=("place", "share"), competitors=K),
                    History(name="saved"),
                    History(name="far"),
                ),
                labels=("click",),
                stages=("exposed",),
                input_space={},
            )
        )


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("columns") / "dataset"
    write(out)
    return out


@pytest.fixture
def make(path: Path, tmp_path: Path) -> Callable[..., Assembler]:
    """Overrides of the config -> an assembler of it over the log."""
    file = tmp_path / "columns.yaml"
    file.write_text(CONFIG.format(dataset=path))

    def made(*overrides: str) -> Assembler:
        config, tree = load_config(file, overrides)
        dataset = Dataset(path)
        check_against(config, tree, dataset.schema)
        return Assembler(Plan(config, dataset.schema), dataset)

    return made


def build(made: Assembler, candidates: Candidates | None = None) -> tuple[Requests, Batch]:
    requests = made.dataset.read_split("train")
    candidates = candidates or logged(requests, made.dataset)
    pool = PoolItems.corpus(np.array([3, 29, -1]))
    return requests, made(requests, candidates, pool, position=Position(), scoring=HEADS)


def rows_of(lists: Ragged) -> list[list]:
    return [lists.values[a:b].tolist() for a, b in zip(lists.offsets, lists.offsets[1:], strict=False)]


def catalogue_of(made: Assembler, name: str) -> list:
    column = made.dataset.catalogue[name]
    return rows_of(column) if isinstance(column, Ragged) else column.tolist()


def looked_up(batch: Batch) -> dict[str, list[list[int]]]:
    found = {key: jagged for sparse in batch.sparse.values() for key, jagged in sparse.to_dict().items()}
    return {key: [part.tolist() for part in jagged.to_dense()] for key, jagged in found.items()}


def slow_cross(past: list[int], value: int, of: Of) -> float:
    matches = [place for place, other in enumerate(past) if other == value != 0]
    if of == "count":
        return math.log(1 + len(matches))
    return 1 / (1 + len(past) - 1 - matches[-1]) if matches else 0.0


@pytest.mark.parametrize("of", ["count", "recency"])
def test_cross_values_by_hand(of: Of) -> None:
    past = Ragged(np.array([7, 0, 2, 7, 0, 2, 2]), np.array([0, 5, 5, 7]))
    candidates = Ragged(np.array([7, 0, 2, 9, 7, 0, 7, 2]), np.array([0, 4, 6, 8]))
    expected = np.log1p([2, 0, 1, 0, 0, 0, 0, 2]) if of == "count" else np.array([1 / 2, 0, 1 / 3, 0, 0, 0, 0, 1])
    found = cross_values(past, candidates, of)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.mark.parametrize("of", ["count", "recency"])
@pytest.mark.parametrize("seed", range(4))
def test_cross_values_of_random_lists(of: Of, seed: int) -> None:
    rng = np.random.default_rng(seed)
    highest = [1, 2, 5, 10**9][seed]  # in the first, all is unknown

    def lists() -> Ragged:
        lengths = rng.integers(0, 9, 50)
        return Ragged(rng.integers(0, highest, 20)[rng.integers(0, 20, lengths.sum())], offsets_of(lengths))

    past, candidates = lists(), lists().take(rng.permutation(50))
    candidates = Ragged(np.where(rng.random(len(candidates.values)) < 0.5, candidates.values, 1), candidates.offsets)
    pairs = zip(rows_of(past), rows_of(candidates), strict=True)
    expected = np.array([slow_cross(events, value, of) for events, values in pairs for value in values])
    np.testing.assert_allclose(cross_values(past, candidates, of), expected, rtol=1e-6)
    empty = Ragged(np.zeros(0, np.int64), np.zeros(51, np.int64))
    assert not cross_values(empty, candidates, of).any()
    assert cross_values(past, empty, of).shape == (0,)


def test_cross_features_of_a_batch(make: Callable[..., Assembler]) -> None:
    made = make()
    requests, batch = build(made)
    seen, saved = rows_of(requests.lists("seen")), rows_of(requests.lists("saved"))
    author, item_id = catalogue_of(made, "author"), catalogue_of(made, "item_id")
    rules: dict[str, tuple[list[list], list, int, Of]] = {
        "times": (seen, author, 50, "count"),
        "since": (seen, author, 50, "recency"),
        "lately": (seen, author, 2, "count"),
        "saved_times": (saved, item_id, 3, "count"),
    }
    for name, (past, feature, length, of) in rules.items():
        expected = [
            [slow_cross([feature[i] for i in past[r][-length:]], feature[item], of)]
            for r, item in zip(batch.row.tolist(), batch.item.tolist(), strict=True)
        ]
        np.testing.assert_allclose(batch.floats[name].numpy(), expected, rtol=1e-6)
        assert len(np.unique(expected)) > 1, name
    assert not torch.equal(batch.floats["times"], batch.floats["lately"])
    assert "far" not in batch.lengths  # the cross feature that reads it is named by no head
    assert batch.lengths["seen"].tolist() == [len(row) for row in seen]


def test_cross_features_follow_their_candidates_and_sampled_ones_have_the_same(make: Callable[..., Assembler]) -> None:
    made = make()
    requests, batch = build(made)
    rng = np.random.default_rng(0)
    items = requests.lists("candidates")
    order = np.lexsort((rng.random(len(items.values)), items.rows))
    shuffled = unlabelled(items.with_values(items.values[order]), ("click",))
    both = with_random(logged(requests, made.dataset), shuffled.items)
    for name in ("times", "since", "lately", "saved_times"):
        assert torch.equal(build(made, shuffled)[1].floats[name], batch.floats[name][order])
        known: dict[tuple[int, int], float] = {}
        doubled = build(made, both)[1]
        assert len(doubled.item) == 2 * len(batch.item)
        for place in zip(doubled.row.tolist(), doubled.item.tolist(), doubled.floats[name][:, 0].tolist(), strict=True):
            assert known.setdefault(place[:2], place[2]) == place[2]


def test_random_negatives_of_the_loader_have_cross_features_too(make: Callable[..., Assembler]) -> None:
    made = make()
    batch = next(Loader(made, rank=0, world_size=1)._batches(Position()))
    drawn = (batch.stages & int(Stage.RANDOM)) != 0
    assert batch.floats["times"][drawn].any()
    author = torch.tensor(catalogue_of(made, "author"))[batch.item]
    assert not batch.floats["times"][author == 0].any()
    assert not batch.floats["since"][author == 0].any()


@pytest.mark.parametrize(("cross", "kept"), [([], 4), (["times"], 50)])
def test_competitors_stand_beside_the_newest_events(make: Callable[..., Assembler], cross: list, kept: int) -> None:
    """Where a cross feature reads further back than the encoders, so many are kept."""
    made = make(f"heads.ranking.features=[{', '.join(['tastes', 'long', 'item_id', 'picture', *cross])}]")
    requests, batch = build(made)
    events = [row[-kept:] for row in rows_of(requests.lists("seen"))]
    against = [row[-kept * K :] for row in rows_of(requests.lists("seen.competitors"))]
    assert batch.lengths["seen"].tolist() == [len(row) for row in events]
    assert [len(row) for row in against] == [K * len(row) for row in events]
    flat = [item for row in against for item in row]
    assert batch.competitors["seen"].shape == (sum(map(len, events)), K)
    assert batch.competitors["seen"].flatten().tolist() == [item >= 0 for item in flat]
    found = looked_up(batch)
    item_id, tags = catalogue_of(made, "item_id"), catalogue_of(made, "tags")
    assert found["seen.item_id"] == [[item_id[i] for i in row] for row in events]
    assert found["seen.competitors.item_id"] == [[item_id[i] if i >= 0 else 0 for i in row] for row in against]
    assert found["seen.competitors.tags"] == [[t for i in row if i >= 0 for t in tags[i]] for row in against]
    assert batch.inner["seen.competitors.tags"].tolist() == [len(tags[i]) if i >= 0 else 0 for i in flat]
    picture = catalogue_of(made, "picture")
    expected = [picture[i] if i >= 0 else [0, 0] for i in flat]
    np.testing.assert_allclose(batch.floats["seen.competitors.picture"], expected)
    assert "seen.competitors.price" not in batch.floats  # no encoder with competitors reads it


def test_numbers_and_vectors_on_every_side(make: Callable[..., Assembler]) -> None:
    made = make()
    requests, batch = build(made)
    price, vectors = np.array(catalogue_of(made, "price")), np.array(catalogue_of(made, "picture"))
    seen, candidates = requests.lists("seen").values, requests.lists("candidates").values
    expected = {
        "hour": requests.scalars("hour")[:, None],
        "profile": requests.lists("profile").values.reshape(REQUESTS, 3),
        "candidate.picture": vectors[candidates],
        "pool.picture": [vectors[3], vectors[29], [0, 0]],
        "pool.price": [[price[3]], [price[29]], [0]],
        "candidate.price": price[candidates][:, None],
        "seen.picture": vectors[seen],
        "seen.price": price[seen][:, None],
        "seen.share": requests.lists("seen.share").values[:, None],
    }
    crossed = {"times", "since", "lately", "saved_times", "seen.competitors.picture"}
    assert set(batch.floats) == set(expected) | crossed
    for name, values in expected.items():
        assert batch.floats[name].dtype == torch.float32
        np.testing.assert_allclose(batch.floats[name], np.asarray(values, np.float32), err_msg=name)
    assert looked_up(batch)["seen.place"] == rows_of(requests.lists("seen.place"))


def test_lists_of_ids_of_a_request_read_the_table_of_their_space(make: Callable[..., Assembler]) -> None:
    made = make()
    requests, batch = build(made)
    tastes = rows_of(requests.lists("tastes"))
    assert looked_up(batch)["tastes"] == tastes
    assert batch.inner["tastes"].tolist() == [len(row) for row in tastes]
    assert [] in tastes
    readers = {shape.name: set(shape.keys) for shape in made.plan.tables}
    assert readers["tags"] == {"tastes", "seen.tags", "seen.competitors.tags"}


def test_tables_of_one_s_own_are_looked_up_with_the_same_ids(make: Callable[..., Assembler]) -> None:
    shared, own = build(make())[1], build(make("sharing.mode=none"))[1]
    names = looked_up(shared), looked_up(own)
    assert {name.partition("@")[0] for name in names[1]} == set(names[0])
    for name, ids in names[1].items():
        assert ids == names[0][name.partition("@")[0]]
        assert "@" in name
    assert {"tastes@retrieval", "tastes@ranking", "seen.competitors.tags@retrieval"} < set(names[1])
    assert "seen.competitors.tags@ranking" not in names[1]
    for name, values in own.floats.items():
        assert torch.equal(values, shared.floats[name.partition("@")[0]])
    assert own.unknown == 0


def test_an_empty_selection_of_requests(make: Callable[..., Assembler]) -> None:
    made = make()
    none = made.dataset.read_split("train").take(np.zeros(0, int))
    columns = Columns(made.plan.reads, made.dataset.catalogue, none, none.lists("candidates"), np.zeros(0, np.int64))
    for key in made.plan.keys:
        if key.embedded:
            assert len(columns.ids(key)[0]) == 0
        else:
            assert columns.numbers(key).shape == (0, made.plan.dim(key.feature))


def changed(name: str, change: Callable[[Ragged], Ragged]) -> Callable[[Requests], Requests]:
    return lambda requests: Requests({**requests.columns, name: change(requests.lists(name))})


def shorter(lists: Ragged) -> Ragged:
    return lists.keep(np.arange(len(lists.values)) > 0)


@pytest.mark.parametrize(
    ("column", "change"),
    [
        ("seen.competitors", lambda lists: lists.with_values(np.where(lists.values < 0, ITEMS, lists.values))),
        ("seen.competitors", shorter),
        ("profile", shorter),
        ("seen.place", shorter),
    ],
)
def test_lists_that_do_not_fit_are_said_to_be_wrong_where_they_are_read(
    tmp_path: Path, column: str, change: Callable[[Ragged], Ragged]
) -> None:
    write(tmp_path / "dataset", changed(column, change))
    with pytest.raises(DataError, match=f"part-train-0.parquet: column {column}"):
        Dataset(tmp_path / "dataset").read_split("train")
