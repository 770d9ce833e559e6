"""Encoders of a user's history.

A history is `[R, L, D]` with `lengths [R]`: request r has its events, oldest first, in its first `lengths[r]`
places, then padding, whose content never matters. A length above L is read as L. No events give zeros.
"""

from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from towers.mlp import Mlp, check_layers

# Attention over candidates runs in blocks of so many numbers per intermediate tensor (64 MiB in float32).
BLOCK_ELEMENTS = 2**24


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
class Mean:
    """The mean of a history's events."""

    kind: Literal["mean"] = "mean"


@dataclass(frozen=True, kw_only=True)
class SelfAttention:
    """A Transformer over the history.

    `mode` `causal`: an event sees the earlier ones, and the newest event's state is the result (SASRec: Kang,
    ICDM'18). `bidirectional`: an event sees all, and the states are summed (RRA 4.2.1). Learned
    `positions` count back from the newest event; older events share the last one.
    """

    kind: Literal["self_attention"] = "self_attention"
    mode: Literal["causal", "bidirectional"] = "causal"
    layers: int = 1
    heads: int = 1
    positions: int = 50
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if self.mode not in ("causal", "bidirectional"):
            raise ValueError(f"mode must be causal or bidirectional, got {self.mode!r}")
        if min(self.layers, self.heads, self.positions) < 1:
            raise ValueError("layers, heads and positions must be at least 1")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout}")


@dataclass(frozen=True, kw_only=True)
class TargetAttention:
    """Attention of the candidate over the history (DIN: Zhou et al., KDD'18), an MLP of `hidden` layers.

    DIN weights the events by the MLP's outputs as they are; `softmax` normalises them (RecFlow).
    """

    kind: Literal["target_attention"] = "target_attention"
    hidden: tuple[int, ...] = (64,)
    softmax: bool = False

    def __post_init__(self) -> None:
        check_layers(self.hidden, 0.0)


Encoder = Mean | SelfAttention | TargetAttention


class MeanEncoder(nn.Module):
    """The mean of each request's events."""

    def __init__(self, *, dim: int) -> None:
        super().__init__()
        self.out_dim = dim

    def forward(self, history: Tensor, lengths: Tensor) -> Tensor:
        """`[R, D]` of `history [R, L, D]` and `lengths [R]`."""
        valid = _age(lengths, history.shape[1]) >= 0
        total = history.masked_fill(~valid.unsqueeze(2), 0.0).sum(dim=1)
        return total / valid.sum(dim=1, keepdim=True).clamp(min=1)


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

    The first layer of `a` is factored, which is exact. Of `W_e e + W_t t + W_d (e - t) + W_p (e ⊙ t) + b`,
    `(W_e + W_d) e + b` is computed once per event, `(W_t - W_d) t` once per candidate, and per pair only
    `W_p (e ⊙ t)`. Backward recomputes blocks of candidates, so memory does not grow with N·L.
    """

    def __init__(self, config: TargetAttention, *, dim: int) -> None:
        super().__init__()
        self.softmax = config.softmax
        self.first = nn.Linear(4 * dim, config.hidden[0])
        self.rest = nn.Sequential(nn.ReLU(), Mlp(config.hidden[0], config.hidden[1:]), nn.Linear(config.hidden[-1], 1))
        self.widest = max(dim, *config.hidden)
        self.out_dim = dim

    def forward(self, history: Tensor, lengths: Tensor, target: Tensor, row: Tensor) -> Tensor:
        """`[N, D]` of `history [R, L, D]`, `lengths [R]`, `target [N, D]` and its request `row [N]`."""
        valid = _age(lengths, history.shape[1]) >= 0
        history = history.masked_fill(~valid.unsqueeze(2), 0.0)
        event, _, difference, _ = self.first.weight.chunk(4, dim=1)
        per_event = functional.linear(history, event + difference, self.first.bias)
        shared = (history, per_event, valid)
        block = max(1, BLOCK_ELEMENTS // (self.widest * history.shape[1]))
        # An exported graph has no loop over a dynamic N.
        if torch.compiler.is_exporting() or target.shape[0] <= block:
            return self._attend(target, row, *shared)
        recomputed = partial(checkpoint, self._attend, use_reentrant=False, preserve_rng_state=False)
        blocks = zip(target.split(block), row.split(block), strict=True)
        return torch.cat([recomputed(*pair, *shared) for pair in blocks])

    def _attend(self, target: Tensor, row: Tensor, history: Tensor, per_event: Tensor, valid: Tensor) -> Tensor:
        """`[n, D]`: the attention of n candidates."""
        _, candidate, difference, product = self.first.weight.chunk(4, dim=1)
        events, valid = history[row], valid[row]
        per_candidate = functional.linear(target, candidate - difference)
        per_pair = functional.linear(events * target.unsqueeze(1), product)
        scores = self.rest(per_event[row] + per_candidate.unsqueeze(1) + per_pair).squeeze(2)
        if self.softmax:
            scores = scores.masked_fill(~valid, torch.finfo(scores.dtype).min).softmax(dim=1)
        return torch.bmm(scores.unsqueeze(1), events).squeeze(1)  # the events of padding are zeros


def build_encoder(config: Encoder, *, dim: int) -> MeanEncoder | SelfAttentionEncoder | TargetAttentionEncoder:
    """The encoder of a config for histories of width `dim`, which is its `out_dim` too.

    Only `TargetAttentionEncoder` also takes `target [N, D]` and `row [N]`; it gives one vector per candidate.
    """
    match config:
        case Mean():
            return MeanEncoder(dim=dim)
        case SelfAttention():
            return SelfAttentionEncoder(config, dim=dim)
        case TargetAttention():
            return TargetAttentionEncoder(config, dim=dim)
