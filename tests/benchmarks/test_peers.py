"""The peers' rows, and the two runners that need no environment of their own."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from benchmarks.peers import bare, common, data, ours
from joint.data.dataset import Dataset
from joint.evaluating.evaluator import Evaluator
from joint.reporting import Reporter


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """600 rows, and 60 of the test."""
    made = tmp_path_factory.mktemp("peers")
    data.write(made, 600)
    return made


def test_auc_counts_ties_as_half():
    assert common.auc(np.array([0, 1, 0, 1]), np.array([0.1, 0.4, 0.4, 0.8])) == pytest.approx(3.5 / 4)


def test_the_dataset_holds_the_rows(folder):
    rows, dataset = common.rows(folder, "train"), Dataset(folder / "dataset")
    assert dataset.schema.requests("train") == len(rows["click"]) == 600
    requests = dataset.read_split("train")
    assert (requests.lists("history").lengths == common.HISTORY).all()
    assert sum(requests.lists("click").values) == rows["click"].sum()
    assert common.rows(folder, "test")["history"].shape == (60, common.HISTORY)
    assert all(rows[name].min() >= 1 and rows[name].max() <= size for name, size in common.SIZES.items())


def test_the_labels_can_be_learnt(folder):
    rows = common.rows(folder, "train")
    assert 0.2 < rows["click"].mean() < 0.45
    assert rows["like"].mean() < rows["long_view"].mean() < rows["click"].mean()


def test_the_blocked_softmax_is_the_mean_cross_entropy(monkeypatch):
    monkeypatch.setattr(bare, "BLOCK", 3)
    torch.manual_seed(0)
    query, item = (torch.randn(n, 4, dtype=torch.double, requires_grad=True) for n in (7, 9))
    own = torch.tensor([0, 2, 2, 8, 5, 1, 3])
    plain = torch.nn.functional.cross_entropy(query @ item.T, own)
    expected = torch.autograd.grad(plain, (query, item))
    found = bare.BlockedSoftmax.apply(query, item, own)
    torch.testing.assert_close(found, plain)
    torch.testing.assert_close(torch.autograd.grad(found, (query, item)), expected)


@pytest.mark.parametrize("runner", [ours, bare])
@pytest.mark.parametrize("model", ["mmoe", "dssm"])
def test_a_runner_says_what_it_took(folder, runner, model, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["runner", str(folder), "--model", model, "--batch", "64", "--bf16"])
    monkeypatch.setattr("joint.training.Reporter", Reporter)  # the runner puts its own there, and below
    monkeypatch.setattr(Evaluator, "_retrieval", Evaluator._retrieval)
    runner.main()
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["samples"] == 600
    assert found["processor"] > 0
    assert 0.3 < found["auc"] < 1
