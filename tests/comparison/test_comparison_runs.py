"""Runs of a comparison: what is started, what is reused, what a crash and an interrupt cost, and what is said."""

from __future__ import annotations

import fcntl
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import joint
from joint import compare
from joint.commands import run_command
from joint.comparison import folders, runs
from joint.comparison.ablation import read_ablation
from joint.comparison.comparison import of_ablation, of_runs
from joint.comparison.folders import code_version, keep_code, read_json
from joint.errors import UserError

SIX = ["snr/seed-0", "snr/seed-1", "sdcl/seed-0", "sdcl/seed-1", "sdcl_random/seed-0", "sdcl_random/seed-1"]
TUNE = "\ntune: {trials: 3, over: {optimizer.dense.lr: [0.001, 0.1], objectives.distill.weight: [0.1, 10]}}"


def run(path: Path, *overrides: str, **options: object):
    return of_ablation(read_ablation(path, overrides), **({"jobs": 1} | options))


def states(comparison) -> dict[str, str]:
    return {str(result.path).removeprefix("runs/ablation/"): result.state for result in comparison.results}


def test_every_variant_and_seed_is_run_once_and_then_reused(ablation, trainer, started, capsys):
    first = run(ablation)
    assert started() == SIX
    assert set(states(first).values()) == {"finished"}
    out = capsys.readouterr().out
    assert "6 runs, 0 of them finished before" in out
    assert "[4/6] sdcl, seed 1 → runs/ablation/sdcl/seed-1" in out
    assert "[4/6] sdcl, seed 1: funnel/ranking/recall@5 0.3212 (0:00:0" in out
    assert "training sdcl/seed-1" in Path("runs/ablation/sdcl/seed-1/output.log").read_text()
    again = run(ablation)
    assert started() == []
    assert [result.metrics for result in again.results] == [result.metrics for result in first.results]


def test_a_run_folder_is_an_ordinary_one(ablation, trainer):
    run(ablation)
    path = Path("runs/ablation/sdcl_random/seed-1")
    config, _ = folders.RunDirectory(path).load_config()
    assert config.objectives["negatives"].weight == 0.5
    notes = read_json(path / "compare.json")
    assert notes["code"] == "c0de"
    assert notes["dataset"] == read_json(path / "environment.json")["dataset"]
    assert 0 < notes["seconds"] < 30


def test_more_seeds_only_run_what_is_new(ablation, trainer, started):
    run(ablation)
    started()
    run(ablation, "seeds=3", jobs=3)
    assert sorted(started()) == ["sdcl/seed-2", "sdcl_random/seed-2", "snr/seed-2"]


def test_another_config_goes_to_another_folder_and_nothing_is_lost(ablation, trainer, started, capsys):
    run(ablation)
    before = Path("runs/ablation/sdcl/seed-0/eval.json").read_text()
    started()
    capsys.readouterr()
    changed = run(ablation, "objectives.negatives.weight=2.0")
    # The placebo sets its weight itself, and snr has no such objective.
    assert started() == ["sdcl/seed-0.2", "sdcl/seed-1.2"]
    assert "(runs/ablation/sdcl/seed-0 is kept: objectives.negatives.weight: 1.0 != 2.0)" in capsys.readouterr().out
    assert Path("runs/ablation/sdcl/seed-0/eval.json").read_text() == before
    assert set(states(changed).values()) == {"finished"}
    run(ablation, "objectives.negatives.weight=2.0")
    run(ablation)
    assert started() == []


