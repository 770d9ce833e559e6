"""The model card of an export: `README.md` with front matter that model hubs read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

FILE = "README.md"
TOLD = ("recall@", "auc", "reverse_rate", "nktd@", "true_reward@")  # metrics that the card shows


def card(said: Mapping[str, Any]) -> str:
    """The text, of what the manifest says."""
    model, items = said["model"], said["items"]
    shown = {name: value for name, value in said["metrics"].items() if any(part in name for part in TOLD)}
    rows = [f"| {name} | {value:.4f} |" for name, value in sorted(shown.items())]
    fields = [f"| {f['name']} | {f['side']} | {f['kind']} | {f['dtype']} | {f['space']} |" for f in said["features"]]
    indices = [_index(pool, entry) for pool, entry in items["index"].items()]
    parts = [
        "---",
        "license: other",
        "library_name: onnx",
        "tags: [recommendation, retrieval, two-tower]",
        "---",
        f"# {model['name']}, version {model['version']}",
        "",
        f"Heads: {', '.join(said['heads'])}. Tasks: {', '.join(said['tasks'])}. {items['count']:,} items. Tables in "
        f"{said['quantization']['tables']}. Model hash `{model['model_hash']}`, from {model['checkpoint']} of the run, "
        f"trained on dataset `{model['dataset_hash']}`.",
        "",
        "`manifest.json` is the contract. Files of several versions do not mix: the loader refuses them.",
        "",
        "```",
        "python -m joint.serve check .",
        "python -m joint.serve recommend . --request selfcheck/request.json",
        "```",
        "",
        "## What it was measured to be",
        "",
        "On the test part of the run's dataset, before the export:",
        "",
        "| metric | value |",
        "|---|---|",
        *(rows or ["| not measured | |"]),
        "",
        "## What it takes",
        "",
        "| input | side | kind | type | ids of |",
        "|---|---|---|---|---|",
        *fields,
        "",
        *indices,
        "",
        "`selfcheck/` holds made-up requests, no user's, and the training forward's answers to them.",
    ]
    return "\n".join(parts) + "\n"


def _index(pool: str, entry: Mapping[str, Any]) -> str:
    found = f"Index of pool `{pool or 'all'}`: {entry['kind']}"
    gate = entry["gate"]
    if gate is None:
        return f"{found}, exact."
    outcome = "passed" if gate["passed"] else f"refused{': ' + gate['reason'] if gate['reason'] else ''}"
    return f"{found}; {gate['kind']} {outcome} (recall {gate['recall']:.3f} of the exact one, {gate['queries']} users)."
