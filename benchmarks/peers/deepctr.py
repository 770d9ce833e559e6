"""deepctr-torch's MMoE by its own `fit`. It has no two-tower model."""

from __future__ import annotations

import torch
from deepctr_torch.inputs import SparseFeat, VarLenSparseFeat
from deepctr_torch.models.multitask import MMOE

from benchmarks.peers import common
from benchmarks.peers.common import DIM, LABELS, SIZES


def main() -> None:
    """Train an epoch, then score the test rows."""
    run = common.asked("mmoe")
    torch.set_num_threads(1)
    train, test = common.rows(run.data, "train"), common.rows(run.data, "test")
    columns = [SparseFeat(name, size + 1, embedding_dim=DIM) for name, size in SIZES.items()]
    past = SparseFeat("history", SIZES["item_id"] + 1, embedding_dim=DIM, embedding_name="item_id")
    model = MMOE(
        [*columns, VarLenSparseFeat(past, maxlen=common.HISTORY, combiner="mean")],
        num_experts=common.EXPERTS,
        expert_dnn_hidden_units=tuple(common.EXPERT),
        gate_dnn_hidden_units=(),
        tower_dnn_hidden_units=tuple(common.TOWER),
        l2_reg_embedding=0.0,
        init_std=common.STD,
        seed=run.seed,
        task_types=["binary"] * len(LABELS),
        task_names=LABELS,
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=common.LR)
    model.compile(optimizer, loss=["binary_crossentropy"] * len(LABELS), metrics=[])
    x, x_test = ({name: part[name] for name in (*SIZES, "history")} for part in (train, test))
    with common.Timed() as timed:
        model.fit(x, common.labels_of(train), batch_size=run.batch, epochs=1, verbose=0)
    found = model.predict(x_test, batch_size=run.batch)
    timed.done(len(train["click"]), common.auc(test["click"], found[:, 0]))


if __name__ == "__main__":
    main()
