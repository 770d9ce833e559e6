"""History encoders against loops in numpy; padding, empty histories, blocks and export."""

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from towers import sequence
from towers.sequence import Pooling, Reading, SelfAttention, TargetAttention, build_encoder, to_padded

KINDS: list[Reading] = [
    Pooling(),
    Pooling(kind="sum"),
    SelfAttention(mode="causal", layers=2, heads=2, positions=3),
    SelfAttention(mode="bidirectional", layers=2, heads=2, positions=3),
    TargetAttention(hidden=(6, 5)),
    TargetAttention(hidden=(6,), softmax=True),
    TargetAttention(hidden=(6,), softmax=True, crossed=False),
]
DIM = 4
LENGTHS = torch.tensor([3, 0, 5, 1])
ROW = torch.tensor([0, 0, 1, 2, 2, 3])


def make(config: Reading) -> Any:
    torch.manual_seed(0)
    encoder = build_encoder(config, dim=DIM).double().eval()
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.normal_(std=0.5)  # no norm weight of 1, no bias of 0
    return encoder


def inputs() -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(4, 5, DIM).double(), torch.randn(6, DIM).double()


def encode(encoder: Any, history: Tensor, lengths: Tensor, target: Tensor, row: Tensor) -> Any:
    wants_target = isinstance(encoder, sequence.TargetAttentionEncoder)
    return encoder(history, lengths, target, row) if wants_target else encoder(history, lengths)


def test_to_padded_keeps_the_newest_events() -> None:
    values = torch.tensor([[1.0], [2.0], [3.0], [4.0]], requires_grad=True)
    padded = to_padded(values, torch.tensor([3, 0, 1]), 2)
    torch.testing.assert_close(padded[..., 0], torch.tensor([[2.0, 3.0], [0.0, 0.0], [4.0, 0.0]]))
    padded.sum().backward()
    torch.testing.assert_close(values.grad, torch.tensor([[0.0], [1.0], [1.0], [1.0]]))


@pytest.mark.parametrize("max_length", [None, 1, 4, 9])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_to_padded_is_a_loop(max_length: int | None, dtype: torch.dtype) -> None:
    lengths = torch.tensor([0, 6, 2, 0, 4], dtype=dtype)
    values = torch.randn(12, 3)
    expected = np.zeros((5, max_length or 6, 3), dtype=np.float32)
    for r, events in enumerate(torch.split(values, lengths.tolist())):
        newest = events[max(0, len(events) - expected.shape[1]) :].numpy()
        expected[r, : len(newest)] = newest
    np.testing.assert_array_equal(to_padded(values, lengths, max_length).numpy(), expected)


@pytest.mark.parametrize("max_length", [None, 3])
def test_to_padded_of_no_events_stays_in_the_graph(max_length: int | None) -> None:
    values = torch.empty(0, 2, requires_grad=True)
    padded = to_padded(values, torch.tensor([0, 0]), max_length)
    torch.testing.assert_close(padded, torch.zeros(2, max_length or 1, 2))
    padded.sum().backward()  # the look-up's backward is collective: every rank must reach it
    assert values.grad is not None


@pytest.mark.parametrize("config", KINDS)
def test_padding_never_matters(config: Reading) -> None:
    encoder = make(config)
    history, target = inputs()
    expected = encode(encoder, history, LENGTHS, target, ROW)
    padding = torch.arange(5) >= LENGTHS[:, None]
    for garbage in (7.0, float("nan")):
        dirty: Any = history.masked_fill(padding.unsqueeze(2), garbage).requires_grad_()
        out = encode(encoder, dirty, LENGTHS, target, ROW)
        torch.testing.assert_close(out, expected)
        out.square().sum().backward()
        assert dirty.grad.isfinite().all()
        assert (dirty.grad[padding] == 0).all()
        assert (dirty.grad[~padding].abs().sum(1) > 0).all()
    longer = torch.cat([history, torch.randn(4, 3, DIM).double()], dim=1)
    torch.testing.assert_close(encode(encoder, longer, LENGTHS, target, ROW), expected)