@pytest.mark.parametrize("what", ["code", "dataset"])
def test_other_code_or_data_is_not_reused(ablation, trainer, started, monkeypatch, dataset_path, tmp_path, what):
    run(ablation)
    started()
    if what == "code":
        monkeypatch.setattr(runs, "keep_code", lambda folder: ("0ther", folder))
        expected = "seed-0.2"
    else:
        schema = json.loads((dataset_path / "dataset.json").read_text())
        copy = tmp_path / "copy"
        copy.mkdir()
        for file in dataset_path.iterdir():
            (copy / file.name).symlink_to(file)
        run(ablation, f"data.path={copy}")  # the same data elsewhere is the same
        assert started() == []
        (copy / "dataset.json").unlink()
        (copy / "dataset.json").write_text(json.dumps(schema | {"hash": "0ther"}))
        expected = "seed-0.2"
    run(ablation, *([f"data.path={copy}"] if what == "dataset" else []))
    found = started()
    assert len(found) == 6
    assert found[0] == f"snr/{expected}"


def test_a_folder_of_somebody_else_is_left_alone(ablation, trainer, started):
    Path("runs/ablation/snr/seed-0").mkdir(parents=True)
    Path("runs/ablation/snr/seed-0/config.yaml").write_text("mine")
    run(ablation, only=["snr"])
    assert started() == ["snr/seed-0.2", "snr/seed-1"]
    assert Path("runs/ablation/snr/seed-0/config.yaml").read_text() == "mine"


def test_a_crash_costs_its_run_alone_and_the_same_command_tries_again(ablation, trainer, started, capsys):
    trainer({"sdcl/seed-0": "fail"})
    found = run(ablation)
    assert started() == SIX
    assert states(found) == {path: "failed" if path == "sdcl/seed-0" else "finished" for path in SIX}
    failed = next(result for result in found.results if result.state == "failed")
    assert failed.note == "exit code 1: the loss of teacher is not finite"
    assert "[3/6] sdcl, seed 0: FAILED, exit code 1: the loss of teacher is not finite; all it said is in" in (
        capsys.readouterr().out
    )
    trainer({})
    assert set(states(run(ablation)).values()) == {"finished"}
    assert started() == ["sdcl/seed-0"]


def test_an_interrupt_loses_nothing_but_the_run_in_hand_which_is_asked_to_save(ablation, trainer, started, capsys):
    trainer({"sdcl/seed-0": "slow"})
    seen: list[str] = []

    def impatient(seconds: float, wait: Callable[[float], None] = time.sleep) -> None:
        wait(seconds)
        if not seen and Path("runs/ablation/sdcl/seed-0/train.log").exists():
            seen.append(runs.live(folders.RunDirectory(Path("runs/ablation/sdcl/seed-0")), "funnel/x"))
            wait(0.3)  # until the stand-in takes signals
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs.time, "sleep", impatient)
        with pytest.raises(KeyboardInterrupt):
            run(ablation)
    assert seen == ["step 7, loss/teacher 0.5000"]
    assert Path("runs/ablation/sdcl/seed-0/saved").exists()
    assert started() == SIX[:3]
    assert "the same command resumes them" in capsys.readouterr().out
    standing = run(ablation, run=False)
    assert list(states(standing).values()) == ["finished", "finished", "unfinished", "missing", "missing", "missing"]
    trainer({})
    assert set(states(run(ablation)).values()) == {"finished"}
    assert started() == SIX[2:]


def test_an_interrupt_of_a_run_whose_notes_are_gone_still_ends_in_order(ablation, trainer, capsys):
    trainer({"snr/seed-0": "slow"})
    folder = Path("runs/ablation/snr/seed-0")

    def impatient(seconds: float, wait: Callable[[float], None] = time.sleep) -> None:
        wait(seconds)
        if (folder / "train.log").exists() and (folder / "compare.json").exists():
            wait(0.3)  # until the stand-in takes signals
            (folder / "compare.json").unlink()
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs.time, "sleep", impatient)
        with pytest.raises(KeyboardInterrupt):
            run(ablation)
    assert (folder / "saved").exists()
    assert read_json(folder / "compare.json")["seconds"] > 0


