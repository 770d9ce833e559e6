"""`python -m joint.plan CONFIG --world-size N [--device cuda] [--hbm 80GB]`: where the tables would go, at what cost.

Nothing is allocated: tables are on meta, and no other rank, GPU or training data is needed, only `dataset.json`.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

from joint.commands import run_command
from joint.sizes import size, size_text
from joint.versions import check_versions


@dataclass
class Found:
    """What the planner decided: TorchRec hands it to whoever is registered for its statistics."""

    options: list[Any] = field(default_factory=list)

    def log(self, *_: object, best_plan: list[Any], **__: object) -> None:
        """Keep the options it chose, one a table, with the bytes and milliseconds of every shard."""
        self.options = best_plan


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the plan; returns the exit code."""
    parser = argparse.ArgumentParser(prog="joint.plan", description="Plan the sharding of a config's tables.")
    parser.add_argument("config", type=Path)
    parser.add_argument("overrides", nargs="*", default=[], metavar="key=value")
    parser.add_argument("--world-size", type=int, required=True, help="number of ranks")
    parser.add_argument("--ranks-per-machine", type=int, default=8)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--hbm", type=size, default=size("80GB"), help="memory of a GPU (default 80GB)")
    parser.add_argument("--ddr", type=size, default=size("128GB"), help="host memory of a rank (default 128GB)")
    parsed = parser.parse_intermixed_args(arguments)
    if parsed.world_size < 1 or parsed.ranks_per_machine < 1:
        parser.error("--world-size and --ranks-per-machine are at least 1")
    check_versions()
    from joint.config import load_config
    from joint.features import Plan
    from joint.fit import check_against
    from joint.schema import read_schema
    from joint.summary import collision_lines

    config, tree = load_config(parsed.config, parsed.overrides)
    schema = read_schema(Path(config.data.path))
    check_against(config, tree, schema)
    plan = Plan(config, schema)
    for line in [*report(plan, parsed), *collision_lines(plan)]:
        print(line)
    return 0


