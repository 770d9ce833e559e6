"""Batches against plain Python: look-ups, table rows, inner lengths, the pool, labels, masks and excluded pairs."""

from collections.abc import Callable

import numpy as np
import pytest
import torch

from joint.batch import Batch
from joint.data.assemble import Assembler, logged
from joint.data.order import Position
from joint.data.ragged import Ragged
from joint.data.requests import Requests
from joint.data.sampling import Candidates, unlabelled
from joint.data.softmax_pool import PoolItems
from joint.experiment import HEADS
from joint.schema import Stage, table_rows

MakeAssembler = Callable[..., Assembler]
POOL = np.array([48, 49, -1, -1])
POOL_ITEMS = PoolItems.corpus(POOL)  # the last rank's slice
POSITION = Position(1, 2, 3)


def rows_of(lists: Ragged) -> list[list]:
    return [lists.values[a:b].tolist() for a, b in zip(lists.offsets, lists.offsets[1:], strict=False)]


@pytest.fixture
def requests(assembler: MakeAssembler) -> Requests:
    return assembler().dataset.read_split("train").take(np.arange(0, 40, 3))


def build(made: Assembler, requests: Requests, *, all_rows: bool = False) -> Batch:
    candidates = logged(requests, made.dataset)
    return made(requests, candidates, POOL_ITEMS, position=POSITION, scoring=HEADS if all_rows else None)


def looked_up(batch: Batch) -> dict[str, list[list[int]]]:
    """Key -> its ids per request."""
    found = {}
    for jagged in batch.sparse.values():
        for name, values in jagged.to_dict().items():
            found[name] = [part.tolist() for part in values.to_dense()]
    return found


def catalogue(made: Assembler, name: str) -> list:
    column = made.dataset.catalogue[name]
    return rows_of(column) if isinstance(column, Ragged) else column.tolist()


def expected_items(requests: Requests, side: str) -> list[list[int]]:
    """The item indices behind a key's side, per request."""
    if side == "candidate":
        return rows_of(requests.lists("candidates"))
    if side == "pool":
        return [POOL.tolist(), *([[]] * (len(requests) - 1))]
    return [items[-3:] if side == "watched" else items[-2:] for items in rows_of(requests.lists(side))]


def test_every_key_is_looked_up_for_its_items(assembler: MakeAssembler, requests: Requests) -> None:
    made = assembler()
    batch = build(made, requests)
    found = looked_up(batch)
    item_ids, words = catalogue(made, "item_id"), catalogue(made, "words")
    for name, ids in found.items():
        side, _, feature = name.rpartition(".")
        if not side:
            assert ids == [[value] for value in requests.scalars(name).tolist()]
        elif feature == "seen_on":
            assert ids == [events[-3:] for events in rows_of(requests.lists("watched.seen_on"))]
        elif feature == "item_id":
            assert ids == [[item_ids[i] if i >= 0 else 0 for i in row] for row in expected_items(requests, side)]
        else:
            assert feature == "words"
            items = expected_items(requests, side)
            assert ids == [[word for i in row for word in words[i]] for row in items]
            assert batch.inner[name].tolist() == [len(words[i]) for row in items for i in row]
    assert set(found) == {
        *("user_id", "device", "candidate.item_id", "candidate.words", "pool.item_id"),
        *("watched.item_id", "watched.words", "watched.seen_on", "saved.item_id"),
    }
    assert {name: lengths.tolist() for name, lengths in batch.lengths.items()} == {
        name: [len(row) for row in expected_items(requests, name)] for name in ("watched", "saved")
    }
    assert batch.unknown == 0


def test_ids_of_pool_items_that_are_padding(assembler: MakeAssembler, requests: Requests) -> None:
    made = assembler("heads.retrieval.features=[user_id, item_id, words]")
    batch = build(made, requests)
    words = catalogue(made, "words")
    assert looked_up(batch)["pool.words"][0] == words[48] + words[49]
    assert batch.inner["pool.words"].tolist() == [len(words[48]), len(words[49]), 0, 0]
    assert batch.pool_item.tolist() == POOL.tolist()


