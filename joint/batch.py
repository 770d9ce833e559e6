"""The batch: everything a step needs as tensors, ragged by offsets and never padded.

Shapes: R requests, N candidates of all requests (a request's are contiguous), T tasks, P pool items of this rank.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor
from torchrec.streamable import Pipelineable

from joint.data.order import Position


@dataclass
class Batch(Pipelineable):
    """One step's requests on this rank. R is at least 1: a rank without requests holds one with empty lists."""

    sparse: dict[str, KeyedJaggedTensor]  # embedding dim -> keys of stride R: request, history, candidate and pool ids
    inner: dict[str, Tensor]  # key whose ids are averaged -> how many consecutive ones each mean is of
    floats: dict[str, Tensor]  # key of a float or vector feature -> [R, ·], [N, ·], [P, ·] or [events, ·]
    competitors: dict[str, Tensor]  # history -> whether each of its events' competitors is one, bool [events, K]
    lengths: dict[str, Tensor]  # history -> events a request [R]
    offsets: Tensor  # [R + 1]
    row: Tensor  # [N] the request of each candidate
    item: Tensor  # [N] item index
    stages: Tensor  # [N] flags of `joint.schema.Stage`
    labels: Tensor  # [N, T] in [0, 1]; 0 where not observed
    weight: Tensor  # [N, T] of a positive: the label's value for a weighted task, else 1
    weighted: Tensor  # [T] bool: tasks of kind weighted
    positive: Tensor  # [N, T] bool: exposed with the task's feedback
    scores: Tensor  # [N, T] a logged teacher's logits; NaN where it has none
    observed: Tensor  # [N, T] bool: an exposure with known feedback, or an unexposed candidate (label 0)
    request_id: Tensor  # [R]
    group: Tensor  # [R]
    head_rows: dict[str, Tensor]  # head -> the candidates it has to score, ascending: in training, to learn from them
    teaching_rows: dict[str, Tensor]  # head -> in training, those it has to score for its students alone, ascending
    pool_item: Tensor  # [P] item index; -1 is padding
    pool_open: Tensor  # [P] bool: an item that has joined the pool by the day of these requests
    pool_in_batch: Tensor  # [P] bool: an impression of these requests, not a shared random item or one of the corpus
    pool_sampled: bool  # impressions and random items, of any order and number; else this rank's slice of the corpus
    pool_available: int  # items of the pool on the day of these requests: what random items are drawn from
    column: Tensor  # [N] each candidate's place in the corpus of all ranks; -1: not in it
    excluded: Tensor  # [E, 2] (request, item) that are not eligible; of a corpus (request, column)
    requests: int  # real ones: 0 on a rank that has run out, else R
    unknown: int  # ids that fell outside their table and became 0
    position: Position  # of the batch that follows this one

    def to(self, device: torch.device, non_blocking: bool = False) -> Batch:
        """The batch on another device."""
        return self._map(lambda tensor: tensor.to(device=device, non_blocking=non_blocking))

    def pin_memory(self) -> Batch:
        """The batch in page-locked memory."""
        return self._map(lambda tensor: tensor.pin_memory())

    def record_stream(self, stream: torch.Stream) -> None:
        """Tell the allocator that `stream` uses the tensors."""

        def record(tensor: Any) -> Any:
            tensor.record_stream(stream)
            return tensor

        self._map(record)

    def _map(self, function: Callable[[Any], Any]) -> Batch:
        def apply(value: Any) -> Any:
            if isinstance(value, dict):
                return {key: function(tensor) for key, tensor in value.items()}
            return function(value) if isinstance(value, Tensor) else value

        return Batch(**{field.name: apply(getattr(self, field.name)) for field in dataclasses.fields(self)})