def report(plan: Any, asked: argparse.Namespace) -> Iterator[str]:
    """The lines of the report.

    Raises:
        ConfigError: no plan fits, with the bytes that are needed and those that are there.
    """
    from joint.sharding import topology_of

    ranks, device, memory = asked.world_size, asked.device, asked.hbm if asked.device == "cuda" else asked.ddr
    topology = topology_of(device, ranks=ranks, ranks_per_machine=asked.ranks_per_machine, hbm=asked.hbm, ddr=asked.ddr)
    options = planned(plan, topology)
    share = max(1, plan.config.data.requests_per_batch // ranks)
    yield f"{ranks} ranks on {device}, {size_text(memory)} each; {share} requests a rank and step"
    yield from _table_lines(options)
    yield ""
    yield from _rank_lines(options, ranks, memory)
    yield ""
    yield from _time_lines(options, ranks)


def planned(plan: Any, topology: Any) -> list[Any]:
    """TorchRec's choice for every table on these machines, the table of the most bytes first.

    Raises:
        ConfigError: no plan fits, with the bytes that are needed and those that are there.
    """
    from torch import nn
    from torchrec.distributed.planner.types import PlannerError

    from joint.errors import ConfigError
    from joint.optimizers import optimize_tables_in_backward, state_of_row
    from joint.sharding import RESERVED, planner_of, sharder_of
    from towers.embeddings import SharedEmbeddings

    module = nn.ModuleDict({"embeddings": SharedEmbeddings(plan.tables, device="meta")})
    optimizer = plan.config.optimizer
    optimize_tables_in_backward(module, optimizer, device=topology.compute_device)
    found, ranks = Found(), topology.world_size
    try:
        planner_of(plan, topology, [found]).plan(module, [sharder_of(topology.compute_device)])
    except PlannerError as error:
        needed = sum(4 * table.rows * (table.dim + state_of_row(optimizer.tables, table.dim)) for table in plan.tables)
        storage = topology.devices[0].storage
        memory = storage.hbm if topology.compute_device == "cuda" else storage.ddr
        raise ConfigError(
            f"no plan fits: rows and {optimizer.tables.kind} take {size_text(needed)}, and {ranks} ranks of "
            f"{size_text(memory)} have {size_text(ranks * memory * (1 - RESERVED))} after the {RESERVED:.0%} that is "
            "kept free; take more ranks, fewer rows, row_wise tables or tables.NAME.memory: uvm_caching"
        ) from error
    return sorted(found.options, key=lambda option: -sum(_bytes(shard) for shard in option.shards))


def rows_by_rank(plan: Any, *, device: str, ranks: int) -> dict[str, list[int]]:
    """Table -> the rows that each of so many ranks holds in training: by rule, or as the planner that is asked finds.

    Raises:
        ConfigError: a table cannot be sharded as its settings say.
    """
    from joint.sharding import by_rule, topology_here

    if any(table.sharding == "planner" for table in plan.table_settings.values()):
        options = planned(plan, topology_here(device, ranks=ranks))
        shards = {option.name: [(shard.rank, shard.size[0]) for shard in option.shards] for option in options}
    else:
        rows = {table.name: table.rows for table in plan.tables}
        placed = by_rule(plan, device=device, ranks=ranks)
        shards = {name: [(rank, rows[name])] for name, rank in placed.items() if rank is not None}
        for name in (name for name, rank in placed.items() if rank is None):
            block = -(-rows[name] // ranks)
            shards[name] = [(rank, min(block, rows[name] - rank * block)) for rank in range(ranks)]
    return {
        table.name: [sum(n for of, n in shards[table.name] if of == rank) for rank in range(ranks)]
        for table in plan.tables
    }


def _table_lines(options: Sequence[Any]) -> Iterator[str]:
    yield f"{'table':20}{'rows':>15}{'dim':>5}  {'sharding':12}{'kernel':18}{'ranks':>6}{'bytes':>11}  slowest shard"
    for option in options:
        rows, dim = option.tensor.shape
        held = sum(_bytes(shard) for shard in option.shards)
        slowest = max(shard.perf.total for shard in option.shards)
        ranks = len({shard.rank for shard in option.shards})
        yield (
            f"{option.name:20}{rows:>15,}{dim:>5}  {option.sharding_type:12}{option.compute_kernel:18}{ranks:>6}"
            f"{size_text(held):>11}{slowest:>12.3f} ms"
        )


def _rank_lines(options: Sequence[Any], ranks: int, memory: int) -> Iterator[str]:
    """The bytes of every rank: rows, optimizer state and buffers of the exchange; equal neighbours in one line."""
    held = [0] * ranks
    for option in options:
        for shard in option.shards:
            held[shard.rank] += _bytes(shard)
    for text, group in groupby(range(ranks), key=lambda rank: size_text(held[rank])):
        members = list(group)
        name = f"rank {members[0]}" if len(members) == 1 else f"ranks {members[0]}-{members[-1]}"
        yield f"{name:20}{text:>11} each, {held[members[0]] / memory:.0%} of its memory"


def _time_lines(options: Sequence[Any], ranks: int) -> Iterator[str]:
    """What the slowest rank is expected to spend on its tables in a step, and on what most."""
    parts = ("input_dist_comms", "fwd_comms", "bwd_comms", "fwd_compute", "bwd_compute", "prefetch_compute")
    times = [dict.fromkeys(parts, 0.0) for _ in range(ranks)]
    for option in options:
        for shard in option.shards:
            for part in parts:
                times[shard.rank][part] += getattr(shard.perf, part)
    slowest = max(range(ranks), key=lambda rank: sum(times[rank].values()))
    spent = times[slowest]
    comms = sum(value for part, value in spent.items() if part.endswith("comms"))
    total = sum(spent.values())
    yield f"expected a step, for tables alone, on the slowest rank ({slowest}): {total:.3f} ms"
    yield "  " + "  ".join(f"{part.replace('_', ' ')} {value:.3f}" for part, value in spent.items() if value)
    kind = "exchanging rows between ranks" if comms > total / 2 else "looking rows up and updating them"
    yield f"expected bottleneck: {kind} ({max(comms, total - comms) / max(total, 1e-12):.0%} of it)"


def _bytes(shard: Any) -> int:
    """What a shard takes, in the memory of its GPU and of its host."""
    return int(shard.storage.hbm + shard.storage.ddr)


if __name__ == "__main__":
    raise SystemExit(run_command(main))
