"""A GPU that is none, for `test_without_a_gpu`: `LD_PRELOAD=shim.so python pretended_gpu.py < JOBS`, no test itself.

Tensors 'on the GPU' hold their numbers in host memory, so everything computes as ever. But they are tensors of device
cuda:0 to PyTorch's own dispatcher, autograd and autocast, and what a real GPU would refuse is refused: an operation on
tensors of both sides, a generator of the other side, a product of integers, a conversion to numpy. Tables stay on the
CPU, since FBGEMM's CUDA kernels are not there; streams, pinned memory and NCCL are not covered either.

The shim is `pretended_gpu.cpp`, loaded before PyTorch asks for what it gives. The jobs, as JSON: a list of [what,
arguments], each the `main` of `joint.WHAT`, or `pytest`.
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map

import joint.distributed
import joint.evaluating.finished_run
import joint.pipeline
import joint.sharding
import joint.task
import joint.training
from joint.batch import Batch
from joint.pipeline import PlainPipeline
from joint.task import StepOutput
from towers.mixtures import HardConcrete

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
aten = torch.ops.aten
COPIES = {aten._to_copy.default, aten.copy_.default}
INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default}  # indices may be on the host
PRODUCTS = {aten.mm.default, aten.bmm.default, aten.addmm.default, aten.baddbmm.default, aten.mv.default}


class OnGpu(torch.Tensor):
    """A tensor of device cuda:0 whose numbers are those of `inner`."""

    inner: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> OnGpu:
        return torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, inner.stride(), inner.storage_offset(), dtype=inner.dtype, device=GPU
        )

    def __init__(self, inner: torch.Tensor) -> None:
        self.inner = inner

    def __repr__(self, **_: object) -> str:
        return f"OnGpu({self.inner})"

    def tolist(self) -> Any:
        return self.inner.tolist()

    def numpy(self, *, force: bool = False) -> Any:
        raise TypeError("can't convert a tensor on the GPU to numpy")

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, arguments: Any = (), named: Any = None) -> Any:
        return computed(function, arguments, named or {})


class Pretending(TorchDispatchMode):
    """Also what makes new tensors goes through `computed`."""

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), named: Any = None) -> Any:
        return computed(function, arguments, named or {})


def computed(function: Any, arguments: Any, named: dict[str, Any]) -> Any:
    """The result of an operation, on the side where it belongs."""
    tensors = [x for x in tree_leaves((arguments, named)) if isinstance(x, torch.Tensor)]
    ours = [x for x in tensors if isinstance(x, OnGpu)]
    check(function, arguments, tensors, ours)
    if function is aten.record_stream.default:
        return None
    device = named.get("device")
    on_gpu = bool(ours) if device is None else torch.device(device).type == "cuda"
    generator = named.get("generator")
    if on_gpu and generator is not None and generator.device.type != "cuda":
        raise RuntimeError(f"{function}: a generator of {generator.device} on a GPU")
    result = function(*tree_map(host, arguments), **tree_map(host, named))
    if not on_gpu:
        return result
    result = tree_map(lambda x: OnGpu(x) if isinstance(x, torch.Tensor) else x, result)
    return return_and_correct_aliasing(function, arguments, named, result)


def check(function: Any, arguments: Any, tensors: list[torch.Tensor], ours: list[OnGpu]) -> None:
    """RuntimeError for what a GPU would not do."""
    if not ours or function in COPIES or (function in INDEXING and isinstance(arguments[0], OnGpu)):
        return
    if theirs := [x for x in tensors if not isinstance(x, OnGpu) and x.dim()]:  # a number may come from the host
        raise RuntimeError(f"{function}: on the GPU {[x.shape for x in ours]}, on the CPU {[x.shape for x in theirs]}")
    if function in PRODUCTS and not ours[0].is_floating_point():
        raise RuntimeError(f"{function}: not for {ours[0].dtype} on a GPU")


def host(value: Any) -> Any:
    if isinstance(value, OnGpu):
        return value.inner
    return CPU if isinstance(value, torch.device) and value.type == "cuda" else value


class OnGpuPipeline(PlainPipeline):
    """The plain loop, each batch copied first; TorchRec's pipeline has tests of its own."""

    def progress(self, batches: Iterator[Batch]) -> StepOutput:
        return super().progress(batch.to(GPU, non_blocking=True) for batch in batches)


