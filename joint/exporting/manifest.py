"""What `manifest.json` says, put together from the plan, the run and the graphs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from joint import __version__
from joint.experiment import heads_of
from joint.exporting.graphs import input_name
from joint.features import Plan
from joint.fusion import fusion_weights
from joint.ids import hashed_rows
from joint.keys import Key, Reads
from joint.run import RunDirectory
from joint.schema import Feature, table_rows
from joint.serving.manifest import hash_of
from towers.retrieval import Retrieval

KINDS = {"id": "id", "ids": "bag", "float": "dense", "vector": "dense"}
ROWS = "row = id where 0 <= id < num_embeddings, otherwise oov"
HASHED = "row = 1 + draw(id) % (num_embeddings - 1) (joint.ids.hashed_rows); row 0 for id 0"
QUOTAS = {"retrieval": 500, "pre_ranking": 100, "ranking": 10}  # of a config that names none


def features(plan: Plan, keys: Sequence[Key], lengths: Mapping[str, int]) -> list[dict[str, Any]]:
    """Every input that is looked up or passed on, once, with the tables that it is looked up in."""
    found: dict[str, dict[str, Any]] = {}
    rows = {table.name: table.rows for table in plan.tables}
    for key in keys:
        said = found.setdefault(input_name(key), _feature(plan, key, lengths))
        if key.embedded and key.table not in said["tables"]:
            said["tables"].append(key.table)
            said["num_embeddings"] = rows[key.table]
            said["test"] = [[i, _row(i, key, rows[key.table])] for i in (1, rows[key.table], -1)]
    return list(found.values())


def _row(wanted: int, key: Key, rows: int) -> int:
    ids = np.array([wanted])
    return int((hashed_rows(ids, rows) if key.hashed else table_rows(ids, rows)[0])[0])


def _feature(plan: Plan, key: Key, lengths: Mapping[str, int]) -> dict[str, Any]:
    feature, past = key.feature, key.side in ("history", "competitors")
    said: dict[str, Any] = {
        "name": input_name(key),
        "side": key.side,
        "feature": feature.name,
        "history": key.history,
        "level": feature.level,
        "kind": "sequence" if past else KINDS[feature.kind],
        "values": feature.kind,
        "dtype": "int64" if key.embedded else "float32",
        "space": feature.space,
        "size": feature.size,
        "width": plan.dim(feature) if feature.space in plan.config.tables or not key.embedded else 1,
        "tables": [],
        "default": 0,
    }
    if key.embedded:
        said |= {
            "hash": HASHED if key.hashed else ROWS,
            "hashed": key.hashed,
            "oov": 0,
            "pooling": "mean" if feature.kind == "ids" else "none",
        }
    return said | ({"max_len": lengths[key.history], "truncate": "keep_last"} if past else {})


def longest(reads: Sequence[Reads]) -> dict[str, int]:
    """History -> the newest events that any of the graphs reads."""
    found: dict[str, int] = {}
    for one in reads:
        found |= {name: max(length, found.get(name, 0)) for name, length in one.lengths.items()}
    return found


def histories(plan: Plan, reads: Sequence[Reads], not_eligible: Sequence[str]) -> dict[str, dict[str, Any]]:
    """The histories that a request brings: those that graphs read, and those whose items are not recommended again."""
    lengths = longest(reads)
    keys = [key for one in reads for key in one.keys]
    found = {}
    for name in dict.fromkeys([*lengths, *not_eligible]):
        events = [k.feature.name for k in keys if k.history == name and k.feature.level == "event"]
        competed = any(name in one.competitors for one in reads)
        found[name] = {
            "length": lengths.get(name, 0),
            "events": sorted(set(events)),
            "competitors": plan.schema.history(name).competitors if competed else 0,
        }
    return found


def fusion(plan: Plan, heads: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Per head the weight of each task, for all and by user group, and what of a task's logit is weighed."""
    tasks, found = list(plan.config.tasks), {}
    for name in heads:
        head = heads_of(plan.config)[name]
        of = {} if isinstance(head, Retrieval) else head.fusion_of
        found[name] = {
            "space": "logit" if isinstance(head, Retrieval) else "task",
            "default": dict(zip(tasks, fusion_weights(head, tasks), strict=True)),
            "by_group": {
                group: dict(zip(tasks, fusion_weights(head, tasks, group), strict=True))
                for group in head.fusion_by_group
            },
            "of": {task: of.get(task, "logit") for task in tasks},
        }
    return found


def model(plan: Plan, run: RunDirectory, checkpoint: Path, number: int, model_hash: str) -> dict[str, Any]:
    """Where the export comes from."""
    return {
        "name": plan.config.run.name,
        "version": number,
        "model_hash": model_hash,
        "checkpoint": checkpoint.name,
        "checkpoint_sha256": hash_of(sorted(path for path in checkpoint.rglob("*") if path.is_file())),
        "dataset_hash": plan.schema.hash,
        "joint": __version__,
        "torch": version("torch"),
        "torchrec": version("torchrec"),
    }


def metrics(run: RunDirectory) -> dict[str, float]:
    """What the run was measured to be, but for what is of one user group; nothing where it was not measured."""
    if not run.evaluation.is_file():
        return {}
    found: dict[str, float] = json.loads(run.evaluation.read_text())
    return {name: value for name, value in found.items() if not name.startswith(("group/", "baselines/"))}


def crosses(reads: Reads) -> dict[str, dict[str, Any]]:
    """The cross features that the ranking graph takes, as declared."""
    return {name: asdict(cross) for name, cross in reads.crosses.items()}


def write_words(folder: Path, words: Mapping[str, pa.Array]) -> dict[str, dict[str, Any]]:
    """Write vocabularies; returns their entries, each with words and their ids to test a look-up by."""
    (folder / "vocabularies").mkdir(exist_ok=True)
    found = {}
    for space, known in words.items():
        name = f"vocabularies/{space}.parquet"
        pq.write_table(pa.table({"value": known}), folder / name, compression="zstd")
        places = sorted({0, len(known) // 2, len(known) - 1}) if len(known) else []
        found[space] = {"file": name, "words": len(known), "test": [[known[at].as_py(), at + 1] for at in places]}
    return found


def item_feature(feature: Feature) -> dict[str, Any]:
    """What new items have to be described by."""
    return {"name": feature.name, "kind": feature.kind, "space": feature.space, "size": feature.size}
