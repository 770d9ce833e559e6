"""Ranks: the process group, the sharding of tables, and the collectives that training needs."""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torchrec.distributed import DistributedModelParallel
from torchrec.distributed.embedding import EmbeddingCollectionSharder
from torchrec.distributed.sharding_plan import construct_module_sharding_plan, row_wise, table_wise
from torchrec.distributed.types import ModuleSharder, ShardingPlan

from joint.errors import ConfigError

TIMEOUT = timedelta(minutes=5)
ROW_WISE_FROM = 100_000  # rows from which an 'auto' table is split over the ranks
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
        dist.init_process_group(backend, timeout=TIMEOUT)
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


def rank() -> int:
    """This rank; 0 without a process group."""
    return dist.get_rank() if dist.is_initialized() else 0


def sum_over_ranks(values: Tensor) -> Tensor:
    """The elementwise sum over ranks, without a gradient; `values` itself becomes the sum."""
    if world_size() > 1:
        dist.all_reduce(values)
    return values


def gather_objects(value: Any) -> list[Any]:
    """Every rank's value, in order of rank, on every rank. Small Python objects of our own only."""
    if world_size() == 1:
        return [value]
    gathered: list[Any] = [None] * world_size()
    dist.all_gather_object(gathered, value)
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


def shard(module: nn.Module, sharding: dict[str, str], *, device: torch.device) -> DistributedModelParallel:
    """Spread the tables over the ranks; their rows still have to be initialised or loaded.

    Args:
        module: holds a `SharedEmbeddings` at `embeddings`, on meta, with its optimizer already in backward.
        sharding: table -> 'auto', 'table_wise' or 'row_wise'.
    """
    sharder = EmbeddingCollectionSharder()
    sharders: list[ModuleSharder[nn.Module]] = [sharder]
    plan = ShardingPlan(plan={})
    turn = 0
    for name, collection in module.embeddings.collections.items():  # type: ignore[union-attr,operator]
        parts = {}
        for table in sorted(collection.embedding_configs(), key=lambda t: -t.num_embeddings * t.embedding_dim):
            kind = sharding[table.name]
            # The kernel is always named: without it a hand-made plan means a dense kernel, which is broken on CPU.
            if kind == "row_wise" or (kind == "auto" and table.num_embeddings >= ROW_WISE_FROM and world_size() > 1):
                _check_rows(table.name, table.num_embeddings)
                parts[table.name] = row_wise(compute_kernel="fused")
            else:
                parts[table.name] = table_wise(rank=turn % world_size(), compute_kernel="fused")
                turn += 1
        plan.plan[f"embeddings.collections.{name}"] = construct_module_sharding_plan(
            collection, parts, sharder, world_size(), world_size(), device.type
        )
    return DistributedModelParallel(module, device=device, plan=plan, sharders=sharders)


def _check_rows(table: str, rows: int) -> None:
    block = -(-rows // world_size())
    if block * (world_size() - 1) >= rows:
        space = table.partition("@")[0]
        raise ConfigError(f"tables.{space}.sharding: {rows} rows leave a rank of {world_size()} empty; use table_wise")


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
