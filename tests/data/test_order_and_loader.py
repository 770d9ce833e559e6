"""The order of training and the loader: every request once, the same for any number of ranks, from any position."""

import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from joint.batch import Batch
from joint.config import load_config
from joint.data import loader
from joint.data.assemble import Assembler
from joint.data.dataset import Dataset
from joint.data.loader import Loader, prefetch
from joint.data.narrow import narrowed
from joint.data.order import WINDOW_GROUPS, DayOrder, Position
from joint.errors import ConfigError, DataError
from joint.features import Plan
from joint.schema import Stage

MakeAssembler = Callable[..., Assembler]
DAYS = 3


def batches(assembler: Assembler, world: int, start: Position = Position()) -> list[list[Batch]]:  # noqa: B008
    """Every rank's batches."""
    return [list(Loader(assembler, rank=rank, world_size=world).from_position(start)) for rank in range(world)]


def ids(batch: Batch) -> list[int]:
    return batch.request_id.tolist() if batch.requests else []


def assert_equal(a: object, b: object, name: str) -> None:
    if isinstance(a, dict) and isinstance(b, dict):
        assert list(a) == list(b), name
        for key in a:
            assert_equal(a[key], b[key], f"{name}.{key}")
    elif isinstance(a, KeyedJaggedTensor) and isinstance(b, KeyedJaggedTensor):
        assert a.keys() == b.keys(), name
        assert_equal(a.values(), b.values(), name)
        assert_equal(a.lengths(), b.lengths(), name)
    elif isinstance(a, Tensor) and isinstance(b, Tensor):
        assert a.dtype == b.dtype, name
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True, msg=name)
    else:
        assert a == b, name


def assert_same(a: Batch, b: Batch) -> None:
    for field in fields(Batch):
        assert_equal(getattr(a, field.name), getattr(b, field.name), field.name)


def by_epoch(per_rank: list[list[Batch]]) -> list[list[set[int]]]:
    """Epoch -> global batch -> its requests."""
    found: list[list[set[int]]] = [[]]
    for step in zip(*per_rank, strict=True):
        found[-1].append(set().union(*map(ids, step)))
        assert len({batch.position for batch in step}) == 1
        if step[0].position.epoch == len(found):
            found.append([])
    return found[:-1]


def test_every_request_once_an_epoch_for_any_world_size(assembler: MakeAssembler) -> None:
    made = assembler()
    per_day = [
        made.dataset.read(part, range(len(part.groups))).scalars("request_id").tolist()
        for part in made.dataset.schema.parts
        if part.split == "train"
    ]
    expected = [request for day in per_day for request in day]
    alone = by_epoch(batches(made, 1))
    for world in (1, 2, 4, 8):
        per_rank = batches(made, world)
        assert {len(rank) for rank in per_rank} == {Loader(made, rank=0, world_size=world).batches_left(Position())}
        assert by_epoch(per_rank) == alone
        seen = [Counter(i for rank in per_rank for b in rank for i in ids(b) if in_epoch(b, epoch)) for epoch in (0, 1)]
        assert seen == [Counter(expected)] * 2
        assert sum(batch.requests for rank in per_rank for batch in rank) == 2 * len(expected)
    days = [[next(day for day, part in enumerate(per_day) if i in part) for b in e for i in sorted(b)] for e in alone]
    assert all(day == sorted(day) for day in days)  # days in time order


def in_epoch(batch: Batch, epoch: int) -> bool:
    """Whether a batch was of this epoch: its position is that of the batch after it."""
    after = batch.position
    return epoch == after.epoch - ((after.day, after.batch) == (0, 0))


def test_epochs_and_seeds_differ_in_order_and_draws(assembler: MakeAssembler) -> None:
    made = assembler()
    [first], [other] = batches(made, 1), batches(assembler("run.seed=4"), 1)
    half = len(first) // 2
    order = [[i for batch in part for i in ids(batch)] for part in (first[:half], first[half:], other[:half])]
    assert sorted(order[0]) == sorted(order[1]) == sorted(order[2])
    assert order[0] != order[1]
    assert order[0] != order[2]
    drawn = [draws(part) for part in (first[:half], first[half:], other[:half])]
    same = [sum(drawn[0][i] == changed[i] for i in order[0]) / len(order[0]) for changed in drawn[1:]]
    assert max(same) < 0.1


def draws(run: list[Batch]) -> dict[int, list[int]]:
    """Request -> its candidates."""
    return {
        request: batch.item[batch.offsets[row] : batch.offsets[row + 1]].tolist()
        for batch in run
        for row, request in enumerate(ids(batch))
    }