@pytest.mark.parametrize("config", KINDS)
def test_an_empty_history_gives_zeros_and_finite_gradients(config: Reading) -> None:
    encoder = make(config)
    history, target = inputs()
    leaf: Any = history.requires_grad_()
    out = encode(encoder, leaf, torch.zeros(4, dtype=torch.long), target, ROW)
    assert (out == 0).all()
    out.sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in encoder.parameters())
    assert (leaf.grad == 0).all()


def naive_attention(query: Tensor, key: Tensor, value: Tensor, *, attn_mask: Tensor | None, is_causal: bool) -> Tensor:
    """Attention as its formula has it: a row without a visible key is NaN."""
    scores = query @ key.transpose(2, 3) / query.shape[3] ** 0.5
    visible = torch.ones(scores.shape[2:]).tril().bool() if attn_mask is None else attn_mask
    assert is_causal is (attn_mask is None)
    return scores.masked_fill(~visible, float("-inf")).softmax(dim=3) @ value


@pytest.mark.parametrize("mode", ["causal", "bidirectional"])
def test_empty_histories_do_not_rely_on_the_attention_kernel(monkeypatch: pytest.MonkeyPatch, mode: Any) -> None:
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", naive_attention)
    encoder = make(SelfAttention(mode=mode, layers=2, heads=2))
    history, _ = inputs()
    out = encoder(history, LENGTHS)
    assert (out[1] == 0).all()
    out.sum().backward()
    assert all(p.grad.isfinite().all() for p in encoder.parameters())


@pytest.mark.parametrize("config", KINDS)
def test_requests_are_independent(config: Reading) -> None:
    encoder = make(config)
    history, target = inputs()
    whole = encode(encoder, history, LENGTHS, target, ROW)
    order = torch.tensor([2, 3, 0, 1])
    place = torch.argsort(order)
    shuffled = encode(encoder, history[order], LENGTHS[order], target, place[ROW])
    per_candidate = isinstance(config, TargetAttention)
    torch.testing.assert_close(shuffled, whole if per_candidate else whole[order])


@pytest.mark.parametrize("config", KINDS)
def test_a_length_above_the_places_is_read_as_the_places(config: Reading) -> None:
    encoder = make(config)
    history, target = inputs()
    expected = encode(encoder, history, torch.full((4,), 5), target, ROW)
    torch.testing.assert_close(encode(encoder, history, torch.full((4,), 9), target, ROW), expected)


@pytest.mark.parametrize(
    ("config", "ordered"), [(Pooling(), False), (TargetAttention(), False), (SelfAttention(), True)]
)
def test_which_encoders_see_the_order_of_events(config: Reading, ordered: bool) -> None:
    encoder = make(config)
    history, target = inputs()
    lengths = torch.full((4,), 5)
    out = encode(encoder, history, lengths, target, ROW)
    flipped = encode(encoder, history.flip(1), lengths, target, ROW)
    assert torch.allclose(out, flipped) is not ordered


def test_bidirectional_attention_sees_order_by_positions_alone() -> None:
    encoder = make(SelfAttention(mode="bidirectional", layers=2))
    history, _ = inputs()
    lengths = torch.full((4,), 5)
    assert not torch.allclose(encoder(history, lengths), encoder(history.flip(1), lengths))
    with torch.no_grad():
        encoder.position.zero_()
    torch.testing.assert_close(encoder(history, lengths), encoder(history.flip(1), lengths))


def linear(layer: Any, x: np.ndarray) -> np.ndarray:
    return x @ layer.weight.detach().numpy().T + layer.bias.detach().numpy()


def layer_norm(layer: Any, x: np.ndarray) -> np.ndarray:
    normal = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    return normal * layer.weight.detach().numpy() + layer.bias.detach().numpy()


def softmax(x: np.ndarray) -> np.ndarray:
    return np.exp(x) / np.exp(x).sum(-1, keepdims=True)


