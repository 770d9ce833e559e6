"""What each head costs: parameters, and multiply-adds per request, per item and per candidate.

The point of a funnel is cost: a stage that scores more candidates must be the cheaper one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from joint.encoding import HistoryEncoder
from joint.features import Plan
from joint.model import JointModel
from towers.pre_ranking import TwoTowerHead
from towers.retrieval import RetrievalHead

MANY = 512  # candidates of one request over which the cost of one more is averaged


@dataclass(frozen=True)
class Cost:
    """A head's dense parameters, its encoders' among them, and its multiply-adds with full histories."""

    parameters: int
    request: int  # the user side, once a request
    item: int  # the item side where it can be cached, once an item
    candidate: int  # what is left for each candidate of a request


def cost_numbers(costs: dict[str, Cost]) -> dict[str, float]:
    """`cost/HEAD/parameters`, `…/request`, `…/item` and `…/candidate`, for the log."""
    return {f"cost/{head}/{name}": float(n) for head, cost in costs.items() for name, n in asdict(cost).items()}


def funnel_costs(costs: Mapping[str, Cost], quotas: Mapping[str, int], scored: int) -> dict[str, int]:
    """The multiply-adds of a request in each stage: its user side, and what is left to do for every candidate.

    Items are cached. `scored`: how many candidates the first head of `quotas` scores.
    """
    found = {}
    for head, quota in quotas.items():
        found[head] = costs[head].request + scored * costs[head].candidate
        scored = min(scored, quota)
    return found


@torch.no_grad()
def head_costs(model: JointModel) -> dict[str, Cost]:
    """The cost of every head of a model, measured by running it on zeros."""
    was_training = model.training
    model.eval()
    found = {name: _cost(model, name) for name in model.heads}
    model.train(was_training)
    return found


def _cost(model: JointModel, name: str) -> Cost:
    plan, head = model.plan, model.heads[name]
    device = next(model.parameters()).device
    encoders = {e: _reading(model, name, e) for e in plan.head_encoders(name)}
    parameters = sum(p.numel() for module in (head, *encoders.values()) for p in module.parameters())
    request = torch.zeros(1, sum(plan.fields(name, "request").values()), device=device)
    item = torch.zeros(1, sum(plan.fields(name, "candidate").values()), device=device)
    histories = sum(_multiply_adds(partial(_encode, e, plan, 0)) for e in encoders.values() if not e.per_candidate)
    if isinstance(head, RetrievalHead | TwoTowerHead):
        user, vector = head.user_vectors(request), head.item_vectors(item)
        of_user, of_pair = _line(lambda n: head.logits(user, vector.expand(n, *vector.shape[1:]), _row(n, device)))
        of_user += _multiply_adds(lambda: head.user_vectors(request))
        return Cost(parameters, histories + of_user, _multiply_adds(lambda: head.item_vectors(item)), of_pair)

    def score(n: int) -> None:
        head(request, item.expand(n, -1), _row(n, device))
        for encoder in encoders.values():
            if encoder.per_candidate:
                _encode(encoder, plan, n)

    of_request, of_pair = _line(score)
    return Cost(parameters, histories + of_request, 0, of_pair)


def _reading(model: JointModel, head: str, encoder: str) -> HistoryEncoder:
    found = model.encoders[model.plan.reading_name(head, encoder)]
    assert isinstance(found, HistoryEncoder)
    return found


def _encode(encoder: HistoryEncoder, plan: Plan, candidates: int) -> None:
    """Run an encoder on one request with a full history."""
    config, device = encoder.config, next(iter(encoder.parameters()), torch.zeros(())).device
    each = plan.schema.history(config.history).competitors
    dims = {key.name: plan.dim(key.feature) for key in plan.keys}

    def zeros(keys: list[str], count: int) -> dict[str, Tensor]:
        return {key: torch.zeros(count, dims[key], device=device) for key in keys}

    rows = zeros([*encoder.item_keys, *encoder.event_keys], config.length)
    if encoder.competing is not None:
        rows |= zeros(encoder.competitor_keys, config.length * each)
    if encoder.per_candidate:
        rows |= zeros(encoder.target_keys, candidates)
    batch: Any = SimpleNamespace(
        lengths={config.history: torch.tensor([config.length], device=device)},
        competitors={config.history: torch.ones(config.length, each, dtype=torch.bool, device=device)},
        row=_row(candidates, device),
    )
    encoder(rows, batch, torch.arange(candidates, device=device))


def _row(candidates: int, device: torch.device) -> Tensor:
    return torch.zeros(candidates, dtype=torch.long, device=device)


def _line(run: Callable[[int], object]) -> tuple[int, int]:
    """The cost that does not grow with the candidates, and that of one candidate."""
    few, many = (_multiply_adds(partial(run, n)) for n in (MANY, 2 * MANY))
    each = round((many - few) / MANY)
    return max(0, few - each * MANY), each


def _multiply_adds(run: Callable[[], object]) -> int:
    # Products element by element are how vectors meet and gates weigh; the counter knows matrix products only.
    elementwise = {torch.ops.aten.mul: lambda *_, out_shape=None, **__: 2 * torch.Size(out_shape).numel()}
    with FlopCounterMode(display=False, custom_mapping=elementwise) as counter:
        run()
    return counter.get_total_flops() // 2
