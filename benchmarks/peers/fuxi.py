"""FuxiCTR's trainer, embeddings and layers with an MMoE on top: its wheel has none, its model zoo is not in it."""

from __future__ import annotations

import logging
import math
import tempfile
from pathlib import Path

import numpy as np
import torch
from fuxictr.features import FeatureMap
from fuxictr.pytorch.dataloaders.npz_dataloader import NpzDataLoader
from fuxictr.pytorch.layers import FeatureEmbedding, MLP_Block
from fuxictr.pytorch.models import MultiTaskModel
from torch import Tensor, nn

from benchmarks.peers import common
from benchmarks.peers.common import DIM, LABELS, SIZES


class Mmoe(MultiTaskModel):
    """Experts and gates as modules, on their base class."""

    def __init__(self, features: FeatureMap, folder: str) -> None:
        tasks = len(LABELS)
        kinds = ["binary_classification"] * tasks
        super().__init__(
            features,
            model_id="mmoe",
            task=kinds,
            num_tasks=tasks,
            metrics=["AUC"],
            verbose=0,
            model_root=folder,
            gpu=-1,
        )
        self.rows = FeatureEmbedding(features, DIM, embedding_initializer=f"partial(nn.init.normal_, std={common.STD})")
        width = features.sum_emb_out_dim()
        self.experts = nn.ModuleList(MLP_Block(width, hidden_units=common.EXPERT) for _ in range(common.EXPERTS))
        self.gates = nn.ModuleList(nn.Linear(width, common.EXPERTS) for _ in LABELS)
        tower = {"output_dim": 1, "hidden_units": common.TOWER}
        self.towers = nn.ModuleList(MLP_Block(common.EXPERT[-1], **tower) for _ in LABELS)
        self.compile("adam", "binary_crossentropy", common.LR)
        self.model_to_device()

    def forward(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Probabilities of every label."""
        x = self.rows(self.get_inputs(inputs), flatten_emb=True)
        experts = torch.stack([expert(x) for expert in self.experts], dim=1)
        mixed = [(gate(x).softmax(1).unsqueeze(2) * experts).sum(1) for gate in self.gates]
        parts = zip(LABELS, self.output_activation, self.towers, mixed, strict=True)
        return {f"{name}_pred": activation(tower(of_task)) for name, activation, tower, of_task in parts}


def features_of(folder: str) -> FeatureMap:
    """Their description of the columns."""
    features = FeatureMap("peers", folder)
    for name, size in SIZES.items():
        features.features[name] = {"source": "", "type": "categorical", "vocab_size": size + 1, "padding_idx": 0}
    features.features["history"] = {
        **{"source": "", "type": "sequence", "vocab_size": SIZES["item_id"] + 1, "padding_idx": 0},
        **{"max_len": common.HISTORY, "share_embedding": "item_id", "feature_encoder": "layers.MaskedAveragePooling()"},
    }
    features.labels, features.default_emb_dim = LABELS, DIM
    features.num_fields = features.get_num_fields()
    features.set_column_index()
    return features


def main() -> None:
    """Train an epoch, then score the test rows."""
    run = common.asked("mmoe")
    torch.set_num_threads(1)
    torch.manual_seed(run.seed)
    logging.disable(logging.INFO)
    with tempfile.TemporaryDirectory() as folder:
        features = features_of(folder)
        for split in ("train", "test"):
            np.savez(Path(folder) / f"{split}.npz", **common.rows(run.data, split))
        train = NpzDataLoader(features, f"{folder}/train", batch_size=run.batch, shuffle=True, num_workers=0)
        test = NpzDataLoader(features, f"{folder}/test", batch_size=run.batch, num_workers=0)
        model = Mmoe(features, folder)
        # What its `fit` sets before it calls `train_epoch`.
        model.valid_gen, model._max_gradient_norm, model._stop_training = None, 10.0, False
        model._best_metric, model._stopping_steps, model._total_steps = -math.inf, 0, 0
        model._steps_per_epoch, model._eval_steps = len(train), 10**9
        model._batch_index = model._epoch_index = 0
        with common.Timed() as timed:
            model.train_epoch(train)
        found = model.evaluate(test, metrics=["AUC"])
    timed.done(train.num_samples, float(found["click_AUC"]))


if __name__ == "__main__":
    main()
