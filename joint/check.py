"""`joint.train CONFIG --check`: what a run would be, and its first steps tried. No file is written."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta
from pathlib import Path

import torch

from joint.checkpoint import size_of, steps
from joint.continuing import open_before
from joint.cost import head_costs
from joint.data.assemble import Assembler
from joint.data.dataset import Dataset
from joint.data.loader import Loader, latest_known
from joint.data.order import Position
from joint.distributed import process_group, rank, world_size
from joint.errors import CheckpointError, ConfigError
from joint.experiment import Config, Task, heads_of
from joint.fast_lookup import use_fast_lookup
from joint.features import Plan
from joint.first_steps import Tried, part_of, try_steps
from joint.optimizers import build_optimizer, state_of_row
from joint.plan import rows_by_rank
from joint.reporting import peak_memory
from joint.run import open_run
from joint.schema import SPLITS, Schema
from joint.sizes import size_text
from joint.summary import aligned, collision_lines, cost_cells, thin_batches, wrapped
from joint.task import build_task

MOST_RANKS = 8  # that are listed one by one
MOST_NAMED = 4  # parameters without a gradient


def check(config: Config, dataset: Dataset, *, ranks: int | None = None, continues: Path | None = None) -> None:
    """Say what a run of this config would be, and what its first steps are like; every rank takes part.

    Args:
        ranks: where so many ranks would hold the tables; None: as many as there are.
        continues: the run that it is to go on from.

    Raises:
        UserError: what `joint.train` would raise up to its first steps.
    """
    torch.set_num_threads(config.train.threads)
    with process_group() as device:
        if continues:
            open_before(continues, config, dataset.schema)
        plan, ranks = Plan(config, dataset.schema), ranks or world_size()
        if config.data.shards % ranks:
            raise ConfigError(f"data.shards: {config.data.shards} is not a multiple of the number of ranks, {ranks}")
        held = rows_by_rank(plan, device=device.type, ranks=ranks)
        loader = Loader(Assembler(plan, dataset), rank=rank(), world_size=world_size())
        _say(f"{config.run.name}: the config is sound and fits {dataset.directory}", *_data_lines(plan, loader))
        _say("", *_table_lines(plan, held), *collision_lines(plan))
        model = build_task(plan, device)
        optimizer = build_optimizer(model, config.optimizer)
        trouble = use_fast_lookup(model) if config.train.fast_lookup else ""
        _say("", *aligned(cost_cells(head_costs(model.module.dense.model))), *([trouble] if trouble else []))
        tried = try_steps(model, optimizer, plan, loader, device)
        _say("", *_loss_lines(config, tried))
        _say("", *_price_lines(plan, loader, tried, size_of(model, optimizer)))
        warnings = [f"warning: {line}" for line in (*thin_batches(loader), *_warnings(config, tried))]
        _say("", *warnings, _standing(config, dataset, continues))


def _say(*lines: str) -> None:
    if rank() == 0:
        print("\n".join(lines), flush=True)


def _data_lines(plan: Plan, loader: Loader) -> Iterator[str]:
    """What is read of the dataset, and what is not."""
    config, schema = plan.config, plan.schema
    read = {key.feature.name for key in plan.keys} | {cross.feature for cross in plan.crosses.values()}
    days = schema.days(config.data.train, config.data.days)
    known = _known(config, schema, days)
    split = [f"{schema.requests(name):,} {name}" for name in SPLITS if schema.requests(name)]
    yield _line(
        "dataset", [f"{schema.items:,} items", *split, f"trains on {len(days)} day(s), {days[0]} to {days[-1]}"]
    )
    for level in ("request", "item", "event"):
        yield _line(f"{level}s", [f.name for f in schema.features if f.level == level and f.name in read])
    yield _line("not read", [f.name for f in schema.features if f.name not in read])
    yield _line("histories", [f"{name} (newest {length})" for name, length in plan.history_lengths.items()])
    yield _line("labels", [_label(name, task, known.get(name, "")) for name, task in config.tasks.items()])
    quotas = [f"{stage} {quota}" for stage, quota in config.data.candidates.items()]
    yield _line(
        "batch", [f"{config.data.requests_per_batch} requests ({loader.mean_requests:.1f} on average)", *quotas]
    )


def _line(name: str, words: Sequence[str]) -> str:
    """A named line of words; one that is too long goes on below, between words."""
    return wrapped(words or ["-"], first=f"{name:<11}", between=", ")


def _label(name: str, task: Task, known: str) -> str:
    rule = "" if task.kind == "ratio" else f" from {task.at_least:g} on"
    notes = [note for note in (task.kind if task.kind != "binary" else "", known) if note]
    return f"{name} is {task.label}{rule}" + (f" ({', '.join(notes)})" if notes else "")


def _known(config: Config, schema: Schema, days: Sequence[str]) -> dict[str, str]:
    """Task whose label matures late -> on how many of the training days it is known: its loss comes and goes by day."""
    found = {}
    for name, latest in latest_known(config, schema).items():
        known = {part.day for part in schema.parts if part.begin <= latest} & {*days}
        found[name] = f"known on {len(known)} of {len(days)} days"
    return found


def _table_lines(plan: Plan, held: Mapping[str, Sequence[int]]) -> Iterator[str]:
    """Rows, bytes and place of every table; the bytes that each rank holds."""
    kind, ranks = plan.config.optimizer.tables, len(next(iter(held.values())))
    row_bytes = {table.name: 4 * (table.dim + state_of_row(kind, table.dim)) for table in plan.tables}
    cells = [["table", "rows", "dim", f"with {kind.kind}", f"on {ranks} rank(s)"]]
    for table in plan.tables:
        size = size_text(table.rows * row_bytes[table.name])
        cells.append([table.name, f"{table.rows:,}", str(table.dim), size, _place(held[table.name])])
    yield from aligned(cells)
    by_rank = [sum(held[name][r] * row_bytes[name] for name in held) for r in range(ranks)]
    if ranks > MOST_RANKS:
        least, most = min(by_rank), max(by_rank)
        yield f"a rank holds {size_text(least)} to {size_text(most)} (rank {by_rank.index(most)}); joint.plan has more"
    else:
        yield "; ".join(f"rank {r} holds {size_text(size)}" for r, size in enumerate(by_rank))


def _place(rows: Sequence[int]) -> str:
    holding = [rank for rank, count in enumerate(rows) if count]
    return f"{max(rows):,} rows each" if len(holding) > 1 else f"rank {holding[0]}"


def _loss_lines(config: Config, tried: Tried) -> Iterator[str]:
    batch = tried.first.batch
    pool = int((batch.pool_item >= 0).sum())
    whose = f" of rank 0 of {world_size()}" if world_size() > 1 else ""
    yield (
        f"one real batch{whose}, forward and backward: {batch.requests:,} requests, {len(batch.item):,} candidates"
        + (f", {pool:,} items of the pool" if pool else "")
    )
    cells = [["objective", "loss", "head", "over", "weight", "value"]]
    for name, objective in config.objectives.items():
        over = " ".join(getattr(objective, "space", ())) or "-"
        value = f"{float(tried.first.losses[name]):.4f}"
        cells.append([name, objective.loss, objective.head, over, f"{objective.weight:g}", value])
    yield from aligned(cells)
    norms = sorted(tried.norms.items(), key=lambda of: of[0] not in heads_of(config))
    yield _line("gradients", [f"{part} {norm:.3g}" for part, norm in norms])


def _price_lines(plan: Plan, loader: Loader, tried: Tried, checkpoint: int) -> Iterator[str]:
    """What a run takes, as far as the tried steps tell."""
    data, train = plan.config.data, plan.config.train
    a_second = tried.requests / tried.seconds
    each, total = (timedelta(seconds=round(n * loader.requests / a_second)) for n in (1, data.epochs))
    steps = loader.batches_left(Position())
    yield _line(
        "time",
        [
            f"{a_second:,.0f} requests/s on {world_size()} rank(s)",
            f"waiting for data {tried.waited / tried.seconds:.0%}",
            f"{each} an epoch of {loader.requests:,} requests",
            f"{total} for all {steps:,} steps, without evaluation",
        ],
    )
    threads = f"{train.threads} thread(s) a rank"
    yield _line(
        "device", [torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU", threads, train.precision]
    )
    yield _line("memory", [f"{size_text(peak_memory())} at its peak so far, on a rank"])
    yield _line("disk", [f"{size_text(checkpoint)} a checkpoint, {train.keep} of them kept"])


def _warnings(config: Config, tried: Tried) -> Iterator[str]:
    """What is no mistake of the config, yet hardly meant."""
    parts = Counter(part_of(name) for name in tried.unreached)
    whole = [part for part in parts if part not in tried.norms or not tried.norms[part]]
    for part in whole:
        yield "no gradient reaches " + (f"the {part} head" if part in heads_of(config) else part)
    for head, task in tried.untaught:
        if head not in whole:
            yield f"no gradient reaches task {task} of the {head} head"
    if some := [name for name in tried.unreached if part_of(name) not in whole]:
        named = ", ".join(some[:MOST_NAMED]) + (", …" if len(some) > MOST_NAMED else "")
        yield f"no gradient in {tried.steps} steps for {len(some)} parameter(s): {named}"
    for name in config.objectives:
        if not float(tried.first.losses[name]):
            yield f"objective {name} is exactly 0: has the batch anything that it is about?"
    if tried.unknown:
        yield f"{tried.unknown:,} ids in {tried.steps} steps are outside their tables, and read as unknown"


def _standing(config: Config, dataset: Dataset, continues: Path | None) -> str:
    """What joint.train would do with the run directory."""
    scores = dataset.predictions.hash if dataset.predictions else ""
    try:
        run = open_run(config, dataset.schema, scores, continues=continues)
    except CheckpointError as error:
        return f"warning: joint.train would be refused: {error}"
    if run.begun:
        return f"nothing was written; joint.train goes on in {run.path}, from {steps(run.checkpoints)[-1].name}"
    return f"nothing was written; joint.train begins {run.path}"
