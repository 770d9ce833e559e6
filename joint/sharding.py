"""Which ranks hold which rows of a table: by a fixed rule, or as TorchRec's planner finds best. Both by config."""

from __future__ import annotations

import logging

import torch
import torch.distributed as dist
from torch import nn
from torchrec.distributed import DistributedModelParallel
from torchrec.distributed.embedding import EmbeddingCollectionSharder
from torchrec.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints, Topology
from torchrec.distributed.planner.storage_reservations import FixedPercentageStorageReservation
from torchrec.distributed.planner.types import Stats
from torchrec.distributed.sharding_plan import construct_module_sharding_plan, row_wise, table_wise
from torchrec.distributed.types import ModuleSharder, ShardingPlan

from joint.distributed import ranks_of_a_machine, world_size
from joint.errors import ConfigError
from joint.experiment import Table
from joint.features import Key, Plan
from towers.embeddings import TableShape

ROW_WISE_FROM = 100_000  # rows from which an 'auto' table is split over the ranks
SCREEN = 10  # candidates of a request that the planner expects of a stage taken whole
RESERVED = 0.15  # the share of a device's memory that the planner leaves to everything but tables
# The kernel is always named: without one, a plan may mean a dense kernel, which is broken on CPU.
KERNELS = {"device": "fused", "uvm": "fused_uvm", "uvm_caching": "fused_uvm_caching"}


def shard(module: nn.Module, plan: Plan, *, device: torch.device) -> DistributedModelParallel:
    """Spread the tables over the ranks; their rows still have to be initialised or loaded.

    Args:
        module: holds a `SharedEmbeddings` at `embeddings`, on meta, with its optimizer already in backward.

    Raises:
        ConfigError: a table cannot be sharded as its settings say on this device and number of ranks.
    """
    sharders = [sharder_of(device.type)]
    if any(table.sharding == "planner" for table in plan.table_settings.values()):
        planner = planner_of(plan, topology_here(device.type, ranks=world_size()), [])
        assert dist.group.WORLD is not None
        found = planner.collective_plan(module, sharders, dist.group.WORLD)
    else:
        found = _plan_by_rule(module, plan, device)
    return DistributedModelParallel(module, device=device, plan=found, sharders=sharders)


def sharder_of(device: str) -> ModuleSharder[nn.Module]:
    """TorchRec's sharder of unpooled tables; where there is CUDA an id goes over the network once a batch."""
    sharder: ModuleSharder[nn.Module] = EmbeddingCollectionSharder(use_index_dedup=device == "cuda")
    return sharder