def attention(block: Any, x: np.ndarray, *, heads: int, causal: bool) -> np.ndarray:
    """One Transformer layer over one request's events `[n, D]`, head by head."""
    query, key, value = np.split(linear(block.query_key_value, layer_norm(block.attention_norm, x)), 3, axis=1)
    size, parts = x.shape[1] // heads, []
    for h in range(heads):
        q, k, v = (part[:, h * size : (h + 1) * size] for part in (query, key, value))
        scores = q @ k.T / np.sqrt(size)
        if causal:
            scores = np.where(np.tril(np.ones_like(scores)) > 0, scores, -np.inf)
        parts.append(softmax(scores) @ v)
    x = x + linear(block.output, np.concatenate(parts, axis=1))
    norm, inner, outer, _ = block.feed_forward
    return x + linear(outer, np.maximum(linear(inner[0], layer_norm(norm, x)), 0))


@pytest.mark.parametrize("mode", ["causal", "bidirectional"])
def test_self_attention_is_a_transformer(mode: Any) -> None:
    encoder = make(SelfAttention(mode=mode, layers=2, heads=2, positions=3))
    history, _ = inputs()
    out = encoder(history, LENGTHS).detach().numpy()
    for r, n in enumerate(LENGTHS.tolist()):
        if n == 0:
            continue
        age = np.minimum(np.arange(n)[::-1], 2)  # 3 positions; the oldest events share the last
        x = history[r, :n].numpy() + encoder.position.detach().numpy()[age]
        for block in encoder.blocks:
            x = attention(block, x, heads=2, causal=mode == "causal")
        states = layer_norm(encoder.norm, x)
        np.testing.assert_allclose(out[r], states[-1] if mode == "causal" else states.sum(0), rtol=1e-8)


@pytest.mark.parametrize("normalised", [False, True])
@pytest.mark.parametrize("hidden", [(6,), (6, 5)])
def test_target_attention_is_an_mlp_on_the_concatenation(normalised: bool, hidden: tuple[int, ...]) -> None:
    encoder = make(TargetAttention(hidden=hidden, softmax=normalised))
    history, target = inputs()
    out = encoder(history, LENGTHS, target, ROW).detach().numpy()
    _, body, last = encoder.rest
    for n, r in enumerate(ROW.tolist()):
        e, t = history[r, : LENGTHS[r]].numpy(), target[n].numpy()
        x = np.concatenate([e, np.broadcast_to(t, e.shape), e - t, e * t], axis=1)
        x = np.maximum(linear(encoder.first, x), 0)
        for layer in list(body)[::3]:
            x = np.maximum(linear(layer, x), 0)
        scores = linear(last, x)[:, 0]
        weights = softmax(scores) if normalised and len(scores) else scores
        np.testing.assert_allclose(out[n], weights @ e, rtol=1e-8, atol=1e-12)


def test_target_attention_of_recflow_sees_event_and_candidate_alone() -> None:
    """By hand: .5 - relu(e_0 + 2 t_0)."""
    encoder = build_encoder(TargetAttention(hidden=(1,), softmax=True, crossed=False), dim=2)
    with torch.no_grad():
        for parameter, value in zip(
            encoder.parameters(), ([[1.0, 0.0, 2.0, 0.0]], [0.0], [[-1.0]], [0.5]), strict=True
        ):
            parameter.copy_(torch.tensor(value))
    history, target = torch.tensor([[[1.0, 7.0], [3.0, 9.0], [8.0, 8.0]]]), torch.tensor([[1.0, 4.0], [-1.0, 4.0]])
    out = encoder(history, torch.tensor([2]), target, torch.tensor([0, 0]))
    # scores (-2.5, -4.5) for the first candidate, (.5, -.5) for the second
    first, second = 1 / (1 + np.exp(-2)), 1 / (1 + np.exp(-1))
    expected = [[3 - 2 * share, 9 - 2 * share] for share in (first, second)]
    np.testing.assert_allclose(out.detach().numpy(), expected, rtol=1e-6)


