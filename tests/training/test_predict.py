"""What `joint.predict` writes, against the model itself; and a run taught by it, against one with that teacher."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

import joint.predict
from joint.config import load_config
from joint.data.assemble import Assembler, logged
from joint.data.dataset import Dataset
from joint.data.loader import Loader
from joint.data.movielens import prepare_movielens
from joint.data.order import Position
from joint.data.predictions import open_predictions
from joint.data.ragged import Ragged
from joint.data.sampling import unlabelled
from joint.errors import CheckpointError, ConfigError, DataError, UserError
from joint.evaluating.evaluator import Evaluator
from joint.evaluating.finished_run import open_model
from joint.experiment import HEADS, Distillation
from joint.features import Plan
from joint.fit import data_hash, predictions_of
from joint.objectives import compute
from joint.predicting.writing import predict
from joint.run import RunDirectory
from joint.train import main

ITEMS = 61
LOGGED = [
    "objectives.distill.teacher=logged",
    "tasks.like.score=ranking.like",
    "tasks.fine.score=ranking.fine",
]


def write(run: Path, data: Path, out: Path, *, splits=(), heads=(), k=10) -> Path:
    predict(run, data, out, splits=splits, heads=heads, k=k)
    return out


def read(path: Path) -> pa.Table:
    return pq.ParquetFile(path).read()


@pytest.fixture(scope="module")
def made(tiny_text, tiny_data, tmp_path_factory) -> Path:
    """A folder with `tiny.yaml`, its finished run `runs/tiny`, and `out`, what that run predicts."""
    folder = tmp_path_factory.mktemp("predict")
    (folder / "tiny.yaml").write_text(tiny_text(folder / "runs"))
    assert main([str(folder / "tiny.yaml"), "data.epochs=1"]) == 0
    write(folder / "runs" / "tiny", tiny_data, folder / "out")
    return folder


def test_the_logits_are_those_of_the_model_request_by_request(made, tiny_data):
    """A file for each of the dataset's, in its order and row groups; each request scored alone says the same."""
    with open_model(made / "runs" / "tiny", []) as (_, evaluator, *_):
        dataset = evaluator.assembler.dataset
        assert {part.split for part in dataset.schema.parts} == {"train", "valid", "test"}
        for part in dataset.schema.parts:
            requests, file = dataset.read(part), pq.ParquetFile(made / "out" / "scores" / part.path)
            assert [file.metadata.row_group(g).num_rows for g in range(file.num_row_groups)] == list(part.groups)
            table = file.read()
            assert table["request_id"].to_pylist() == requests.scalars("request_id").tolist()
            for row in range(0, len(requests), 9):
                one = requests.take(np.array([row]))
                with torch.no_grad():
                    _, outputs = evaluator.run(one, logged(one, dataset), HEADS)
                for head in HEADS:
                    for index, task in enumerate(("like", "fine")):
                        found = table[f"{head}.{task}"][row].as_py()
                        assert found == pytest.approx(outputs[head].logits[:, index].tolist(), rel=1e-4, abs=1e-5)


def test_the_lists_are_the_best_eligible_items_by_brute_force(made, tiny_data):
    with open_model(made / "runs" / "tiny", []) as (_, evaluator, *_):
        dataset = evaluator.assembler.dataset
        requests = dataset.read_split("test")
        words = read(tiny_data / "vocabularies" / "item_id.parquet")["value"].to_pylist()
        people = read(tiny_data / "vocabularies" / "user_id.parquet")["value"].to_pylist()
        part = next(part for part in dataset.schema.parts if part.split == "test")
        rows = read(made / "out" / "top" / part.path).to_pylist()
        assert [row["head"] for row in rows] == ["retrieval", "funnel"] * len(requests)
        for number in range(len(requests)):
            one = requests.take(np.array([number]))
            everything = unlabelled(Ragged(np.arange(ITEMS), np.array([0, ITEMS])), dataset.schema.labels)
            with torch.no_grad():
                batch, outputs = evaluator.run(one, everything, HEADS)
            group = batch.group[batch.row]
            score = {head: evaluator.fused(head, outputs[head].logits, group).numpy() for head in HEADS}
            kept = np.flatnonzero(evaluator.eligibility.mask(one)[0])
            lists = {"retrieval": kept[np.argsort(-score["retrieval"][kept])][:10]}
            for head, quota in evaluator.config.evaluation.quotas.items():
                kept = kept[np.argsort(-score[head][kept])][:quota]
            lists["funnel"] = kept
            for name, head in (("retrieval", "retrieval"), ("funnel", "ranking")):
                row = rows[2 * number + (name == "funnel")]
                assert row["request_id"] == one.scalars("request_id")[0]
                assert row["user_id"] == people[one.scalars("user_id")[0] - 1]
                assert row["items"] == lists[name].tolist()
                assert row["ids"] == [words[item] for item in lists[name]]
                assert row["scores"] == pytest.approx(score[head][lists[name]].tolist(), rel=1e-4, abs=1e-5)


