"""A run that is stopped, torn or started again ends like one that never was."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import joint.train
import joint.training
from joint import checkpoint
from joint.errors import CheckpointError, UserError
from joint.optimizers import build_optimizer, set_learning_rates
from joint.task import build_task
from towers.mixtures import set_step

STEPS = 16

Run = Callable[..., Path]


@pytest.fixture
def run(tiny_file: Path, tmp_path: Path) -> Run:
    """`run('key=value', ...)`: what `python -m joint.train` does; returns the run directory."""

    def start(*overrides: str) -> Path:
        assert joint.train.main([str(tiny_file), *overrides]) == 0
        return tmp_path / "runs" / "tiny"

    return start


@pytest.fixture
def ask_to_stop(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """`ask_to_stop(n)`: a signal arrives in the middle of step n (counted from 1)."""

    def at(step: int, number: signal.Signals = signal.SIGTERM) -> None:
        def signalled(model: torch.nn.Module, done: int) -> None:
            if done + 1 == step:
                signal.raise_signal(number)
            set_step(model, done)

        monkeypatch.setattr(joint.training, "set_step", signalled)

    return at


def everything(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def steps_of(run: Path) -> list[str]:
    return [path.name for path in checkpoint.steps(run / "checkpoints")]


def numbers(run: Path) -> list[dict[str, float]]:
    """metrics.jsonl, but for what depends on the machine."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith(("speed/", "memory/"))} for line in lines]


@pytest.fixture(scope="module")
def unbroken(tiny_text, flat, tmp_path_factory) -> tuple[dict[str, torch.Tensor], list[dict[str, float]], str]:
    """Weights, numbers and eval.json of a run that nothing stopped."""
    folder = tmp_path_factory.mktemp("unbroken")
    (folder / "tiny.yaml").write_text(tiny_text(folder))
    assert joint.train.main([str(folder / "tiny.yaml")]) == 0
    done = folder / "tiny"
    return flat(done / "checkpoints"), numbers(done), (done / "eval.json").read_text()


def same(run: Path, flat, unbroken) -> None:
    weights, reported, evaluation = unbroken
    after = flat(run / "checkpoints")
    assert after.keys() == weights.keys()
    assert [name for name in weights if not torch.equal(after[name], weights[name])] == []
    assert numbers(run) == reported
    assert (run / "eval.json").read_text() == evaluation


@pytest.mark.parametrize("stops", [[1], [8], [3, 9, STEPS]])  # step 8 ends an epoch
def test_a_run_stopped_by_sigterm_and_resumed_is_the_run_bit_by_bit(run, ask_to_stop, flat, unbroken, stops, capsys):
    for step in stops:
        ask_to_stop(step)
        folder = run()
        assert steps_of(folder)[-1] == f"step-{step:08d}"
        said = f"stopped after step {step} of {STEPS}; the same command goes on from there"
        assert (said in capsys.readouterr().out) == (step < STEPS)
    ask_to_stop(0)
    run()
    same(folder, flat, unbroken)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


