"""A bare TorchRec loop: the least that trains the same models. No loader, no log, no metric, no checkpoint.

The rows lie in memory as arrays, a batch's `KeyedJaggedTensor` is made by hand, the history is pooled in the kernel,
all experts are one product, and the softmax runs over the clicked rows alone, in blocks, its gradient formed with its
value.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, KeyedJaggedTensor, PoolingType
from torchrec.distributed import DistributedModelParallel
from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints, Topology
from torchrec.distributed.types import ShardingType
from torchrec.optim import RowWiseAdagrad
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward

from benchmarks.peers import common
from benchmarks.peers.common import DIM, EXPERTS, ITEM_SIDE, LABELS, REQUEST_SIDE, SIZES, STD, Rows

ONE = [*REQUEST_SIDE, *ITEM_SIDE]  # features of one id
BLOCK = 256  # rows of the softmax at once


class Grouped(nn.Module):
    """A linear map a group: `[G, N, in] -> [G, N, out]`."""

    def __init__(self, groups: int, fan_in: int, out: int) -> None:
        super().__init__()
        bound = fan_in**-0.5
        self.weight = nn.Parameter(torch.empty(groups, fan_in, out).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(groups, 1, out).uniform_(-bound, bound))

    def forward(self, x: Tensor) -> Tensor:
        return torch.baddbmm(self.bias, x.contiguous(), self.weight)  # in bfloat16 a view's backward is slow


class Mmoe(nn.Module):
    """All experts' first layers and all gates in one product."""

    def __init__(self, width: int) -> None:
        super().__init__()
        (first, second), (tower,), tasks = common.EXPERT, common.TOWER, len(LABELS)
        self.split = [EXPERTS * first, tasks * EXPERTS]
        self.first = nn.Linear(width, sum(self.split))
        self.experts, self.towers = Grouped(EXPERTS, first, second), Grouped(tasks, second, tower)
        self.last = Grouped(tasks, tower, 1)

    def forward(self, x: Tensor) -> Tensor:
        experts, gates = self.first(x).split(self.split, dim=1)
        experts = self.experts(experts.relu().unflatten(1, (EXPERTS, -1)).transpose(0, 1)).relu()
        mixed = gates.unflatten(1, (-1, EXPERTS)).softmax(2) @ experts.transpose(0, 1)
        return self.last(self.towers(mixed.transpose(0, 1)).relu()).squeeze(2).T