def test_the_description_says_by_what_and_of_what(made, tiny_data):
    said = json.loads((made / "out" / "predict.json").read_text())
    assert said["dataset"] == Dataset(tiny_data).schema.hash
    assert said["columns"] == [f"{head}.{task}" for head in HEADS for task in ("like", "fine")]
    assert (said["splits"], said["lists"], said["k"], said["ids"]) == (
        ["train", "valid", "test"], ["retrieval", "funnel"], 10, "item_id",
    )  # fmt: skip
    assert (said["step"], said["run"]) == (8, str(made / "runs" / "tiny"))
    assert "torchrec" in said["versions"]


def test_a_part_of_it_can_be_asked_for(made, tiny_data, tmp_path):
    out = write(made / "runs" / "tiny", tiny_data, tmp_path / "some", splits=["valid"], heads=["ranking"], k=5)
    files = [path.relative_to(out).parts[0] for path in out.rglob("*.parquet")]
    assert files == ["scores"]  # without retrieval there is nothing to list
    part = next(part for part in Dataset(tiny_data).schema.parts if part.split == "valid")
    table = read(out / "scores" / part.path)
    assert table.column_names == ["request_id", "ranking.like", "ranking.fine"]
    whole = read(made / "out" / "scores" / part.path)
    assert all(table[name].equals(whole[name]) for name in table.column_names)


def batch_and_outputs(made: Path, *overrides: str):
    """A training batch with sampled candidates, and what the finished run's heads say of all of it."""
    config, _ = load_config(made / "tiny.yaml", overrides)
    dataset = Dataset(config.data.path, predictions=predictions_of(config.data))
    plan = Plan(config, dataset.schema)
    assembler = Assembler(plan, dataset)
    return config, assembler, next(iter(Loader(assembler, rank=0, world_size=1)._batches(Position())))


def test_learning_from_predictions_is_learning_from_that_frozen_teacher(made):
    """The same loss and gradient by value, wherever a candidate was logged; sampled ones have no logged score."""
    _, _, batch = batch_and_outputs(made, *LOGGED, f"data.scores={made / 'out'}")
    random = batch.stages == 1
    assert random.any()
    assert torch.equal(batch.scores.isnan().all(1), random)
    with open_model(made / "runs" / "tiny", []) as (_, evaluator, *_):
        requests = evaluator.assembler.dataset.read_split("train")
        order = np.argsort(requests.scalars("request_id"))
        rows = order[np.searchsorted(requests.scalars("request_id")[order], batch.request_id.numpy())]
        candidates = unlabelled(Ragged(batch.item.numpy(), batch.offsets.numpy()), ("rating",))
        with torch.no_grad():
            _, outputs = evaluator.run(requests.take(rows), candidates, HEADS)
    student = outputs["pre_ranking"].logits
    found = {}
    for teacher in ("ranking", "logged"):
        outputs["pre_ranking"].logits = student.clone().requires_grad_()
        objective = Distillation(head="pre_ranking", space=("exposed",), teacher=teacher, temperature=2.0)
        term = compute(objective, outputs, batch, ("like", "fine"))
        term.total.sum().backward()
        found[teacher] = (*term, outputs["pre_ranking"].logits.grad)
    assert float(found["logged"][1].sum()) > 0
    torch.testing.assert_close(found["logged"], found["ranking"], rtol=1e-4, atol=1e-6)
    everything = Distillation(head="pre_ranking", space=("exposed", "random"), teacher="logged", temperature=2.0)
    torch.testing.assert_close(tuple(compute(everything, outputs, batch, ("like", "fine"))), found["logged"][:2])


