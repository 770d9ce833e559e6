"""What a head's scores on logged candidates are worth: on exposures, in its input space, and against the teacher."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from joint import metrics
from joint.batch import Batch
from joint.evaluating.alignment import of_fusions, to_order, to_the_teacher
from joint.evaluating.variety import Coverage
from joint.experiment import Config
from joint.metrics import AucState, PerRequest, Ratio
from joint.outputs import Outputs
from joint.ranks import ranks, request_sums
from joint.schema import GROUPS, Schema
from joint.spaces import stage_mask

State = Ratio | PerRequest | AucState | Coverage


def logged_metrics(
    config: Config,
    schema: Schema,
    batch: Batch,
    outputs: Outputs,
    scores: Mapping[str, Tensor],
    orders: Mapping[str, Tensor],
) -> dict[str, State]:
    """Every metric of logged candidates, as `HEAD/METRIC[/TASK]` and `alignment/…`; what is fused names no task.

    Args:
        scores: head -> its fused scores `[N]`.
        orders: whose -> an order of the candidates `[N]`, NaN outside of it, to hold the heads against.
    """
    found = dict(_on_exposures(config, batch, outputs))
    found |= dict(against_negatives(config, batch, outputs, batch, outputs))
    found |= dict(to_the_teacher(config, schema, batch, outputs, scores))
    if len(config.tasks) > 1:
        found |= dict(of_fusions(batch, outputs, scores))
    for whose, order in orders.items():
        found |= dict(to_order(whose, order, scores, batch, config.evaluation.k))
    for head, score in scores.items():
        if head in schema.input_space and head not in config.evaluation.whole_catalogue:
            inside = stage_mask(("exposed", *schema.input_space[head]), batch.stages)
            found |= dict(in_space(config, head, score, inside, batch))
    return found


def against_negatives(
    config: Config, batch: Batch, outputs: Outputs, others: Batch, of_others: Outputs
) -> Iterator[tuple[str, AucState]]:
    """`HEAD/auc/TASK/STAGE`: AUC of the task's positives against the unexposed candidates of each of SDCL's kinds.

    One grid for models trained with any kind and number of negatives (SDCL Tables 5-6 leave theirs open).

    Args:
        batch, outputs: where the positives are; others, of_others: where the negatives are.
    """
    kinds = {name: stage_mask((name,), others.stages) for name in GROUPS}
    for head, output in outputs.items():
        for index, task in enumerate(config.tasks):
            positive = output.logits[batch.positive[:, index], index]
            for name, mask in kinds.items():
                if mask.any():
                    negative = of_others[head].logits[mask, index]
                    labels = torch.cat([torch.ones_like(positive), torch.zeros_like(negative)])
                    yield f"{head}/auc/{task}/{name}", metrics.auc(torch.cat([positive, negative]), labels)


def _on_exposures(config: Config, batch: Batch, outputs: Outputs) -> Iterator[tuple[str, State]]:
    """AUC over all and within requests, log loss and calibration per task, on exposures with known feedback."""
    exposed = stage_mask(("exposed",), batch.stages)
    for head, output in outputs.items():
        for index, (task, rule) in enumerate(config.tasks.items()):
            logits, labels = output.logits[:, index], batch.labels[:, index]
            mask = batch.observed[:, index] & exposed
            positive = batch.positive[:, index].float()
            yield f"{head}/auc/{task}", metrics.auc(logits, positive, mask=mask)
            within = metrics.grouped_auc_by_request(logits, positive, batch.offsets, mask=mask)
            yield f"{head}/grouped_auc/{task}", within
            if head == "retrieval":  # a softmax's logits are no probabilities
                continue
            if rule.kind == "weighted":  # odds that expect the value of a positive (RRA Eq 1)
                expected, found = logits.double().exp(), batch.weight[:, index] * positive
            else:
                yield f"{head}/log_loss/{task}", metrics.log_loss(logits, labels, mask=mask)
                expected, found = logits.double().sigmoid(), labels
            # `metrics.calibration` request by request, so that user groups have theirs.
            sums = (request_sums(x.where(mask, 0), batch.offsets) for x in (expected, found))
            yield f"{head}/calibration/{task}", PerRequest.of(*sums)


def in_space(
    config: Config, head: str, scores: Tensor, inside: Tensor, batch: Batch
) -> Iterator[tuple[str, PerRequest]]:
    """The positives among the candidates `inside [N]` the head has to order (RecFlow's recall, SDCL's precision)."""
    offsets = torch.cat([inside.new_zeros(1, dtype=torch.long), inside.long().cumsum(0)])[batch.offsets]
    positive = batch.positive[:, list(config.tasks).index(config.evaluation.task)]
    order, lengths = ranks(scores[inside], positive[inside], offsets), offsets.diff()
    rank, row = order[positive[inside]], batch.row[inside][positive[inside]]
    for k in config.evaluation.k:
        yield f"{head}/recall@{k}", metrics.recall_by_request(rank, row, len(lengths), k)
        yield f"{head}/precision@{k}", metrics.precision_by_request(rank, row, lengths, k)
        yield f"{head}/ndcg@{k}", metrics.ndcg_by_request(rank, row, len(lengths), k)
        yield f"{head}/dcg_per_positive@{k}", metrics.dcg_by_request(rank, row, len(lengths), k)
    for index, (task, rule) in enumerate(config.tasks.items()):
        if rule.kind == "weighted":
            worth = batch.weight[:, index].where(batch.positive[:, index], 0)[inside]
            rank = ranks(scores[inside], positive[inside], offsets, worth)[positive[inside]]
            for k in config.evaluation.k:
                recall = metrics.recall_by_request(rank, row, len(lengths), k, weight=worth[positive[inside]])
                yield f"{head}/weighted_recall@{k}/{task}", recall