@pytest.mark.usefixtures("heeding_ctrl_c")
def test_a_run_stopped_by_ctrl_c_and_resumed_is_the_run_bit_by_bit(run, ask_to_stop, flat, unbroken, tmp_path, capfd):
    before = signal.getsignal(signal.SIGINT)
    ask_to_stop(3, signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        run()
    said = capfd.readouterr()
    assert f"stopped after step 3 of {STEPS}; the same command goes on from there" in said.out
    assert said.err.count("interrupted: training stops at its next step and saves") == 1
    assert steps_of(tmp_path / "runs" / "tiny")[-1] == "step-00000003"
    assert signal.getsignal(signal.SIGINT) == before
    ask_to_stop(0)
    same(run(), flat, unbroken)


def test_a_run_killed_between_checkpoints_repeats_the_lost_steps(run, flat, unbroken, monkeypatch):
    def killed(model: torch.nn.Module, done: int) -> None:
        if done == 13:
            raise KeyboardInterrupt
        set_step(model, done)

    with monkeypatch.context() as patch:
        patch.setattr(joint.training, "set_step", killed)
        with pytest.raises(KeyboardInterrupt):
            run()
    folder = run()  # goes on from step 10
    same(folder, flat, unbroken)


def test_a_torn_checkpoint_is_passed_over(run, flat, unbroken):
    folder = run()
    checkpoints = folder / "checkpoints"
    (checkpoints / f"step-{STEPS:08d}" / ".metadata").unlink()
    left = checkpoints / ".step-00000012.unfinished"
    left.mkdir()
    (left / "__0_0.distcp").write_bytes(b"half")
    assert steps_of(folder)[-1] == "step-00000015"
    run()
    assert sorted(path.name for path in checkpoints.iterdir()) == [f"step-{n:08d}" for n in (10, 15, STEPS)]
    same(folder, flat, unbroken)


@pytest.mark.parametrize("damage", ["cut", "flip", "missing", "index"])
def test_a_damaged_checkpoint_is_named_and_what_to_do_about_it(run, damage):
    folder = run("data.epochs=1")
    before = everything(folder)
    newest = checkpoint.steps(folder / "checkpoints")[-1]
    file = newest / (".metadata" if damage == "index" else "__0_0.distcp")
    whole = file.read_bytes()
    if damage == "missing":
        file.unlink()
    elif damage == "flip":
        middle = len(whole) // 2
        file.write_bytes(
            whole[:middle] + bytes(255 - b for b in whole[middle : middle + 4096]) + whole[middle + 4096 :]
        )
    else:
        file.write_bytes(whole[: len(whole) // 2])
    broken = everything(folder)
    with pytest.raises(CheckpointError) as raised:
        run("data.epochs=1")
    text = str(raised.value)
    assert text.startswith(f"{newest}: cannot be loaded (")
    assert text.endswith("); remove it to go on from step-00000005")
    assert "\n" not in text
    assert everything(folder) == broken != before
    shutil.rmtree(newest)
    run("data.epochs=1")
    assert (folder / "eval.json").read_bytes() == before["eval.json"]


def test_only_the_newest_are_kept_and_nothing_else_is_left(run):
    folder = run("train.checkpoint_every=2", "train.keep=2", "data.epochs=1")
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["step-00000006", "step-00000008"]


def test_a_finished_run_started_again_shows_its_table_and_changes_nothing(run, capsys):
    folder = run("data.epochs=1")
    first, before = capsys.readouterr().out, everything(folder)
    run("data.epochs=1")
    second, after = capsys.readouterr().out, everything(folder)
    table = first[first.index("recall@3  ") :]
    assert second.endswith(table)
    assert "step  " not in second
    assert "resuming after" not in second
    assert "trained to its end before, and measured again" in second
    same_files = {name for name in before if not name.startswith(("train.log", "tensorboard"))}
    assert {name: after[name] for name in same_files} == {name: before[name] for name in same_files}


def test_a_run_may_speak_and_save_at_other_steps_when_it_goes_on(run, ask_to_stop, flat, unbroken):
    ask_to_stop(3)
    run()
    ask_to_stop(0)
    folder = run("train.log_every=4", "train.checkpoint_every=7")
    weights, _, evaluation = unbroken
    after = flat(folder / "checkpoints")
    assert [name for name in weights if not torch.equal(after[name], weights[name])] == []
    assert (folder / "eval.json").read_text() == evaluation
    assert steps_of(folder)[-2:] == ["step-00000014", "step-00000016"]


def test_another_config_is_refused_with_its_differences_and_changes_nothing(run):
    folder = run("train.log_every=8", "data.epochs=1")
    before = everything(folder)
    with pytest.raises(CheckpointError) as raised:
        run("train.log_every=8", "data.epochs=2", "objectives.distill.weight=2", "objectives.negatives=")
    text = str(raised.value)
    assert text.startswith(f"{folder}: made by another config; choose another run.name. Differing (what the run has")
    for difference in ("data.epochs: 1 != 2", "objectives.distill.weight: 0.5 != 2.0", "objectives.negatives"):
        assert difference in text
    assert "\n" not in text
    assert everything(folder) == before


def test_another_dataset_is_refused_and_changes_nothing(run, tiny_data, tmp_path, tiny_file):
    folder = run("data.epochs=1")
    before = everything(folder)
    environment = json.loads((folder / "environment.json").read_text())
    (folder / "environment.json").write_text(json.dumps(environment | {"dataset": "0123456789abcdef"}))
    with pytest.raises(CheckpointError, match=r"made from a dataset of hash 0123456789abcdef, this one's is "):
        run("data.epochs=1")
    (folder / "environment.json").write_bytes(before["environment.json"])
    assert everything(folder) == before


def test_a_run_directory_may_be_moved(run, tmp_path, tiny_file):
    folder = run("data.epochs=1")
    moved = tmp_path / "elsewhere" / "renamed"
    moved.parent.mkdir()
    folder.rename(moved)
    overrides = [f"run.dir={moved.parent}", "run.name=renamed", "data.epochs=1"]
    assert joint.train.main([str(tiny_file), *overrides]) == 0


@pytest.mark.parametrize("kind", ["adam", "adamw"])
def test_the_dense_optimizer_is_torch_s_own_from_the_first_step(configure, group, assemble, kind):
    """TorchRec makes the moments by a step of its own, which must not be counted nor decay a weight."""
    config = configure(f"optimizer.dense={{kind: {kind}, lr: 0.01, weight_decay: 0.1}}", "optimizer.warmup_steps=0")
    torch.manual_seed(config.run.seed)
    task = build_task(assemble.plan(config), group).train()
    dense = {name: p for name, p in task.named_parameters() if "embeddings" not in name}
    before = {name: p.detach().clone().requires_grad_() for name, p in dense.items()}
    optimizer = build_optimizer(task, config.optimizer)
    assert all(torch.equal(p, before[name]) for name, p in dense.items())
    reference = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[kind](before.values(), lr=0.01, weight_decay=0.1)
    batch = assemble(config)
    for step in range(2):
        set_step(task, step)
        set_learning_rates(optimizer, config.optimizer, step)
        optimizer.zero_grad()
        task(batch)[0].backward()
        for name, parameter in before.items():
            parameter.grad = None if dense[name].grad is None else dense[name].grad.clone()
        optimizer.step()
        reference.step()
        assert [n for n, p in dense.items() if not torch.equal(p, before[n])] == []


def test_the_rates_reach_the_fused_kernels_and_warm_up(configure, group, assemble):
    config = configure("optimizer={tables: {kind: sgd, lr: 0.4}, dense: {lr: 0.01}, warmup_steps: 4}")
    task = build_task(assemble.plan(config), group).train()
    optimizer, batch = build_optimizer(task, config.optimizer), assemble(config)
    table = next(p for name, p in task.named_parameters() if "user_id" in name)
    moved = []
    for step in (0, 3, 9):
        torch.manual_seed(0)
        set_step(task, 0)
        rates = set_learning_rates(optimizer, config.optimizer, step)
        optimizer.zero_grad()
        before = table.detach().clone()
        task(batch)[0].backward()
        moved.append((table.detach() - before).norm().item())
        with torch.no_grad():
            table.copy_(before)  # the same place, so the same gradient
    assert rates == {"optimizer/lr_tables": 0.4, "optimizer/lr_dense": 0.01}
    assert moved[0] > 0
    assert moved[1] / moved[0] == pytest.approx(4, rel=0.1)
    assert moved[2] / moved[1] == pytest.approx(1, rel=0.1)


def test_a_run_that_never_saved_may_be_started_again_with_another_config(run):
    """Say, with the lower learning rate that a loss which blew up asks for."""
    with pytest.raises(UserError, match="is not finite"):
        run("optimizer.dense.lr=1e30")
    directory = run("optimizer.dense.lr=0.002")
    assert "lr: 0.002" in (directory / "config.yaml").read_text()
    steps = [json.loads(line)["step"] for line in (directory / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(steps)
