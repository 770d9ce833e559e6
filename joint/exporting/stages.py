"""The graphs of an export and the tables they share, written side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from joint.checkpoint import read_model
from joint.exporting.graphs import (
    ItemTower,
    Lookup,
    PreRankingScorer,
    Teacher,
    UserTower,
    input_name,
    keys_of,
    reads_of,
)
from joint.exporting.tables import Precision, Stored, write_tables
from joint.exporting.trace import Axes, axes_of, types_of, write_graph
from joint.features import Plan
from joint.keys import Key, Reads
from joint.model import JointModel
from joint.serving.manifest import GRAPHS, TABLES
from towers.fields import width_of
from towers.pre_ranking import MlpHead, TwoTowerHead

OUTPUTS = {"retrieval": ("u", "v"), "pre_ranking": ("pu", "pi")}


@dataclass(frozen=True)
class Trained:
    """A checkpoint's model without anything sharded: the dense modules in evaluation mode, and whole tables by name."""

    plan: Plan
    model: JointModel
    tables: Mapping[str, Tensor]


def read_trained(plan: Plan, checkpoint: Path) -> Trained:
    """Read a checkpoint of any number of ranks into one process. It is a trusted file: its index is unpickled."""
    state = read_model(checkpoint)
    prefix = "dense.model."
    model = JointModel(plan)
    model.load_state_dict({name.removeprefix(prefix): part for name, part in state.items() if name.startswith(prefix)})
    tables = {name.split(".")[-2]: part for name, part in state.items() if name.startswith("embeddings.")}
    return Trained(plan, model.eval(), tables)


def keys_in(plan: Plan, heads: Sequence[str], *, teacher: bool) -> tuple[Key, ...]:
    """All that exported graphs look up or pass on."""
    every = (*heads, "ranking") if teacher else heads
    return reads_of(plan, every).keys


def user_reads(plan: Plan, heads: Sequence[str]) -> Reads:
    """What the user tower reads."""
    reads = reads_of(plan, heads)
    return Reads(keys_of(plan, heads, item_side=False), reads.lengths, reads.competitors, {})


def item_reads(plan: Plan, heads: Sequence[str]) -> Reads:
    """What the item tower reads."""
    return Reads(keys_of(plan, heads, item_side=True), {}, {}, {})


def write_stages(
    trained: Trained, heads: Sequence[str], precision: Precision, folder: Path, *, teacher: bool
) -> tuple[dict[str, dict[str, Any]], list[Stored]]:
    """Write `tables.bin` and the graphs; returns what the manifest says of the graphs, and where each table lies."""
    plan, model = trained.plan, trained.model
    used = {key.table for key in keys_in(plan, heads, teacher=teacher) if key.embedded}
    tables = {name: table for name, table in trained.tables.items() if name in used}
    stored = write_tables(folder / TABLES, tables, precision)
    users, items = user_reads(plan, heads), item_reads(plan, heads)
    stages = {
        "user_tower": _stage("user_tower", users, [OUTPUTS[head][0] for head in heads]),
        "item_tower": _stage("item_tower", items, [OUTPUTS[head][1] for head in heads]),
    }
    modules = {
        "user_tower": UserTower(plan, model, heads, _lookup(plan, users, precision)),
        "item_tower": ItemTower(plan, model, heads, _lookup(plan, items, precision)),
    }
    if teacher:
        reads = reads_of(plan, ["ranking"])
        stages["ranking"] = _stage("ranking", reads, ["logits"], batch=1)
        modules["ranking"] = Teacher(plan, model, ["ranking"], _lookup(plan, reads, precision))
    for name, module in modules.items():
        stage = stages[name]
        write_graph(module, stage["axes"], stage["types"], stage["outputs"], folder / stage["file"], stored)
    if "pre_ranking" in heads:
        head = model.heads["pre_ranking"]
        assert isinstance(head, TwoTowerHead | MlpHead)
        user, item = pre_ranking_shapes(plan)
        axes: Axes = {"pu": (1, *user), "pi": ("items", *item)}
        stage = _entry("prerank_head", axes, dict.fromkeys(axes, "float32"), ["logits"])
        stages["prerank_head"] = stage
        write_graph(PreRankingScorer(head), axes, stage["types"], stage["outputs"], folder / stage["file"], [])
    return stages, stored


def pre_ranking_shapes(plan: Plan) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The shapes of one request's `pu` and one item's `pi`: vectors a task, or the inputs of a head of kind mlp."""
    config = plan.config.heads.pre_ranking
    assert config is not None
    if config.kind == "mlp":
        return (width_of(plan.fields("pre_ranking", "request")),), (width_of(plan.fields("pre_ranking", "candidate")),)
    return ((len(plan.config.tasks), config.dim),) * 2


def _lookup(plan: Plan, reads: Reads, precision: Precision) -> Lookup:
    used = {key.table for key in reads.keys if key.embedded}
    return Lookup([shape for shape in plan.tables if shape.name in used], precision, {})


def _stage(graph: str, reads: Reads, outputs: Sequence[str], *, batch: str | int = "batch") -> dict[str, Any]:
    axes, types = axes_of(reads.keys, reads, batch=batch), types_of(reads.keys)
    entry = _entry(graph, axes, {name: types.get(name, "int64") for name in axes}, outputs)
    names = list(dict.fromkeys(input_name(key) for key in reads.keys))
    return entry | {"features": names, "lengths": dict(reads.lengths)}


def _entry(graph: str, axes: Axes, types: Mapping[str, str], outputs: Sequence[str]) -> dict[str, Any]:
    entry = {"file": GRAPHS[graph], "inputs": list(axes), "outputs": list(outputs), "axes": axes, "types": types}
    return entry | {"features": [], "lengths": {}}