def test_a_run_that_another_comparison_has_in_hand_is_left_to_it(ablation, trainer, started, capsys):
    folder = Path("runs/ablation/snr/seed-0")
    folder.mkdir(parents=True)
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        found = run(ablation)
    assert started() == SIX[1:]
    assert "[1/6] snr, seed 0: another process has it in hand; left to it" in capsys.readouterr().out
    assert found.results[0].state == "missing"
    run(ablation)
    assert started() == SIX[:1]


def test_two_jobs_run_at_a_time(ablation, trainer, started, monkeypatch):
    trainer(dict.fromkeys(SIX, "pause"))
    at_once: list[int] = []
    live = runs.Progress.live
    monkeypatch.setattr(
        runs.Progress, "live", lambda self, active, *rest: (at_once.append(len(active)), live(self, active, *rest))[1]
    )
    found = run(ablation, jobs=2)
    assert max(at_once) == 2
    assert sorted(started()) == sorted(SIX)
    assert [str(result.path).removeprefix("runs/ablation/") for result in found.results] == SIX


def test_only_runs_what_is_named_and_takes_the_rest_as_it_is(ablation, trainer, started):
    run(ablation, only=["snr"])
    assert started() == SIX[:2]
    found = run(ablation, only=["sdcl"])
    assert started() == SIX[2:4]
    assert list(states(found).values()) == ["finished"] * 4 + ["missing"] * 2
    assert found.left_out == ("snr", "sdcl_random")
    with pytest.raises(UserError, match="--only sdlc: no such variant; did you mean sdcl"):
        run(ablation, only=["sdlc"])


def test_worlds_have_folders_of_their_own(ablation, trainer, started, worlds):
    ablation.write_text(ablation.read_text() + "\nworlds: worlds/*")
    found = run(ablation, only=["snr"])
    assert started() == ["snr/seed-0/seed-0", "snr/seed-0/seed-1", "snr/seed-1/seed-0", "snr/seed-1/seed-1"]
    assert {(r.world, r.environment["dataset"]) for r in found.results if r.variant == "snr"} == {
        ("seed-0", "hash0"),
        ("seed-1", "hash1"),
    }