def ragged(places: int = 5) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Six requests of 0, 3, 1, 17, 0 and 2 candidates."""
    torch.manual_seed(2)
    row = torch.arange(6).repeat_interleave(torch.tensor([0, 3, 1, 17, 0, 2]))
    history, target = torch.randn(6, places, DIM).double(), torch.randn(len(row), DIM).double()
    return history.requires_grad_(), torch.tensor([2, 5, 0, 4, 1, 3]), target.requires_grad_(), row


def with_gradients(encoder: Any, out: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    return out.detach(), *torch.autograd.grad(out.square().sum(), [*inputs, *encoder.parameters()])


def din(encoder: Any, history: Tensor, lengths: Tensor, target: Tensor, row: Tensor) -> Tensor:
    """Candidate by candidate on the concatenation."""
    out = []
    for t, r in zip(target, row.tolist(), strict=True):
        e = history[r, : lengths[r]]
        scores = encoder.rest(encoder.first(torch.cat([e, t.expand_as(e), e - t, e * t], dim=1))).squeeze(1)
        out.append((scores.softmax(0) if encoder.softmax else scores) @ e)
    return torch.stack(out)


@pytest.mark.parametrize("normalised", [False, True])
@pytest.mark.parametrize("hidden", [(6,), (6, 5)])
@pytest.mark.parametrize("candidates", [1, 4, 10**4])
@pytest.mark.parametrize("saved", [0, 2**26])
def test_target_attention_of_ragged_candidates_in_blocks(
    monkeypatch: pytest.MonkeyPatch, normalised: bool, hidden: tuple[int, ...], candidates: int, saved: int
) -> None:
    monkeypatch.setitem(sequence.BLOCK_ELEMENTS, "cpu", candidates * 6 * 5)
    monkeypatch.setattr(sequence, "SAVED_ELEMENTS", saved)
    encoder = make(TargetAttention(hidden=hidden, softmax=normalised))
    history, lengths, target, row = ragged()
    expected = with_gradients(encoder, din(encoder, history, lengths, target, row), history, target)
    got = with_gradients(encoder, encoder(history, lengths, target, row), history, target)
    for ours, plain in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, plain)


@pytest.mark.parametrize("normalised", [False, True])
def test_target_attention_with_fewer_or_more_events_than_candidates(normalised: bool) -> None:
    encoder = make(TargetAttention(hidden=(6, 5), softmax=normalised))
    history, lengths, target, row = ragged(places=5)
    fewer = with_gradients(encoder, encoder(history, lengths, target, row), history, target)
    longer = torch.cat([history, torch.ones(6, 15, DIM)], dim=1)  # 20 places for up to 17 candidates
    more = with_gradients(encoder, encoder(longer, lengths, target, row), history, target)
    for a, b in zip(fewer, more, strict=True):
        torch.testing.assert_close(a, b)


def test_target_attention_takes_candidates_in_any_order() -> None:
    encoder = make(TargetAttention())
    history, lengths, target, row = ragged()
    shuffled = torch.randperm(len(row))
    out = encoder(history, lengths, target[shuffled], row[shuffled])
    torch.testing.assert_close(out, encoder(history, lengths, target, row)[shuffled])


def test_blocks_of_requests() -> None:
    blocks = partial(sequence._blocks, room=32, dim=2)
    assert blocks([9, 4, 4, 3, 1, 1], [1, 2, 3, 2, 4, 7]) == [(1, 9, 1), (2, 4, 3), (1, 3, 2), (2, 1, 7)]
    assert blocks([9, 4], [0, 0]) == [(2, 9, 1)]
    assert blocks([40], [40]) == [(1, 40, 40)]
    row, lengths = torch.tensor([0, 2, 2, 2, 5, 5]), torch.tensor([3, 9, 2, 9, 9, 1])
    request, place, blocks = sequence._layout(row, lengths, room=32, dim=2)
    assert request.tolist() == [5, 2, 0]
    assert blocks == [(1, 2, 1), (2, 3, 3)]
    assert place.tolist() == [5, 2, 3, 4, 0, 1]


class Largest(TorchDispatchMode):
    """The most numbers that any operation gave."""

    numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.numbers = max([self.numbers, *(x.numel() for x in tree_leaves(out) if isinstance(x, Tensor))])
        return out


@pytest.mark.parametrize("places", [3, 8])
def test_target_attention_builds_nothing_larger_than_a_block(monkeypatch: pytest.MonkeyPatch, places: int) -> None:
    monkeypatch.setitem(sequence.BLOCK_ELEMENTS, "cpu", 200)  # the first layer of all pairs has 414 or more
    with torch.no_grad(), Largest() as largest:
        make(TargetAttention(hidden=(6,)))(*ragged(places))
    assert largest.numbers <= 200


def test_target_attention_memory_does_not_grow_with_candidates(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = make(TargetAttention(hidden=(6,)))
    history, target = inputs()
    lengths = torch.full_like(LENGTHS, history.shape[1])
    monkeypatch.setitem(sequence.BLOCK_ELEMENTS, "cpu", 2 * 6 * 5)

    def saved_by(limit: int) -> int:
        monkeypatch.setattr(sequence, "SAVED_ELEMENTS", limit)
        saved: dict[int, Tensor] = {}

        def pack(x: Tensor) -> Tensor:
            saved[x.untyped_storage().data_ptr()] = x
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            encoder(history, lengths, target.repeat_interleave(10, 0), ROW.repeat_interleave(10)).sum()
        return sum(x.numel() for x in saved.values())

    first_layer = 60 * 5 * 6
    assert saved_by(first_layer - 1) < first_layer <= saved_by(first_layer)


def test_target_attention_of_no_candidates() -> None:
    encoder = make(TargetAttention())
    history, target = inputs()
    out = encoder(history, LENGTHS, target[:0], ROW[:0])
    assert out.shape == (0, DIM)
    out.sum().backward()
    assert all(p.grad is not None and (p.grad == 0).all() for p in encoder.parameters())


@pytest.mark.parametrize("config", KINDS)
def test_bfloat16_autocast_of_histories(config: Reading) -> None:
    torch.manual_seed(0)
    encoder = build_encoder(config, dim=DIM)
    history, target = (x.float() for x in inputs())
    args = (encoder, history, LENGTHS, target, ROW)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = encode(*args)
    torch.testing.assert_close(low.float(), encode(*args), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("config", KINDS)
def test_export_with_dynamic_sizes(config: Reading) -> None:
    encoder = make(config)
    history, target = inputs()
    batch, places, count = (torch.export.Dim(name, min=1) for name in ("batch", "places", "count"))
    args: tuple[Tensor, ...] = (history, LENGTHS)
    shapes: tuple[dict, ...] = ({0: batch, 1: places}, {0: batch})
    if isinstance(config, TargetAttention):
        args, shapes = (*args, target, ROW), (*shapes, {0: count}, {0: count})
    program = torch.export.export(encoder, args, dynamic_shapes=shapes).module()
    one = (history[2:3, :3], torch.tensor([2]), target[:2], torch.tensor([0, 0]))[: len(args)]
    torch.testing.assert_close(program(*one), encoder(*one))


def test_dropout_of_self_attention_acts_in_training_only() -> None:
    encoder = make(SelfAttention(dropout=0.5))
    history, _ = inputs()
    torch.testing.assert_close(encoder(history, LENGTHS), encoder(history, LENGTHS), rtol=0, atol=0)
    encoder.train()
    assert not torch.equal(encoder(history, LENGTHS), encoder(history, LENGTHS))


@pytest.mark.parametrize(
    ("kind", "wrong"),
    [
        (Pooling, {"kind": "max"}),
        (SelfAttention, {"mode": "both"}),
        (SelfAttention, {"layers": 0}),
        (SelfAttention, {"heads": 0}),
        (SelfAttention, {"positions": 0}),
        (SelfAttention, {"dropout": 1.0}),
        (TargetAttention, {"hidden": ()}),
    ],
)
def test_encoder_configs_refuse(kind: type, wrong: dict) -> None:
    with pytest.raises(ValueError, match=f"^{next(iter(wrong))}"):
        kind(**wrong)


def test_heads_must_divide_the_width() -> None:
    with pytest.raises(ValueError, match="3 heads"):
        build_encoder(SelfAttention(heads=3), dim=4)
