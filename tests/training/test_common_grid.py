"""Models trained with different negatives are held against the same ones."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from joint.data.assemble import logged
from joint.evaluating.evaluator import RANDOM, evaluator_of
from joint.task import build_task


def test_random_items_are_the_same_for_every_model_and_none_that_was_logged(configure, assemble, group):
    drawn = []
    for overrides in ((), ("data.random_by=popularity", "run.seed=9", "data.candidates.random=2")):
        assembler = assemble.assembler(configure(*overrides))
        evaluator = evaluator_of(build_task(assembler.plan, group), assembler, group)
        requests = assembler.dataset.read_split("test").take(np.arange(6))
        with torch.no_grad():
            batch, outputs = evaluator._random(requests, logged(requests, assembler.dataset))
        drawn.append(batch)
        assert set(outputs) == {"retrieval", "pre_ranking", "ranking"}
    one, other = drawn
    assert torch.equal(one.item, other.item)
    assert torch.equal(one.offsets, other.offsets)
    assert 5 * RANDOM < len(one.item) <= 6 * RANDOM  # a slot that finds no free item in its attempts stays empty
    for name in ("candidates", "rated"):
        held = requests.lists(name)
        for row in range(6):
            mine = one.item[one.row == row].numpy()
            assert not np.isin(mine, held.values[held.rows == row]).any(), (name, row)


def test_the_auc_against_random_items_is_of_positives_alone(configure, assemble, group):
    assembler = assemble.assembler(configure())
    model = build_task(assembler.plan, group)
    found = evaluator_of(model, assembler, group)("test", whole_catalogue=False).numbers
    evaluator = evaluator_of(model, assembler, group)
    requests = assembler.dataset.read_split("test")
    candidates = logged(requests, assembler.dataset)
    with torch.no_grad():
        batch, outputs = evaluator.run(requests, candidates, evaluator.heads)
        _, others = evaluator._random(requests, candidates)
    for index, task in enumerate(("like", "fine")):
        positive = outputs["ranking"].logits[batch.positive[:, index], index]
        higher = positive[:, None] - others["ranking"].logits[:, index]
        expected = float((higher.sign() / 2 + 0.5).mean())
        assert found[f"ranking/auc/{task}/matching_ns"] == pytest.approx(
            expected, abs=1e-3
        )  # in pieces of other sizes a tie may break
