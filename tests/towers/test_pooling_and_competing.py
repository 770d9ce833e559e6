"""Pooled histories, and attention of past events over their competitors, against loops in numpy."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from towers.sequence import Competing, CompetingEncoder, Pooling, PoolingEncoder

DIM = 4
VALID = torch.tensor([[1, 1, 1], [0, 0, 0], [0, 1, 0], [1, 0, 1], [1, 1, 0]]).bool()


@pytest.mark.parametrize("kind", ["mean", "sum"])
def test_pooling(kind: Any) -> None:
    history, lengths = torch.randn(4, 5, DIM).double(), torch.tensor([3, 0, 5, 1])
    counts = [max(n, 1) if kind == "mean" else 1 for n in lengths.tolist()]
    expected = np.stack([history[r, :n].numpy().sum(0) / counts[r] for r, n in enumerate(lengths.tolist())])
    np.testing.assert_allclose(PoolingEncoder(Pooling(kind=kind), dim=DIM)(history, lengths).numpy(), expected)


def make(hidden: tuple[int, ...] = (6, 5)) -> Any:
    torch.manual_seed(0)
    return CompetingEncoder(Competing(hidden=hidden), dim=DIM).double()


def inputs() -> tuple[Any, Any]:
    torch.manual_seed(1)
    return torch.randn(5, DIM).double().requires_grad_(), torch.randn(5, 3, DIM).double().requires_grad_()


def linear(layer: Any, x: np.ndarray) -> np.ndarray:
    return x @ layer.weight.detach().numpy().T + layer.bias.detach().numpy()


@pytest.mark.parametrize("hidden", [(6,), (6, 5)])
def test_it_is_softmax_attention_of_an_mlp_on_the_concatenation(hidden: tuple[int, ...]) -> None:
    encoder = make(hidden)
    event, competitors = inputs()
    out = encoder(event, competitors, VALID).detach().numpy()
    _, body, last = encoder.rest
    for e in range(5):
        rivals = competitors[e][VALID[e]].detach().numpy()
        x = np.concatenate([np.broadcast_to(event[e].detach().numpy(), rivals.shape), rivals], axis=1)
        x = np.maximum(linear(encoder.first.joint, x), 0)
        for layer in list(body)[::3]:
            x = np.maximum(linear(layer, x), 0)
        weights = np.exp(linear(last, x)[:, 0])
        np.testing.assert_allclose(out[e], weights / max(weights.sum(), 1e-9) @ rivals, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("garbage", [7.0, float("nan"), float("inf")])
def test_padding_never_matters(garbage: float) -> None:
    encoder = make()
    event, competitors = inputs()
    expected = encoder(event, competitors, VALID)
    lonely = ~VALID.any(1)
    dirty: Any = competitors.detach().masked_fill(~VALID.unsqueeze(2), garbage).requires_grad_()
    dirty_event: Any = event.detach().masked_fill(lonely.unsqueeze(1), garbage).requires_grad_()
    out = encoder(dirty_event, dirty, VALID)
    torch.testing.assert_close(out, expected)
    out.square().sum().backward()
    assert all(p.grad.isfinite().all() for p in encoder.parameters())
    assert (dirty.grad[~VALID] == 0).all()
    assert (dirty.grad[VALID].abs().sum(1) > 0).all()
    assert (dirty_event.grad[lonely] == 0).all()
    assert dirty_event.grad.isfinite().all()


@pytest.mark.parametrize("places", [0, 3])
def test_events_without_competitors_give_zeros(places: int) -> None:
    encoder = make()
    event, competitors = inputs()
    out = encoder(event, competitors[:, :places], torch.zeros(5, places, dtype=torch.bool))
    assert (out == 0).all()
    out.sum().backward()
    assert all(p.grad is not None and (p.grad == 0).all() for p in encoder.parameters())
    assert encoder(event[:0], competitors[:0], VALID[:0]).shape == (0, DIM)


def test_events_are_independent_and_competitors_have_no_order() -> None:
    encoder = make()
    event, competitors = inputs()
    out = encoder(event, competitors, VALID)
    order = torch.tensor([3, 1, 4, 0, 2])
    torch.testing.assert_close(encoder(event[order], competitors[order], VALID[order]), out[order])
    torch.testing.assert_close(encoder(event, competitors.flip(1), VALID.flip(1)), out)
    more = torch.cat([competitors, torch.ones(5, 2, DIM)], dim=1)
    torch.testing.assert_close(encoder(event, more, torch.nn.functional.pad(VALID, (0, 2))), out)


def test_the_result_lies_among_the_competitors() -> None:
    event, competitors = inputs()
    out = make()(event, competitors, VALID)
    torch.testing.assert_close(out[2], competitors[2, 1])  # its only one
    for e in (0, 3, 4):
        mine = competitors[e][VALID[e]]
        assert (out[e] >= mine.min(0).values).all()
        assert (out[e] <= mine.max(0).values).all()


def test_bfloat16_autocast() -> None:
    encoder = make().float()
    event, competitors = (x.detach().float() for x in inputs())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = encoder(event, competitors, VALID)
    torch.testing.assert_close(low.float(), encoder(event, competitors, VALID), rtol=0.03, atol=0.03)
    assert (low[1] == 0).all()


def test_export_with_dynamic_sizes() -> None:
    encoder = make()
    args: tuple[Tensor, ...] = (*inputs(), VALID)
    events, places = torch.export.Dim("events", min=1), torch.export.Dim("places", min=1)
    shapes = ({0: events}, {0: events, 1: places}, {0: events, 1: places})
    program = torch.export.export(encoder, args, dynamic_shapes=shapes).module()
    fewer = (args[0][:2], args[1][:2, :2], VALID[:2, :2])
    torch.testing.assert_close(program(*fewer), encoder(*fewer))


def test_the_config_refuses() -> None:
    with pytest.raises(ValueError, match=r"^hidden"):
        Competing(hidden=())