class BlockedSoftmax(torch.autograd.Function):
    """Mean cross-entropy of queries against all items, each query's own the right one."""

    @staticmethod
    def forward(context: object, query: Tensor, item: Tensor, own: Tensor) -> Tensor:  # type: ignore[override]
        of_query, of_item, total = torch.empty_like(query), torch.zeros_like(item), query.new_zeros(())
        for first in range(0, len(query), BLOCK):
            q, right = query[first : first + BLOCK], own[first : first + BLOCK, None]
            logits = q @ item.T
            norm = logits.logsumexp(1, keepdim=True)
            total += (norm - logits.gather(1, right)).sum()
            share = logits.sub_(norm).exp_()
            share.scatter_add_(1, right, share.new_full((len(q), 1), -1.0))
            of_query[first : first + BLOCK] = share @ item
            of_item += share.T @ q
        context.save_for_backward(of_query / len(query), of_item / len(query))  # type: ignore[attr-defined]
        return total / len(query)

    @staticmethod
    def backward(context: object, gradient: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[override]
        of_query, of_item = context.saved_tensors  # type: ignore[attr-defined]
        return of_query * gradient, of_item * gradient, None


class Net(nn.Module):
    """Tables, then MMoE or two towers: the loss, and the score of a click."""

    def __init__(self, model: str) -> None:
        super().__init__()
        readers = {name: [name, "history"] if name == "item_id" else [name] for name in ONE}
        tables = [
            EmbeddingBagConfig(
                name=name,
                embedding_dim=DIM,
                num_embeddings=SIZES[name] + 1,
                feature_names=readers[name],
                pooling=PoolingType.MEAN,
                init_fn=partial(nn.init.normal_, std=STD),
            )
            for name in ONE
        ]
        self.tables = EmbeddingBagCollection(tables=tables, device=torch.device("meta"))
        self.mmoe = Mmoe(DIM * (len(ONE) + 1)) if model == "mmoe" else None
        if not self.mmoe:
            first, out = common.TOWERS
            user, item = (DIM * n for n in (len(REQUEST_SIDE) + 1, len(ITEM_SIDE)))
            self.user = nn.Sequential(nn.Linear(user, first), nn.ReLU(), nn.Linear(first, out))
            self.item = nn.Sequential(nn.Linear(item, first), nn.ReLU(), nn.Linear(first, out))

    def forward(self, ids: KeyedJaggedTensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        found = self.tables(ids).to_dict()
        if self.mmoe:
            logits = self.mmoe(torch.cat([found[name] for name in [*ONE, "history"]], 1)).float()
            return functional.binary_cross_entropy_with_logits(logits, labels), logits[:, 0]
        user = self.user(torch.cat([found[name] for name in [*REQUEST_SIDE, "history"]], 1)).float()
        item = self.item(torch.cat([found[name] for name in ITEM_SIDE], 1)).float()
        user, item = functional.normalize(user, dim=1) / common.TEMPERATURE, functional.normalize(item, dim=1)
        own = labels[:, 0].nonzero().squeeze(1)
        return BlockedSoftmax.apply(user[own], item, own), (user * item).sum(1)  # type: ignore[no-untyped-call]


def batches(rows: Rows, size: int, order: np.ndarray) -> Iterator[tuple[KeyedJaggedTensor, Tensor]]:
    """Ids and labels of so many rows at a time."""
    one, labels = np.stack([rows[name] for name in ONE]), common.labels_of(rows)
    for begin in range(0, len(order), size):
        chosen = order[begin : begin + size]
        ids = np.concatenate([one[:, chosen].ravel(), rows["history"][chosen].ravel()])
        lengths = np.repeat([1, common.HISTORY], [len(chosen) * len(ONE), len(chosen)])
        keys = [*ONE, "history"]
        yield (
            KeyedJaggedTensor(keys, torch.from_numpy(ids), lengths=torch.from_numpy(lengths)),
            torch.from_numpy(labels[chosen]),
        )


def sharded(net: Net) -> DistributedModelParallel:
    """Every table in a fused kernel: by itself the planner copies small ones, which no optimizer here reaches."""
    sharder = EmbeddingBagCollectionSharder()  # type: ignore[no-untyped-call]
    fused = ParameterConstraints(
        sharding_types=[ShardingType.TABLE_WISE.value], compute_kernels=[EmbeddingComputeKernel.FUSED.value]
    )
    planner = EmbeddingShardingPlanner(
        topology=Topology(world_size=1, compute_device="cpu"), constraints=dict.fromkeys(ONE, fused)
    )
    plan = planner.plan(net, [sharder])  # type: ignore[list-item]
    return DistributedModelParallel(net, device=torch.device("cpu"), sharders=[sharder], plan=plan)  # type: ignore[list-item]


def main() -> None:
    """Train an epoch, then score the test rows."""
    run = common.asked("mmoe", "dssm")
    torch.set_num_threads(1)
    torch.manual_seed(run.seed)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    train, test = common.rows(run.data, "train"), common.rows(run.data, "test")
    net = Net(run.model)
    apply_optimizer_in_backward(RowWiseAdagrad, net.tables.parameters(), {"lr": common.TABLE_LR})
    model = sharded(net)
    dense = [parameter for name, parameter in model.named_parameters() if not name.startswith("tables")]
    optimizer = torch.optim.Adam(dense, lr=common.LR)
    with common.Timed() as timed:
        for ids, labels in batches(train, run.batch, np.random.default_rng(run.seed).permutation(len(train["click"]))):
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=run.bf16):
                loss, _ = model(ids, labels)
            loss.backward()
            optimizer.step()
    model.eval()
    with torch.no_grad():
        scores = [model(*batch)[1].numpy() for batch in batches(test, run.batch, np.arange(len(test["click"])))]
    timed.done(len(train["click"]), common.auc(test["click"], np.concatenate(scores)))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
