"""Speed of the losses beside their plain forms: padded and dense, or a materialised matrix of logits.

    python -m benchmarks.losses

Forward and backward on one thread; both sides take turns in one run, medians. `deviation` is the largest
difference of total and gradient from the plain form in float64, relative to the largest entry.
"""

import math
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize, softplus

from losses import LossTerm, adaptive_contrastive, multi_class_vectors, pairwise

ROUNDS = 7
Loss = Callable[..., Tensor]


def pad(x: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
    """Ragged [N, ...] as [R, longest, ...], and where it is real [R, longest]."""
    lengths = offsets.diff()
    real = torch.arange(int(lengths.max())) < lengths.unsqueeze(1)
    table = x.new_zeros(*real.shape, *x.shape[1:])
    return table.masked_scatter(real.view(*real.shape, *[1] * (x.dim() - 1)), x), real


def dense_pairwise(logits: Tensor, priority: Tensor, offsets: Tensor) -> Tensor:
    """FS-LTR over a padded [R, K, K] tensor, as it is usually written."""
    s, real = pad(logits, offsets)
    p, _ = pad(priority, offsets)
    pair = (p.unsqueeze(2) > p.unsqueeze(1)) & real.unsqueeze(2) & real.unsqueeze(1)
    return (softplus(s.unsqueeze(1) - s.unsqueeze(2)) * pair).sum() / pair.sum()


def dense_contrastive(logits: Tensor, positive: Tensor, negative: Tensor, features: Tensor, offsets: Tensor) -> Tensor:
    """SDCL Eq 7-8 over padded [R, positives, negatives] tensors."""
    (s, real), (z, z_real) = (pad(logits[x], chosen(x, offsets)) for x in (positive, negative))
    with torch.no_grad():
        x, y = (normalize(pad(features[x], chosen(x, offsets))[0], dim=-1) for x in (positive, negative))
        cosine = (x @ y.transpose(1, 2)).masked_fill(~z_real.unsqueeze(1), -math.inf)
        weight = cosine.softmax(2) + z.sigmoid().unsqueeze(1)
    other = (z.unsqueeze(1) + weight.log()).masked_fill(~z_real.unsqueeze(1), -math.inf).logsumexp(2)
    return ((torch.logaddexp(s, other) - s) * real).sum() / real.sum()


def chosen(mask: Tensor, offsets: Tensor) -> Tensor:
    """The offsets that remain of `offsets` when only the candidates in `mask` do."""
    return torch.nn.functional.pad(mask.cumsum(0), (1, 0))[offsets]


def blocked_softmax(queries: Tensor, items: Tensor, target: Tensor) -> Tensor:
    """One row a query, at temperature 0.05."""
    row = torch.arange(len(queries))
    return divided(multi_class_vectors(queries, items, row, target, scale=1 / 0.05))


def dense_softmax(queries: Tensor, items: Tensor, target: Tensor) -> Tensor:
    """The same as cross entropy over all logits at once."""
    return cross_entropy(queries @ items.t() / 0.05, target)


def divided(term: LossTerm) -> Tensor:
    """total / count."""
    return term.total / term.count


def timed(loss: Loss, arguments: list[Tensor], leaves: list[int]) -> tuple[float, list[Tensor]]:
    """Seconds of one forward and backward; the value and the gradients by the arguments at `leaves`."""
    arguments = [x.detach().requires_grad_(k in leaves) for k, x in enumerate(arguments)]
    start = time.perf_counter()
    value = loss(*arguments)
    gradients = torch.autograd.grad(value, [arguments[k] for k in leaves])
    return time.perf_counter() - start, [value.detach(), *gradients]


def compare(name: str, ours: Loss, plain: Loss, arguments: list[Tensor], leaves: list[int]) -> None:
    """Print one line of the table."""
    seconds: dict[Loss, list[float]] = {ours: [], plain: []}
    for _ in range(ROUNDS):
        for loss in seconds:
            seconds[loss].append(timed(loss, arguments, leaves)[0])
    exact = timed(plain, [x.double() if x.is_floating_point() else x for x in arguments], leaves)[1]
    deviation = max(
        ((got - want).abs().max() / want.abs().max()).item()
        for got, want in zip(timed(ours, arguments, leaves)[1], exact, strict=True)
    )
    a, b = (1e3 * statistics.median(seconds[loss]) for loss in (ours, plain))
    print(f"{name:34}{a:10.1f}{b:10.1f}{b / a:9.2f}x{deviation:12.1e}", flush=True)


def batch(lengths: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
    """Random candidates for requests of these lengths: about 5 positives each, priorities 0 to 6."""
    n = int(lengths.sum())
    positive = torch.rand(n, generator=generator) < (5 / lengths).repeat_interleave(lengths)
    return {
        "logits": torch.randn(n, generator=generator),
        "priority": torch.randint(7, (n,), generator=generator).float(),
        "positive": positive,
        "negative": ~positive,
        "features": torch.randn(n, 64, generator=generator),
        "offsets": torch.nn.functional.pad(lengths.cumsum(0), (1, 0)),
    }


def main() -> None:
    """Print the table."""
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    even, tail = (
        torch.full((512,), 200),
        (8 * torch.rand(512, generator=generator).pow(-0.8)).clamp(max=400).long(),
    )
    tail[0] = 400
    print(f"{'':34}{'ours ms':>10}{'plain ms':>10}{'speed-up':>10}{'deviation':>12}")
    for shape, lengths in (("512 x 200", even), ("512, long tail to 400", tail)):
        data = batch(lengths, generator)
        arguments = [data[name] for name in ("logits", "priority", "offsets")]
        compare(f"pairwise, {shape}", lambda *x: divided(pairwise(*x)), dense_pairwise, arguments, [0])
        arguments = [data[name] for name in ("logits", "positive", "negative", "features", "offsets")]
        compare(
            f"contrastive, {shape}",
            lambda *x: divided(adaptive_contrastive(*x)),
            dense_contrastive,
            arguments,
            [0],
        )
    queries, items = (normalize(torch.randn(4096, 64, generator=generator), dim=-1) for _ in range(2))
    target = torch.randint(4096, (4096,), generator=generator)
    compare("softmax, 4096 x 4096, dim 64", blocked_softmax, dense_softmax, [queries, items, target], [0, 1])


if __name__ == "__main__":
    main()