def sharding_of(table: str, rows: int, settings: Table, *, device: str, ranks: int) -> str:
    """'table_wise', 'row_wise' or 'planner': 'auto' by its rows; ConfigError for what the device cannot do."""
    space = table.partition("@")[0]
    if settings.memory != "device" and device != "cuda":
        raise ConfigError(f"tables.{space}.memory: {settings.memory} is for CUDA, found {device}")
    kind = settings.sharding
    if kind == "auto":
        kind = "row_wise" if rows >= ROW_WISE_FROM and ranks > 1 else "table_wise"
    block = -(-rows // ranks)
    if kind == "row_wise" and block * (ranks - 1) >= rows:
        raise ConfigError(f"tables.{space}.sharding: {rows} rows leave a rank of {ranks} empty; use table_wise")
    return kind


def by_rule(plan: Plan, *, device: str, ranks: int) -> dict[str, int | None]:
    """Table -> its rank, None for all of them: row-wise tables, and the others in turn, by width, the largest first."""
    placed: dict[str, int | None] = {}
    turn = 0
    for table in sorted(plan.tables, key=lambda table: (table.dim, -table.rows)):
        kind = sharding_of(table.name, table.rows, plan.table_settings[table.name], device=device, ranks=ranks)
        placed[table.name] = None if kind == "row_wise" else turn % ranks
        turn += kind != "row_wise"
    return placed


def _plan_by_rule(module: nn.Module, plan: Plan, device: torch.device) -> ShardingPlan:
    placed, found = by_rule(plan, device=device.type, ranks=world_size()), ShardingPlan(plan={})
    for name, collection in module.embeddings.collections.items():  # type: ignore[union-attr,operator]
        parts = {}
        held = {config.name for config in collection.embedding_configs()}
        for table, rank in ((table, rank) for table, rank in placed.items() if table in held):
            kernel = KERNELS[plan.table_settings[table].memory]
            by_rank = row_wise(compute_kernel=kernel) if rank is None else table_wise(rank=rank, compute_kernel=kernel)
            parts[table] = by_rank
        found.plan[f"embeddings.collections.{name}"] = construct_module_sharding_plan(
            collection, parts, sharder_of(device.type), ranks_of_a_machine(), world_size(), device.type
        )
    return found


def topology_of(device: str, *, ranks: int, ranks_per_machine: int, hbm: int, ddr: int | None = None) -> Topology:
    """The machines: `hbm` bytes a GPU and `ddr` bytes of host memory a rank (None: as TorchRec assumes)."""
    logging.getLogger("torchrec.distributed.planner").setLevel(logging.ERROR)  # it speaks to its own developers
    logging.getLogger("torchrec.distributed.planner.types").setLevel(logging.ERROR)
    return Topology(
        world_size=ranks,
        compute_device=device,
        hbm_cap=hbm if device == "cuda" else 0,
        ddr_cap=ddr,
        local_world_size=min(ranks, ranks_per_machine),
    )


def topology_here(device: str, *, ranks: int) -> Topology:
    """So many ranks, each on a device like this one."""
    hbm = torch.cuda.get_device_properties(torch.device(device)).total_memory if device == "cuda" else 0
    machine = ranks_of_a_machine() if ranks == world_size() else ranks
    return topology_of(device, ranks=ranks, ranks_per_machine=machine, hbm=hbm)


def planner_of(plan: Plan, topology: Topology, stats: list[Stats]) -> EmbeddingShardingPlanner:
    """TorchRec's planner under the constraints of a config; `stats` are shown what it found.

    'planner' tables may go table-wise or row-wise, all others as they say; column-wise would change row-wise Adagrad.
    """
    ids = ids_per_request(plan)
    ranks, device = topology.world_size, topology.compute_device

    def constraints(table: TableShape) -> ParameterConstraints:
        settings = plan.table_settings[table.name]
        kind = sharding_of(table.name, table.rows, settings, device=device, ranks=ranks)
        return ParameterConstraints(
            sharding_types=["table_wise", "row_wise"] if kind == "planner" else [kind],
            compute_kernels=[KERNELS[settings.memory]],
            pooling_factors=[ids[key] for key in table.keys],
        )

    return EmbeddingShardingPlanner(
        topology=topology,
        batch_size=max(1, plan.config.data.requests_per_batch // ranks),
        constraints={table.name: constraints(table) for table in plan.tables},
        storage_reservation=FixedPercentageStorageReservation(RESERVED),
        stats=stats,
    )


def ids_per_request(plan: Plan) -> dict[str, float]:
    """Key -> ids a request that the planner reckons with: whole histories, quotas as given, one id an item."""
    data = plan.config.data
    candidates = sum(SCREEN if quota == "all" else quota for quota in data.candidates.values())
    whole = "corpus" in plan.pool_spaces
    pool = plan.schema.items / data.requests_per_batch if whole else SCREEN + data.shared_random

    def ids(key: Key) -> float:
        match key.side:
            case "request":
                return 1
            case "candidate":
                return candidates
            case "pool":
                return pool
            case "competitors":
                return plan.history_lengths[key.history] * plan.schema.history(key.history).competitors
            case _:
                return plan.history_lengths[key.history]

    return {key.name: float(max(ids(key), 1e-3)) for key in plan.keys if key.embedded}
