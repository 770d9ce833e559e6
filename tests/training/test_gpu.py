"""What only a GPU can show about its own runs; `make gpu-check` runs these, and holds losses against the CPU's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import joint.train

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

# Sums are in no fixed order on a GPU, and dropout is drawn by the device.
KINDS = {
    "adagrad": ["optimizer.tables.lr=0.01"],
    "adam": ["optimizer.tables={kind: adam, lr: 0.001}"],
    "uvm_caching": ["optimizer.tables.lr=0.01", "tables.item_id.memory=uvm_caching", "tables.user_id.memory=uvm"],
    "beside": ["optimizer.tables.lr=0.01", "train.save_beside_training=true"],
}


def losses(run: Path) -> list[float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["loss/total"] for line in lines if "loss/total" in line]


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_goes_on_as_the_uninterrupted_one(kind, tiny_file, tmp_path):
    """Its tables, both optimizers and the steps of Adam come back from the checkpoint, out of every kind of memory."""
    overrides = ["evaluation.whole_catalogue=[]", "evaluation.baselines=false", *KINDS[kind]]
    for name in ("whole", "halved"):
        assert joint.train.main([str(tiny_file), f"run.name={name}", *overrides]) == 0
    newest = max((tmp_path / "runs/halved/checkpoints").iterdir())
    for path in sorted(newest.rglob("*"), reverse=True):
        path.unlink()
    newest.rmdir()
    assert joint.train.main([str(tiny_file), "run.name=halved", *overrides]) == 0
    whole, halved = (losses(tmp_path / "runs" / name) for name in ("whole", "halved"))
    assert len(whole) == 16
    assert halved == pytest.approx(whole, rel=1e-2)
