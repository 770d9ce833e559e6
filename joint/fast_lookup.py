"""The look-up of unpooled rows through FBGEMM's fast CPU kernel: the same rows and updates, bit for bit.

On a CPU, FBGEMM 1.8 walks hash maps in the backward of a look-up without pooling, slower than where it pools.
A sum of one row is that row, so every id becomes a bag of its own. The kernel wants equally many bags of every feature:
each table's ids are cut into runs of `BAGS`, a run is a feature, and only a table's last runs are filled up with empty
bags. A table's ids stay in their order, in which gradients of equal ids are added. Every table has two runs at least:
one feature alone takes another path of the kernel, slower here, that rounds differently.

This leans on what FBGEMM keeps in its module, so it is used with the versions it was written against, and no others.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import partial

import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType as OptimType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import PoolingMode
from fbgemm_gpu.split_table_batched_embeddings_ops_training import SplitTableBatchedEmbeddingBagsCodegen
from torch import Tensor, nn
from torchrec.distributed.batched_embedding_kernel import BatchedFusedEmbedding
from torchrec.distributed.embedding import ShardedEmbeddingCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from joint.versions import installed_versions

TESTED = {"fbgemm-gpu-cpu": "1.8.0", "torchrec": "1.8.0"}
BAGS = 512  # ids of a run: many, as a run costs the kernel some microseconds, and few, as the last run is filled up

SLOW_SHARE = 4  # the plain kernel pays for every different row: below a quarter of the ids it is the faster one


def use_fast_lookup(model: nn.Module) -> str:
    """Make the look-ups of a sharded model that are on a CPU fast; or say why not, '' where there is nothing to say."""
    kernels = [kernel for kernel in _kernels(model) if kernel.emb_module.use_cpu]
    found = {name: version for name, version in installed_versions().items() if name in TESTED}
    if kernels and found != TESTED:
        return f"train.fast_lookup has no effect: written for {_listed(TESTED)}, found {_listed(found)}"
    for kernel in kernels:
        kernel.forward = partial(_forward, kernel)
    return ""


def _kernels(model: nn.Module) -> Iterator[BatchedFusedEmbedding]:
    """TorchRec keeps them out of `modules()`."""
    for collection in model.modules():
        for lookup in collection._lookups if isinstance(collection, ShardedEmbeddingCollection) else ():
            yield from (kernel for kernel in lookup.modules() if isinstance(kernel, BatchedFusedEmbedding))


def _listed(versions: dict[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in sorted(versions.items())) or "none of them"


def _forward(kernel: BatchedFusedEmbedding, features: KeyedJaggedTensor) -> Tensor:
    """`[ids, D]`, in the order of the ids, as the kernel's own `forward` gives it."""
    tables = kernel.emb_module
    ids = [0] * len(tables.embedding_specs)
    for table, length in zip(tables.feature_table_map, features.length_per_key(), strict=True):
        ids[table] += length
    different = sum(min(n, rows) for n, (rows, *_) in zip(ids, tables.embedding_specs, strict=True))
    if SLOW_SHARE * different < sum(ids) or not torch.is_grad_enabled():
        return BatchedFusedEmbedding.forward(kernel, features)
    runs = [max(2, -(-n // BAGS)) for n in ids]
    ends = torch.tensor([0, *ids]).cumsum(0)
    bags = [torch.arange(r * BAGS).clamp_(max=n) + end for r, n, end in zip(runs, ids, ends[:-1], strict=True)]
    rows = _pooled(tables, runs)(indices=features.values().long(), offsets=torch.cat([*bags, ends[-1:]]))
    by_run = rows.view(BAGS, sum(runs), -1).transpose(0, 1).flatten(0, 1)
    filling = (size for r, n in zip(runs, ids, strict=True) for size in (n, r * BAGS - n))
    return torch.cat(by_run.split(list(filling))[::2])


def _pooled(tables: SplitTableBatchedEmbeddingBagsCodegen, runs: list[int]) -> SplitTableBatchedEmbeddingBagsCodegen:
    """The same tables and optimizer state, shared, seen as summing and with so many features of each table."""
    feature = torch.tensor(tables.feature_table_map)
    first = torch.searchsorted(feature, torch.arange(len(runs))).repeat_interleave(torch.tensor(runs))
    pooled = copy.copy(tables)
    pooled._buffers = dict(tables._buffers)
    pooled.pooling_mode = PoolingMode.SUM
    pooled.total_D = len(first) * tables.max_D
    pooled.D_offsets = torch.arange(len(first) + 1, dtype=torch.int32) * tables.max_D
    pooled.hash_size_cumsum = torch.cat([tables.hash_size_cumsum[first], tables.hash_size_cumsum[-1:]])
    by_feature = ["weights_offsets", "rows_per_table"]
    if tables.optimizer != OptimType.EXACT_SGD:  # which has no moments
        by_feature.append("momentum1_offsets")
    for name in by_feature:
        setattr(pooled, name, getattr(tables, name)[first])
    return pooled