def test_a_run_that_learns_offline_goes_on_as_if_never_stopped(made, tmp_path, flat, monkeypatch):
    scores = f"data.scores={made / 'out'}"
    common = [
        str(made / "tiny.yaml"),
        *LOGGED,
        scores,
        f"run.dir={tmp_path}",
        "data.epochs=1",
        "train.checkpoint_every=3",
    ]
    assert main([*common, "run.name=whole"]) == 0
    shutil.copytree(tmp_path / "whole", tmp_path / "stopped")
    for step in (6, 8):
        shutil.rmtree(tmp_path / "stopped" / "checkpoints" / f"step-{step:08}")
    assert main([*common, "run.name=stopped"]) == 0
    whole, stopped = (flat(tmp_path / name / "checkpoints") for name in ("whole", "stopped"))
    assert whole.keys() == stopped.keys()
    assert all(torch.equal(whole[name], stopped[name]) for name in whole)
    assert (
        RunDirectory(tmp_path / "whole").read_environment()["scores"]
        == json.loads((made / "out/predict.json").read_text())["hash"]
    )
    # A finished run is measured without what taught it; but it does not go on with other scores.
    moved = shutil.copytree(made / "out", tmp_path / "other")
    said = json.loads((moved / "predict.json").read_text())
    (moved / "predict.json").write_text(json.dumps(said | {"hash": "another"}))
    config = (tmp_path / "stopped" / "config.yaml").read_text()
    (tmp_path / "stopped" / "config.yaml").write_text(config.replace(str(made / "out"), str(moved)))
    with pytest.raises(CheckpointError, match="begun with scores of hash"):
        main([*common[:-3], f"data.scores={moved}", *common[-3:], "run.name=stopped"])
    shutil.rmtree(moved)
    with open_model(tmp_path / "stopped", []) as opened:
        assert opened.step == 8


def test_the_name_of_the_dataset_stands_in_the_path_of_its_scores(made, tiny_data, tmp_path):
    for name in ("one", "two"):
        shutil.copytree(tiny_data, tmp_path / "worlds" / name)
        shutil.copytree(made / "out", tmp_path / "teachers" / name)
    pattern = f"data.scores={tmp_path}/teachers/{{dataset}}"
    for name in ("one", "two"):
        config, _ = load_config(made / "tiny.yaml", [*LOGGED, pattern, f"data.path={tmp_path}/worlds/{name}"])
        found = predictions_of(config.data)
        assert found is not None
        assert found.directory == tmp_path / "teachers" / name
        assert data_hash(config.data) == f"{Dataset(tiny_data).schema.hash}+{found.hash}"


def test_what_is_asked_of_predict_in_vain(made, tiny_data, tmp_path, monkeypatch, capsys):
    run = made / "runs" / "tiny"
    for wrong, message in [
        ({"out": made / "out"}, "exists already"),
        ({"heads": ["rankng"]}, "--heads rankng: expected a head of"),
        ({"k": -1}, "--k -1: expected 0 or more"),
        ({"run": tmp_path}, "not a run directory"),
        ({"data": tmp_path}, "expected a prepared dataset"),
    ]:
        asked = {"run": run, "data": tiny_data, "out": tmp_path / "none"} | wrong
        with pytest.raises(UserError, match=message):
            write(**asked)
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(sys, "argv", ["joint.predict", str(run), str(tiny_data), str(tmp_path / "out"), "--k", "0"])
    assert joint.predict.main() == 0
    assert not (tmp_path / "out" / "top").exists()
    assert "requests of" in capsys.readouterr().out


def test_a_failure_leaves_nothing(made, tiny_data, tmp_path):
    broken = shutil.copytree(tiny_data, tmp_path / "data")
    last = broken / Dataset(tiny_data).schema.parts[-1].path
    text = bytearray(last.read_bytes())
    text[50:400] = bytes(350)
    last.write_bytes(text)
    with pytest.raises(UserError):
        write(made / "runs" / "tiny", broken, tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"data"}


