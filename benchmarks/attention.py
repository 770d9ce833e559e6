"""Speed of target attention beside its plain form: DIN on the concatenation `[N, L, 4D]`.

    python -m benchmarks.attention

One thread; both sides take turns in one run, medians. `deviation` is the largest difference of output and gradients
between the two, relative to the largest entry.
"""

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from towers.sequence import TargetAttention, TargetAttentionEncoder

ROUNDS = 7
PLACES, DIM, HIDDEN = 50, 64, 32
CHUNK = 4096  # candidates at once in the plain form: 0.2 GiB
Attention = Callable[..., Tensor]


def plain_attention(
    encoder: TargetAttentionEncoder, history: Tensor, lengths: Tensor, target: Tensor, row: Tensor
) -> Tensor:
    """`[N, D]` with the encoder's own parameters, every pair's features side by side."""
    out = []
    for t, r in zip(target.split(CHUNK), row.split(CHUNK), strict=True):
        events = history[r]
        repeated = t.unsqueeze(1).expand_as(events)
        pairs = torch.cat([events, repeated, events - repeated, events * repeated], dim=2)
        real = torch.arange(PLACES) < lengths[r].unsqueeze(1)
        scores = encoder.rest(encoder.first(pairs)).squeeze(2) * real
        out.append(torch.bmm(scores.unsqueeze(1), events).squeeze(1))
    return torch.cat(out)


def timed(attention: Attention, encoder: TargetAttentionEncoder, arguments: list[Tensor]) -> tuple[float, list[Tensor]]:
    """Seconds of one forward (and backward where gradients are on); the output and the gradients."""
    start = time.perf_counter()
    out = attention(encoder, *arguments)
    leaves = [*(x for x in arguments if x.requires_grad), *encoder.parameters()]
    gradients = torch.autograd.grad(out.square().sum(), leaves) if out.requires_grad else []
    return time.perf_counter() - start, [out.detach(), *gradients]


def compare(name: str, counts: Tensor, *, backward: bool) -> None:
    """Print one line of the table: requests of these numbers of candidates."""
    generator = torch.Generator().manual_seed(0)
    encoder = TargetAttentionEncoder(TargetAttention(hidden=(HIDDEN,)), dim=DIM)
    history = torch.randn(len(counts), PLACES, DIM, generator=generator).requires_grad_(backward)
    lengths = torch.randint(1, PLACES + 1, (len(counts),), generator=generator)
    target = torch.randn(int(counts.sum()), DIM, generator=generator).requires_grad_(backward)
    arguments = [history, lengths, target, torch.arange(len(counts)).repeat_interleave(counts)]
    sides: list[Attention] = [TargetAttentionEncoder.forward, plain_attention]
    with torch.set_grad_enabled(backward):
        results = [[timed(side, encoder, arguments) for side in sides] for _ in range(ROUNDS)]
    ours, plain = (
        1e3 * statistics.median(seconds) for seconds in zip(*([s for s, _ in r] for r in results), strict=True)
    )
    (_, got), (_, want) = results[-1]
    deviation = max(((a - b).abs().max() / b.abs().max()).item() for a, b in zip(got, want, strict=True))
    print(f"{name:40}{ours:10.1f}{plain:10.1f}{plain / ours:9.2f}x{deviation:12.1e}", flush=True)


def main() -> None:
    """Print the table."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    tail = (8 * torch.rand(256, generator=torch.Generator().manual_seed(0)).pow(-0.8)).clamp(max=400).long()
    tail[0] = 400
    print(f"{'':40}{'ours ms':>10}{'plain ms':>10}{'speed-up':>10}{'deviation':>12}")
    compare("training, 256 x 20", torch.full((256,), 20), backward=True)
    compare("training, 256, long tail to 400", tail, backward=True)
    compare("evaluation, 39 x 1600", torch.full((39,), 1600), backward=False)


if __name__ == "__main__":
    main()
