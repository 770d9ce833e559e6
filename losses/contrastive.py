"""Contrastive loss with adaptive weights of the negatives (SDCL)."""

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple, overload

import torch
from torch import Tensor
from torch.nn.functional import normalize

from losses.blocks import Ledger, padded, pair_blocks
from losses.segments import by_task, list_offsets
from losses.term import LossTerm, check_positive, chosen_like, forming_gradients, in_full


class NegativeWeights(NamedTuple):
    """The pairs of `adaptive_contrastive`, ordered by task, positive, negative: [pairs] each.

    `positive` and `negative` are candidate indices; `task` is 0 throughout for logits [N]. A pair weighs
    delta * (similarity + confidence); without adaptive weights these are 0 and 1.
    """

    task: Tensor
    positive: Tensor
    negative: Tensor
    similarity: Tensor
    confidence: Tensor


@overload
def adaptive_contrastive(
    logits: Tensor,
    positive: Tensor,
    negative: Tensor,
    features: Tensor,
    offsets: Tensor,
    *,
    temperature: float = ...,
    delta: float = ...,
    adaptive: bool = ...,
    weigh_as: Tensor | None = ...,
    return_weights: Literal[False] = ...,
) -> LossTerm: ...


@overload
def adaptive_contrastive(
    logits: Tensor,
    positive: Tensor,
    negative: Tensor,
    features: Tensor,
    offsets: Tensor,
    *,
    temperature: float = ...,
    delta: float = ...,
    adaptive: bool = ...,
    weigh_as: Tensor | None = ...,
    return_weights: Literal[True],
) -> tuple[LossTerm, NegativeWeights]: ...


def adaptive_contrastive(
    logits: Tensor,
    positive: Tensor,
    negative: Tensor,
    features: Tensor,
    offsets: Tensor,
    *,
    temperature: float = 1.0,
    delta: float = 1.0,
    adaptive: bool = True,
    weigh_as: Tensor | None = None,
    return_weights: bool = False,
) -> LossTerm | tuple[LossTerm, NegativeWeights]:
    """Softmax loss of every positive against the weighted negatives of its request; a unit is a positive.

    -log(e^(s_i / T) / (e^(s_i / T) + sum_z w_iz e^(s_z / T))) with w_iz = delta (softmax_z(cos(x_i, x_z)) +
    sigma(s_z)); the sigmoid is of the plain logit, the cosine of a zero vector is 0. The weights carry no
    gradient, to logits or features; `adaptive=False` makes them delta. With delta = 0 every loss is 0.

    `logits`, `positive`, `negative` (bool) are [N] or [N, T], `features` [N, F] or [N, T, F]. A candidate is
    never its own negative; a positive without negatives is no unit. What is neither may be NaN.
    `weigh_as` [N] names for every negative the one of its request whose weight it takes: shuffled weights, a placebo.
    `return_weights` adds every pair with the two parts of its weight; it holds them all, so ask for it when
    logging. ValueError for shapes that do not fit, a temperature not above 0, and a delta below 0.

    Source: SDCL Eq 7-8.
    """
    check_positive(temperature=temperature)
    if not delta >= 0:
        raise ValueError(f"delta is {delta}, expected 0 or more")
    lists, inputs = list_offsets(offsets, logits), _by_task(features, logits) if adaptive else None
    positives = by_task(chosen_like(positive, logits, "positive"))
    negatives = by_task(chosen_like(negative, logits, "negative"))
    width, alias = 0 if inputs is None else inputs.shape[1], _alias(weigh_as, logits)
    with forming_gradients(logits.device):
        s, book = in_full(padded(logits, logits, "logits")), Ledger.empty(logits)
        weights: list[tuple[Tensor, ...]] = [(lists[:0], lists[:0], s[:0], s[:0])]
        for i, j, real in pair_blocks(positives, negatives, lists, width=width):
            pair = (i.unsqueeze(2) != j.unsqueeze(1)).logical_and_(real)
            similarity, confidence = s.new_zeros(1, 1, 1), s.new_ones(1, 1, 1)
            if inputs is not None:
                taken = j if alias is None else alias[j]
                x, z = (inputs[place % len(inputs)].to(s.dtype) for place in (i, taken))
                similarity, confidence = _similarity(x, z, pair), s[taken].sigmoid().unsqueeze(1)
            if return_weights:
                weights.append(_listed(pair, i, j, similarity, confidence))
            log_weight = (delta * confidence).add(similarity, alpha=delta).log_()
            lead = s[j].unsqueeze(1) - s[i].unsqueeze(2)  # first: a large logit would round log w away
            lead = lead.mul_(1 / temperature).add_(log_weight).masked_fill_(~pair, -math.inf)
            book.value[i], share = _softmax_loss(lead)
            book.units[i] = pair.any(2).to(s.dtype)
            book.gradient[i] -= share.sum(2) / temperature
            book.gradient[j] += share.sum(1) / temperature
    term = book.term(logits)
    return (term, _ordered(weights, len(logits))) if return_weights else term


