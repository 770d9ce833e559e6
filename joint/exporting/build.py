"""An export from its first file to its last: written under another name, checked, and only then given its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pyarrow as pa
import torch

from joint.checkpoint import steps
from joint.data.dataset import Dataset
from joint.data.words import item_key, item_words
from joint.errors import CheckpointError, UserError
from joint.experiment import HEADS
from joint.exporting import manifest
from joint.exporting.card import FILE as CARD
from joint.exporting.card import card
from joint.exporting.golden import write_golden
from joint.exporting.graphs import as_inputs, reads_of
from joint.exporting.index import QUERIES, Kind, spaced, spread, write_indices
from joint.exporting.items import item_vectors, items_table, write_items
from joint.exporting.stages import item_reads, pre_ranking_shapes, read_trained, user_reads, write_stages
from joint.exporting.tables import Precision
from joint.exporting.versions import new_version, write_manifest
from joint.features import Plan
from joint.files import write_whole
from joint.fusion import fusion_weights
from joint.keys import Key, Reads
from joint.run import RunDirectory
from joint.serving.check import Differences, check
from joint.serving.inputs import request_inputs
from joint.serving.items import FILE as ITEMS
from joint.serving.manifest import GRAPHS, TABLES, hash_of

LIGHT = HEADS[:2]


@dataclass(frozen=True, kw_only=True)
class Choices:
    """What is exported, and how."""

    heads: tuple[str, ...] = LIGHT  # those that the run has
    precision: Precision = "fp32"
    teacher: bool = False
    index: Kind = "flat"


@dataclass(frozen=True)
class Source:
    """A run's newest checkpoint, and what is made of it."""

    run: RunDirectory
    checkpoint: Path
    plan: Plan
    dataset: Dataset
    choices: Choices

    @cached_property
    def light(self) -> tuple[str, ...]:
        """The exported heads of the two towers."""
        return tuple(head for head in self.choices.heads if getattr(self.plan.config.heads, head))

    @cached_property
    def heads(self) -> tuple[str, ...]:
        """All exported heads, in the funnel's order."""
        return (*self.light, *(["ranking"] if self.choices.teacher else []))

    @cached_property
    def reads(self) -> tuple[Reads, ...]:
        """What each graph reads."""
        teacher = [reads_of(self.plan, ["ranking"])] if self.choices.teacher else []
        return (user_reads(self.plan, self.light), item_reads(self.plan, self.light), *teacher)

    @cached_property
    def keys(self) -> tuple[Key, ...]:
        """All that graphs look up or pass on."""
        return tuple(dict.fromkeys(key for reads in self.reads for key in reads.keys))


def export_run(path: Path, out: Path, choices: Choices) -> tuple[Path, Differences]:
    """Export a run's newest checkpoint as `OUT/<next version>`; returns the folder and how far its answers are off.

    Raises:
        UserError: the run lacks what is asked for, or the export does not answer as the training forward does;
            nothing is left behind then.
    """
    source = _source(path, choices)
    with new_version(out) as (folder, number):
        write_version(source, folder, number)
        differences = check(folder)
    return out / str(number), differences


def _source(path: Path, choices: Choices) -> Source:
    run = RunDirectory(path)
    config, _ = run.load_config()
    found = steps(run.checkpoints)
    if not found:
        raise CheckpointError(f"{run.checkpoints}: no complete checkpoint in it; train the run first")
    dataset = Dataset(config.data.path)
    run.check_dataset(dataset.schema)
    source = Source(run, found[-1], Plan(config, dataset.schema), dataset, choices)
    if not source.light or (choices.teacher and config.heads.ranking is None):
        raise UserError(f"{path}: has no {'ranking' if source.light else ' or '.join(choices.heads)} head to export")
    if any(encoder.competing and encoder.competing.reverse for encoder in config.encoders.values()):
        raise UserError(f"{path}: an encoder's competing.reverse is on; a placebo is not exported")
    if choices.teacher and config.heads.ranking is not None and config.heads.ranking.residual is not None:
        raise UserError(f"{path}: heads.ranking.residual is not exported yet; export without the teacher")
    return source


