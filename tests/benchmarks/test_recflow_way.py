"""Training in RecFlow's way and by our trainer: the same rows, the same models."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch

from benchmarks.recflow_way import theirs
from benchmarks.recflow_way.__main__ import sizes_of
from benchmarks.recflow_way.log import prepared
from benchmarks.recflow_way.ours import our_config
from joint.data.assemble import Assembler
from joint.data.loader import Loader
from joint.data.order import Position
from joint.distributed import process_group
from joint.fast_lookup import _kernels
from joint.features import Plan
from joint.task import build_task


@pytest.fixture(scope="module")
def day(tmp_path_factory):
    """400 requests of 10 users on 500 videos, as both sides read them; local time is China's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TZ", "CST-8")
        time.tzset()
        yield prepared(tmp_path_factory.mktemp("way"), videos=500, requests=400)
    time.tzset()


def _copy(ours, model):
    """Our weights into their model."""
    for kernel in _kernels(ours):
        tables = kernel._config.embedding_tables
        for table, rows in zip(tables, kernel.emb_module.split_embedding_weights(), strict=True):
            model.tables[table.name].weight.data.copy_(rows)
            model.tables[table.name].weight.data[0] = 0  # their padding
    head = next(iter(ours.module.dense.model.heads.values()))
    pairs = (
        [(model.user, head.user), (model.item, head.item)] if isinstance(model, theirs.Dssm) else [(model.mlp, head)]
    )
    for sequence, part in pairs:
        first = part.first.joint if hasattr(part.first, "joint") else part.first
        linear = [m for m in sequence if isinstance(m, torch.nn.Linear)]
        of_ours = [first, *(m for m in part.trunk.modules() if isinstance(m, torch.nn.Linear))]
        for to, of in zip(linear, of_ours, strict=False):
            to.load_state_dict(of.state_dict())
        last = part.last[1]
        linear[-1].weight.data.copy_(last.weight[0].T)
        linear[-1].bias.data.copy_(last.bias[0])
    if isinstance(model, theirs.Din):
        attention = next(iter(ours.module.dense.model.encoders.values())).encoder
        model.attention[0].load_state_dict(attention.first.state_dict())
        model.attention[2].load_state_dict(attention.rest[-1].state_dict())


@pytest.mark.parametrize(("name", "kind"), [("DSSM", theirs.Dssm), ("DIN", theirs.Din)])
def test_same_rows_and_weights_give_the_same_logits(day, tmp_path, name, kind):
    dataset, files = day
    config = our_config(name, dataset.directory, tmp_path, requests=4096)  # all in one batch
    plan, model = Plan(config, dataset.schema), kind(sizes_of(dataset)).eval()
    with process_group() as device:
        batch = next(Loader(Assembler(plan, dataset), rank=0, world_size=1)._batches(Position()))
        task = build_task(plan, device).eval()
        _copy(task, model)
        with torch.no_grad():
            found = next(iter(task(batch)[1].outputs.values())).logits.flatten().tolist()
        dense = sum(p.numel() for p in task.module.dense.parameters())
    video = (dataset.catalogue["video_id"][batch.item.numpy()] - 1).tolist()
    ours = dict(zip(zip(batch.request_id[batch.row].tolist(), video, strict=True), found, strict=True))
    rows = theirs.Exposures(files)
    assert len(ours) == len(rows) > 1000
    *inputs, labels = torch.utils.data.default_collate([rows[i] for i in range(len(rows))])
    with torch.no_grad():
        logits = model(*[value.long() for value in inputs]).tolist()
    keys = list(zip(files.exposures[:, 0].tolist(), files.exposures[:, 7].tolist(), strict=True))
    np.testing.assert_allclose(logits, [ours[key] for key in keys], rtol=1e-4, atol=1e-6)
    assert labels.sum() == batch.positive.sum() > 0
    assert sum(p.numel() for n, p in model.named_parameters() if not n.startswith("tables")) == dense - (name == "DSSM")


def test_a_request_has_62_slots(day):
    _, files = day
    rows = theirs.StageSamples(files)
    *_, videos, priority = rows[0]
    request = int(files.requests[0][0])
    assert videos.shape == (62, 8)
    shown = files.stages[request].get("realshow", np.zeros((0, 8)))
    assert (priority[6:12] == 5).sum() == min(6, len(shown))
    assert (priority[:6] == 6).sum() == min(6, int(shown[:, -1].sum()))
    assert (videos[52:, 0] == files.stages[request]["coarse_neg"][:, 0] + 1).all()
    assert ((videos != 0).all(1) == (priority > 0)).all()


def test_the_pairs_are_those_of_the_formula():
    class Fixed:
        def of_slots(self, logits):
            return logits

    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 62, generator=generator)
    priority = torch.tensor([6] * 2 + [0] * 4 + [5] * 6 + [4] * 10 + [3] * 10 + [4] * 10 + [3] * 10 + [2] * 10)
    priority = priority.float().expand(2, -1)
    pairs = [(r, i, j) for r in range(2) for i in range(62) for j in range(62) if priority[r, i] > priority[r, j]]
    total = sum(np.log1p(np.exp(-float(logits[r, i] - logits[r, j]))) for r, i, j in pairs if i < 52)
    assert float(theirs.on_pairs(Fixed(), [logits], priority)) == pytest.approx(total / len(pairs), rel=1e-5)


@pytest.mark.parametrize("name", ["DSSM", "DIN", "FS-LTR"])
def test_their_way_trains(day, name):
    dataset, files = day
    model = (theirs.Din if name == "DIN" else theirs.Dssm)(sizes_of(dataset))
    rows, loss = theirs.Exposures(files), theirs.on_exposures
    if name == "FS-LTR":
        rows, loss = theirs.StageSamples(files), theirs.on_pairs
    rate, mean = theirs.train(rows, model, loss, batch=16, steps=2, warm_up=1)
    assert rate > 0
    assert 0 < mean < 10
