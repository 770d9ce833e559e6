"""torch-rechub's MMoE, and its DSSM with in-batch negatives: their models and trainers on their own loader."""

from __future__ import annotations

import tempfile

import torch
from torch_rechub.basic.features import SequenceFeature, SparseFeature
from torch_rechub.basic.initializers import RandomNormal
from torch_rechub.models.matching import DSSM
from torch_rechub.models.multi_task import MMOE
from torch_rechub.trainers import MatchTrainer, MTLTrainer
from torch_rechub.utils.data import DataGenerator

from benchmarks.peers import common
from benchmarks.peers.common import DIM, ITEM_SIDE, LABELS, REQUEST_SIDE, SIZES


def main() -> None:
    """Train an epoch, then score the test rows."""
    run = common.asked("mmoe", "dssm")
    torch.set_num_threads(1)
    torch.manual_seed(run.seed)
    train, test = common.rows(run.data, "train"), common.rows(run.data, "test")
    samples = len(train["click"])
    if run.model == "dssm":
        train = common.clicked(train)
    start = RandomNormal(0, common.STD)
    ids = {name: SparseFeature(name, SIZES[name] + 1, DIM, initializer=start) for name in SIZES}
    past = SequenceFeature("history", SIZES["item_id"] + 1, DIM, "mean", shared_with="item_id", padding_idx=0)
    user, item = [*(ids[name] for name in REQUEST_SIDE), past], [ids[name] for name in ITEM_SIDE]
    parts = [({name: part[name] for name in (*SIZES, "history")}, _labels(run.model, part)) for part in (train, test)]
    (x, y), (x_test, y_test) = parts
    loader, _, held_out = DataGenerator(x, y).generate_dataloader(
        x_val=x_test, y_val=y_test, x_test=x_test, y_test=y_test, batch_size=run.batch
    )
    with tempfile.TemporaryDirectory() as folder:
        settings = {"optimizer_params": {"lr": common.LR}, "n_epoch": 1, "model_path": folder}
        if run.model == "mmoe":
            kinds, tower = ["classification"] * len(LABELS), {"dims": common.TOWER}
            experts = {"dims": common.EXPERT}
            model = MMOE([*user, *item], kinds, common.EXPERTS, experts, [tower] * len(LABELS))
            trainer = MTLTrainer(model, kinds, **settings)
        else:
            tower = {"dims": common.TOWERS}
            model = DSSM(user, item, tower, tower, temperature=common.TEMPERATURE)
            trainer = MatchTrainer(model, mode=2, in_batch_neg=True, **settings)
        with common.Timed() as timed:
            trainer.train_one_epoch(loader)
        found = trainer.evaluate(trainer.model, held_out)
    timed.done(samples, float(found[0] if run.model == "mmoe" else found))


def _labels(model: str, part: common.Rows) -> object:
    return common.labels_of(part) if model == "mmoe" else part["click"]


if __name__ == "__main__":
    main()
