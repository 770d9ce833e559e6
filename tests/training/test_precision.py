"""`train.precision: bfloat16`: the dense part's products are rounded, and nothing else changes its type."""

from __future__ import annotations

import pytest
import torch

import joint.task
from joint.task import build_task
from joint.train import main
from towers.mixtures import set_step


@pytest.fixture
def stepped(configure, group, assemble):
    """`stepped(precision)`: losses, outputs and dense gradients of a training forward and backward."""

    def step(precision: str, *, training: bool = True):
        config = configure(f"train.precision={precision}")
        model = build_task(assemble.plan(config), group).train(training)
        model.zero_grad()
        torch.manual_seed(0)
        set_step(model, 0)
        loss, output = (model if training else model.module)(assemble(config))
        return model, loss, output

    return step


def test_losses_are_close_and_all_that_leaves_the_heads_is_float32(stepped):
    _, loss, exact = stepped("float32")
    model, rounded_loss, rounded = stepped("bfloat16")
    assert rounded_loss.dtype == torch.float32
    for name, value in exact.losses.items():
        assert rounded.losses[name].item() == pytest.approx(value.item(), rel=0.02), name
    assert rounded_loss.item() != loss.item()  # it was rounded
    for name, output in rounded.outputs.items():
        for part in ("logits", "features", "user"):
            value = getattr(output, part)
            assert value is None or value.dtype == torch.float32, (name, part)
    assert rounded.outputs["retrieval"].pool.vectors.dtype == torch.float32
    rounded_loss.backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert gradients
    assert {gradient.dtype for gradient in gradients} == {torch.float32}


def test_rows_and_their_gradients_are_float32(stepped, configure, group, assemble, monkeypatch):
    seen = {}

    def spy(looked_up, segments):
        rows = real(looked_up, segments)
        for key, row in rows.items():
            row.register_hook(
                lambda gradient, key=key: seen.__setitem__(key, (gradient.dtype, gradient.isfinite().all()))
            )
        return rows

    real = joint.task.rows_of
    monkeypatch.setattr(joint.task, "rows_of", spy)
    _model, loss, _ = stepped("bfloat16")  # held: a hook of it runs in backward
    loss.backward()
    assert seen
    assert {dtype for dtype, _ in seen.values()} == {torch.float32}
    assert all(finite for _, finite in seen.values())


def test_evaluation_is_float32_whatever_training_is(stepped):
    _, _, exact = stepped("float32", training=False)
    _, _, other = stepped("bfloat16", training=False)
    for name, output in exact.outputs.items():
        assert torch.equal(output.logits, other.outputs[name].logits)


def test_a_resumed_run_is_the_uninterrupted_one(tiny_file, flat):
    folder = tiny_file.parent / "runs"
    settings = ["train.precision=bfloat16", "train.checkpoint_every=8"]
    assert main([str(tiny_file), "run.name=whole", *settings]) == 0
    assert main([str(tiny_file), "run.name=halved", *settings]) == 0
    newest = max((folder / "halved" / "checkpoints").iterdir())
    for path in sorted(newest.rglob("*"), reverse=True):
        path.unlink()
    newest.rmdir()
    assert main([str(tiny_file), "run.name=halved", *settings]) == 0
    whole, halved = (flat(folder / name / "checkpoints") for name in ("whole", "halved"))
    assert {name for name in whole if not torch.equal(whole[name], halved[name])} == set()
