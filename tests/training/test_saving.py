"""What a checkpoint holds, and what becomes of one that cannot be written or was altered."""

from __future__ import annotations

import json
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

import joint.train
from joint import checkpoint
from joint.checkpoint import Progress, Saver
from joint.data.dataset import file_hash
from joint.data.loader import Loader
from joint.data.order import Position
from joint.errors import CheckpointError
from joint.fast_lookup import _kernels
from joint.optimizers import build_optimizer, set_learning_rates
from joint.task import JointTask, build_task
from towers.mixtures import set_step


@pytest.fixture
def built(configure, group, assemble):
    """A model after one step, its optimizer, and a function that takes one more step."""
    config = configure()
    model = build_task(assemble.plan(config), group).train()
    optimizer, batch = build_optimizer(model, config.optimizer), assemble(config)

    def step() -> None:
        set_step(model, 0)
        set_learning_rates(optimizer, config.optimizer, 0)
        optimizer.zero_grad()
        model(batch)[0].backward()
        optimizer.step()

    step()
    return model, optimizer, step


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1.5 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1500k", "none", str(disk)], capture_output=True).returncode:
        pytest.skip("no right to mount a tmpfs")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def tensors(model, optimizer) -> dict[str, torch.Tensor]:
    """Copies of all local tensors of a model and its optimizer."""
    found: dict[str, torch.Tensor] = {}

    def walk(name: str, value: object) -> None:
        if isinstance(value, dict):
            for key, child in value.items():
                walk(f"{name}/{key}", child)
        elif hasattr(value, "local_shards"):
            found[name] = value.local_shards()[0].tensor.clone()
        elif isinstance(value, torch.Tensor):
            found[name] = value.clone()

    walk("", {"model": model.state_dict()} | ({"optimizer": optimizer.state_dict()} if optimizer else {}))
    return found


