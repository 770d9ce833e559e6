"""Training in the way of RecFlow's released scripts (github.com/RecFlow-ICLR/RecFlow), written anew.

Taken over, as it decides what a row costs:
- a map-style dataset whose row is built in Python: the exposure's values out of an int64 matrix one by one, every id
  plus one, two calls of `time.localtime`, the request's history out of a dictionary (six of its ten columns, copied,
  the real rows shifted by one), a tuple of 20 values; torch's default collation and a copy of every tensor;
- FS-LTR: a row is a request, with up to 6 clicks, 6 exposures and 10 of each of five stages out of a nested
  dictionary; each list becomes an array of zeros that is filled column by column, with three passes of `localtime`;
- `nn.Embedding` for 13 tables with dense gradients, one Adam over everything;
- the history looked up, averaged (DSSM) or attended to (DIN) for every row anew, padded to 50; all pairs of slots of a
  request at once for FS-LTR.

Kinder than the release: a row of the matrix is taken once, not for each of its values; nothing is unpickled; no worker
process, whose own time and pickling would count too. Other than there: category_level_one is shifted like the other
ids (the release freezes one category at zero), which costs the same.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, softmax
from torch.utils.data import DataLoader, Dataset

from benchmarks.recflow_way.log import HISTORY, PAST, Files

WIDTH = 8
USER = ("weekday", "hour", "minute", "user_id", "device_id", "age", "gender", "province")
ITEM = (*PAST, "weekday", "hour", "minute")
SLOTS = {
    "click": 6,
    "realshow": 6,
    "rerank_pos": 10,
    "rerank_neg": 10,
    "rank_pos": 10,
    "rank_neg": 10,
    "coarse_neg": 10,
}
PRIORITY = {"click": 6, "realshow": 5, "rerank_pos": 4, "rank_pos": 4, "rerank_neg": 3, "rank_neg": 3, "coarse_neg": 2}
FILLED = {0: 0, 1: 1, 2: 3, 3: 6, 4: 4}  # place of an id among ITEM -> column of a stage sample
Values = tuple[int | np.generic | np.ndarray, ...]


def _clock(seconds: int) -> tuple[int, int, int]:
    when = time.localtime(seconds)
    return when.tm_wday + 1, when.tm_hour + 1, when.tm_min + 1


def _user(row: np.ndarray) -> Values:
    user, device, age, gender, province = row[1] + 1, row[3] + 1, row[4] + 1, row[5] + 1, row[6] + 1
    return *_clock(row[2] // 1000), user, device, age, gender, province


def _past(sequences: Mapping[int, np.ndarray], request: int) -> Values:
    """Ids [50, 5], their mask [50] and the number of real ones, at least 1."""
    whole = sequences[request][:, [0, 1, 2, 3, 4, 7]].copy()
    mask = (whole[:, 5] > 0).astype(np.int8)
    length = np.sum(mask)
    ids = whole[:, :5]
    if length > 0:
        ids[-length:] += 1
    return ids, mask, max(length, 1)


class Exposures(Dataset[Values]):
    """A row an exposure: 8 values of the request, 8 of the video, its past, the label."""

    def __init__(self, files: Files) -> None:
        self.rows, self.sequences = files.exposures, files.sequences

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Values:
        row = self.rows[index]
        video, author, second, kind, first = row[7] + 1, row[8] + 1, row[9] + 1, row[10] + 1, row[12] + 1
        item = video, author, second, first, kind, *_clock(row[11])
        return *_user(row), *item, *_past(self.sequences, row[0]), row[13]


class StageSamples(Dataset[Values]):
    """A row a request: 8 values of it, its past, 62 slots of videos [62, 8] and their priorities [62]."""

    def __init__(self, files: Files) -> None:
        self.rows, self.sequences, self.stages = files.requests, files.sequences, files.stages

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Values:
        row = self.rows[index]
        request, videos, priorities = row[0], [], []
        for stage, slots in SLOTS.items():
            samples = self._samples(self.stages[request], stage)
            ids, priority = np.zeros((slots, len(ITEM)), np.int64), np.zeros(slots, np.float32)
            real = min(slots, len(samples))
            for place, column in FILLED.items():
                ids[:real, place] = samples[:real, column] + 1
            for place, part in enumerate(("tm_wday", "tm_hour", "tm_min"), start=5):
                uploaded = samples[:real, 5].tolist()
                ids[:real, place] = np.array([getattr(time.localtime(when), part) + 1 for when in uploaded], np.int64)
            priority[:real] += PRIORITY[stage]
            videos.append(ids)
            priorities.append(priority)
        return *_user(row), *_past(self.sequences, request), np.concatenate(videos), np.concatenate(priorities)

    @staticmethod
    def _samples(stages: Mapping[str, np.ndarray], stage: str) -> np.ndarray:
        found = stages.get("realshow" if stage == "click" else stage, np.zeros((0, 8), np.int64))
        return found[np.nonzero(found[:, -1])[0]] if stage == "click" else found


def _mlp(width: int, hidden: Sequence[int], out: int) -> nn.Sequential:
    widths = [width, *hidden]
    pairs = itertools.pairwise(widths)
    return nn.Sequential(*(m for a, b in pairs for m in (nn.Linear(a, b), nn.ReLU())), nn.Linear(widths[-1], out))


class _Tables(nn.Module):
    def __init__(self, sizes: Mapping[str, int]) -> None:
        super().__init__()
        self.tables = nn.ModuleDict({name: nn.Embedding(size, WIDTH, padding_idx=0) for name, size in sizes.items()})

    def rows(self, names: Sequence[str], ids: Sequence[Tensor]) -> Tensor:
        """`[..., 8 · names]` of the ids of each name."""
        return torch.cat([self.tables[name](column) for name, column in zip(names, ids, strict=True)], dim=-1)


class Dssm(_Tables):
    """Two towers of 128, 64 and 32; the mean of the past on the request's side."""

    def __init__(self, sizes: Mapping[str, int]) -> None:
        super().__init__(sizes)
        self.user = _mlp(WIDTH * (len(USER) + len(PAST)), (128, 64), 32)
        self.item = _mlp(WIDTH * len(ITEM), (128, 64), 32)

    def _user_vectors(self, request: Sequence[Tensor], past: Tensor, length: Tensor) -> Tensor:
        mean = self.rows(PAST, past.unbind(2)).sum(1) / length.float().unsqueeze(1)
        return self.user(torch.cat([self.rows(USER, request), mean], dim=1))

    def forward(self, *inputs: Tensor) -> Tensor:
        """Logits `[B]` of a batch of exposures, without its labels."""
        request, item, (past, _, length) = inputs[:8], inputs[8:16], inputs[16:]
        return (self._user_vectors(request, past, length) * self.item(self.rows(ITEM, item))).sum(1)

    def of_slots(self, *inputs: Tensor) -> Tensor:
        """Logits `[B, 62]` of a batch of requests, without its priorities."""
        request, (past, _, length, videos) = inputs[:8], inputs[8:]
        items = self.item(self.rows(ITEM, videos.unbind(2)))
        return torch.bmm(items, self._user_vectors(request, past, length).unsqueeze(2)).squeeze(2)