def test_floats(assembler: MakeAssembler, requests: Requests) -> None:
    made = assembler()
    floats = build(made, requests).floats
    price = made.dataset.catalogue["price"]
    assert isinstance(price, np.ndarray)
    assert set(floats) == {"hour", "candidate.price", "pool.price"}
    assert all(values.dtype == torch.float32 for values in floats.values())
    np.testing.assert_allclose(floats["hour"][:, 0], requests.scalars("hour"), rtol=1e-6)
    np.testing.assert_allclose(floats["candidate.price"][:, 0], price[requests.lists("candidates").values], rtol=1e-6)
    np.testing.assert_allclose(floats["pool.price"][:, 0], [price[48], price[49], 0, 0], rtol=1e-6)


def test_a_table_smaller_than_the_vocabulary(assembler: MakeAssembler, requests: Requests) -> None:
    whole = looked_up(build(assembler(), requests))
    batch = build(assembler("tables.user_id.rows=5", "tables.item_id.rows=20", "tables.words.rows=3"), requests)
    missed = 0
    for name, ids in looked_up(batch).items():
        rows = {"user_id": 5, "item_id": 20, "words": 3}.get(name.rpartition(".")[2], 10**6)
        assert ids == [[value if value < rows else 0 for value in row] for row in whole[name]]
        missed += sum(value >= rows for row in whole[name] for value in row)
    assert batch.unknown == missed > 0


def test_table_rows() -> None:
    rows, missed = table_rows(np.array([[0, 4, 5], [-1, 2**60, 1]]), 5)
    assert rows.tolist() == [[0, 4, 0], [0, 0, 1]]
    assert rows.dtype == np.int64
    assert missed == 3
    rows, missed = table_rows(np.zeros(0, np.int8), 5)
    assert (rows.dtype, rows.shape, missed) == (np.int64, (0,), 0)


def test_labels_of_each_kind_of_task(assembler: MakeAssembler, requests: Requests) -> None:
    exposed, ranked = int(Stage.EXPOSED | Stage.RANKED), int(Stage.RANKED)
    stages = np.array([exposed, exposed, exposed, exposed, ranked, ranked, int(Stage.RANDOM)], np.uint16)
    nan = np.nan
    labels = {
        "click": np.array([1, 0, nan, 2, 1, nan, nan], np.float32),
        "minutes": np.array([5, 4.9, 7, nan, 9, nan, nan], np.float32),
        "share": np.array([0.5, 1.7, -0.2, nan, 0.9, nan, nan], np.float32),
    }
    items = Ragged(np.arange(7), np.array([0, 7]))
    batch = assembler()(requests.take(np.array([4])), Candidates(items, stages, labels), POOL_ITEMS, position=POSITION)
    expected = {  # click, minutes >= 5, share clipped; nothing is known of what was not exposed, and it counts as 0
        "labels": [[1, 1, 0.5], [0, 0, 1], [0, 1, 0], [1, 0, 0], [0, 0, 0], [0, 0, 0], [0, 0, 0]],
        "positive": [[1, 1, 1], [0, 0, 1], [0, 1, 0], [1, 0, 0], [0, 0, 0], [0, 0, 0], [0, 0, 0]],
        "observed": [[1, 1, 1], [1, 1, 1], [0, 1, 1], [1, 0, 0], [1, 1, 1], [1, 1, 1], [1, 1, 1]],
    }
    for name, values in expected.items():
        assert getattr(batch, name).tolist() == torch.tensor(values, dtype=getattr(batch, name).dtype).tolist(), name


def test_what_is_not_observed_is_not_positive_even_from_0_on(assembler: MakeAssembler, requests: Requests) -> None:
    candidates = logged(requests, assembler().dataset)
    batch = build(assembler("tasks.minutes.at_least=0"), requests)
    exposed = (candidates.stages & Stage.EXPOSED) != 0
    known = ~np.isnan(candidates.labels["minutes"]) & exposed
    assert batch.positive[:, 1].tolist() == known.tolist()
    assert 0 < known.sum() < exposed.sum()


