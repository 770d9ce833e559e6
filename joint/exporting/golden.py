"""Golden requests: made up, no user's; and what the training forward answers them."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from joint.data.assemble import logged
from joint.data.dataset import Dataset
from joint.data.order import Position
from joint.data.ragged import Ragged, offsets_of
from joint.data.requests import Column, Requests
from joint.data.sampling import unlabelled
from joint.data.softmax_pool import NO_POOL, PoolItems
from joint.evaluating.evaluator import Evaluator
from joint.evaluating.finished_run import open_model
from joint.exporting.tables import Precision
from joint.features import Plan
from joint.files import write_whole
from joint.fusion import fuse
from joint.outputs import Outputs
from joint.ranks import top_k
from joint.schema import Feature, Schema, day_name, day_number

if TYPE_CHECKING:
    from joint.exporting.build import Source

COUNT = 16
K = 10
# How far answers may be from the training forward's, as a part of the scale of what is compared, and the least share of
# their ids that agree.
TOLERANCE: dict[Precision, tuple[float, float]] = {"fp32": (1e-5, 1.0), "fp16": (5e-3, 0.9), "int8": (5e-2, 0.7)}
APPROXIMATE = 0.9  # the least share that an approximate index has to find, beside its gate
GIVEN = 64  # candidates of a request where nothing retrieves
SAMPLE = 256  # items whose vectors are compared
Answers = dict[str, np.ndarray]


def synthetic_requests(plan: Plan, dataset: Dataset, count: int = COUNT, seed: int = 0) -> Requests:
    """Made-up requests on the dataset's last day: every kind of history, no, one, as many as are read, and more;
    first all of the largest ids, then all unknown, then any."""
    rng = np.random.default_rng(seed)
    schema = dataset.schema
    day = max(day_number(part.day) for part in schema.parts)
    columns: dict[str, Column] = {
        "request_id": np.arange(count),
        "timestamp": np.full(count, day * 86_400),
        "group": rng.integers(0, 5, count),
        "day": np.full(count, day, np.int32),
        "candidates": _empty(count, np.int32),
        "stages": _empty(count, np.uint16),
        **{label: _empty(count, np.float32) for label in schema.labels},
    }
    for feature in schema.features:
        if feature.level == "request":
            columns[feature.name] = _feature(feature, rng, count)
    there = np.flatnonzero(dataset.first_day[""] <= day)
    for history in schema.histories:
        longest = plan.history_lengths.get(history.name, 1)
        lengths = rng.integers(0, longest + 1, count)
        lengths[: min(5, count)] = [0, longest, longest + 3, 1, longest][:count]
        past = Ragged(rng.choice(there, lengths.sum()).astype(np.int32), offsets_of(lengths))
        columns[history.name] = past
        for event in history.events:
            columns[f"{history.name}.{event}"] = past.with_values(_values(schema.feature(event), rng, lengths.sum()))
        if history.competitors:
            others = rng.choice(np.append(there, -1), lengths.sum() * history.competitors).astype(np.int32)
            columns[f"{history.name}.competitors"] = Ragged(others, offsets_of(lengths * history.competitors))
    return Requests(columns)


def _empty(count: int, dtype: type) -> Ragged:
    return Ragged(np.zeros(0, dtype), np.zeros(count + 1, np.int64))


def _values(feature: Feature, rng: np.random.Generator, count: int) -> np.ndarray:
    if feature.kind in ("id", "ids"):
        return rng.integers(0, max(feature.size, 1), count)
    return rng.standard_normal(count).astype(np.float32)


def _feature(feature: Feature, rng: np.random.Generator, count: int) -> Column:
    match feature.kind:
        case "id":
            ids = _values(feature, rng, count)
            ids[:2] = [max(feature.size - 1, 0), 0][:count]
            return ids
        case "ids":
            lengths = rng.integers(0, 4, count)
            return Ragged(_values(feature, rng, lengths.sum()), offsets_of(lengths))
        case "vector":
            return Ragged(_values(feature, rng, count * feature.size), np.arange(count + 1) * feature.size)
        case _:
            return _values(feature, rng, count)


def write_golden(
    source: Source, folder: Path, said: Mapping[str, Any], ids: pa.Array, words: Mapping[str, pa.Array]
) -> dict[str, Any]:
    """Write golden requests and answers; returns what the manifest says of them."""
    requests = synthetic_requests(source.plan, source.dataset)
    with open_model(source.run.path, [], reference=False) as opened:
        quotas = {head: max(K, quota) for head, quota in said["quotas"].items()}
        answers = training_answers(opened.evaluator, requests, source.heads, quotas)
    for place in range(len(requests)):
        answers[f"ids.{place}"] = np.array(ids.take(pa.array(answers.pop(f"final.{place}"))).to_pylist())
    (folder / "selfcheck").mkdir()
    np.savez_compressed(folder / "selfcheck/golden.npz", **answers)  # type: ignore[arg-type]
    schema = source.plan.schema
    write_whole(folder / "selfcheck/request.json", json.dumps(as_json(requests, said, schema, ids, words), indent=1))
    tolerance, overlap = TOLERANCE[source.choices.precision]
    if any(entry["kind"] != "flat" for entry in said["items"]["index"].values()):
        overlap = min(overlap, APPROXIMATE)
    stages = [f"{head}.{what}" for head in ("retrieval", *source.heads) for what in ("rows", "scores")]
    return {
        "file": "selfcheck/golden.npz",
        "requests": "selfcheck/request.json",
        "answers": list(dict.fromkeys([*stages, "ids", "scores"])),
        "day": day_name(requests.scalars("day")[0]),
        "k": K,
        "tolerance": tolerance,
        "overlap": overlap,
    }


def as_json(
    requests: Requests, said: Mapping[str, Any], schema: Schema, ids: pa.Array, words: Mapping[str, pa.Array]
) -> list[dict[str, Any]]:
    """The requests as a client would send them: items and words as the log has them, null for the unknown."""
    names = {s["feature"] for s in said["features"] if s["level"] == "request"}
    columns: dict[str, list[Any]] = {
        "day": [day_name(day) for day in requests.scalars("day")],
        "group": requests.scalars("group").tolist(),
    }
    for name in sorted(names):
        columns[name] = _told(requests.columns[name], schema.feature(name), words)
    item_ids = ids.to_pylist()
    for name, history in said["histories"].items():
        past = requests.lists(name)
        columns[name] = _lists(past, [item_ids[item] for item in past.values])
        for event in history["events"]:
            columns[f"{name}.{event}"] = _told(requests.columns[f"{name}.{event}"], schema.feature(event), words)
        if each := history["competitors"]:
            others = requests.lists(f"{name}.competitors").values
            told = [item_ids[item] if item >= 0 else None for item in others]
            events = [told[at : at + each] for at in range(0, len(told), each)]
            columns[f"{name}.competitors"] = _lists(past, events)
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def _lists(shape: Ragged, values: list[Any]) -> list[Any]:
    return [values[begin:end] for begin, end in itertools.pairwise(shape.offsets.tolist())]


def _told(column: Column, feature: Feature, words: Mapping[str, pa.Array]) -> list[Any]:
    """A feature's values, request by request, as the log has them."""
    values = column.values if isinstance(column, Ragged) else column
    if feature.kind in ("float", "vector"):
        told = values.astype(float).tolist()
    elif feature.space in words:
        known = [None, *words[feature.space].to_pylist()]
        told = [known[value] for value in values]
    else:
        told = [int(value) if value else None for value in values]
    return _lists(column, told) if isinstance(column, Ragged) else told