def test_the_code_version_is_of_what_training_imports(tmp_path, monkeypatch):
    for name, text in {
        "joint/__init__.py": "",
        "joint/train.py": "def main() -> None:\n    from joint.data import loader\n    import losses.term",
        "joint/data/__init__.py": "",
        "joint/data/loader.py": "import json",
        "losses/__init__.py": "",
        "losses/term.py": "x = 1",
        "joint/compare.py": "import joint.train",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(joint, "__file__", str(tmp_path / "joint/__init__.py"))
    before = code_version()
    (tmp_path / "joint/compare.py").write_text("import joint.train, json")
    assert code_version() == before
    for name in ("losses/term.py", "joint/data/loader.py", "joint/data/__init__.py"):
        (tmp_path / name).write_text("y = 22")
        after = code_version()
        assert after != before
        before = after


def test_runs_are_made_with_a_copy_of_the_source(tmp_path, monkeypatch):
    root = tmp_path / "source"
    for package in ("joint", "losses", "towers"):
        (root / package).mkdir(parents=True)
        (root / package / "__init__.py").write_text("")
    (root / "joint/train.py").write_text("print('the copy')")
    monkeypatch.setattr(joint, "__file__", str(root / "joint/__init__.py"))
    code, copy = keep_code(tmp_path)
    assert (code, copy) == (code_version(), tmp_path / ".code" / code)
    (root / "joint/train.py").write_text("print('edited since')")
    environment = {"PYTHONPATH": str(copy)}
    said = subprocess.run(
        runs.command(Path("x")), cwd=root, env=environment, capture_output=True, text=True, check=True
    )
    assert said.stdout == "the copy\n"
    assert keep_code(tmp_path)[0] != code
    assert sorted(path.name for path in tmp_path.iterdir()) == [".code", "source"]


# Tuning


def test_tuned_variants_are_run_with_the_best_trial_and_as_written(ablation, trainer, started):
    ablation.write_text(ablation.read_text() + TUNE)
    found = run(ablation)
    tune = read_ablation(ablation).ablation.tune
    assert tune
    lrs = {trial: tune.draw(trial).get("optimizer.dense.lr", 0.001) for trial in range(4)}
    nearest = min(lrs, key=lambda trial: abs(math.log(lrs[trial] / 0.02)))
    assert {name: tuning.best for name, tuning in found.tuning.items()} == dict.fromkeys(found.variants, nearest)
    assert [len(tuning.trials) for tuning in found.tuning.values()] == [4, 4, 4]
    assert found.tuning["snr"].skipped == ["objectives.distill.weight"]
    assert len(started()) == 3 * 4 + 6 + 6
    assert {str(result.path.parent.name) for result in found.results} == {"tuned"}
    assert [str(result.path).removeprefix("runs/ablation/") for result in found.untuned] == SIX
    config, _ = folders.RunDirectory(found.results[-1].path).load_config()
    assert config.optimizer.dense.lr == lrs[nearest]
    run(ablation)
    assert started() == []


def test_where_the_variant_as_written_is_best_it_is_not_run_twice(ablation, trainer, started):
    ablation.write_text(ablation.read_text() + TUNE)
    found = run(ablation, "optimizer.dense.lr=0.02")
    assert {tuning.best for tuning in found.tuning.values()} == {0}
    assert found.results == found.untuned
    assert len(started()) == 3 * 4 + 6


def test_a_trial_that_fails_is_not_chosen_and_one_that_is_missing_stops_the_choice(ablation, trainer, started):
    ablation.write_text(ablation.read_text() + TUNE)
    best = run(ablation, only=["snr"]).tuning["snr"].best
    trainer({f"sdcl/tune/trial-{best}": "fail"})
    found = run(ablation, only=["sdcl"])
    assert found.tuning["sdcl"].best not in (best, None)
    assert found.tuning["sdcl_random"].best is None
    last = found.results[-1]
    assert (last.variant, last.state, last.note) == ("sdcl_random", "missing", "no trial of its tuning is chosen yet")


# Runs at hand, and the command


def test_runs_at_hand_are_grouped_by_config(ablation, trainer):
    run(ablation)
    paths = [Path("runs/ablation") / path for path in SIX]
    found = of_runs(paths, folder=Path("out"))
    assert found.variants == ("snr", "sdcl", "sdcl_random")
    assert (found.baseline, found.primary) == ("snr", "funnel/ranking/recall@5")
    assert [(r.variant, r.seed) for r in found.results] == [(v, s) for v in found.variants for s in (0, 1)]
    assert [line.split(":")[0] for line in found.differs["sdcl_random"]] == [
        "objectives.distill",
        "objectives.negatives",
    ]
    with pytest.raises(UserError, match="snr/seed-0: given twice"):
        of_runs([paths[0], paths[0]], folder=Path("out"))
    with pytest.raises(UserError, match="not a run directory"):
        of_runs([paths[0], Path("runs")], folder=Path("out"))


def test_runs_on_different_data_are_refused_unless_told(ablation, trainer, worlds, capsys):
    ablation.write_text(ablation.read_text() + "\nworlds: worlds/*")
    run(ablation)
    paths = [f"runs/ablation/{variant}/{world}/seed-0" for variant in ("snr", "sdcl") for world in worlds]
    assert run_command(lambda: compare.main(paths)) == 2
    said = (
        "no difference means anything (--any-data): runs/ablation/snr/seed-0/seed-0 of hash0, runs/ablation/snr/seed-1"
    )
    assert said in capsys.readouterr().err
    assert run_command(lambda: compare.main([*paths, "--any-data", "--out", "out"])) == 0
    assert "2 worlds" in capsys.readouterr().out
    assert Path("out/report.md").is_file()


def test_the_command_writes_a_report_and_its_exit_code_tells_of_failures(ablation, trainer, capsys):
    assert run_command(lambda: compare.main(["ablation.yaml", "--jobs", "2"])) == 0
    out = capsys.readouterr().out
    assert "sdcl helps: it beats the baseline and its placebo sdcl_random" in out
    assert out.endswith("runs/ablation/report.md has the tables and pictures\n")
    folder = Path("runs/ablation")
    assert (folder / "figures/funnel-ranking-recall-5.png").stat().st_size > 10_000
    assert (folder / "report.csv").read_text().startswith("variant,world,seed,metric,value\n")
    trainer({"snr/seed-2": "fail"})
    assert run_command(lambda: compare.main(["ablation.yaml", "--seeds", "3"])) == 1
    assert "1 of 9 runs have no result" in capsys.readouterr().out
    assert run_command(lambda: compare.main(["ablation.yaml", "--seeds", "3", "--report-only"])) == 1


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["runs"], "expected two or more run directories and nothing else, or one ablation file"),
        (["ablation.yaml", "tiny.yaml"], "expected one ablation file, or two or more run directories"),
        (["nowhere.yaml"], "nowhere.yaml: cannot be read: No such file or directory"),
        (["ablation.yaml", "seeds=x"], "seeds=x (command line): seeds: expected an integer, found 'x'"),
    ],
)
def test_what_the_command_was_given_is_checked_first(ablation, trainer, started, capsys, arguments, says):
    Path("runs").mkdir(exist_ok=True)
    assert run_command(lambda: compare.main(arguments)) == 2
    assert capsys.readouterr().err == says + "\n"
    assert started() == []