def write_version(source: Source, folder: Path, number: int) -> None:
    """Write every file of a version."""
    torch.manual_seed(0)  # of the placeholders for tables: the same run gives the same files
    plan, dataset = source.plan, source.dataset
    trained = read_trained(plan, source.checkpoint)
    stages, stored = write_stages(
        trained, source.light, source.choices.precision, folder, teacher=source.choices.teacher
    )
    model_hash = hash_of([folder / TABLES, *(folder / stages[name]["file"] for name in sorted(stages))])
    words = dataset.vocabularies()
    ids = item_words(dataset, words)
    everything = np.arange(dataset.schema.items)
    vectors = item_vectors(folder / GRAPHS["item_tower"], as_inputs(source.reads[1]), dataset.catalogue, everything)
    table = items_table(ids, dataset.first_day, dataset.catalogue, _item_features(source), vectors)
    write_items(folder / ITEMS, table, model_hash)
    said = _said(source, number, model_hash)
    said |= {"stages": stages, "tables": [asdict(part) for part in stored]}
    said["vocabularies"] = _write_words(source, folder, words)
    users = _users(source, folder / GRAPHS["user_tower"]) if "u" in stages["user_tower"]["outputs"] else None
    indices = {} if users is None else _indices(source, folder, vectors["v"], users, model_hash)
    said["items"] = {
        "file": ITEMS,
        "count": dataset.schema.items,
        "key": item_key(dataset),
        "features": [manifest.item_feature(plan.schema.feature(name)) for name in _item_features(source)],
        "index": indices,
    }
    said["metrics"] = manifest.metrics(source.run) | ({} if users is None else {"export/user_spread": spread(users)})
    said["selfcheck"] = write_golden(source, folder, said, ids, words)
    write_whole(folder / CARD, card(said))
    write_manifest(folder, said)


def _said(source: Source, number: int, model_hash: str) -> dict[str, Any]:
    """What the manifest says that no file has to be written for."""
    plan, config = source.plan, source.plan.config
    retrieval, pre_ranking = config.heads.retrieval, config.heads.pre_ranking
    return {
        "model": manifest.model(plan, source.run, source.checkpoint, number, model_hash),
        "heads": list(source.heads),
        "tasks": list(config.tasks),
        "similarity": retrieval.similarity if retrieval else None,
        "dims": {
            "v": retrieval.dim if retrieval else None,
            "pu": pre_ranking_shapes(plan)[0] if pre_ranking else None,
            "pi": pre_ranking_shapes(plan)[1] if pre_ranking else None,
        },
        "features": manifest.features(plan, source.keys, manifest.longest(source.reads)),
        "histories": manifest.histories(plan, source.reads, config.data.not_eligible),
        "crosses": manifest.crosses(source.reads[-1]),
        "eligibility": {"pool": config.data.pool, "not_eligible": list(config.data.not_eligible)},
        "fusion": manifest.fusion(plan, source.heads),
        "quotas": {head: config.evaluation.quotas.get(head, manifest.QUOTAS[head]) for head in source.heads},
        "quantization": {"tables": source.choices.precision},
    }


def _write_words(source: Source, folder: Path, words: Mapping[str, pa.Array]) -> dict[str, dict[str, Any]]:
    """The vocabularies of all ids that requests and new items may bring."""
    read = [key.feature for key in source.keys] + [source.plan.schema.feature(name) for name in _item_features(source)]
    spaces = {feature.space for feature in read if feature.kind in ("id", "ids")}
    return manifest.write_words(folder, {space: known for space, known in words.items() if space in spaces})


def _item_features(source: Source) -> list[str]:
    """The item features that graphs and cross features read."""
    crossed = {cross.feature for reads in source.reads for cross in reads.crosses.values()}
    return sorted(
        {key.feature.name for key in source.keys if key.feature.level == "item" and key.side != "cross"} | crossed
    )


def _users(source: Source, graph: Path) -> np.ndarray:
    """`u [R, T, D]` of some real requests, which an approximate index is measured on."""
    days = source.dataset.parts([source.plan.config.evaluation.test])
    parts = [part for day in days.values() for part in day if part.rows]
    parts = [parts[at] for at in spaced(len(parts), QUERIES)]
    session = onnxruntime.InferenceSession(str(graph), providers=["CPUExecutionProvider"])
    found: list[np.ndarray] = []
    for part in parts:
        requests = source.dataset.read(part)
        requests = requests.take(spaced(len(requests), -(-QUERIES // len(parts))))
        inputs = request_inputs(as_inputs(source.reads[0]), source.dataset.catalogue, requests)
        found.append(session.run(["u"], inputs)[0])
    return np.concatenate(found)


def _indices(
    source: Source, folder: Path, vectors: np.ndarray, users: np.ndarray, model_hash: str
) -> dict[str, dict[str, Any]]:
    head = source.plan.config.heads.retrieval
    assert head is not None
    groups = ["", *head.fusion_by_group]
    weights = np.array([fusion_weights(head, list(source.plan.config.tasks), group) for group in groups])
    gated: dict[str, Any] = {"kind": source.choices.index, "users": users, "weights": weights}
    gated["deep"] = source.plan.config.evaluation.quotas.get("retrieval", manifest.QUOTAS["retrieval"])
    return write_indices(folder, vectors, source.dataset.first_day, model_hash, **gated)