def test_where_candidates_are(assembler: MakeAssembler, requests: Requests) -> None:
    batch = build(assembler(), requests)
    candidates = rows_of(requests.lists("candidates"))
    assert batch.offsets.tolist() == [0, *np.cumsum([len(row) for row in candidates]).tolist()]
    assert batch.row.tolist() == [row for row, items in enumerate(candidates) for _ in items]
    assert batch.item.tolist() == [item for items in candidates for item in items]
    assert batch.stages.tolist() == requests.lists("stages").values.tolist()
    assert batch.request_id.tolist() == requests.scalars("request_id").tolist()
    assert batch.group.tolist() == requests.scalars("group").tolist()
    assert batch.requests == len(requests)
    assert batch.position == POSITION


def test_head_rows_are_what_the_objectives_need(assembler: MakeAssembler, requests: Requests) -> None:
    made = assembler()
    stages = [Stage(int(stage)) for stage in requests.lists("stages").values]
    exposed = [bool(stage & Stage.EXPOSED) for stage in stages]
    ranked = [bool(stage & Stage.RANKED) and not shown for stage, shown in zip(stages, exposed, strict=True)]
    coarse = [bool(stage & Stage.COARSE_NEG) for stage in stages]
    needed = {
        "retrieval": [False] * len(stages),
        "pre_ranking": [any(flags) for flags in zip(exposed, ranked, coarse, strict=True)],
        "ranking": exposed,
    }
    batch = build(made, requests)
    rows = batch.head_rows
    assert {head: r.tolist() for head, r in rows.items()} == {h: np.flatnonzero(m).tolist() for h, m in needed.items()}
    assert 0 < len(rows["ranking"]) < len(rows["pre_ranking"])
    assert {h: r.tolist() for h, r in batch.teaching_rows.items()} == {"ranking": np.flatnonzero(ranked).tolist()}
    everything = build(made, requests, all_rows=True)
    assert all(r.tolist() == list(range(len(stages))) for r in everything.head_rows.values())
    assert not everything.teaching_rows


def test_excluded_pairs_come_from_all_named_histories(assembler: MakeAssembler, requests: Requests) -> None:
    watched, saved = rows_of(requests.lists("watched")), rows_of(requests.lists("saved"))  # whole, not the newest
    both = [a + b for a, b in zip(watched, saved, strict=True)]
    pairs = [[row, item] for row, items in enumerate(both) for item in items]
    assert build(assembler(), requests).excluded.tolist() == pairs
    assert rows_of(assembler().eligibility.taken(requests)) == both
    none = build(assembler("data.not_eligible=[]"), requests).excluded
    assert none.shape == (0, 2)
    assert none.dtype == torch.int64


def test_the_whole_catalogue_as_candidates(assembler: MakeAssembler, requests: Requests) -> None:
    made = assembler()
    items = made.eligibility.eligible(requests)
    batch = made(requests, unlabelled(items, made.dataset.schema.labels), POOL_ITEMS, position=POSITION, scoring=HEADS)
    assert len(batch.item) == made.dataset.schema.items * len(requests) - len(
        {tuple(p) for p in batch.excluded.tolist()}
    )
    assert not batch.positive.any()
    assert batch.observed.all()


def test_a_batch_of_one_request_without_candidates(assembler: MakeAssembler) -> None:
    made = assembler()
    lonely = made.dataset.read_split("train").take(np.array([0]))  # the first requests of a day have no lists at all
    batch = build(made, lonely)
    assert batch.requests == 1
    assert batch.offsets.tolist() == [0, 0]
    assert looked_up(batch)["candidate.item_id"] == [[]]
    assert batch.labels.shape == (0, 3)


def test_moving_a_batch_moves_every_tensor(assembler: MakeAssembler, requests: Requests) -> None:
    batch = build(assembler(), requests)
    moved = batch.to(torch.device("meta"))
    assert moved.item.device.type == moved.head_rows["ranking"].device.type == "meta"
    assert all(jagged.values().device.type == "meta" for jagged in moved.sparse.values())
    assert (moved.position, moved.requests) == (POSITION, len(requests))
    assert batch.item.device.type == "cpu"
