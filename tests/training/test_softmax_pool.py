"""Softmaxes over samples: in-batch impressions, shared random items, both, and a window of the head's own ranks."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from joint.batch import Batch
from joint.data.loader import Loader
from joint.data.order import Position
from joint.data.softmax_pool import PoolItems, sampled_items
from joint.fit import misfits
from joint.objectives import compute
from joint.schema import NEVER
from joint.softmax_pool import RATE, StreamingFrequency
from joint.task import build_task
from towers.mixtures import set_step

RETRIEVE = "objectives.retrieve={{head: retrieval, loss: multi_class, tasks: [like], space: [{}], log_q: {}}}"
STILL = ("heads.retrieval.trunk.dropout=0", "encoders.rated_sequence.by.dropout=0")


@pytest.fixture
def step(configure, assemble, group):
    """Overrides -> the first training batch, the retrieval head's output on it, and its objective's term."""

    def run(*overrides: str):
        config = configure("data.shared_random=9", *STILL, *overrides)
        loader = Loader(assemble.assembler(config), rank=0, world_size=1)
        batch = next(iter(loader._batches(Position())))
        task = build_task(loader.assembler.plan, group).train()
        set_step(task, 0)
        _, output = task(batch)
        objective = config.objectives["retrieve"]
        return batch, output.outputs["retrieval"], compute(objective, output.outputs, batch, tuple(config.tasks))

    return run


def shown_items(batch: Batch) -> set[int]:
    return set(batch.item[(batch.stages & 512) != 0].tolist())


def by_hand(batch: Batch, head, columns: dict[int, float]) -> tuple[float, int]:
    """Total and count over the impressions, against `columns`: item -> log q; vectors are looked up by item."""
    where = {item: place for place, item in zip(head.pool.target.tolist(), batch.item.tolist(), strict=True)}
    vectors = {int(i): v for i, v in zip(items_of(head, batch), head.pool.vectors.double(), strict=True)}
    excluded = {(int(r), int(c)) for r, c in head.pool.excluded}
    total, count = torch.zeros((), dtype=torch.float64), 0
    for n in ((batch.stages & 512) != 0).nonzero().flatten().tolist():
        request, item = int(batch.row[n]), int(batch.item[n])
        places = {int(i): p for p, i in enumerate(items_of(head, batch))}
        kept = [i for i in columns if (request, places[i]) not in excluded or i == item]
        user = head.user[request, 0].double()
        scores = torch.stack([vectors[i] @ user - columns[i] for i in kept])
        weight = 1.0 if batch.positive[n, 0] else 0.5
        total = total + weight * (scores.logsumexp(0) - scores[kept.index(item)])
        count += 1
        assert where[item] == places[item]
    return total.item(), count


def items_of(head, batch: Batch) -> list[int]:
    """The item of every column."""
    return sorted(set(batch.pool_item.tolist()))


def test_in_batch_negatives_are_the_batch_s_impressions_once_each(step):
    batch, head, term = step(RETRIEVE.format("in_batch", "false"))
    shown = shown_items(batch)
    total, count = by_hand(batch, head, dict.fromkeys(shown, 0.0))
    torch.testing.assert_close(term.total[0].double().item(), total, rtol=1e-5, atol=1e-4)
    assert (term.count.item(), len(shown) > 10) == (count, True)


def test_popular_items_are_corrected_by_how_often_batches_hold_them(step):
    batch, head, term = step(RETRIEVE.format("in_batch", "true"))
    # At the first step each has waited one step: all are held by every batch so far, log 1 = 0.
    total, _ = by_hand(batch, head, dict.fromkeys(shown_items(batch), 0.0))
    torch.testing.assert_close(term.total[0].double().item(), total, rtol=1e-5, atol=1e-4)


def test_random_items_are_shared_by_all_requests_of_a_batch(step):
    batch, head, term = step(RETRIEVE.format("random", "true"))
    drawn = set(batch.pool_item[~batch.pool_in_batch].tolist())
    assert 1 < len(drawn) <= 9
    total, count = torch.zeros((), dtype=torch.float64), 0
    places = {int(i): p for p, i in enumerate(items_of(head, batch))}
    vectors = head.pool.vectors.double()
    excluded = {(int(r), int(c)) for r, c in head.pool.excluded}
    for n in ((batch.stages & 512) != 0).nonzero().flatten().tolist():
        request, item = int(batch.row[n]), int(batch.item[n])
        kept = [i for i in drawn if (request, places[i]) not in excluded and i != item]
        user = head.user[request, 0].double()
        scores = torch.stack([vectors[places[i]] @ user for i in [item, *kept]])
        total = total + (1.0 if batch.positive[n, 0] else 0.5) * (scores.logsumexp(0) - scores[0])
        count += 1
    torch.testing.assert_close(term.total[0].double().item(), total.item(), rtol=1e-5, atol=1e-4)
    assert term.count.item() == count


def test_a_random_item_is_as_frequent_as_among_those_of_the_day(configure, assemble, group):
    config = configure("data.shared_random=9", *STILL, RETRIEVE.format("random", "true"))
    assembler = assemble.assembler(config)
    assembler.eligibility.first_day = np.where(np.arange(61) < 40, NEVER, assembler.eligibility.first_day)
    batch = next(iter(Loader(assembler, rank=0, world_size=1)._batches(Position())))
    assert batch.pool_available == 21
    task = build_task(assembler.plan, group).train()
    set_step(task, 0)
    log_q = task(batch)[1].outputs["retrieval"].pool.log_q["random"]
    assert log_q[log_q.isfinite()].unique().tolist() == pytest.approx([np.log(9 / 21)])


def test_mixed_negatives_are_both(step):
    batch, head, term = step(RETRIEVE.format("in_batch, random", "false"))
    columns = dict.fromkeys(set(batch.pool_item.tolist()), 0.0)
    assert len(columns) > len(shown_items(batch))
    total, _ = by_hand(batch, head, columns)
    torch.testing.assert_close(term.total[0].double().item(), total, rtol=1e-5, atol=1e-4)


def test_hard_negatives_are_a_window_of_the_head_s_own_ranks(step):
    batch, head, term = step(
        "objectives.retrieve={head: retrieval, loss: multi_class, space: [corpus], hard: [3, 8], tasks: [like, fine]}"
    )
    excluded = {(int(r), int(c)) for r, c in batch.excluded}
    vectors, total, count = head.pool.vectors.double(), torch.zeros(2, dtype=torch.float64), 0
    for n in ((batch.stages & 512) != 0).nonzero().flatten().tolist():
        request, item = int(batch.row[n]), int(batch.item[n])
        count += 1
        for task in range(2):
            scores = vectors @ head.user[request, task].double()
            free = [c for c in range(61) if (request, c) not in excluded]
            best = sorted(free, key=lambda c: -scores[c].item())[3:8]
            own = scores[[item, *(c for c in best if c != item)]]
            total[task] += (1.0 if batch.positive[n, task] else 0.5) * (own.logsumexp(0) - own[0]).detach()
    torch.testing.assert_close(term.total.double(), total, rtol=1e-4, atol=1e-4)
    assert term.count.tolist() == [count, count]


def test_the_frequency_of_an_item_follows_the_steps_between_its_batches():
    frequency = StreamingFrequency(4).train()
    items = torch.tensor([-1, 0, 2])
    held = {0: [1, 2], 1: [1], 4: [1, 2]}
    for step, places in held.items():
        frequency.step = step
        present = torch.zeros(3, dtype=torch.bool)
        present[places] = True
        chance = frequency(items, present)
    first = 1.0 + RATE * (1 - 1)  # 0 came at steps 0, 1 and 4: after 1, 1 and 3 steps
    second = first + RATE * (3 - first)
    other = 1.0 + RATE * (4 - 1)  # 2 came at steps 0 and 4
    torch.testing.assert_close(chance[1:], torch.tensor([1 / second, 1 / other]))
    assert frequency.interval.tolist()[1] == 0
    frequency.eval()
    before = frequency.interval.clone()
    frequency(items, torch.ones(3, dtype=torch.bool))
    assert torch.equal(frequency.interval, before)


def test_random_items_of_a_batch_do_not_depend_on_the_ranks(configure, assemble):
    assembler = assemble.assembler(configure("data.shared_random=9", RETRIEVE.format("in_batch, random", "true")))
    pools = {
        world: [list(Loader(assembler, rank=r, world_size=world)._batches(Position()))[:6] for r in range(world)]
        for world in (1, 2)
    }
    for one, *two in zip(pools[1][0], *pools[2], strict=True):
        for random in (False, True):
            together = torch.cat([b.pool_item[b.pool_in_batch ^ random] for b in two])
            alone = one.pool_item[one.pool_in_batch ^ random]
            assert sorted(together.unique().tolist()) == sorted(alone.unique().tolist())


def test_a_rank_without_requests_brings_its_random_items_only():
    pool = sampled_items(None, np.array([5, 3]))
    assert (pool.items.tolist(), pool.in_batch.tolist(), pool.sampled) == ([5, 3], [False, False], True)
    assert PoolItems.corpus(np.array([1])).sampled is False


def test_a_window_of_ranks_begins_within_the_pool(tiny_file, assemble, configure):
    dataset = assemble.assembler(configure()).dataset
    assert not [*misfits(configure("objectives.retrieve.hard=[60, 90]"), dataset)]
    found = [*misfits(configure("objectives.retrieve.hard=[61, 90]"), dataset)]
    assert found == [("objectives.retrieve.hard", "begins after the last item; the pool has 61")]


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("objectives.retrieve.space=[random]", "data.shared_random is 0"),
        (
            "objectives.retrieve.space=[corpus, in_batch]",
            "over space \\[corpus\\], \\[in_batch\\], \\[random\\] or both",
        ),
        (
            "objectives.retrieve={head: retrieval, loss: multi_class, space: [in_batch], hard: [1, 2]}",
            "window of ranks",
        ),
        ("objectives.other={head: retrieval, loss: multi_class, space: [in_batch]}", "expected one pool in a run"),
        ("objectives.retrieve.hard=[5, 2]", "expected two ranks"),
        ("objectives.student.space=[in_batch]", "in_batch is not among them"),
    ],
)
def test_pools_that_make_no_sense(configure, override, says):
    with pytest.raises(Exception, match=says):
        configure(override)
