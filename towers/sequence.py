"""Encoders of a user's history.

A history is `[R, L, D]` with `lengths [R]`: request r has its events, oldest first, in its first `lengths[r]`
places, then padding, whose content never matters. A length above L is read as L. No events give zeros.
"""

from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from towers.checks import check_choice, check_counts, check_dropout, check_widths
from towers.mlp import FactoredLinear, Mlp

# Attention over candidates runs in blocks of so many numbers per intermediate tensor: what a core's cache holds
# (2 MiB in float32), or what keeps a GPU busy.
BLOCK_ELEMENTS = {"cpu": 2**19, "cuda": 2**24}
# Where one layer of all blocks has more numbers than this (256 MiB), padding included, backward recomputes the blocks
# instead of keeping them, for about a fifth more time.
SAVED_ELEMENTS = 2**26


def _age(lengths: Tensor, places: int) -> Tensor:
    """`[R, L]`: 0 for the newest event of each request, 1 for the one before, negative for padding."""
    position = torch.arange(places, device=lengths.device)
    return lengths.clamp(max=places).unsqueeze(1) - 1 - position


def to_padded(values: Tensor, lengths: Tensor, max_length: int | None) -> Tensor:
    """`[R, L, D]` of jagged `values [ΣL, D]` and `lengths [R]`: the newest events, then zeros as padding.

    L is `max_length`, or for None the longest length (at least 1), which costs a wait for the device.
    """
    places = max(int(lengths.max()), 1) if max_length is None else max_length
    newest = lengths.cumsum(0).unsqueeze(1) - 1
    age = _age(lengths, places)
    padding = values.shape[0]
    index = torch.where(age >= 0, newest - age, padding)
    # One row of zeros serves all padding; as the padding index it gathers no gradient.
    return functional.embedding(index, functional.pad(values, (0, 0, 0, 1)), padding_idx=padding)


@dataclass(frozen=True, kw_only=True)
class Pooling:
    """The mean of a history's events, or their sum (RRA 4.2.3)."""

    kind: Literal["mean", "sum"] = "mean"

    def __post_init__(self) -> None:
        check_choice("kind", self.kind, "mean", "sum")


@dataclass(frozen=True, kw_only=True)
class SelfAttention:
    """A Transformer over the history.

    `mode` `causal`: an event sees the earlier ones, and the newest event's state is the result (SASRec: Kang,
    ICDM'18). `bidirectional`: an event sees all, and the states are summed (RRA 4.2.1). Learned
    `positions` count back from the newest event; older events share the last one.
    """

    kind: Literal["self_attention"] = "self_attention"
    mode: Literal["causal", "bidirectional"] = "causal"
    layers: int = 1  # blocks of attention and feed-forward
    heads: int = 1  # of attention; a divisor of the width
    positions: int = 50
    dropout: float = 0.0  # share of activations set to 0 in training

    def __post_init__(self) -> None:
        check_choice("mode", self.mode, "causal", "bidirectional")
        check_counts(layers=self.layers, heads=self.heads, positions=self.positions)
        check_dropout(self.dropout)


@dataclass(frozen=True, kw_only=True)
class TargetAttention:
    """Attention of the candidate over the history (DIN: Zhou et al., KDD'18), an MLP of `hidden` layers.

    DIN weights the events by the MLP's outputs as they are; `softmax` normalises them (RecFlow). `crossed`: the MLP
    sees the difference and the product of event and candidate beside the two themselves (RecFlow's does not).
    """

    kind: Literal["target_attention"] = "target_attention"
    hidden: tuple[int, ...] = (64,)
    softmax: bool = False
    crossed: bool = True

    def __post_init__(self) -> None:
        check_widths(hidden=self.hidden)


Reading = Pooling | SelfAttention | TargetAttention


@dataclass(frozen=True, kw_only=True)
class Competing:
    """Attention of a past event over what competed with it for exposure, an MLP of `hidden` layers (RecFlow A.6)."""

    hidden: tuple[int, ...] = (80,)
    reverse: bool = False  # a placebo: the oldest event has the newest one's competitors, and so on

    def __post_init__(self) -> None:
        check_widths(hidden=self.hidden)


