"""A run to an answer: what is written, what is left out, and that it is what the training forward says."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest

from joint.errors import UserError
from joint.export import main as export_main
from joint.exporting.build import Choices, export_run
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
    program = WITHOUT + f"from joint.serve import main; code = main(['check', {str(exported)!r}])\n"
    program += "assert not {n for n, m in sys.modules.items() if m and n.startswith(('torch', 'towers', 'losses'))}\n"
    program += (
        f"code += main(['recommend', {str(exported)!r}, '--request', {str(exported / 'selfcheck/request.json')!r}])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program + "\nsys.exit(code)"], cwd=ROOT, capture_output=True, text=True
    )
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


def test_every_file_is_in_the_manifest(exported: Path) -> None:
    said = json.loads((exported / "manifest.json").read_text())
    there = {str(path.relative_to(exported)) for path in exported.rglob("*") if path.is_file()}
    assert set(said["files"]) == there - {"manifest.json"}
    assert said["metrics"]["retrieval/recall@5"] >= 0
    assert said["items"]["index"].keys() == {"", "shelf"}
    assert not [part for part in (exported / "user_tower.onnx",) if str(ROOT).encode() in part.read_bytes()]


def test_nothing_is_unpickled(exported: Path, asked, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("unpickled")

    for name in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(pickle, name, never)
    check(exported)
    assert Recommender(exported).recommend(asked()).ids


def test_a_second_export_is_the_next_version_and_equal(shop_run: Path, exported: Path) -> None:
    out = exported.parent
    assert export_main([str(shop_run), "--out", str(out), "--with-teacher"]) == 0
    assert (out / "2").is_dir()
    first, second = (json.loads((out / str(n) / "manifest.json").read_text()) for n in (1, 2))
    assert second["model"]["version"] == 2
    assert first["files"]["tables.bin"] == second["files"]["tables.bin"]
    assert first["model"]["model_hash"] == second["model"]["model_hash"]
    assert Recommender(out).version == "shop/2"
    assert serve_main(["check", str(out)]) == 0


def test_mistakes_leave_nothing(shop_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="no config.yaml"):
        export_run(tmp_path, tmp_path / "out", Choices())
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="--heads: 'ranking'"):
        export_main([str(shop_run), "--out", str(tmp_path / "out"), "--heads", "ranking"])

    def wrong(*_: object) -> None:
        raise UserError("not as trained")

    monkeypatch.setattr("joint.exporting.build.check", wrong)
    with pytest.raises(UserError, match="not as trained"):
        export_run(shop_run, tmp_path / "out", Choices(heads=("pre_ranking",)))
    assert list((tmp_path / "out").iterdir()) == []


def test_one_head_alone_orders_given_candidates(shop_run: Path, tmp_path: Path, asked) -> None:
    folder, found = export_run(shop_run, tmp_path, Choices(heads=("pre_ranking",)))
    assert found["overlap"] == 1.0
    recommender = Recommender(folder)
    request = {name: value for name, value in asked().items() if name in (*recommender.read.fields, "day")}
    answer = recommender.recommend(request, 3, candidates=["item 5", "item 9", "item 11", "item 12", "nothing"])
    assert len(answer.ids) == 3
    assert set(answer.ids) < {"item 5", "item 9", "item 11", "item 12"}
    assert answer.scores == sorted(answer.scores, reverse=True)
    assert np.isfinite(answer.scores).all()
    with pytest.raises(UserError, match="no retrieval head"):
        recommender.recommend(request)