def on_cpu(named: dict[str, Any]) -> dict[str, Any]:
    return {name: value.to(CPU) for name, value in named.items()}


def shard(module: joint.task.JointTask, plan: Any, *, device: torch.device) -> Any:
    """Tables as on a CPU, everything dense on the GPU."""
    assert device == GPU
    model = joint.sharding.shard(module, plan, device=CPU)
    module.dense.to(GPU)
    module.embeddings.register_forward_pre_hook(lambda _, given: tuple(map(on_cpu, given)))
    return model


@contextmanager
def process_group() -> Iterator[torch.device]:
    with real_process_group():
        yield GPU


def set_step(model: torch.nn.Module, step: int) -> None:
    """Gates draw from their names, which are here without DDP's part of them."""
    real_set_step(model, step)
    for part in model.modules():
        if isinstance(part, HardConcrete):
            part.name = part.name.replace("_dmp_wrapped_module", "_dmp_wrapped_module.module")


def pretend() -> None:
    """From here on the program runs on the GPU."""
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    real_rows_of = joint.task.rows_of
    joint.task.rows_of = lambda looked_up, segments: {
        key: rows.to(GPU) for key, rows in real_rows_of(looked_up, on_cpu(segments)).items()
    }
    joint.task.shard = shard
    joint.sharding.DistributedModelParallel = partial(joint.sharding.DistributedModelParallel, init_data_parallel=False)
    for module in (joint.distributed, joint.training, joint.evaluating.finished_run):
        module.process_group = process_group
    joint.training.set_step = set_step
    for module in (joint.pipeline, joint.training):
        module.build_pipeline = lambda model, optimizer, device: OnGpuPipeline(model, optimizer)
    Batch.pin_memory = lambda batch: batch
    # Autocast asks for these two before it goes on by the rules that PyTorch has for CUDA.
    torch.cuda.amp.common.amp_definitely_not_available = lambda: False
    torch.cuda.is_bf16_supported = lambda *_: True
    torch.cuda._lazy_init = lambda: None
    torch._C._set_only_lift_cpu_tensors(True)  # so that torch.tensor(…, device=…) makes its copy where we see it


real_process_group, real_set_step = joint.training.process_group, joint.training.set_step


def refusals() -> None:
    """What could not be done on a GPU cannot be done here."""
    there, here = torch.arange(4, device=GPU), torch.arange(4)
    for wrong in (
        lambda: there + here,
        lambda: torch.cat([here, there]),
        lambda: here[there],
        lambda: torch.where(there > 1, there, here),
        lambda: there.view(2, 2) @ there.view(2, 2),
        lambda: torch.rand(3, device=GPU, generator=torch.Generator()),
        lambda: torch.empty(3, device=GPU).uniform_(generator=torch.Generator()),
        lambda: there.numpy(),
    ):
        with pytest.raises((RuntimeError, TypeError)):
            wrong()
    assert (there[here] + 1 == (there + torch.tensor(1)).cpu().to(GPU)).all()
    assert there.device == GPU == torch.nn.Linear(2, 2).to("cuda").weight.device


def main() -> None:
    pretend()
    with Pretending():
        refusals()
        for what, arguments in json.load(sys.stdin):
            if what == "pytest":
                code = pytest.main(arguments)
            else:
                sys.argv = [what, *arguments]
                code = importlib.import_module(f"joint.{what}").main()
            assert code == 0, (what, arguments)


if __name__ == "__main__":
    main()