def test_draws_do_not_depend_on_ranks_and_batches(assembler: MakeAssembler) -> None:
    expected = draws(batches(assembler("data.epochs=1"), 1)[0])
    for world, size in ((4, 32), (1, 64), (2, 8)):
        per_rank = batches(assembler("data.epochs=1", f"data.requests_per_batch={size}"), world)
        assert draws([batch for rank in per_rank for batch in rank]) == expected


@pytest.mark.parametrize("names", [("watched", "saved"), ()])
def test_random_negatives_are_neither_logged_nor_in_named_histories(
    assembler: MakeAssembler, names: tuple[str, ...]
) -> None:
    made = assembler(f"data.not_eligible=[{', '.join(names)}]", "data.candidates.random=40", "data.epochs=1")
    log = made.dataset.read_split("train")

    def pairs(*columns: str) -> set[tuple[int, int]]:
        lists = [log.lists(name) for name in columns]
        return {pair for one in lists for pair in zip(request[one.rows].tolist(), one.values.tolist(), strict=True)}

    request = log.scalars("request_id")
    sampled: set[tuple[int, int]] = set()
    for batch in batches(made, 1)[0]:
        random = batch.stages == int(Stage.RANDOM)
        row = batch.row[random]
        sampled |= set(zip(batch.request_id[row].tolist(), batch.item[random].tolist(), strict=True))
        # At most 18 of the 50 items are taken: 8 attempts hardly ever fail.
        assert torch.bincount(row, minlength=batch.requests).min() >= 39
    assert not sampled & pairs("candidates", *names)
    assert bool(sampled & pairs("watched", "saved")) == (not names)


def test_restart_from_any_position(assembler: MakeAssembler) -> None:
    made = assembler()
    per_rank = batches(made, 2)
    for number in range(0, len(per_rank[0]), 3):
        again = batches(made, 2, per_rank[0][number].position)
        for rank in range(2):
            rest = per_rank[rank][number + 1 :]
            assert len(again[rank]) == len(rest)
            for a, b in zip(again[rank], rest, strict=True):
                assert_same(a, b)
    assert per_rank[0][-1].position == Position(epoch=2)
    assert batches(made, 2, Position(epoch=2)) == [[], []]


def test_a_rank_without_requests_has_an_empty_batch(assembler: MakeAssembler) -> None:
    empty = [batch for rank in batches(assembler("data.epochs=1"), 8) for batch in rank if not batch.requests]
    assert empty  # the day of 7 requests is one row group: only one shard has any
    for batch in empty:
        assert len(batch.request_id) == 1
        assert batch.offsets.tolist() == [0, 0]
        for tensor in (
            batch.item,
            batch.labels,
            batch.positive,
            batch.observed,
            batch.stages,
            batch.row,
            batch.excluded,
        ):
            assert len(tensor) == 0
        assert all(len(rows) == 0 for rows in batch.head_rows.values())
        assert all(lengths.tolist() == [0] for lengths in batch.lengths.values())
        for name, jagged in ((name, v) for kjt in batch.sparse.values() for name, v in kjt.to_dict().items()):
            user, pool = name in ("user_id", "device"), name.startswith("pool.")
            assert len(jagged.values()) == (1 if user else len(batch.pool_item) if pool else 0), name


def test_positions_count_batches_of_a_day(assembler: MakeAssembler) -> None:
    made = assembler()
    loader = Loader(made, rank=0, world_size=1)
    position = Position()
    for batch in loader.from_position(position):
        following = batch.position
        assert following in (
            replace(position, batch=position.batch + 1),
            Position(position.epoch, position.day + 1),
            Position(position.epoch + 1),
        )
        assert following.day < DAYS
        position = following


