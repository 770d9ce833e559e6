"""The look-up of a CPU through FBGEMM's fast kernel: the same rows and updates, bit for bit.

On a CPU, FBGEMM 1.8 walks hash maps in the backward of a look-up without pooling, slower than where it pools.
A sum of one row is that row, so every id becomes a bag of its own, and the ids of one mean a bag. The kernel wants
equally many bags of every feature: each table's bags are cut into runs of `BAGS`, a run is a feature, and only a
table's last runs are filled up with empty bags. A table's ids stay in their order, in which gradients of equal ids are
added. Every table has two runs at least: one feature alone takes another path of the kernel, slower here, that rounds
differently.

One rank alone calls the kernels itself, as there is nothing to exchange. What is averaged is then summed in the kernel;
with more ranks rows are averaged by whoever reads them.

This leans on what FBGEMM and TorchRec keep in their modules, so it is used with the versions it was written against,
and no others.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from functools import partial

import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType as OptimType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import BoundsCheckMode, PoolingMode
from fbgemm_gpu.split_table_batched_embeddings_ops_training import SplitTableBatchedEmbeddingBagsCodegen
from torch import Tensor, nn
from torch.nn.functional import pad
from torchrec.distributed.batched_embedding_kernel import BatchedFusedEmbedding
from torchrec.distributed.embedding import ShardedEmbeddingCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from joint.distributed import world_size
from joint.versions import installed_versions
from towers.embeddings import Averaged, SharedEmbeddings, segment_mean

TESTED = {"fbgemm-gpu-cpu": "1.8.0", "torchrec": "1.8.0"}
BAGS = 512  # bags of a run: many, as a run costs the kernel some microseconds, and few, as the last run is filled up
SLOW_SHARE = 12  # the plain kernel pays for every different row: below a twelfth of the ids it is the faster one


def use_fast_lookup(model: nn.Module) -> str:
    """Make the look-ups of a sharded model that are on a CPU fast; or say why not, '' where there is nothing to say."""
    kernels = [kernel for kernel in _kernels(model) if kernel.emb_module.use_cpu]
    found = {name: version for name, version in installed_versions().items() if name in TESTED}
    if kernels and found != TESTED:
        return f"train.fast_lookup has no effect: written for {_listed(TESTED)}, found {_listed(found)}"
    for kernel in kernels:
        kernel.forward = partial(_forward, kernel)
    if kernels and world_size() == 1:
        for embeddings in model.modules():
            if isinstance(embeddings, SharedEmbeddings):
                of = {name: [*_kernels(collection)] for name, collection in embeddings.collections.items()}
                embeddings.forward = partial(_look_up, of)  # type: ignore[method-assign]
    return ""


def _kernels(model: nn.Module) -> Iterator[BatchedFusedEmbedding]:
    """TorchRec keeps them out of `modules()`."""
    for collection in model.modules():
        for lookup in collection._lookups if isinstance(collection, ShardedEmbeddingCollection) else ():
            yield from (kernel for kernel in lookup.modules() if isinstance(kernel, BatchedFusedEmbedding))


def _listed(versions: dict[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in sorted(versions.items())) or "none of them"


def _look_up(
    of: Mapping[str, Sequence[BatchedFusedEmbedding]],
    sparse: Mapping[str, KeyedJaggedTensor],
    segments: Mapping[str, Tensor],
) -> dict[str, object]:
    """What `SharedEmbeddings` gives on one rank, means instead of their rows."""
    return {name: _by_key(kernels, sparse[name], segments) for name, kernels in of.items()}


def _by_key(
    kernels: Sequence[BatchedFusedEmbedding], features: KeyedJaggedTensor, segments: Mapping[str, Tensor]
) -> dict[str, Averaged]:
    ids = dict(zip(features.keys(), features.values().split(features.length_per_key()), strict=True))
    found: dict[str, Averaged] = {}
    for kernel in kernels:
        keys = [key for table in kernel._config.embedding_tables for key in table.feature_names]
        averaged = [segments.get(key) for key in keys]
        rows = _rows(kernel.emb_module, [ids[key] for key in keys], averaged)
        found |= {key: Averaged(row) for key, row in zip(keys, rows, strict=True)}
    return found


def _forward(kernel: BatchedFusedEmbedding, features: KeyedJaggedTensor) -> Tensor:
    """`[ids, D]`, in the order of the ids, as the kernel's own `forward` gives it."""
    ids = features.values().split(features.length_per_key())
    return torch.cat(_rows(kernel.emb_module, ids, [None] * len(ids)))


