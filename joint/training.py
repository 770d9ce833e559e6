"""Training, read top to bottom: set up, resume, loop, evaluate."""

from __future__ import annotations

import time
import zlib
from pathlib import Path

import torch
from torch import nn
from torchrec.optim.keyed import CombinedOptimizer

from joint import checkpoint
from joint.charts import charts
from joint.checkpoint import Saver
from joint.continuing import open_before
from joint.cost import cost_numbers, head_costs
from joint.data.assemble import Assembler
from joint.data.dataset import Dataset
from joint.data.loader import Loader
from joint.data.order import Position
from joint.data.planted.truth import FOLDER as TRUTH
from joint.distributed import process_group, rank, sum_over_ranks, world_size
from joint.evaluating.evaluator import Measured, evaluator_of
from joint.evaluating.finished_run import reference_of
from joint.evaluating.negative_weights import negative_weights
from joint.experiment import Config
from joint.fast_lookup import use_fast_lookup
from joint.features import Plan
from joint.optimizers import build_optimizer, set_learning_rates
from joint.pipeline import build_pipeline
from joint.reporting import Reporter
from joint.run import RunDirectory, make_run, open_run, write_metrics
from joint.stopping import Together, stop_signal
from joint.summary import highlights, opening, tables, wrapped
from joint.task import build_task
from towers.mixtures import routing, set_step


def train(config: Config, dataset: Dataset, *, continues: Path | None = None) -> None:
    """Train a config to its end, from its newest checkpoint if it has one, then measure it on the test part.

    A run without a checkpoint of its own starts from that of the run `continues`, if one is given.
    """
    torch.set_num_threads(config.train.threads)
    with stop_signal() as asked, process_group() as device:
        scores = dataset.predictions.hash if dataset.predictions else ""
        run = open_run(config, dataset.schema, scores, continues=continues)
        before = open_before(continues, config, dataset.schema) if continues and not run.begun else None
        plan = Plan(config, dataset.schema)
        assembler = Assembler(plan, dataset)
        model = build_task(plan, device)
        optimizer = build_optimizer(model, config.optimizer)
        progress = checkpoint.load_latest(run.checkpoints, model, optimizer)
        if before:
            progress = before.load(model, optimizer)
        loader = Loader(assembler, rank=rank(), world_size=world_size())
        total = progress.step + loader.batches_left(progress.position)
        if rank() == 0:  # only now that everything could be built
            make_run(run, config, dataset.schema, scores, continues=continues)
        reporter = Reporter(run, total_steps=total, resumed_from=progress.step)
        reporter.charts(charts(config, planted=(dataset.directory / TRUTH).exists()))
        costs = head_costs(model.module.dense.model)
        if config.train.fast_lookup and (trouble := use_fast_lookup(model)):
            reporter.say(trouble)
        reporter.text("run", opening(plan, dataset, loader, model, costs, progress, total), progress.step)
        if not progress.step:
            reporter.numbers(0, cost_numbers(costs), only=())  # constants: no curves, and in the text
        pipeline = build_pipeline(model, optimizer, device)
        batches = Together(loader.from_position(progress.position, pinned=device.type == "cuda"), asked)
        beside = config.train.save_beside_training
        with Saver(run.checkpoints, model, optimizer, keep=config.train.keep, beside=beside) as saver:
            model.train()
            while progress.step < total and not batches.stopping:
                began = time.perf_counter()
                rates = begin_step(model, optimizer, config, progress.step)
                output = pipeline.progress(batches)
                batch = output.batch
                reporter.step(
                    output.losses,
                    requests=batch.requests,
                    candidates=len(batch.item),
                    unknown=batch.unknown,
                    seconds=time.perf_counter() - began,
                    waited=batches.waited(),
                )
                progress = progress.after(batch)
                if progress.step % config.train.log_every == 0 or progress.step == total:
                    counts = sum_over_ranks(torch.tensor(reporter.counts(), device=device))
                    more = routing_numbers(model) | negative_weights(config, output.outputs, batch)
                    reporter.interval(progress.step, counts.tolist(), rates | more)
                if ends_epoch(progress.position, config.train.evaluate_every_epochs):
                    pipeline.detach()
                    valid = config.evaluation.valid
                    found = evaluator_of(model, assembler, device)(valid, whole_catalogue=False).numbers
                    pipeline.attach()
                    model.train()
                    reporter.numbers(progress.step, found)
                    said = f"epoch {progress.position.epoch} on {valid}  "
                    reporter.say(wrapped(highlights(config, found), first=said, between="  "))
                if batches.stopping or progress.step % config.train.checkpoint_every == 0 or progress.step == total:
                    saver.save(progress)
        if progress.step < total:
            reporter.say(f"stopped after step {progress.step} of {total}; the same command goes on from there")
        else:
            loader.check_seen(progress.of_all_ranks().seen)
            pipeline.detach()
            reporter.say(f"measuring on {config.evaluation.test} …")
            evaluator = evaluator_of(model, assembler, device)
            evaluator.reference = reference_of(config, dataset, device)
            report(run, config, evaluator.full(config.evaluation.test), reporter, progress.step)
        reporter.close()


def begin_step(model: nn.Module, optimizer: CombinedOptimizer, config: Config, step: int) -> dict[str, float]:
    """Set what a step depends on beside its batch and the weights; returns the learning rates.

    Everything random in a step follows from (seed, step, rank), so a resumed run repeats it.
    """
    torch.manual_seed(zlib.crc32(f"{config.run.seed}/{step}/{rank()}".encode()))
    set_step(model, step)
    return set_learning_rates(optimizer, config.optimizer, step)


def report(run: RunDirectory, config: Config, measured: Measured, reporter: Reporter, step: int) -> None:
    """Write what the finished run measures on the test part, and show it."""
    if rank() == 0:
        write_metrics(run, measured.numbers, measured.requests)
    numbers = {f"test/{name}": value for name, value in measured.numbers.items()}
    reporter.measured(step, numbers, tables(config, measured.numbers))


def routing_numbers(model: nn.Module) -> dict[str, float]:
    """`routing/GATE/to_I/from_J`: how open evaluation's gate of every edge of an SNR trunk is."""
    return {
        f"routing/{name.partition('heads.')[2]}/to_{i}/from_{j}": value
        for name, gates in routing(model).items()
        for i, row in enumerate(gates.tolist())
        for j, value in enumerate(row)
    }


def ends_epoch(position: Position, every: int) -> bool:
    """Whether this position is the start of an epoch after which the validation part is looked at."""
    return every > 0 and (position.day, position.batch) == (0, 0) and position.epoch % every == 0