def equal(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    assert left.keys() == right.keys()
    return all(torch.equal(value, right[name]) for name, value in left.items())


def test_progress_is_kept_in_words(built, tmp_path):
    model, optimizer, _ = built
    progress = Progress(7, Position(1, 2, 3), {(0, 0): 30, (1, 2): 4})
    Saver(tmp_path, model, optimizer, keep=1).save(progress)
    text = json.loads((tmp_path / "step-00000007" / "progress.json").read_text())
    assert text["position"] == {"epoch": 1, "day": 2, "batch": 3}
    assert text["seen"] == [{"epoch": 0, "day": 0, "requests": 30}, {"epoch": 1, "day": 2, "requests": 4}]
    assert checkpoint.load_latest(tmp_path, model, optimizer) == progress


def test_what_is_written_beside_training_is_the_state_of_the_call(built, tmp_path, monkeypatch):
    model, optimizer, step = built
    go_on = threading.Event()
    write = Saver._write

    def late(*arguments: object) -> None:
        assert go_on.wait(60)
        write(*arguments)

    monkeypatch.setattr(Saver, "_write", late)
    at_the_call = tensors(model, optimizer)
    with Saver(tmp_path, model, optimizer, keep=1, beside=True) as saver:
        saver.save(Progress(1))
        step()
        assert not checkpoint.steps(tmp_path)
        go_on.set()
    assert not equal(tensors(model, optimizer), at_the_call)
    checkpoint.load_latest(tmp_path, model, optimizer)
    assert equal(tensors(model, optimizer), at_the_call)


def test_a_run_that_saves_beside_training_is_the_same_run(tiny_file, tmp_path, flat):
    for name, beside in (("waits", "false"), ("beside", "true")):
        overrides = [f"run.name={name}", f"train.save_beside_training={beside}", "train.checkpoint_every=1"]
        assert joint.train.main([str(tiny_file), *overrides, "data.epochs=1"]) == 0
    waits, beside = (flat(tmp_path / "runs" / name / "checkpoints") for name in ("waits", "beside"))
    assert [name for name, value in waits.items() if not torch.equal(beside[name], value)] == []
    names = [path.name for path in checkpoint.steps(tmp_path / "runs/beside/checkpoints")]
    assert names == ["step-00000006", "step-00000007", "step-00000008"]


@pytest.mark.parametrize("beside", [False, True])
def test_a_full_disk_is_said_and_the_last_checkpoint_is_whole(built, small_disk, beside):
    model, optimizer, step = built
    folder, number = small_disk / "checkpoints", 0
    saver = Saver(folder, model, optimizer, keep=99, beside=beside)
    with pytest.raises(CheckpointError) as raised:  # noqa: PT012, which is the first that does not fit?
        for number in range(1, 20):
            fits = tensors(model, optimizer)
            saver.save(Progress(number))
            saver.wait()
            saved = fits
            step()
    assert str(raised.value).startswith(f"{folder}/step-{number:08d}: cannot be written (")
    assert str(raised.value).endswith("No space left on device); the checkpoint before it is whole")
    assert "\n" not in str(raised.value)
    assert sorted(path.name for path in folder.iterdir()) == [f"step-{n:08d}" for n in range(1, number)]
    shutil.rmtree(folder / "step-00000001")
    saver.save(Progress(number))  # there is room again
    saver.wait()
    shutil.rmtree(folder / f"step-{number:08d}")
    assert checkpoint.load_latest(folder, model, optimizer).step == number - 1
    assert equal(tensors(model, optimizer), saved)


def test_no_flipped_bit_goes_unnoticed(built, tmp_path):
    """PyTorch alone loads three of four such files without a word, some with other weights."""
    model, optimizer, _ = built
    Saver(tmp_path, model, optimizer, keep=1).save(Progress(1))
    files = sorted((tmp_path / "step-00000001").iterdir())
    assert [file.name for file in files] == [".metadata", "__0_0.distcp", "hashes.json", "progress.json"]
    random = np.random.default_rng(0)
    for file in files:
        whole = file.read_bytes()
        for place in random.integers(0, len(whole), 5).tolist():
            file.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
            with pytest.raises(CheckpointError, match="step-00000001: cannot be loaded"):
                checkpoint.load_latest(tmp_path, model, optimizer)
        file.write_bytes(whole)
    assert checkpoint.load_latest(tmp_path, model, optimizer) == Progress(1)


def test_progress_that_cannot_be_read_is_named(built, tmp_path):
    model, optimizer, _ = built
    saver = Saver(tmp_path, model, optimizer, keep=2)
    saver.save(Progress(1))
    saver.save(Progress(2))
    for text in ("", "[]", "{}", '{"step": 2, "position": {"month": 1}, "seen": []}'):
        (tmp_path / "step-00000002" / "progress.json").write_text(text)
        with pytest.raises(CheckpointError, match=r"step-00000002: cannot be loaded \(.+\); remove it to go on from"):
            checkpoint.load_latest(tmp_path, model, optimizer)


def test_every_request_of_every_epoch_is_counted_once(configure, assemble):
    loader = Loader(assemble.assembler(configure()), rank=0, world_size=1)
    requests = sum(part.rows for part in loader.days[next(iter(loader.days))])
    assert len(loader.days) == 1
    progress = Progress()
    for batch in loader._batches(Position()):
        progress = progress.after(batch)
    assert progress.seen == {(0, 0): requests, (1, 0): requests}
    loader.check_seen(progress.seen)
    for wrong in ({(0, 0): requests}, {(0, 0): requests + 1, (1, 0): requests - 1}):
        with pytest.raises(
            CheckpointError, match=rf"epoch \d of .*: trained on \d+ requests, the dataset has {requests}"
        ):
            loader.check_seen(wrong)


def test_a_run_that_lost_requests_does_not_end_well(tiny_file, tmp_path):
    assert joint.train.main([str(tiny_file), "data.epochs=1"]) == 0
    path = checkpoint.steps(tmp_path / "runs/tiny/checkpoints")[-1] / "progress.json"
    path.write_text(path.read_text().replace('"requests": 126', '"requests": 110'))
    hashes = path.with_name("hashes.json")
    hashes.write_text(json.dumps(json.loads(hashes.read_text()) | {"progress.json": file_hash(path)}))
    with pytest.raises(CheckpointError, match=r"epoch 1 of .*: trained on 110 requests, the dataset has 126"):
        joint.train.main([str(tiny_file), "data.epochs=1"])


def test_tables_are_loaded_after_sharding_which_would_make_them_anew(configure, group, assemble, tmp_path):
    """The trap: rows loaded before `DistributedModelParallel` are lost. Ours hold nothing that could be loaded then."""
    plan = assemble.plan(configure())
    assert {parameter.device.type for parameter in JointTask(plan).embeddings.parameters()} == {"meta"}
    model = build_task(plan, group)
    optimizer = build_optimizer(model, plan.config.optimizer)
    saved = tensors(model, optimizer)
    Saver(tmp_path, model, optimizer, keep=1).save(Progress(7))
    other = build_task(assemble.plan(configure("run.seed=4")), group)
    other_optimizer = build_optimizer(other, plan.config.optimizer)
    tables = [name for name in saved if ".embeddings." in name and name.endswith(".weight")]
    assert not any(torch.equal(tensors(other, other_optimizer)[name], saved[name]) for name in tables)
    checkpoint.load_latest(tmp_path, other, other_optimizer)
    assert equal(tensors(other, other_optimizer), saved)
    # The steps by which a table's Adam, on a GPU, mends its bias: no part of TorchRec's state.
    assert {int(kernel.emb_module.iter) for kernel in _kernels(other)} == {7}