def test_columns_that_no_key_history_or_task_needs_are_not_read(
    assembler: MakeAssembler, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = assembler(
        *("encoders.watched.events=[]", "encoders.saved.history=watched", "data.not_eligible=[]"),
        *("tasks.minutes=", "tasks.share=", "heads.ranking.features=[user_id, watched, item_id]"),
    )
    [narrow] = batches(made, 1)
    read = narrowed(made.dataset, made.plan).columns()
    assert set(made.dataset.columns()) - set(read) == {"device", "watched.seen_on", "saved", "minutes", "share"}
    monkeypatch.setattr(loader, "narrowed", lambda dataset, _: dataset)
    for one, other in zip(narrow, batches(made, 1)[0], strict=True):
        assert_same(one, other)


def test_a_batch_takes_its_share_from_every_shard(assembler: MakeAssembler) -> None:
    made = assembler()
    day = next(iter(made.dataset.parts(["train"])))
    order = DayOrder(made.dataset.parts(["train"])[day], day, epoch=0, seed=0, shards=4, batch=8)
    total = sum(part.rows for part in made.dataset.parts(["train"])[day])
    counts = np.array([[len(s) if s else 0 for s in order.shares(i, 0, made.dataset)] for i in range(4)])
    assert counts.sum() == total
    assert counts.shape == (4, order.batches)
    for shard in counts:  # full shares, then the rest, then nothing
        assert shard.tolist() == sorted(shard, reverse=True)
        assert set(shard.tolist()) <= {2, 1, 0}


def test_windows_hold_few_row_groups(assembler: MakeAssembler) -> None:
    made = assembler()
    [(day, parts)] = [(day, parts) for day, parts in made.dataset.parts(["train"]).items() if day == "2024-02-28"]
    order = DayOrder(parts, day, epoch=0, seed=0, shards=1, batch=32)
    assert [len(window.groups) for window in order.windows[0]] == [WINDOW_GROUPS, 2]  # 150 requests in groups of 16
    whole = [share.scalars("request_id") for share in order.shares(0, 0, made.dataset) if share]
    for first in (0, 1, 3, 4):  # batch 4 begins with what two windows hold
        rest = [share.scalars("request_id") for share in order.shares(0, first, made.dataset) if share]
        np.testing.assert_array_equal(np.concatenate(rest), np.concatenate(whole[first:]))
    windowed = np.concatenate(whole)
    border = order.windows[0][0].end
    groups = [{int(i) // 16 for i in windowed[:border]}, {int(i) // 16 for i in windowed[border:]}]
    assert not groups[0] & groups[1]
    assert border % 32  # a batch takes from both
    np.testing.assert_array_equal(np.sort(windowed), np.arange(150))
    assert not np.array_equal(windowed, np.sort(windowed))


def test_a_window_is_permuted_anew_every_epoch(assembler: MakeAssembler) -> None:
    made = assembler()
    day = "2024-03-01"  # 90 requests in 6 row groups: one window
    parts = made.dataset.parts(["train"])[day]
    epochs = [DayOrder(parts, day, epoch=epoch, seed=0, shards=1, batch=90) for epoch in range(3)]
    found = [next(order.shares(0, 0, made.dataset)) for order in epochs]
    orders = [tuple(requests.scalars("request_id").tolist()) for requests in found if requests]
    assert len(set(orders)) == 3
    assert len({tuple(sorted(order)) for order in orders}) == 1


def test_the_little_movielens_with_three_heads(config_path: str, dataset: Dataset) -> None:
    config, _ = load_config(config_path)
    made = Assembler(Plan(config, dataset.schema), dataset)
    seen = Counter(i for rank in batches(made, 4) for batch in rank for i in ids(batch))
    assert len(seen) == dataset.schema.requests("train")
    assert set(seen.values()) == {2}


def test_world_size_must_divide_the_shards(assembler: MakeAssembler) -> None:
    with pytest.raises(ConfigError, match=r"data\.shards: 8 is not a multiple of the number of ranks, 3"):
        Loader(assembler(), rank=0, world_size=3)


def test_training_on_a_split_without_requests(assembler: MakeAssembler) -> None:
    with pytest.raises(ConfigError, match="no request in test"):
        Loader(assembler("data.train=[test]"), rank=0, world_size=1)


def test_prefetch_hands_over_values_in_order_and_then_the_error() -> None:
    def numbers() -> Iterator[int]:
        yield from range(5)
        raise DataError("file 5 is torn")

    found: list[int] = []
    with pytest.raises(DataError, match="file 5 is torn"):
        found.extend(prefetch(numbers(), depth=2))
    iterator = prefetch(numbers(), depth=2)
    assert [next(iterator) for _ in range(5)] == list(range(5))
    with pytest.raises(DataError):
        next(iterator)


def test_prefetch_stops_with_its_reader() -> None:
    made = []

    def numbers() -> Iterator[int]:
        for number in range(1000):
            made.append(number)
            yield number

    iterator = prefetch(numbers(), depth=2)
    assert next(iterator) == 0
    iterator.close()  # type: ignore[attr-defined]
    assert len(made) <= 5
    assert not any(thread.name == "loader" for thread in threading.enumerate())


def test_a_process_may_end_while_the_loader_works(tmp_path: Path) -> None:
    program = """
import pathlib, sys, time
from joint.data.loader import prefetch

def numbers():
    yield 0
    time.sleep(0.5)
    pathlib.Path(sys.argv[1]).write_text("left in good order")
    yield 1

kept = prefetch(numbers(), depth=1)
assert next(kept) == 0
sys.exit(3)
"""
    line = [sys.executable, "-c", program, str(tmp_path / "said")]
    assert subprocess.run(line, check=False, cwd=Path(__file__).parents[2]).returncode == 3
    assert (tmp_path / "said").read_text() == "left in good order"
