"""The training task: tables, model and objectives as one module, `forward(batch) -> (loss, StepOutput)`."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torchrec.distributed import DistributedModelParallel

from joint.batch import Batch
from joint.distributed import initialise_tables, sum_over_ranks, world_size
from joint.errors import UserError
from joint.features import Plan
from joint.model import JointModel
from joint.objectives import compute
from joint.optimizers import optimize_tables_in_backward
from joint.outputs import Outputs
from joint.sharding import shard
from towers.embeddings import SharedEmbeddings, rows_of


@dataclass
class StepOutput:
    """What a step leaves behind; a pipeline reads ahead, so it says which batch it was."""

    batch: Batch
    outputs: Outputs
    losses: dict[str, Tensor]  # objective -> its mean over the units of all ranks, detached; `total` is their sum


class Dense(nn.Module):
    """Everything after the look-up. It holds no table, so a tracer takes it as one leaf."""

    def __init__(self, plan: Plan) -> None:
        super().__init__()
        self.model = JointModel(plan)
        self.objectives = plan.config.objectives
        self.tasks = tuple(plan.config.tasks)
        self.reduced = plan.config.train.precision == "bfloat16"

    def forward(self, looked_up: dict[str, object], batch: Batch) -> tuple[Tensor, StepOutput]:
        """The loss over all ranks' units (in training), and the outputs."""
        with torch.autocast(batch.item.device.type, torch.bfloat16, enabled=self.reduced and self.training):
            outputs = self.model(rows_of(looked_up, batch.inner), batch)
        if not self.training:
            return batch.labels.new_zeros(()), StepOutput(batch, outputs, {})
        loss, values = self._loss(outputs, batch)
        return loss, StepOutput(batch, outputs, values)

    def _loss(self, outputs: Outputs, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Σ weight · Σ_task total / count, with counts (and a finite flag an objective) summed over the ranks.

        Gradients are averaged over ranks, so the local total is multiplied by the number of ranks: uneven ranks
        give the gradient that one rank with all of their requests would.
        """
        terms = {name: compute(o, outputs, batch, self.tasks) for name, o in self.objectives.items()}
        sizes = [term.total.numel() for term in terms.values()]
        totals = torch.cat([term.total for term in terms.values()])
        counts = torch.cat([term.count for term in terms.values()])
        broken = torch.stack([~term.total.isfinite().all() for term in terms.values()])
        summed = sum_over_ranks(torch.cat([totals.detach().double(), counts.double(), broken.double()]))
        all_totals, all_counts, all_broken = summed.split([len(totals), len(counts), len(broken)])
        if all_broken.any():
            names = [name for name, flag in zip(terms, all_broken.tolist(), strict=True) if flag]
            raise UserError(f"loss of {', '.join(names)} is not finite; a lower learning rate may mend it")
        divisor = all_counts.clamp(min=1)
        shares = (totals * (world_size() / divisor).float()).split(sizes)
        means = (all_totals / divisor).float().split(sizes)
        weights = [objective.weight for objective in self.objectives.values()]
        loss = torch.stack([w * share.sum() for w, share in zip(weights, shares, strict=True)]).sum()
        values = {name: mean.sum() for name, mean in zip(terms, means, strict=True)}
        values["total"] = torch.stack([w * value for w, value in zip(weights, values.values(), strict=True)]).sum()
        return loss, values


class JointTask(nn.Module):
    """Look up, then everything dense. The tables are on `meta` until they are sharded."""

    def __init__(self, plan: Plan) -> None:
        super().__init__()
        self.embeddings = SharedEmbeddings(plan.tables, device="meta")
        self.dense = Dense(plan)

    def forward(self, batch: Batch) -> tuple[Tensor, StepOutput]:
        """The loss (0 in evaluation) and what the step leaves behind."""
        return self.dense(self.embeddings(batch.sparse, batch.inner), batch)


def build_task(plan: Plan, device: torch.device) -> DistributedModelParallel:
    """The task with its tables sharded, optimized in backward and initialised; the same for any number of ranks."""
    config = plan.config
    torch.manual_seed(config.run.seed)
    task = JointTask(plan)
    optimize_tables_in_backward(task.embeddings, config.optimizer, device=device.type)
    model = shard(task, plan, device=device)
    initialise_tables(model, {name: table.init for name, table in plan.table_settings.items()}, config.run.seed)
    return model