def test_a_run_that_has_diverged_predicts_nothing(made, tiny_data, tmp_path, monkeypatch):
    run = Evaluator.run

    def diverged(*arguments, **more):
        batch, outputs = run(*arguments, **more)
        if len(batch.item):
            outputs["ranking"].logits[0, 1] = torch.nan
        return batch, outputs

    monkeypatch.setattr(Evaluator, "run", diverged)
    with pytest.raises(CheckpointError, match=r"ranking\.fine: the model says NaN"):
        write(made / "runs" / "tiny", tiny_data, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_another_dataset_has_to_have_what_the_run_reads(made, tiny_data, tmp_path):
    log = tiny_data.parent / "log"
    prepare_movielens(log, tmp_path / "other", run=3, seed=1, overwrite=False)
    out = write(made / "runs" / "tiny", tmp_path / "other", tmp_path / "out", splits=["test"])
    part = next(part for part in Dataset(tmp_path / "other").schema.parts if part.split == "test")
    assert read(out / "scores" / part.path).num_rows == part.rows
    description = tmp_path / "other" / "dataset.json"
    said = json.loads(description.read_text())
    for change, message in [
        ({"features": [f for f in said["features"] if f["name"] != "gender"]}, "has no feature gender"),
        ({"histories": [h for h in said["histories"] if h["name"] != "liked"]}, "has no history liked"),
        ({"features": [f | {"space": "sex"} if f["name"] == "gender" else f for f in said["features"]]}, "gender is"),
    ]:
        description.write_text(json.dumps(said | change))
        with pytest.raises(UserError, match=message):
            write(made / "runs" / "tiny", tmp_path / "other", tmp_path / "again")
        assert not (tmp_path / "again").exists()


@pytest.fixture
def training(made, tmp_path) -> Callable[..., str]:
    """`training(change)`: what training from predictions says once `change(folder)` was made to a copy of them."""

    def said(change: Callable[[Path], object], *overrides: str) -> str:
        folder = shutil.copytree(made / "out", tmp_path / "scores")
        change(folder)
        command = [str(made / "tiny.yaml"), *LOGGED, f"data.scores={folder}", f"run.dir={tmp_path}", *overrides]
        with pytest.raises(UserError) as caught:
            main(command)
        shutil.rmtree(folder)
        assert len(str(caught.value).splitlines()) == 1
        return str(caught.value)

    return said


def describe(**changes: object) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        said = json.loads((folder / "predict.json").read_text())
        (folder / "predict.json").write_text(json.dumps(said | changes))

    return change


def rewrite(change: Callable[[pa.Table], pa.Table]) -> Callable[[Path], object]:
    """Change the scores of all requests, in the row groups that they have."""

    def rewritten(folder: Path) -> None:
        for path in (folder / "scores").rglob("*.parquet"):
            group = pq.ParquetFile(path).metadata.row_group(0).num_rows
            pq.write_table(change(read(path)), path, row_group_size=group)

    return rewritten


def test_scores_that_do_not_fit_are_refused(training):
    assert "predict.json: not found; expected what joint.predict" in training(lambda f: (f / "predict.json").unlink())
    assert "not a description of predictions" in training(lambda f: (f / "predict.json").write_text("{}"))
    assert "format version 9" in training(describe(version=9))
    assert "of a dataset of hash other; that of" in training(describe(dataset="other"))
    assert "expected train too (data.train)" in training(describe(splits=["test"]))
    assert "no score column 'ranking.like'" in training(describe(columns=["ranking.fine"]))
    assert "cannot be read" in training(lambda f: shutil.rmtree(f / "scores"))
    assert "is not of the requests of" in training(rewrite(lambda t: t.take(list(range(t.num_rows))[::-1])))

    def infinite(table: pa.Table) -> pa.Table:
        column = table["ranking.like"].combine_chunks()
        values = pa.array(np.full(len(column.values), np.inf, np.float32))
        at = table.schema.get_field_index("ranking.like")
        return table.set_column(at, "ranking.like", pa.ListArray.from_arrays(column.offsets, values))

    assert "has an infinite score" in training(rewrite(infinite))


def test_what_a_config_may_not_say_of_a_logged_teacher(made):
    def said(*overrides: str) -> str:
        with pytest.raises(ConfigError) as caught:
            load_config(made / "tiny.yaml", overrides)
        return str(caught.value)

    assert "tasks.fine: score: missing" in said(*LOGGED[:2])
    load_config(made / "tiny.yaml", [*LOGGED[:2], "objectives.distill.tasks=[like]"])
    load_config(made / "tiny.yaml", [*LOGGED, "objectives.distill.shuffle=true"])
    assert "holds sampled candidates only" in said(*LOGGED, "objectives.distill.space=[random]")
    assert "did you mean logged?" in said("objectives.distill.teacher=loged")


def test_predictions_open_where_they_fit(made, tiny_data):
    found = open_predictions(made / "out", tiny_data, ["train", "test"])
    assert found.columns[0] == "retrieval.like"
    with pytest.raises(DataError):
        open_predictions(made, tiny_data, ["train"])