@torch.no_grad()
def training_answers(
    evaluator: Evaluator, requests: Requests, heads: Sequence[str], quotas: Mapping[str, int]
) -> Answers:
    """What the training forward gives: vectors, and stage by stage the candidates and scores of every request.

    `rows`, `v`, `u`; and of request i `retrieval.rows.i` (ascending) and `.scores.i`, for each later head the
    candidates that reach it and their scores, and `final.rows.i` and `scores.i`, best first.
    """
    config, corpus = evaluator.config, evaluator.eligibility.corpus
    tasks, answers = list(config.tasks), Answers()
    free = evaluator.eligibility.mask(requests)
    group = torch.from_numpy(requests.scalars("group"))
    if "retrieval" in heads:
        outputs = _forward(evaluator, requests, heads, PoolItems.corpus(corpus))
        output = outputs["retrieval"]
        assert output.user is not None
        assert output.pool is not None
        chosen = np.linspace(0, len(corpus) - 1, min(SAMPLE, len(corpus))).astype(np.int64)
        answers |= {"rows": corpus[chosen], "v": output.pool.vectors[chosen].numpy(), "u": output.user.numpy()}
        # Every task's logit of every item, then the weights: what the served vectors have to agree with.
        logits = torch.einsum("rtd,cd->rct", output.user, output.pool.vectors)
        fused = fuse(evaluator.heads["retrieval"], tasks, logits, group.unsqueeze(1))
        fused = fused.where(torch.from_numpy(free), -torch.inf)
        kept = np.zeros_like(free)
        np.put_along_axis(kept, fused.topk(min(quotas["retrieval"], len(corpus)), dim=1).indices.numpy(), True, axis=1)
        kept &= free
    else:
        fused = torch.zeros(free.shape)
        kept = free & (np.cumsum(free, axis=1) <= GIVEN)
    row, column = np.nonzero(kept)
    items = Ragged(corpus[column], offsets_of(kept.sum(axis=1)))
    scores = fused[torch.from_numpy(row), torch.from_numpy(column)]
    _keep(answers, "retrieval", items, scores)
    for head in heads[1:] if heads[0] == "retrieval" else heads:
        logits_ = _forward(evaluator, requests, heads, None, items)[head].logits
        scores = fuse(evaluator.heads[head], tasks, logits_, group[torch.from_numpy(items.rows)])
        _keep(answers, head, items, scores)
        if head != heads[-1]:
            alive = top_k(scores, torch.from_numpy(items.offsets), quotas[head]).numpy()
            items, scores = items.keep(alive), scores[torch.from_numpy(alive)]
    for place in range(len(items)):
        part = slice(int(items.offsets[place]), int(items.offsets[place + 1]))
        best = np.argsort(-scores[part].numpy(), kind="stable")[:K]
        answers |= {f"final.{place}": items.values[part][best], f"scores.{place}": scores[part].numpy()[best]}
    return answers


def _forward(
    evaluator: Evaluator, requests: Requests, heads: Sequence[str], pool: PoolItems | None, items: Ragged | None = None
) -> Outputs:
    assembler = evaluator.assembler
    candidates = (
        logged(requests, assembler.dataset) if items is None else unlabelled(items, assembler.dataset.schema.labels)
    )
    batch = assembler(requests, candidates, pool or NO_POOL, position=Position(), scoring=heads)
    return evaluator.forward(batch.to(evaluator.device))


def _keep(answers: Answers, stage: str, items: Ragged, scores: Tensor) -> None:
    for place in range(len(items)):
        part = slice(int(items.offsets[place]), int(items.offsets[place + 1]))
        answers[f"{stage}.rows.{place}"] = items.values[part].astype(np.int64)
        answers[f"{stage}.scores.{place}"] = scores[part].numpy().astype(np.float32)