def test_without_the_extra_it_says_what_to_install_before_anything_runs(
    ablation, trainer, started, capsys, monkeypatch
):
    monkeypatch.setattr(compare, "find_spec", lambda name: None if name == "scipy" else object())
    assert run_command(lambda: compare.main(["ablation.yaml"])) == 2
    assert capsys.readouterr().err == "a report needs scipy: pip install scipy (or .[report])\n"
    assert started() == []


def test_sigterm_ends_a_comparison_like_an_interrupt(ablation, trainer):
    trainer({"snr/seed-0": "slow"})
    program = (
        "import sys; from joint import compare; from joint.commands import run_command as run;"
        "from joint.comparison import runs;"
        "runs.command = lambda config: [sys.executable, 'fake.py', str(config)];"
        "raise SystemExit(run(lambda: compare.main(['ablation.yaml'])))"
    )
    root = Path(joint.__file__).parents[1]
    process = subprocess.Popen([sys.executable, "-c", program], env=os.environ | {"PYTHONPATH": str(root)})
    while not Path("runs/ablation/snr/seed-0/train.log").exists():
        assert process.poll() is None
        time.sleep(0.1)
    time.sleep(0.3)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 130
    assert Path("runs/ablation/snr/seed-0/saved").exists()
    assert read_json(Path("runs/ablation/snr/seed-0/compare.json"))["seconds"] > 0


@pytest.mark.slow
def test_the_real_trainer_on_two_variants_and_two_seeds(ablation, monkeypatch):
    root = Path(joint.__file__).parents[1]
    monkeypatch.setenv("PYTHONPATH", str(root))
    arguments = ["ablation.yaml", "--jobs", "2", "variants.sdcl_random=null", "data.epochs=1"]
    assert run_command(lambda: compare.main(arguments)) == 0
    path = Path("runs/ablation/sdcl/seed-1")
    written = (path / "eval.json").stat().st_mtime_ns
    assert (path / "checkpoints").is_dir()
    report = Path("runs/ablation/report.md").read_text()
    assert "| snr | 2 |" in report
    assert "| sdcl | 2 |" in report
    assert "objectives.negatives" in report
    (path / "eval.json").unlink()  # as if it had been stopped before it measured
    assert run_command(lambda: compare.main(arguments)) == 0
    assert "resuming after step" in (path / "train.log").read_text()
    assert (path / "eval.json").stat().st_mtime_ns > written
