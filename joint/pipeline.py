"""One step, the same contract on every device: `progress(batches) -> StepOutput`, StopIteration at the end."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch
from torchrec.distributed import DistributedModelParallel
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist
from torchrec.optim.keyed import CombinedOptimizer

from joint.batch import Batch
from joint.task import StepOutput


class Pipeline(Protocol):
    """Trains on the next batch of an iterator."""

    def progress(self, batches: Iterator[Batch]) -> StepOutput:
        """Forward, backward and step on one batch."""

    def detach(self) -> object:
        """Give the plain model back (for evaluation)."""

    def attach(self) -> None:
        """Take it again."""


class PlainPipeline:
    """The loop as a book would write it; on CPU there is nothing to overlap with."""

    def __init__(self, model: DistributedModelParallel, optimizer: CombinedOptimizer) -> None:
        self.model = model
        self.optimizer = optimizer

    def progress(self, batches: Iterator[Batch]) -> StepOutput:
        """Forward, backward and step on one batch."""
        batch = next(batches)
        self.optimizer.zero_grad()
        loss, output = self.model(batch)
        loss.backward()
        self.optimizer.step()
        return output

    def detach(self) -> object:
        """Nothing to do."""
        return self.model

    def attach(self) -> None:
        """Nothing to do."""


def build_pipeline(model: DistributedModelParallel, optimizer: CombinedOptimizer, device: torch.device) -> Pipeline:
    """TorchRec's pipeline on CUDA, which overlaps copies, exchanges of ids and compute; a plain loop on CPU."""
    if device.type == "cuda":
        return TrainPipelineSparseDist(model, optimizer, device)
    return PlainPipeline(model, optimizer)