def _alias(weigh_as: Tensor | None, logits: Tensor) -> Tensor | None:
    """`weigh_as` of the flat candidates of all tasks, and of padding."""
    if weigh_as is None:
        return None
    tasks = torch.arange(logits.numel() // max(len(logits), 1), device=logits.device)
    flat = (tasks.unsqueeze(1) * len(logits) + weigh_as).flatten()
    return torch.cat([flat, flat.new_tensor([logits.numel()])])


def _by_task(features: Tensor, logits: Tensor) -> Tensor:
    """[N, F] as it is, [N, T, F] as [T * N, F]: either way the row of flat candidate i is i % rows."""
    if features.shape[:-1] == logits.shape:
        return features.detach().transpose(0, -2).reshape(logits.numel(), features.shape[-1])
    if features.dim() == 2 and len(features) == len(logits):
        return features.detach()
    raise ValueError(f"features have shape {list(features.shape)}, expected {list(logits.shape)} + [F] or [N, F]")


def _similarity(x: Tensor, z: Tensor, pair: Tensor) -> Tensor:
    """Softmax over the paired columns of the cosines of x [B, rows, F] with z [B, columns, F]."""
    cosine = _direction(x) @ _direction(z).transpose(1, 2)
    return cosine.masked_fill_(~pair, -math.inf).softmax(2)


def _direction(x: Tensor) -> Tensor:
    """Unit vectors, zeros for zeros; scaled first, so that no square over- or underflows."""
    if not x.shape[-1]:
        return x
    size = x.abs().amax(-1, keepdim=True)
    return normalize(x / size.clamp(min=torch.finfo(x.dtype).tiny), dim=-1)


def _softmax_loss(lead: Tensor) -> tuple[Tensor, Tensor]:
    """-log of the softmax share of a logit 0 beside lead [B, rows, columns], and the shares of lead, in place."""
    peak = lead.amax(2).clamp_(min=0)
    share = lead.sub_(peak.unsqueeze(2)).exp_()
    norm = share.sum(2) + (-peak).exp()
    return norm.log() + peak, share.div_(norm.unsqueeze(2))


def _listed(pair: Tensor, i: Tensor, j: Tensor, similarity: Tensor, confidence: Tensor) -> tuple[Tensor, ...]:
    """The pairs of a block: flat positive and negative, and the parts of the weight, [pairs] each."""
    block, row, column = pair.nonzero(as_tuple=True)
    return i[block, row], j[block, column], similarity.expand_as(pair)[pair], confidence.expand_as(pair)[pair]


def _ordered(weights: Sequence[tuple[Tensor, ...]], candidates: int) -> NegativeWeights:
    """The pairs of all blocks in an order that does not depend on how they were dealt into blocks."""
    positive, negative, similarity, confidence = (torch.cat(x) for x in zip(*weights, strict=True))
    order = negative.argsort(stable=True)
    order = order[positive[order].argsort(stable=True)]
    i, j = positive[order], negative[order]
    n = max(candidates, 1)
    return NegativeWeights(i // n, i % n, j % n, similarity[order], confidence[order])
