"""`joint.train --check`: what is wrong all at once, what is right on one page, and nothing on disk."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path

import pytest
from torch.distributed.checkpoint import FileSystemReader

import joint.train
from joint import first_steps
from joint.check import _data_lines
from joint.commands import run_command
from joint.data.assemble import Assembler
from joint.data.loader import Loader
from joint.features import Plan
from joint.fit import MOST_SAID, load_fitting
from joint.plan import rows_by_rank

UNTAUGHT = "warning: no gradient reaches task fine of the retrieval head"


@pytest.fixture
def check(tiny_file, capsys):
    """`check('key=value', …)`: exit code, output and errors of --check."""

    def run(*arguments: str) -> tuple[int, str, str]:
        code = run_command(lambda: joint.train.main([str(tiny_file), "--check", *arguments]))
        return code, *capsys.readouterr()

    return run


def files(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_a_page_says_what_the_run_would_be_and_nothing_is_written(check, tmp_path):
    before = files(tmp_path)
    code, out, err = check()
    assert (code, err) == (0, "")
    assert files(tmp_path) == before
    assert len(out.splitlines()) < 50
    assert re.search(r"^requests +user_id, gender$", out, re.M)
    assert re.search(r"^not read +age, .*year", out, re.M)
    assert re.search(r"^labels +like is rating from 4 on, fine is rating from 3 on$", out, re.M)
    # 63 rows of 8 floats and one of Adagrad each
    assert re.search(r"^item_id +63 +8 +2\.27 kB +rank 0$", out, re.M)
    assert re.search(
        r"^one real batch, forward and backward: 16 requests, [\d,]+ candidates, 61 items of the pool$", out, re.M
    )
    for name, loss in (("teacher", "binary"), ("distill", "distillation"), ("retrieve", "multi_class")):
        assert float(re.search(rf"^{name} +{loss} .* (\d+\.\d{{4}})$", out, re.M)[1]) > 0
    norms = re.search(r"^gradients +(.*)$", out, re.M)[1]
    assert re.match(r"retrieval [\d.e-]+, pre_ranking [\d.e-]+, ranking [\d.e-]+, encoder ", norms)
    assert re.search(r"an epoch of 126 requests,\s+\S+ for all 16 steps", out)
    # Its retrieval learns one task of two.
    assert [line for line in out.splitlines() if line.startswith("warning")] == [UNTAUGHT]
    assert out.endswith(f"nothing was written; joint.train begins {tmp_path}/runs/tiny\n")


def test_a_run_that_is_there_stays_as_it_is_and_its_checkpoint_is_of_the_size_that_was_said(check, tiny_file, tmp_path):
    short = "data.epochs=1"
    assert joint.train.main([str(tiny_file), short]) == 0
    before = files(tmp_path)
    _, out, _ = check(short)
    assert out.endswith(f"joint.train goes on in {tmp_path}/runs/tiny, from step-00000008\n")
    _, other, _ = check(short, "optimizer.dense.lr=0.5")
    assert "warning: joint.train would be refused: " in other
    assert "optimizer.dense.lr: 0.01 != 0.5" in other
    assert files(tmp_path) == before
    said = float(re.search(r"^disk +([\d.]+) kB a checkpoint", out, re.M)[1]) * 1000
    saved = tmp_path / "runs/tiny/checkpoints/step-00000008"
    tensors = len(FileSystemReader(saved).read_metadata().state_dict_metadata)
    written = sum(path.stat().st_size for path in saved.glob("*.distcp"))
    assert 0 < written - said < 2000 * tensors  # each has a name and padding beside its numbers


def test_mistakes_of_every_kind_are_said_at_once(check, tmp_path):
    wrong = [
        "objectives.teacher.wieght=2",
        "train.log_every=ten",
        "tasks.like.label=ratings",
        "heads.ranking.features=[user_id, price, item_id]",
        "evaluation.quotas={retrieval: 20, pre_rankin: 8}",
        "encoders.rated_sequence.by.heads=3",
        "tables.nothing={dim: 4}",
    ]
    code, out, err = check(*wrong)
    assert (code, out) == (2, "")
    assert len(err.splitlines()) == len(wrong)
    for override in wrong:
        assert f": {override.partition('=')[0]}: " in err
    assert "unknown key; did you mean weight?" in err
    assert "no label 'ratings'; did you mean rating?" in err
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(("after", "all_days"), [(1e-5, True), (1e6, False)])
def test_a_label_that_matures_late_says_on_how_many_days_it_is_known(tiny_file, after, all_days):
    config, dataset = load_fitting(tiny_file, [f"tasks.fine.matures_after={after}"])
    days = len(dataset.schema.days(config.data.train))
    loader = Loader(Assembler(Plan(config, dataset.schema), dataset), rank=0, world_size=1)
    page = " ".join("\n".join(_data_lines(loader.assembler.plan, loader)).split())
    known = f"known on {days if all_days else 0} of {days} days"
    assert f"like is rating from 4 on, fine is rating from 3 on ({known})" in page


def test_no_more_than_a_screen_of_mistakes_and_where_the_rest_are(check):
    wrong = [f"objectives.o{n}={{head: ranking, loss: binary, space: [exposed], tasks: [no]}}" for n in range(12)]
    code, _, err = check(*wrong)
    lines = err.splitlines()
    assert code == 2
    assert len(lines) == MOST_SAID
    assert lines[-1].startswith("… and 3 more, at objectives.o9=")
    lines = check(*wrong[:MOST_SAID])[2].splitlines()
    assert len(lines) == MOST_SAID
    assert "no task 'no'" in lines[-1]


@pytest.mark.parametrize("command", ["train", "config", "plan", "evaluate"])
def test_overrides_are_not_said_to_be_required(command, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", [command])
    with pytest.raises(SystemExit):
        importlib.import_module(f"joint.{command}").main()
    assert "key=value" not in capsys.readouterr().err.split("required: ")[1]


def test_a_dataset_that_is_not_there_hides_no_other_mistake(check):
    code, _, err = check("data.path=nowhere", "tasks.like.at_last=3")
    assert code == 2
    first, second = err.splitlines()
    assert first.startswith("data.path=nowhere (command line): data.path: nowhere/dataset.json: not found")
    assert second.endswith("tasks.like.at_last: unknown key; did you mean at_least?")


def test_what_no_gradient_reaches_is_a_warning(check):
    code, out, _ = check("objectives.teacher=null", "objectives.student.positive_weight=1")
    assert code == 0
    warned = [line for line in out.splitlines() if line.startswith("warning: ")]
    assert "warning: no gradient reaches the ranking head" in warned
    assert "warning: no gradient reaches encoder rated_attention" in warned
    assert not any("pre_ranking" in line for line in warned)


@pytest.mark.parametrize(
    ("batch", "shards", "mean", "why"),
    [
        (100, 2, "63.0", "not 100: a day of 126 ends with what is left; lower data.requests_per_batch"),
        # Eight row groups: of seven shards one has two, and makes it 16 batches.
        (14, 7, "7.9", "not 14: a day's row groups go to 7 shards, some run out early; lower data.shards"),
    ],
)
def test_batches_that_are_thinner_than_asked_for_are_a_warning(check, batch, shards, mean, why):
    _, out, _ = check(f"data.requests_per_batch={batch}", f"data.shards={shards}", "data.epochs=1")
    assert f"\nbatch      {batch} requests ({mean} on average), exposed all, random 6\n" in out
    warned = [line for line in out.splitlines() if line.startswith(f"warning: {mean}")]
    assert warned == [f"warning: {mean} requests a batch on average, {why}"]


def test_a_task_that_nothing_teaches_is_named(check):
    _, out, _ = check("objectives.teacher.tasks=[like]")
    assert [line for line in out.splitlines() if line.startswith("warning: ")] == [
        "warning: no gradient reaches task fine of the ranking head",
        UNTAUGHT,
    ]


def test_an_objective_without_anything_to_learn_from_is_a_warning(check):
    _, out, _ = check("tasks.fine.at_least=100", "objectives.negatives.tasks=[fine]")
    assert "warning: objective negatives is exactly 0: has the batch anything that it is about?" in out


def test_a_loss_that_blows_up_in_the_first_steps_is_one_line_below_the_page(check):
    code, out, err = check("optimizer.dense.lr=1e30")
    assert (code, err.count("\n")) == (2, 1)
    assert "is not finite; a lower learning rate may mend it" in err
    assert "the config is sound" in out


def test_tables_on_other_numbers_of_ranks(check):
    code, out, _ = check("--world-size", "2")
    assert code == 0
    assert re.search(r"^item_id +63 +8 +2\.27 kB +32 rows each$", out, re.M)
    held = re.search(r"^rank 0 holds ([\d.]+) kB; rank 1 holds ([\d.]+) kB$", out, re.M)
    assert held
    code, _, err = check("--world-size", "3")
    assert (code, err) == (2, "data.shards: 2 is not a multiple of the number of ranks, 3\n")
    with pytest.raises(SystemExit):
        check("--world-size", "0")


@pytest.mark.parametrize("sharding", ["row_wise", "planner"])
def test_the_rows_of_a_table_are_all_of_them_on_any_number_of_ranks(tiny_file, sharding):
    config, dataset = load_fitting(tiny_file, [f"tables.item_id.sharding={sharding}"])
    plan = Plan(config, dataset.schema)
    for ranks in (1, 2, 4):
        held = rows_by_rank(plan, device="cpu", ranks=ranks)
        assert {name: sum(rows) for name, rows in held.items()} == {table.name: table.rows for table in plan.tables}
        assert {len(rows) for rows in held.values()} == {ranks}


def test_what_a_run_to_go_on_from_must_be_is_checked_too(check, tmp_path):
    code, _, err = check("--continue", str(tmp_path / "nowhere"))
    assert (code, err) == (2, f"{tmp_path}/nowhere: not a run directory (no config.yaml in it)\n")


def test_one_step_is_enough_for_a_pace(tiny_file, check, monkeypatch):
    monkeypatch.setattr(first_steps, "SECONDS", -1.0)  # stopped after the first step
    code, out, _ = check()
    assert code == 0
    assert re.search(r"^time +[\d,]+ requests/s on 1 rank", out, re.M)
