"""The CUDA path as far as a CPU can run it: TorchRec's pipeline gives what the plain loop gives."""

from __future__ import annotations

import dataclasses
import math
from contextlib import contextmanager

import pytest
import torch
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist
from torchrec.distributed.train_pipeline.runtime_forwards import PipelinedForward
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

import joint.pipeline
import joint.train
import joint.training
from joint.batch import Batch
from joint.data.loader import Loader
from joint.data.order import Position
from joint.evaluating.evaluator import evaluator_of
from joint.optimizers import build_optimizer, set_learning_rates
from joint.pipeline import PlainPipeline, build_pipeline
from joint.task import build_task
from towers.mixtures import set_step


def sparse_dist(model, optimizer, device):
    """What `build_pipeline` gives on CUDA."""
    return TrainPipelineSparseDist(model, optimizer, device)


@pytest.fixture
def steps(configure, group, assemble):
    """`steps(build)`: losses and positions of ten steps, and the weights after; halfway the model is evaluated."""

    def train(build, *, evaluated: int = 5) -> tuple[list[float], list[Position], dict[str, torch.Tensor]]:
        config = configure()
        assembler = assemble.assembler(config)
        model = build_task(assembler.plan, group).train()
        optimizer = build_optimizer(model, config.optimizer)
        pipeline, losses, positions = build(model, optimizer, group), [], []
        batches = Loader(assembler, rank=0, world_size=1).from_position(Position())
        for step in range(10):
            torch.manual_seed(step)
            set_step(model, step)
            set_learning_rates(optimizer, config.optimizer, step)
            output = pipeline.progress(batches)
            losses.append({name: value.item() for name, value in output.losses.items()})
            positions.append(output.batch.position)
            if step == evaluated:
                pipeline.detach()
                found = evaluator_of(model, assembler, group).full("valid").numbers
                losses.append({name: None if math.isnan(value) else value for name, value in found.items()})
                pipeline.attach()
                model.train()
        if build is sparse_dist:
            pipelined = [m for m in model.modules() if isinstance(getattr(m, "forward", None), PipelinedForward)]
            assert len(pipelined) == len(assembler.plan.keys_by_width)
        weights = {name: value.detach().clone() for name, value in model.named_parameters()}
        return losses, positions, weights

    return train


def test_the_pipeline_trains_as_the_plain_loop_and_survives_an_evaluation(steps):
    losses, positions, weights = steps(lambda model, optimizer, device: PlainPipeline(model, optimizer))
    piped_losses, piped_positions, piped_weights = steps(sparse_dist)
    assert piped_positions == positions
    assert positions[:2] == [Position(0, 0, 1), Position(0, 0, 2)]  # of the batch trained, not of those read ahead
    assert positions[7] == Position(1, 0, 0)
    assert piped_losses == losses
    assert [n for n, w in weights.items() if not torch.equal(piped_weights[n], w)] == []


def test_an_evaluation_leaves_no_trace_in_training(steps):
    def plain(model, optimizer, device):
        return PlainPipeline(model, optimizer)

    _, _, weights = steps(plain)
    _, _, undisturbed = steps(plain, evaluated=-1)
    assert [n for n, w in weights.items() if not torch.equal(undisturbed[n], w)] == []


def test_a_whole_run_through_the_pipeline_is_the_run_of_the_plain_loop(tiny_file, tmp_path, flat, monkeypatch):
    """Stopped and resumed on the way: what was read ahead is read again. The pipeline drives TorchRec's own look-up."""
    arguments = [str(tiny_file), "train.fast_lookup=false"]
    assert joint.train.main(arguments) == 0
    with monkeypatch.context() as patch:
        patch.setattr(joint.training, "build_pipeline", sparse_dist)
        patch.setattr(joint.training, "stop_signal", _asked_at(11))  # the third batch of an epoch, two ahead
        for _ in range(2):
            assert joint.train.main([*arguments, "run.name=piped"]) == 0
    plain, piped = (flat(tmp_path / "runs" / name / "checkpoints") for name in ("tiny", "piped"))
    assert [name for name in plain if not torch.equal(piped[name], plain[name])] == []
    evaluated = [(tmp_path / "runs" / name / "eval.json").read_text() for name in ("tiny", "piped")]
    assert evaluated[0] == evaluated[1]


def _asked_at(batch: int):
    """In place of a signal: the run is asked to stop as this batch is read, and not again."""
    answers = iter([False] * (batch - 1) + [True] + [False] * 99)

    @contextmanager
    def stop_signal():
        yield lambda: next(answers)

    return stop_signal


def test_the_device_chooses_the_pipeline(configure, group, assemble, monkeypatch):
    config = configure()
    model = build_task(assemble.plan(config), group)
    optimizer = build_optimizer(model, config.optimizer)
    assert isinstance(build_pipeline(model, optimizer, group), PlainPipeline)
    monkeypatch.setattr(joint.pipeline, "TrainPipelineSparseDist", lambda *given: given)
    cuda = torch.device("cuda", 0)
    assert build_pipeline(model, optimizer, cuda) == (model, optimizer, cuda)


def test_a_batch_moves_whole(configure, assemble, monkeypatch):
    """Every tensor of every field goes along, and nothing else changes."""
    batch = assemble(configure())
    count = sum(len(value) if isinstance(value, dict) else 1 for value in tensors(batch).values())
    for method in ("pin_memory", "record_stream"):
        seen: list[object] = []
        for kind in (torch.Tensor, KeyedJaggedTensor):
            monkeypatch.setattr(kind, method, lambda self, *a, seen=seen: seen.append(self) or self)
        result = batch.pin_memory() if method == "pin_memory" else batch.record_stream(torch.Stream("cpu"))
        assert len(seen) == count
        if result is not None:
            assert result.position == batch.position
            assert result.requests == 5
    moved = batch.to(torch.device("meta"), non_blocking=True)
    for name, value in tensors(moved).items():
        parts = value.values() if isinstance(value, dict) else [value]
        devices = {(p.values() if isinstance(p, KeyedJaggedTensor) else p).device.type for p in parts}
        assert devices <= {"meta"}, name


def tensors(batch: Batch) -> dict[str, object]:
    fields = {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)}
    return {name: value for name, value in fields.items() if isinstance(value, dict | torch.Tensor)}