class Din(_Tables):
    """Attention by an MLP of 80 on (behaviour, target), then an MLP of 128, 128 and 32."""

    def __init__(self, sizes: Mapping[str, int]) -> None:
        super().__init__(sizes)
        self.attention = _mlp(2 * WIDTH * len(PAST), (80,), 1)
        self.mlp = _mlp(WIDTH * (len(USER) + len(ITEM) + len(PAST)), (128, 128, 32), 1)

    def forward(self, *inputs: Tensor) -> Tensor:
        """Logits `[B]` of a batch of exposures, without its labels."""
        request, item, (past, mask, _) = inputs[:8], inputs[8:16], inputs[16:]
        history, video = self.rows(PAST, past.unbind(2)), self.rows(ITEM, item)
        target = video[:, : history.shape[2]].unsqueeze(1).expand(-1, HISTORY, -1)
        scores = self.attention(torch.cat([history, target], dim=2)).transpose(1, 2)
        scores = torch.where((mask != 0).unsqueeze(1), scores, torch.full_like(scores, -(2.0**30)))
        interest = torch.bmm(softmax(scores, dim=2), history).squeeze(1)
        return self.mlp(torch.cat([self.rows(USER, request), video, interest], dim=1)).squeeze(1)


def on_exposures(model: nn.Module, inputs: Sequence[Tensor], label: Tensor) -> Tensor:
    """Binary cross-entropy."""
    return binary_cross_entropy_with_logits(model(*inputs), label.float())


def on_pairs(model: Dssm, inputs: Sequence[Tensor], priority: Tensor) -> Tensor:
    """FS-LTR: the pairs of slots of a request, those that a coarse_neg wins at weight 0, by the number of all pairs."""
    logits = model.of_slots(*inputs)
    pair = priority.unsqueeze(2) > priority.unsqueeze(1)
    weight = (torch.arange(sum(SLOTS.values())) < sum(SLOTS.values()) - SLOTS["coarse_neg"]).float().view(1, -1, 1)
    ahead = logits.unsqueeze(2) - logits.unsqueeze(1)
    of_pairs = binary_cross_entropy_with_logits(ahead, torch.ones_like(ahead), weight=pair * weight, reduction="sum")
    return of_pairs / pair.sum()


def train(
    rows: Dataset[Values], model: nn.Module, loss_of: Callable[..., Tensor], *, batch: int, steps: int, warm_up: int
) -> tuple[float, float]:
    """Rows a second of processor time, and the mean loss, over so many steps after the first ones."""
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    began, losses = 0.0, []
    loader = DataLoader(rows, batch, shuffle=True, drop_last=True)
    for step, values in enumerate(itertools.islice(loader, warm_up + steps)):
        if step == warm_up:
            began = time.process_time()
        *inputs, target = [
            value.clone() if value.is_floating_point() else value.to(torch.long, copy=True) for value in values
        ]
        loss = loss_of(model, inputs, target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    counted = losses[warm_up:]
    return batch * len(counted) / (time.process_time() - began), sum(counted) / len(counted)
