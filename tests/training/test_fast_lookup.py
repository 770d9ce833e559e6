"""The fast look-up changes no bit of rows, tables and the optimizer's state."""

from __future__ import annotations

import pytest
import torch

from joint import fast_lookup
from joint.data.loader import Loader
from joint.data.order import Position
from joint.fast_lookup import use_fast_lookup
from joint.optimizers import build_optimizer, set_learning_rates
from joint.pipeline import PlainPipeline
from joint.task import build_task
from towers.embeddings import rows_of
from towers.mixtures import set_step


@pytest.fixture
def pooled(monkeypatch) -> list[list[int]]:
    """The runs of every look-up that was pooled."""
    seen, real = [], fast_lookup._pooled
    monkeypatch.setattr(fast_lookup, "_pooled", lambda tables, runs: seen.append(runs) or real(tables, runs))
    return seen


@pytest.fixture
def learned(configure, group, assemble):
    """`learned(*overrides)`: losses of six steps, then tables and moments."""

    def learn(*overrides: str, fast: bool) -> tuple[list[float], dict[str, torch.Tensor]]:
        config = configure(*overrides)
        assembler = assemble.assembler(config)
        model = build_task(assembler.plan, group).train()
        if fast:
            assert use_fast_lookup(model) == ""
        optimizer = build_optimizer(model, config.optimizer)
        pipeline = PlainPipeline(model, optimizer)
        batches = Loader(assembler, rank=0, world_size=1).from_position(Position())
        losses = []
        for step in range(6):
            torch.manual_seed(step)
            set_step(model, step)
            set_learning_rates(optimizer, config.optimizer, step)
            losses.append(pipeline.progress(batches).losses["total"].item())
        states = {"model": model.state_dict(), **model.fused_optimizer.state_dict()["state"]}
        shards = {
            f"{part} {name}": value.local_shards()[0].tensor.clone()
            for part, state in states.items()
            for name, value in state.items()
            if hasattr(value, "local_shards")
        }
        return losses, shards

    return learn


@pytest.mark.parametrize("bags", [4, 64, 4096])
@pytest.mark.parametrize("kind", ["rowwise_adagrad", "adagrad", "sgd"])
def test_the_same_bits(learned, pooled, monkeypatch, bags, kind):
    monkeypatch.setattr(fast_lookup, "BAGS", bags)
    monkeypatch.setattr(fast_lookup, "SLOW_SHARE", 10**9)
    settings = f"optimizer.tables={{kind: {kind}, lr: 0.1}}"
    losses, plain = learned(settings, fast=False)
    assert not pooled
    again, fast = learned(settings, fast=True)
    assert len(pooled) == 3 * 6  # width 4; of width 8 a table-wise and a row-wise part
    assert min(min(runs) for runs in pooled) >= 2
    assert again == losses
    assert fast.keys() == plain.keys()
    assert len(plain) == 5 * (1 if kind == "sgd" else 2)
    assert {name for name in plain if not torch.equal(plain[name], fast[name])} == set()


def test_few_different_rows_and_evaluation_are_left_to_the_plain_kernel(
    learned, pooled, monkeypatch, configure, group, assemble
):
    monkeypatch.setattr(fast_lookup, "SLOW_SHARE", 0)
    learned(fast=True)
    monkeypatch.setattr(fast_lookup, "SLOW_SHARE", 10**9)
    config = configure()
    model = build_task(assemble.plan(config), group).eval()
    use_fast_lookup(model)
    with torch.no_grad():
        model.module(assemble(config))
    assert not pooled


def test_another_version_is_left_alone_and_said(configure, group, assemble, monkeypatch, pooled):
    monkeypatch.setattr(fast_lookup, "SLOW_SHARE", 10**9)
    monkeypatch.setattr(fast_lookup, "installed_versions", lambda: {"torch": "2.14", "torchrec": "1.9.0"})
    config = configure()
    model = build_task(assemble.plan(config), group).train()
    assert use_fast_lookup(model) == (
        "train.fast_lookup has no effect: written for fbgemm-gpu-cpu 1.8.0, torchrec 1.8.0, found torchrec 1.9.0"
    )
    set_step(model, 0)
    model(assemble(config))
    assert not pooled


def test_one_rank_sums_what_is_averaged_in_the_kernel(configure, group, assemble, monkeypatch):
    monkeypatch.setattr(fast_lookup, "SLOW_SHARE", 10**9)
    config = configure("encoders.liked_mean.features=[item_id]")
    batch, model = assemble(config), build_task(assemble.plan(config), group).train()
    use_fast_lookup(model)
    rows = rows_of(model.module.embeddings(batch.sparse, batch.inner), batch.inner)
    monkeypatch.setattr(fast_lookup, "SLOW_SHARE", 0)
    unpooled = rows_of(model.module.embeddings(batch.sparse, batch.inner), batch.inner)
    assert {"liked.item_id", "candidate.genres"} <= batch.inner.keys()
    assert len(rows["liked.item_id"]) == batch.requests
    assert {key for key in rows if not torch.equal(rows[key], unpooled[key])} == set()


MEAN = "history: liked, features: [item_id]"
OTHERS = {
    "fewer events": f"{{{MEAN}, length: 5, by: {{kind: mean}}}}",
    "a sum": f"{{{MEAN}, length: 6, by: {{kind: sum}}}}",
    "lists of ids": "{history: liked, features: [item_id, genres], length: 6, by: {kind: mean}}",
    "events": f"{{{MEAN}, length: 6, events: [rating], by: {{kind: mean}}}}",
}


@pytest.mark.parametrize("other", ["", *OTHERS])
def test_only_a_history_that_nothing_but_means_read_is_averaged(configure, assemble, other):
    overrides = ["encoders.liked_mean.features=[item_id]"]
    if other:
        overrides += [f"encoders.more={OTHERS[other]}", "heads.ranking.features=[user_id, liked_mean, more, item_id]"]
    assert assemble.plan(configure(*overrides)).averaged == (set() if other else {("liked", "")})
