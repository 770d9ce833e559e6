"""A run to an answer: what is written, what is left out, and that it is what the training forward says."""

from __future__ import annotations

import json
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from joint.errors import UserError
from joint.evaluating.finished_run import open_model
from joint.export import main as export_main
from joint.exporting.build import Choices, export_run
from joint.exporting.golden import as_json, training_answers
from joint.serve import main as serve_main
from joint.serving import Recommender
from joint.serving.check import check

ROOT = Path(__file__).parents[2]
WITHOUT = "import sys; sys.modules.update(dict.fromkeys(['torch', 'torchrec', 'omegaconf', 'onnx']))\n"


def graphs(folder: Path) -> dict[str, onnx.ModelProto]:
    return {path.stem: onnx.load(path, load_external_data=False) for path in folder.glob("*.onnx")}


def test_the_training_forward_is_answered(exported: Path) -> None:
    found = check(exported)
    assert found.pop("overlap") == 1.0
    assert set(found) == {"u", "v", "item_tower", "retrieval", "pre_ranking", "ranking", "answer"}
    assert max(found.values()) < 1e-5


def test_it_is_checked_where_torch_cannot_be_imported(exported: Path) -> None:
    request = exported / "selfcheck/request.json"
    program = (
        f"{WITHOUT}from joint.serve import main; code = main(['check', {str(exported)!r}])\n"
        "assert not {n for n, m in sys.modules.items() if m and n.startswith(('torch', 'towers', 'losses'))}\n"
        f"sys.exit(code + main(['recommend', {str(exported)!r}, '--request', {str(request)!r}]))"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "ok" in done.stdout
    assert len(json.loads(done.stdout[done.stdout.index("{") :])["ids"]) == 10


def test_without_faiss_numpy_retrieves_the_same(exported: Path) -> None:
    program = "import sys; sys.modules['faiss'] = None\n"
    program += f"from joint.serving.check import check; assert check({str(exported)!r})['retrieval'] < 1e-5"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_teacher_is_absent_unless_asked_for(light: Path, exported: Path) -> None:
    said = json.loads((light / "manifest.json").read_text())
    assert set(graphs(light)) == {"user_tower", "item_tower", "prerank_head"}
    names = {i.name for graph in graphs(light).values() for i in graph.graph.initializer}
    assert not [name for name in names if "ranking" in name.replace("pre_ranking", "")]
    assert not [name for name in names if "attended" in name or "task_gates" in name]
    assert not {"bought.item_id", "again", "since"} & {f["name"] for f in said["features"]}
    assert said["crosses"] == {}
    assert set(said["fusion"]) == {"retrieval", "pre_ranking"}
    assert "ranking" in graphs(exported)


def test_no_graph_loops(exported: Path, light: Path) -> None:
    for folder in (exported, light):
        kinds = {node.op_type for graph in graphs(folder).values() for node in graph.graph.node}
        assert kinds
        assert not [kind for kind in kinds if kind.startswith(("Loop", "Sequence", "Scan", "If"))]


def test_tables_are_shared_and_whole(exported: Path) -> None:
    said = json.loads((exported / "manifest.json").read_text())
    assert {part["name"] for part in said["tables"]} == {"user_id", "city", "item_id", "tags", "device"}
    assert all(part["offset"] % 4096 == 0 for part in said["tables"])
    for graph in graphs(exported).values():
        inline = {i.name for i in graph.graph.initializer if i.name.startswith("lookup.") and not i.external_data}
        assert inline == set()
    assert {part["name"]: part["shape"][0] for part in said["tables"]}["user_id"] == 20


def test_eight_bits_are_checked_by_their_own_measure(light: Path) -> None:
    found = check(light)
    assert 1e-5 < found["u"] < 5e-2
    assert json.loads((light / "manifest.json").read_text())["selfcheck"]["tolerance"] == 5e-2


def test_half_precision_is_checked_by_its_own_measure(shop_run: Path, tmp_path: Path) -> None:
    folder, found = export_run(shop_run, tmp_path, Choices(precision="fp16"))
    assert 0 < found["u"] < 5e-3
    assert {part["dtype"] for part in json.loads((folder / "manifest.json").read_text())["tables"]} == {"float16"}


def test_logged_requests_of_the_test_split_are_answered_as_in_training(exported: Path, shop_run: Path) -> None:
    recommender = Recommender(exported)
    said, items = recommender.manifest.json, recommender.items
    with open_model(shop_run, []) as opened:
        evaluator = opened.evaluator
        dataset = evaluator.assembler.dataset
        requests = dataset.read_split("test")
        requests = requests.take(np.flatnonzero(requests.scalars("day") == requests.scalars("day").max()))
        expected = training_answers(evaluator, requests, said["heads"], said["quotas"])
    told = as_json(requests, said, dataset.schema, items.ids, dataset.vocabularies())
    assert len(told) == 24
    assert {request["group"] for request in told} == {0, 1}
    for place, request in enumerate(told):
        answer = recommender.recommend(request, 10)
        assert answer.ids == items.names(expected[f"final.{place}"])
        np.testing.assert_allclose(answer.scores, expected[f"scores.{place}"], rtol=1e-4, atol=1e-5)


def test_every_file_is_in_the_manifest(exported: Path) -> None:
    said = json.loads((exported / "manifest.json").read_text())
    there = {str(path.relative_to(exported)) for path in exported.rglob("*") if path.is_file()}
    assert set(said["files"]) == there - {"manifest.json"}
    assert said["metrics"]["retrieval/recall@5"] >= 0
    assert said["items"]["index"].keys() == {"", "shelf"}
    assert not [part for part in (exported / "user_tower.onnx",) if str(ROOT).encode() in part.read_bytes()]


def test_nothing_is_unpickled(
    exported: Path, asked: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("unpickled")

    for name in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(pickle, name, never)
    check(exported)
    assert Recommender(exported).recommend(asked()).ids


def test_mistakes_leave_nothing(shop_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="not a run directory"):
        export_run(tmp_path, tmp_path / "out", Choices())
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="--heads: 'ranking'"):
        export_main([str(shop_run), "--out", str(tmp_path / "out"), "--heads", "ranking"])
    with pytest.raises(UserError, match="--out: missing"):
        export_main([str(shop_run)])

    def half(_: object, folder: Path, __: int) -> None:
        (folder / "manifest.json").write_text("{")

    monkeypatch.setattr("joint.exporting.build.write_version", half)
    with pytest.raises(UserError, match="no manifest"):  # its own check finds what is wrong
        export_run(shop_run, tmp_path / "out", Choices())
    assert list((tmp_path / "out").iterdir()) == []


def test_one_head_alone_orders_given_candidates_and_is_the_next_version(
    shop_run: Path,
    exported: Path,
    asked: Callable[..., dict[str, Any]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = exported.parent
    assert export_main([str(shop_run), "--out", str(out), "--heads", "pre_ranking"]) == 0
    assert capsys.readouterr().out.endswith("  without the ranking head (--with-teacher adds it)\n")
    assert serve_main(["check", str(out)]) == 0
    recommender = Recommender(out)
    assert recommender.version == "shop/2"
    request = {name: value for name, value in asked().items() if name in (*recommender.read.fields, "day")}
    candidates = recommender.items.names(recommender.items.of_pool("shelf")[:9])
    answer = recommender.recommend(request, 3, candidates=[*candidates, "nothing"])
    assert len(answer.ids) == 3
    assert set(answer.ids) < set(candidates) - set(request["bought"])
    assert answer.scores == sorted(answer.scores, reverse=True)
    assert np.isfinite(answer.scores).all()
    with pytest.raises(UserError, match="no retrieval head"):
        recommender.recommend(request)
    shutil.rmtree(out / "2")