class PoolingEncoder(nn.Module):
    """The mean or the sum of each request's events."""

    def __init__(self, config: Pooling, *, dim: int) -> None:
        super().__init__()
        self.mean = config.kind == "mean"
        self.out_dim = dim

    def forward(self, history: Tensor, lengths: Tensor) -> Tensor:
        """`[R, D]` of `history [R, L, D]` and `lengths [R]`."""
        valid = _age(lengths, history.shape[1]) >= 0
        total = history.masked_fill(~valid.unsqueeze(2), 0.0).sum(dim=1)
        return total / valid.sum(dim=1, keepdim=True).clamp(min=1) if self.mean else total


class _Block(nn.Module):
    """One pre-norm Transformer layer, its feed-forward part as wide as its input (SASRec 3.2)."""

    def __init__(self, config: SelfAttention, *, dim: int) -> None:
        super().__init__()
        self.heads = (config.heads, dim // config.heads)
        self.attention_norm = nn.LayerNorm(dim)
        self.query_key_value = nn.Linear(dim, 3 * dim)
        self.output = nn.Linear(dim, dim)
        self.dropout = nn.Dropout(config.dropout)
        self.feed_forward = nn.Sequential(
            nn.LayerNorm(dim), Mlp(dim, [dim], dropout=config.dropout), nn.Linear(dim, dim), self.dropout
        )

    def forward(self, x: Tensor, visible: Tensor | None) -> Tensor:
        """`[R, L, D]` of `x [R, L, D]`; `visible [R, 1, L, L]` True where query sees key, None for causal."""
        projected = self.query_key_value(self.attention_norm(x)).chunk(3, dim=2)
        query, key, value = (part.unflatten(2, self.heads).transpose(1, 2) for part in projected)
        attended = functional.scaled_dot_product_attention(
            query, key, value, attn_mask=visible, is_causal=visible is None
        )
        x = x + self.dropout(self.output(attended.transpose(1, 2).flatten(2)))
        return x + self.feed_forward(x)


class SelfAttentionEncoder(nn.Module):
    """Transformer layers over the history, then the newest state or the sum of all states."""

    def __init__(self, config: SelfAttention, *, dim: int) -> None:
        super().__init__()
        if dim % config.heads:
            raise ValueError(f"self_attention: {config.heads} heads do not divide the history's width {dim}")
        self.causal = config.mode == "causal"
        self.position = nn.Parameter(torch.empty(config.positions, dim))
        nn.init.normal_(self.position, std=0.02)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(_Block(config, dim=dim) for _ in range(config.layers))
        self.norm = nn.LayerNorm(dim)
        self.out_dim = dim

    def forward(self, history: Tensor, lengths: Tensor) -> Tensor:
        """`[R, D]` of `history [R, L, D]` and `lengths [R]`."""
        age = _age(lengths, history.shape[1])
        valid = age >= 0
        position = functional.embedding(age.clamp(0, self.position.shape[0] - 1), self.position)
        x = self.dropout(history + position).masked_fill(~valid.unsqueeze(2), 0.0)
        visible = None if self.causal else self._visible(valid)
        for block in self.blocks:
            x = block(x, visible)
        pooled = age == 0 if self.causal else valid
        return self.norm(x).masked_fill(~pooled.unsqueeze(2), 0.0).sum(dim=1)

    @staticmethod
    def _visible(valid: Tensor) -> Tensor:
        """`[R, 1, L, L]`: all see all events; every place sees itself too, or an empty row would be NaN."""
        itself = torch.eye(valid.shape[1], dtype=torch.bool, device=valid.device)
        return valid[:, None, None, :] | itself


class TargetAttentionEncoder(nn.Module):
    """`Σ_j a([e_j; t; e_j - t; e_j ⊙ t]) e_j` over the history of the candidate's request.

    Or, if not `crossed`, `a([e_j; t])`: without the last two parts, and a pair's first layer is the sum of two vectors,
    one of the event and one of the candidate.

    The first layer of `a`, `W_e e + W_t t + W_d (e - t) + W_p (e ⊙ t) + b`, is linear in the event for a given
    candidate, `(W_e + W_d + W_p diag(t)) e + (W_t - W_d) t + b`, and likewise in the candidate for a given event.
    So all pairs of a request are one matrix product, in which each vector of the shorter side acts as a layer on
    the longer side. No `[N, L, D]` is built.
    """

    def __init__(self, config: TargetAttention, *, dim: int) -> None:
        super().__init__()
        self.softmax = config.softmax
        self.parts = 4 if config.crossed else 2
        self.first = nn.Linear(self.parts * dim, config.hidden[0])
        self.rest = nn.Sequential(nn.ReLU(), Mlp(config.hidden[0], config.hidden[1:]), nn.Linear(config.hidden[-1], 1))
        self.widest = max(config.hidden)
        self.out_dim = dim

    def forward(self, history: Tensor, lengths: Tensor, target: Tensor, row: Tensor) -> Tensor:
        """`[N, D]` of `history [R, L, D]`, `lengths [R]`, `target [N, D]` and its request `row [N]`.

        Candidates may come in any order; it is fast where those of a request follow one another.
        """
        lengths = lengths.clamp(max=history.shape[1])
        valid = _age(lengths, history.shape[1]) >= 0
        history = history.masked_fill(~valid.unsqueeze(2), 0.0)
        event, candidate, *crossed = self.first.weight.chunk(self.parts, dim=1)
        weights: tuple[Tensor, ...] = event, candidate
        if crossed:
            difference, product = crossed
            weights = event + difference, candidate - difference, product
        # An exported graph has no loop over a dynamic N: there each candidate is a request of its own.
        if torch.compiler.is_exporting() or target.shape[0] == 0:
            return self._attend(target.unsqueeze(1), history[row], valid[row], *weights).squeeze(1)
        return self._in_blocks(target, row, history, lengths, valid, *weights)

    def _in_blocks(
        self, target: Tensor, row: Tensor, history: Tensor, lengths: Tensor, valid: Tensor, *weights: Tensor
    ) -> Tensor:
        """`[N, D]`: blocks of requests padded to their most candidates and events; one with too many goes in parts."""
        room = BLOCK_ELEMENTS[target.device.type] // self.widest
        dim = target.shape[1]
        request, place, blocks = _layout(row, lengths, room=room, dim=dim)
        attend: Callable[..., Tensor] = self._attend
        numbers = sum(runs * min(width, events) * max(width, events, dim) for runs, width, events in blocks)
        if numbers * self.widest > SAVED_ELEMENTS:
            attend = partial(checkpoint, attend, use_reentrant=False, preserve_rng_state=False)
        sizes = [runs for runs, _, _ in blocks]
        areas = [runs * width for runs, width, _ in blocks]
        padded = target.new_zeros(sum(areas), dim).index_copy(0, place, target).split(areas)
        histories, valids = (x.index_select(0, request).split(sizes) for x in (history, valid))
        out = []
        for (runs, width, events), candidates, past, real in zip(blocks, padded, histories, valids, strict=True):
            parts = candidates.unflatten(0, (runs, width)).split(max(1, room // max(events, dim)), dim=1)
            attended = [attend(part, past[:, :events], real[:, :events], *weights) for part in parts]
            out.append(torch.cat(attended, dim=1).flatten(0, 1))
        return torch.cat(out).index_select(0, place)

    def _attend(
        self, target: Tensor, history: Tensor, valid: Tensor, event: Tensor, candidate: Tensor, *product: Tensor
    ) -> Tensor:
        """`[R, K, D]`: attention of `target [R, K, D]`, K candidates a request."""
        if target.shape[1] <= history.shape[1]:
            scores = self._scores(target, history, candidate, event, *product)
        else:
            scores = self._scores(history, target, event, candidate, *product).mT
        if self.softmax:
            scores = scores.masked_fill(~valid.unsqueeze(1), torch.finfo(scores.dtype).min).softmax(dim=2)
        return torch.bmm(scores, history)  # the events of padding are zeros

    def _scores(self, short: Tensor, long: Tensor, on_short: Tensor, on_long: Tensor, *product: Tensor) -> Tensor:
        """`[R, A, B]`: `a` of all pairs of `short [R, A, D]` and `long [R, B, D]`."""
        if not product:
            of_short, of_long = functional.linear(short, on_short, self.first.bias), functional.linear(long, on_long)
            return self.rest[1:]((of_short.unsqueeze(2) + of_long.unsqueeze(1)).relu_()).squeeze(3)
        # Expanded first, backward sums over A and R in turn, many times faster on a CPU than over both at once.
        wide, crossing = (w.unsqueeze(1).expand(short.shape[0], -1, -1, -1) for w in (on_long, *product))
        layer = torch.addcmul(wide, crossing, short.unsqueeze(1))  # [R, H, A, D]
        bias = functional.linear(short, on_short, self.first.bias).mT  # [R, H, A]
        x = torch.baddbmm(bias.flatten(1).unsqueeze(2), layer.flatten(1, 2), long.mT).relu_()
        x = x.unflatten(1, bias.shape[1:]).flatten(2)  # [R, H, A·B]: the other layers see H as channels
        for step in self.rest[1:].modules():
            if isinstance(step, nn.Linear):
                x = torch.baddbmm(step.bias.unsqueeze(1), step.weight.expand(x.shape[0], -1, -1), x)
            elif isinstance(step, nn.ReLU):
                x = step(x)
        return x.squeeze(1).unflatten(1, (short.shape[1], long.shape[1]))


def _layout(row: Tensor, lengths: Tensor, *, room: int, dim: int) -> tuple[Tensor, Tensor, list[tuple[int, int, int]]]:
    """Runs of candidates of one request in blocks, padded to the longest run and history of the block.

    Gives the runs' requests, each candidate's place `[N]` among the padded ones of all blocks, and the blocks.
    """
    request, counts = row.unique_consecutive(return_counts=True)
    events = lengths[request]
    level = torch.frexp(events.double()).exponent.long()  # histories of a block are alike up to a factor of 2
    order = ((level << 32) - counts).argsort(stable=True)
    blocks = _blocks(*torch.stack([counts, events])[:, order].tolist(), room=room, dim=dim)
    sizes, widths, _ = torch.tensor(blocks, device=row.device).unbind(1)
    width = widths.repeat_interleave(sizes)
    start = (width.cumsum(0) - width)[order.argsort()]
    shift = start - (counts.cumsum(0) - counts)
    place = torch.arange(row.shape[0], device=row.device) + shift.repeat_interleave(counts)
    return request[order], place, blocks


def _blocks(counts: list[int], events: list[int], *, room: int, dim: int) -> list[tuple[int, int, int]]:
    """(runs, longest run, longest history) of each block.

    A block's widest tensor has `room` numbers in each hidden unit, or is one run's. By level (the bits of the number)
    events rise and, within a level, counts descend.
    """
    levels = [number.bit_length() for number in events]
    blocks, start = [], 0
    while start < len(counts):
        short, long = sorted([counts[start], max(1, 2 ** levels[start] - 1)])
        most = max(1, room // (short * max(long, dim)))
        stop = min(start + most, bisect_right(levels, levels[start]))
        blocks.append((stop - start, counts[start], max(1, *events[start:stop])))
        start = stop
    return blocks


class CompetingEncoder(nn.Module):
    """`Σ_k softmax_k(a([v; c_k])) c_k` over the competitors c of each event v (RecFlow A.6 and A.8).

    The first layer of the MLP `a` sees each event once, not with every competitor.
    """

    def __init__(self, config: Competing, *, dim: int) -> None:
        super().__init__()
        self.first = FactoredLinear(dim, dim, config.hidden[0])
        self.rest = nn.Sequential(nn.ReLU(), Mlp(config.hidden[0], config.hidden[1:]), nn.Linear(config.hidden[-1], 1))
        self.out_dim = dim

    def forward(self, event: Tensor, competitors: Tensor, valid: Tensor) -> Tensor:
        """`[E, D]` of `event [E, D]`, `competitors [E, K, D]` and which of them are `valid [E, K]`.

        The content of the others never matters; an event without competitors gives zeros, whatever it holds.
        """
        event = event.masked_fill(~valid.any(dim=1, keepdim=True), 0.0)
        competitors = competitors.masked_fill(~valid.unsqueeze(2), 0.0)
        first = self.first.request_part(event).unsqueeze(1) + self.first.candidate_part(competitors)
        scores = self.rest(first).squeeze(2)
        weights = scores.masked_fill(~valid, torch.finfo(scores.dtype).min).softmax(dim=1)
        return torch.bmm(weights.unsqueeze(1), competitors).squeeze(1)


def build_encoder(config: Reading, *, dim: int) -> PoolingEncoder | SelfAttentionEncoder | TargetAttentionEncoder:
    """The encoder of a config for histories of width `dim`, which is its `out_dim` too.

    Only `TargetAttentionEncoder` also takes `target [N, D]` and `row [N]`; it gives one vector per candidate.
    """
    match config:
        case Pooling():
            return PoolingEncoder(config, dim=dim)
        case SelfAttention():
            return SelfAttentionEncoder(config, dim=dim)
        case TargetAttention():
            return TargetAttentionEncoder(config, dim=dim)
