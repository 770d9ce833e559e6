"""Ranks: the process group, the first rows of tables, and the collectives that training needs."""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torchrec.distributed import DistributedModelParallel

TIMEOUT = timedelta(minutes=5)
INIT_BLOCK = 1024  # rows that share one seeded generator


@contextmanager
def process_group() -> Iterator[torch.device]:
    """Join the ranks of torchrun (or be the only one); yields this rank's device and leaves in good order."""
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    backend = "nccl" if cuda else "gloo"
    if "RANK" in os.environ:
        store, rank_, size = next(dist.rendezvous("env://", timeout=TIMEOUT))
        # After a restart torchrun's store still holds the addresses of dead ranks, for which the living would wait.
        store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
        dist.init_process_group(backend, store=store, rank=rank_, world_size=size, timeout=TIMEOUT)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield device
        # Without it a rank sometimes dies while another still tears down.
        dist.barrier()
    finally:
        dist.destroy_process_group()


def world_size() -> int:
    """Number of ranks; 1 without a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def ranks_of_a_machine() -> int:
    """Number of ranks on this machine, by torchrun: a rank's GPU is its number modulo this."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", world_size()))


def rank() -> int:
    """This rank; 0 without a process group."""
    return dist.get_rank() if dist.is_initialized() else 0


def sum_over_ranks(values: Tensor) -> Tensor:
    """The elementwise sum over ranks, without a gradient; `values` itself becomes the sum."""
    if world_size() > 1:
        dist.all_reduce(values)
    return values


def new_host_group() -> dist.ProcessGroup:
    """A group of all ranks of its own, over gloo: for what must not mingle with training or wait for a GPU."""
    return dist.new_group(backend="gloo", timeout=TIMEOUT)


def gather_objects(value: Any, group: dist.ProcessGroup | None = None) -> list[Any]:
    """Every rank's value, in order of rank, on every rank. Small Python objects of our own only."""
    if world_size() == 1:
        return [value]
    gathered: list[Any] = [None] * world_size()
    dist.all_gather_object(gathered, value, group=group)
    return gathered


def gather_rows(rows: Tensor) -> Tensor:
    """All ranks' rows, one rank after another; every rank gives equally many. Gradients flow back to their rank."""
    return rows if world_size() == 1 else _GatherRows.apply(rows)


def gather_uneven(rows: Tensor) -> Tensor:
    """`gather_rows` where ranks may give different numbers of rows."""
    if world_size() == 1:
        return rows
    sizes = [torch.zeros(1, dtype=torch.long, device=rows.device) for _ in range(world_size())]
    dist.all_gather(sizes, torch.tensor([len(rows)], device=rows.device))
    lengths = [int(size) for size in sizes]
    padding = rows.new_zeros(max(lengths) - len(rows), *rows.shape[1:])
    whole = gather_rows(torch.cat([rows, padding])).unflatten(0, (world_size(), max(lengths)))
    return torch.cat([part[:length] for part, length in zip(whole, lengths, strict=True)])


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        gathered = rows.new_empty(world_size() * len(rows), *rows.shape[1:])
        dist.all_gather_into_tensor(gathered, rows.contiguous())
        return gathered

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        # gloo has no reduce-scatter: sum everything, keep our share.
        gradient = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(gradient)
        return gradient.chunk(world_size())[rank()]


def initialise_tables(model: DistributedModelParallel, ranges: dict[str, float], seed: int) -> None:
    """Fill every table uniformly in ±its range, each row by (seed, table, row): equal for any sharding."""
    for key, value in model.state_dict().items():
        if not hasattr(value, "local_shards"):
            continue
        table = key.split(".")[-2]
        for part in value.local_shards():
            (first, column), (rows, columns) = part.metadata.shard_offsets, part.metadata.shard_sizes
            for block in range(first // INIT_BLOCK, -(-(first + rows) // INIT_BLOCK)):
                generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}/{table}/{block}".encode()))
                drawn = torch.empty(INIT_BLOCK, value.size(1)).uniform_(-1, 1, generator=generator) * ranges[table]
                low, high = max(first, block * INIT_BLOCK), min(first + rows, (block + 1) * INIT_BLOCK)
                begin = block * INIT_BLOCK
                part.tensor[low - first : high - first] = drawn[low - begin : high - begin, column : column + columns]
