"""The fused optimizer of the tables (in backward), the dense optimizer, and their common schedule."""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.optim import _apply_optimizer_in_backward as apply_optimizer_in_backward
from torchrec.distributed import DistributedModelParallel
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizerWrapper
from torchrec.optim.optimizers import SGD, Adagrad, Adam, in_backward_optimizer_filter
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad

from joint.errors import ConfigError
from joint.experiment import Optimizer, TableOptimizer

TABLE_OPTIMIZERS = {"rowwise_adagrad": RowWiseAdagrad, "adagrad": Adagrad, "sgd": SGD, "adam": Adam}
DENSE_OPTIMIZERS = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}


def state_of_row(config: TableOptimizer, dim: int) -> int:
    """Floats that the tables' optimizer keeps for every row of `dim` weights."""
    return {"rowwise_adagrad": 1, "adagrad": dim, "sgd": 0, "adam": 2 * dim}[config.kind]


def optimize_tables_in_backward(tables: nn.Module, config: Optimizer, *, device: str) -> None:
    """Attach the tables' optimizer; before sharding, or the fused kernels fall back to plain SGD.

    Raises:
        ConfigError: the device has no such kernel.
    """
    if config.tables.kind == "adam" and device != "cuda":
        raise ConfigError("optimizer.tables.kind: adam is for CUDA; on CPU there is rowwise_adagrad")
    settings = {"lr": config.tables.lr} | ({} if config.tables.kind == "sgd" else {"eps": 1e-8})
    apply_optimizer_in_backward(TABLE_OPTIMIZERS[config.tables.kind], tables.parameters(), settings)


def build_optimizer(model: DistributedModelParallel, config: Optimizer) -> CombinedOptimizer:
    """Both optimizers as one: `tables` (whose step happened in backward) and `dense`."""
    kind = DENSE_OPTIMIZERS[config.dense.kind]
    dense = KeyedOptimizerWrapper(
        dict(in_backward_optimizer_filter(model.named_parameters())),
        lambda parameters: kind(parameters, lr=0.0, weight_decay=config.dense.weight_decay),
    )
    # Moments exist from the start, so that a checkpoint always finds them. TorchRec makes them by a step, which must
    # leave no trace: at a rate of 0 (`set_learning_rates` knows the real one), and with all counts and moments at 0.
    dense.init_state()
    for moments in dense.state.values():
        for moment in moments.values():
            moment.zero_()
    return CombinedOptimizer([("tables", model.fused_optimizer), ("dense", dense)])


def set_learning_rates(optimizer: CombinedOptimizer, config: Optimizer, step: int) -> dict[str, float]:
    """Set both rates for a step (linear warm-up, then constant) and return them, as `optimizer/lr_NAME`.

    `zero_grad` has to follow before the backward pass: it is what hands the rate to the fused kernels.
    """
    scale = min(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps else 1.0
    rates = {"tables": config.tables.lr * scale, "dense": config.dense.lr * scale}
    for name, part in optimizer.optimizers:
        for group in part.param_groups:
            group["lr"] = rates[name]
    return {f"optimizer/lr_{name}": rate for name, rate in rates.items()}