def _rows(
    tables: SplitTableBatchedEmbeddingBagsCodegen, ids: Sequence[Tensor], averaged: Sequence[Tensor | None]
) -> list[Tensor]:
    """Of each feature its ids' rows `[n, D]`, or means `[S, D]` of as many consecutive ones as `averaged` says."""
    of_table = [0] * len(tables.embedding_specs)
    for table, of_feature in zip(tables.feature_table_map, ids, strict=True):
        of_table[table] += len(of_feature)
    different = sum(min(n, rows) for n, (rows, *_) in zip(of_table, tables.embedding_specs, strict=True))
    if SLOW_SHARE * different < sum(of_table) or not torch.is_grad_enabled():
        ends = torch.tensor([0, *map(len, ids)]).cumsum(0)
        rows = tables(indices=torch.cat([*ids]).long(), offsets=ends).split([*map(len, ids)])
        return [r if n is None else segment_mean(r, n) for r, n in zip(rows, averaged, strict=True)]
    lengths = [torch.ones_like(i) if n is None else n for i, n in zip(ids, averaged, strict=True)]
    sums = _sums(tables, torch.cat([*ids]).long(), lengths)
    return [s if n is None else s / n.clamp(min=1).unsqueeze(1) for s, n in zip(sums, averaged, strict=True)]


def _sums(tables: SplitTableBatchedEmbeddingBagsCodegen, ids: Tensor, lengths: Sequence[Tensor]) -> list[Tensor]:
    """Of each feature the sums `[S, D]` of the rows of as many consecutive ids as its `lengths [S]` say."""
    of_table: list[list[Tensor]] = [[] for _ in tables.embedding_specs]
    for table, of_feature in zip(tables.feature_table_map, lengths, strict=True):
        of_table[table].append(of_feature)
    bags = [sum(map(len, of)) for of in of_table]
    runs = [max(2, -(-n // BAGS)) for n in bags]
    filled = [[*of, ids.new_zeros(r * BAGS - n)] for of, r, n in zip(of_table, runs, bags, strict=True)]
    offsets = pad(torch.cat([n for of in filled for n in of]).cumsum(0), (1, 0))
    by_place = _pooled(tables, runs)(indices=ids, offsets=offsets).view(BAGS, sum(runs), -1)
    found = iter(by_place.transpose(0, 1).flatten(0, 1).split([len(n) for of in filled for n in of]))
    return [rows for of in filled for rows in [next(found) for _ in of][:-1]]


def _pooled(tables: SplitTableBatchedEmbeddingBagsCodegen, runs: list[int]) -> SplitTableBatchedEmbeddingBagsCodegen:
    """The same tables and optimizer state, shared, seen as summing and with so many features of each table."""
    feature = torch.tensor(tables.feature_table_map)
    first = torch.searchsorted(feature, torch.arange(len(runs))).repeat_interleave(torch.tensor(runs))
    pooled = copy.copy(tables)
    pooled._buffers = dict(tables._buffers)
    pooled.pooling_mode = PoolingMode.SUM
    pooled.bounds_check_mode_int = BoundsCheckMode.NONE.value  # the loader has mapped every id to a row of its table
    pooled.total_D = len(first) * tables.max_D
    pooled.D_offsets = torch.arange(len(first) + 1, dtype=torch.int32) * tables.max_D
    pooled.hash_size_cumsum = torch.cat([tables.hash_size_cumsum[first], tables.hash_size_cumsum[-1:]])
    by_feature = ["weights_offsets", "rows_per_table"]
    if tables.optimizer != OptimType.EXACT_SGD:  # which has no moments
        by_feature.append("momentum1_offsets")
    for name in by_feature:
        setattr(pooled, name, getattr(tables, name)[first])
    return pooled
