"""Two ranks are one: the same losses, weights, metrics and checkpoints as a single process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

import joint
from joint import checkpoint
from joint.config import load_config
from joint.data.assemble import Assembler
from joint.data.dataset import Dataset
from joint.data.loader import Loader
from joint.data.order import Position
from joint.distributed import process_group
from joint.features import Plan
from joint.optimizers import build_optimizer
from joint.predicting.writing import predict
from joint.task import build_task
from joint.train import main

# Dropout is drawn by rank; everything else is the same for any number of ranks.
EQUAL = [
    "heads.retrieval.trunk.dropout=0",
    "encoders.rated_sequence.by.dropout=0",
    "run.seed=5",
    "objectives.views={loss: item_views, space: [corpus], share: 0.5, temperature: 0.5}",
    # Open for every item, a ReLU leaves its bias no gradient but rounding, along which Adam takes full steps.
    "heads.retrieval.item_hidden=[]",
    # A first update of row-wise Adagrad is its rate, however small the gradient: it blows rounding up to 1e-4 at 0.1.
    "optimizer={tables: {lr: 0.01}, dense: {lr: 0.001}}",
]
# 38 requests in three row groups on two shards: in half of the steps the second rank has no request at all.
UNEVEN = [*EQUAL, "data.train=[valid]", "evaluation.valid=test", "data.epochs=4", "train.evaluate_every_epochs=0"]
# 56 steps under every kind of sharding; `item_id` has the rows for it.
LONG = [*EQUAL, "data.epochs=7", "train.evaluate_every_epochs=0"]
RUNS = {
    "": EQUAL,
    "uneven-": UNEVEN,
    "rows-": LONG,
    "tables-": [*LONG, "tables.item_id.sharding=table_wise", "tables.genres.sharding=table_wise"],
    "planner-": [*LONG, "tables.item_id.sharding=planner", "tables.genres.sharding=planner"],
}

PLAIN = [*UNEVEN, "train.fast_lookup=false"]


@pytest.fixture(scope="module")
def both(tiny_text, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which one rank, then two ranks, have done their runs."""
    folder = tmp_path_factory.mktemp("ranks")
    (folder / "tiny.yaml").write_text(tiny_text(folder / "runs"))
    (folder / "equal.json").write_text(json.dumps(EQUAL))
    (folder / "runs.json").write_text(json.dumps({f"{run}two": RUNS[run] for run in RUNS} | {"plain-two": PLAIN}))
    for run, overrides in RUNS.items():
        assert main([str(folder / "tiny.yaml"), f"run.name={run}one", *overrides]) == 0
    environment = os.environ | {"PYTHONPATH": str(Path(joint.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(Path(__file__).with_name("two_ranks.py"))]
    ranks = [
        subprocess.Popen([*command, str(rank), str(folder)], env=environment, stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    errors = [rank.communicate(timeout=180)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(errors)[-4000:]
    return folder


def losses_of(folder: Path, run: str) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (folder / "runs" / run / "metrics.jsonl").read_text().splitlines()]
    return [{n: v for n, v in line.items() if n.startswith("loss/")} for line in lines if "loss/total" in line]


@pytest.mark.parametrize("run", ["", "uneven-"])
def test_two_ranks_train_as_one_does(both, flat, run):
    losses = losses_of(both, f"{run}one")
    assert len(losses) >= 10
    for alone, together in zip(losses, losses_of(both, f"{run}two"), strict=True):
        assert together == pytest.approx(alone, rel=1e-5)
    folders = [both / "runs" / f"{run}{name}" / "checkpoints" for name in ("one", "two")]
    alone, together = (flat(folder) for folder in folders)
    assert alone.keys() == together.keys()
    for name, value in alone.items():
        learned = torch.ones_like(value, dtype=torch.bool)
        if name.startswith("/model/dense."):
            # Not so what all items of a softmax share, and its like: there the gradient is nothing but rounding.
            learned = alone[f"/optimizer/state/dense.{name.split('/')[-1]}/exp_avg_sq"].sqrt() > 1e-6
        torch.testing.assert_close(together[name][learned], value[learned], atol=1e-5, rtol=1e-5, msg=name)


def test_the_fast_look_up_gives_two_ranks_the_same_bits(both, flat):
    fast, plain = (flat(both / "runs" / f"{name}-two" / "checkpoints") for name in ("uneven", "plain"))
    assert fast.keys() == plain.keys()
    assert {name for name in fast if not torch.equal(fast[name], plain[name])} == set()
    assert losses_of(both, "uneven-two") == losses_of(both, "plain-two")


@pytest.mark.parametrize("run", ["rows-", "tables-", "planner-"])
def test_two_ranks_stay_with_one_for_fifty_steps_under_any_sharding(both, run):
    alone, together = losses_of(both, f"{run}one"), losses_of(both, f"{run}two")
    assert len(alone) == len(together) == 56
    for step in range(56):
        assert together[step] == pytest.approx(alone[step], rel=1e-5 if step < 10 else 1e-4), step


@pytest.mark.parametrize("run", ["", "rows-", "tables-", "planner-"])
def test_two_ranks_end_with_the_metrics_of_one(both, run):
    alone, together = (json.loads((both / f"runs/{run}{name}/eval.json").read_text()) for name in ("one", "two"))
    # Two scores 1e-6 apart may change places: one pair of the 4,000 of an AUC.
    assert together == pytest.approx(alone, rel=1e-4, abs=6e-4, nan_ok=True)
    smooth = {name: value for name, value in alone.items() if "log_loss" in name or "calibration" in name}
    assert smooth
    assert {name: together[name] for name in smooth} == pytest.approx(smooth, rel=1e-4)


def test_the_runs_were_as_uneven_as_can_be(both):
    """Rows and corpus that two ranks cannot halve, and no request for the second rank at the end."""
    config, _ = load_config(both / "tiny.yaml", UNEVEN)
    assert config.tables["item_id"].sharding == "row_wise"
    assert config.tables["item_id"].rows % 2 == 1
    dataset = Dataset(config.data.path)
    assert dataset.schema.items % 2 == 1
    batches = Loader(Assembler(Plan(config, dataset.schema), dataset), rank=1, world_size=2)._batches(Position())
    assert {batch.requests > 0 for batch in batches} == {True, False}


def test_a_checkpoint_of_one_rank_loads_on_two_and_back_bit_by_bit(both, flat, tmp_path):
    first = flat(both / "runs/one/checkpoints")
    by_two = flat(both / "one-by-two")
    config, _ = load_config(both / "tiny.yaml", EQUAL)
    with process_group() as device:
        model = build_task(Plan(config, Dataset(config.data.path).schema), device)
        optimizer = build_optimizer(model, config.optimizer)
        progress = checkpoint.load_latest(both / "one-by-two", model, optimizer)
        checkpoint.Saver(tmp_path / "back", model, optimizer, keep=1).save(progress)
    back = flat(tmp_path / "back")
    assert first.keys() == by_two.keys() == back.keys()
    kinds = {"embeddings", "exp_avg", "momentum1"}
    assert all(any(kind in name for name in first) for kind in kinds)
    for name, value in first.items():
        assert torch.equal(by_two[name], value), name
        assert torch.equal(back[name], value), name
    assert progress.step == 16


def test_two_ranks_measure_what_one_measures(both):
    alone = json.loads((both / "runs/one/eval.json").read_text())
    together = json.loads((both / "one-by-two.json").read_text())
    # Rows are summed in another order: two scores 1e-7 apart may change places, one pair in 10,000 of an AUC.
    assert together == pytest.approx(alone, rel=1e-6, abs=2e-4, nan_ok=True)
    assert {"retrieval/recall@3", "ranking/recall@3", "funnel/ranking/recall@3", "ranking/auc/like"} <= together.keys()


def test_two_ranks_predict_what_one_predicts(both):
    data = Path(load_config(both / "tiny.yaml")[0].data.path)
    alone, together = both / "predicted-by-one", both / "predicted-by-two"
    predict(both / "runs" / "one", data, alone, splits=["test"], heads=[], k=3)
    files = sorted(str(path.relative_to(alone)) for path in alone.rglob("*.parquet"))
    assert files == sorted(str(path.relative_to(together)) for path in together.rglob("*.parquet"))
    assert {name.split("/")[0] for name in files} == {"scores", "top"}
    for name in files:
        one, two = (pq.read_table(folder / name) for folder in (alone, together))
        assert one.schema == two.schema
        for column in one.column_names:
            a, b = (table[column].combine_chunks() for table in (one, two))
            if pa.types.is_list(a.type) and pa.types.is_floating(a.type.value_type):
                assert a.offsets == b.offsets
                np.testing.assert_allclose(b.values, a.values, rtol=1e-5, atol=1e-6)
            else:
                assert a == b, (name, column)


def test_gathered_rows_are_the_concatenation_and_their_gradient_is_its_gradient(both):
    rows = torch.cat([torch.arange(6.0).view(3, 2), torch.arange(6.0).view(3, 2) + 10]).requires_grad_()
    weights = torch.arange(12.0).view(6, 2)
    ((rows * weights).sum() + ((rows * weights) ** 2).sum()).backward()
    for rank in range(2):
        everything, gradient, whole_numbers = torch.load(both / f"gathered-{rank}.pt")
        assert torch.equal(everything, rows.detach())
        torch.testing.assert_close(gradient, rows.grad[3 * rank : 3 * rank + 3])
        assert whole_numbers.tolist() == [0, 7, 1, 7]
