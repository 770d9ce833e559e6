"""What a recommender answers, what it refuses, and that a changed export is found out."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import onnx
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from onnx import numpy_helper

from joint.schema import NEVER
from joint.serving import Recommender
from joint.serving.check import check
from joint.serving.diversity import Diversity, diversified
from joint.serving.errors import CheckError, ExportError, RequestError
from joint.serving.inputs import padded, request_inputs
from joint.serving.manifest import inside, version_folder
from joint.serving.words import Words

Asked = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def recommender(exported: Path) -> Recommender:
    return Recommender(exported)


def every_request(exported: Path) -> list[dict[str, Any]]:
    return json.loads((exported / "selfcheck/request.json").read_text())


# ---- answers


def test_the_served_order_is_that_of_brute_force(recommender: Recommender, exported: Path) -> None:
    """Retrieval by fused vectors = by weighed logits of every task and item, eligibility by hand."""
    items = recommender.items
    for request in every_request(exported):
        requests = recommender.read([request])
        inputs = request_inputs(recommender.reads["user_tower"], items.catalogue, requests)
        user = recommender.run("user_tower", inputs)
        logits = np.einsum("td,nd->nt", user["u"][0].astype(float), items.vectors["v"].astype(float))
        scores = logits @ ([0.5, 2.0] if request["group"] == 1 else [1.0, 0.5])
        names, first_day = items.names(np.arange(len(items))), items.first_day["shelf"]
        day = (np.datetime64(request["day"]) - np.datetime64("1970-01-01")).astype(int)
        free = [row for row, name in enumerate(names) if first_day[row] <= day and name not in request["bought"]]
        best = sorted(sorted(free, key=lambda r: -scores[r])[:12])
        rows, found = recommender.retrieve(user, requests, 12)
        assert rows.tolist() == best
        np.testing.assert_allclose(found, scores[best], atol=1e-5)


def test_one_row_is_that_row_of_many(recommender: Recommender, exported: Path) -> None:
    """Batches of 1, 3 and 256, padded to their own longest history, give the same vectors."""
    requests = every_request(exported)
    reads, catalogue = recommender.reads["user_tower"], recommender.items.catalogue

    def vectors(some: list[dict[str, Any]]) -> dict[str, np.ndarray]:
        return recommender.run("user_tower", request_inputs(reads, catalogue, recommender.read(some)))

    alone = [vectors([request]) for request in requests]
    for name in ("u", "pu"):
        whole = vectors(requests * 16)[name]
        assert len(whole) == 256
        np.testing.assert_allclose(whole[:16], np.concatenate([one[name] for one in alone]), atol=1e-5)
        np.testing.assert_allclose(vectors(requests[:3])[name], whole[:3], atol=1e-5)
    assert np.std(vectors(requests)["u"], axis=0).min() > 1e-3  # users differ, or nothing was shown


def test_ids_at_and_beyond_the_ends_of_a_table(recommender: Recommender, exported: Path) -> None:
    """Ids 0, V - 1, V and -1, of tables that have V rows: the last two are the unknown, as 0 is."""
    requests = recommender.read([every_request(exported)[2]] * 4)
    inputs = request_inputs(recommender.reads["user_tower"], recommender.items.catalogue, requests)
    for name in ("user_id", "city", "viewed.device"):
        rows = recommender.manifest.feature(name)["num_embeddings"]
        ids = np.array([0, rows - 1, rows, -1]).reshape(4, *[1] * (inputs[name].ndim - 1))
        found = recommender.run("user_tower", inputs | {name: np.broadcast_to(ids, inputs[name].shape).copy()})["u"]
        np.testing.assert_array_equal(found[2:], found[[0, 0]])
        assert np.abs(found[1] - found[0]).max() > 1e-4
        assert np.isfinite(found).all()


def test_no_past_and_unknown_words_are_answered(recommender: Recommender, asked: Asked) -> None:
    lists = {name: [] for name, value in asked().items() if isinstance(value, list) and name not in ("taste",)}
    empty = recommender.recommend(asked(**lists, user_id=None, city=None))
    unknown = recommender.recommend(asked(**lists, user_id=10**15, city="Atlantis"))
    assert len(empty.ids) == 10
    assert empty == unknown
    assert np.isfinite(empty.scores).all()
    assert recommender.recommend(asked(**lists, user_id=1007, city="Bonn")) != empty


def test_items_that_are_not_known_are_left_out_of_the_past(recommender: Recommender, asked: Asked) -> None:
    past = {"viewed": ["item 3", "item 4"], "viewed.device": [1, 2], "viewed.seconds": [0.5, 0.25]}
    past["viewed.competitors"] = [["item 1"], ["item 2", "item 5"]]
    more = {"viewed": ["item 3", "new", "item 4"], "viewed.device": [1, 3, 2], "viewed.seconds": [0.5, 9, 0.25]}
    more["viewed.competitors"] = [["item 1", "new"], ["item 6"], ["item 2", "item 5"]]
    assert recommender.recommend(asked(**more)) == recommender.recommend(asked(**past))


def test_only_the_newest_events_count(recommender: Recommender, asked: Asked) -> None:
    """The cross features read 7 events, all else fewer: of 8 the oldest says nothing."""
    names = [f"item {n}" for n in range(8)]
    eight = {"viewed": names, "viewed.device": [1] * 8, "viewed.seconds": [0.5] * 8, "viewed.competitors": [[]] * 8}
    seven = {name: value[1:] for name, value in eight.items()}
    one_other = eight | {"viewed": ["item 30", *names[1:]]}
    assert recommender.recommend(asked(**eight)) == recommender.recommend(asked(**seven))
    assert recommender.recommend(asked(**one_other)) == recommender.recommend(asked(**seven))
    six = {name: value[2:] for name, value in eight.items()}  # without item 1, which is recommended again
    again = [recommender.recommend(asked(**past), candidates=["item 1"]) for past in (six, seven)]
    assert again[0] != again[1]


def test_what_is_not_eligible_is_never_served(recommender: Recommender, exported: Path) -> None:
    first_day = recommender.items.first_day["shelf"]
    off_shelf = set(recommender.items.names(np.flatnonzero(first_day == NEVER)))
    later = set(recommender.items.names(np.flatnonzero(first_day == 19_783)))
    assert off_shelf
    assert later
    served_later = False
    for request in every_request(exported):
        today = recommender.recommend(request, 20).ids
        before = recommender.recommend({**request, "day": "2024-02-29"}, 20).ids
        assert not set(today) & (off_shelf | set(request["bought"]))
        assert not set(before) & later
        served_later |= bool(set(today) & later)
    assert served_later
    everything = Recommender(exported, pool="", quotas={"retrieval": 60, "pre_ranking": 60})
    found = everything.recommend({**every_request(exported)[0], "bought": []}, 60).ids
    assert set(found) == set(recommender.items.ids.to_pylist())


def test_where_nothing_is_left_the_list_is_empty(recommender: Recommender, asked: Asked) -> None:
    everything = recommender.items.ids.to_pylist()
    for answer in (
        recommender.recommend(asked(bought=everything)),
        recommender.recommend(asked(day="1969-12-31")),
        recommender.recommend(asked(), candidates=["nothing"], diversity=Diversity(weight=1.0)),
    ):
        assert answer.ids == []
        assert answer.scores == []
        assert set(answer.stages.values()) == {0}


def test_quotas_and_k(recommender: Recommender, asked: Asked) -> None:
    answer = recommender.recommend(asked(), 4)
    assert answer.stages == {"retrieval": 25, "pre_ranking": 15, "ranking": 4}
    assert recommender.recommend(asked(), 20).stages == {"retrieval": 25, "pre_ranking": 20, "ranking": 20}
    assert set(answer.milliseconds) == {"read", "user_tower", "retrieval", "pre_ranking", "ranking", "total"}
    with pytest.raises(RequestError, match="k: expected 1 to"):
        recommender.recommend(asked(), 0)


def test_a_group_may_have_weights_of_its_own(recommender: Recommender, asked: Asked) -> None:
    assert recommender.weights("retrieval", 1).tolist() == [0.5, 2.0]
    assert recommender.weights("pre_ranking", 1).tolist() == recommender.weights("pre_ranking", 0).tolist()
    assert recommender.weights("ranking", 0).tolist() == [1.0, 1.0]
    assert recommender.weights("ranking", 1).tolist() == [0.0, 1.0]
    assert recommender.recommend(asked(group=0)) == recommender.recommend(asked(group=2))
    assert recommender.recommend(asked(group=1)) != recommender.recommend(asked(group=0))


# ---- diversity


def test_diversity_by_hand() -> None:
    scores = np.array([1.0, 0.9, 0.8, 0.1])
    vectors = np.array([[1.0, 0], [2.0, 0], [0, 1.0], [0, 0]])
    assert diversified(scores, vectors, 3, weight=0.5, keep=0).tolist() == [0, 2, 1]  # .9 - .5 < .8
    assert diversified(scores, vectors, 3, weight=0.05, keep=0).tolist() == [0, 1, 2]
    assert diversified(scores, vectors, 3, weight=0.5, keep=2).tolist() == [0, 1, 2]
    assert diversified(scores, vectors, 4, weight=9, keep=1).tolist() == [0, 2, 3, 1]
    assert diversified(scores[:0], vectors[:0], 3, weight=1, keep=1).tolist() == []


def test_a_diverse_list_is_of_more_kinds() -> None:
    rng = np.random.default_rng(0)
    kind = rng.integers(0, 8, 200)
    vectors, scores = np.eye(8)[kind] + 0.1 * rng.standard_normal((200, 8)), rng.random(200) + (kind == 3)
    assert set(kind[diversified(scores, vectors, 8, weight=0.0, keep=0)]) == {3}
    assert set(kind[diversified(scores, vectors, 8, weight=5.0, keep=0)]) == set(range(8))


def test_no_weight_changes_nothing_and_much_does(recommender: Recommender, asked: Asked) -> None:
    plain = recommender.recommend(asked())
    assert recommender.recommend(asked(), diversity=Diversity(weight=0.0)) == plain
    assert recommender.recommend(asked(), diversity=Diversity(weight=50.0)).ids != plain.ids
    with pytest.raises(ValueError, match="must not be negative"):
        Diversity(weight=-1.0)


# ---- refusals, by name


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"agee": 1}, "agee: no such field; did you mean age?"),
        ({"viewed": "item 3"}, "viewed: expected a list"),
        ({"viewed": [3]}, "viewed: expected text, found 3"),
        ({"user_id": "1007"}, "user_id: expected an integer, found '1007'"),
        ({"user_id": True}, "user_id: expected an integer"),
        ({"user_id": 2**70}, "user_id: .* is no 64-bit integer"),
        ({"age": "old"}, "age: expected a number"),
        ({"age": float("nan")}, "age: expected a number"),
        ({"age": 1e300}, "age: expected a number that is finite as float32, found 1e[+]300"),
        ({"age": 10**400}, "age: expected a number"),
        ({"age": 3e38}, "user_tower: its answer is not finite"),
        ({"taste": [0.0, -1e39, 0.0]}, "taste: expected a number"),
        ({"taste": [1.0, 2.0]}, "taste: 2 numbers; expected 3"),
        ({"viewed.device": []}, "viewed.device: 0 values; its history has"),
        ({"viewed.device": [1.5]}, "viewed.device"),
        ({"bought": ["x"] * 10_001}, "bought: 10001 values; at most 10000"),
        ({"day": "1 March"}, "day: expected YYYY-MM-DD"),
        ({"group": "a"}, "group: expected an integer"),
    ],
)
def test_a_wrong_field_is_named(recommender: Recommender, asked: Asked, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        recommender.recommend(asked(**changes))


@pytest.mark.parametrize("k", ["3", 2.5, None, True, 0, -1, 100_001])
def test_k_is_a_number_of_items(recommender: Recommender, asked: Asked, k: Any) -> None:
    with pytest.raises(RequestError, match=r"^k: expected"):
        recommender.recommend(asked(), k)


@pytest.mark.parametrize(
    ("quotas", "message"),
    [
        ({"retreival": 3}, "no stage 'retreival'; expected retrieval, pre_ranking, ranking"),
        ({"retrieval": -1}, r"quotas\.retrieval: expected 1 to 100000, found -1"),
        ({"ranking": 2.5}, r"quotas\.ranking: expected an integer"),
    ],
)
def test_a_wrong_quota_is_named(exported: Path, quotas: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        Recommender(exported, quotas=quotas, verify=False)


def test_many_candidates_and_many_requests_at_once_are_taken(recommender: Recommender, asked: Asked) -> None:
    assert recommender.recommend(asked(), candidates=["item 3"] * 50_000).ids == ["item 3"]
    with pytest.raises(RequestError, match="candidates: 100001 values; at most 100000"):
        recommender.recommend(asked(), candidates=["item 3"] * 100_001)
    assert len(recommender.read([asked(bought=["item 3"] * 8_000)] * 2)) == 2


def test_a_missing_field_is_named(recommender: Recommender, asked: Asked) -> None:
    for name in recommender.read.fields:
        request = asked()
        del request[name]
        with pytest.raises(RequestError, match=f"^{name}: missing"):
            recommender.recommend(request)
    with pytest.raises(RequestError, match="expected an object"):
        recommender.recommend([1])  # type: ignore[arg-type]


def test_a_graph_refuses_other_inputs(recommender: Recommender, exported: Path) -> None:
    requests = recommender.read(every_request(exported)[:2])
    inputs = request_inputs(recommender.reads["user_tower"], recommender.items.catalogue, requests)
    with pytest.raises(RequestError, match="user_tower: inputs missing or unknown: age"):
        recommender.run("user_tower", {name: array for name, array in inputs.items() if name != "age"})
    with pytest.raises(RequestError, match="user_tower: input age is float64; expected float32"):
        recommender.run("user_tower", inputs | {"age": inputs["age"].astype(np.float64)})
    with pytest.raises(RequestError, match="user_tower: input user_id is int32; expected int64"):
        recommender.run("user_tower", inputs | {"user_id": inputs["user_id"].astype(np.int32)})


# ---- changed and mixed exports


def test_a_changed_file_is_refused(copied: Path) -> None:
    path = copied / "tables.bin"
    data = bytearray(path.read_bytes())
    data[4100] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(ExportError, match=r"tables\.bin: is not the file that was exported"):
        Recommender(copied)


def test_vectors_and_indices_of_another_model_are_refused(copied: Path, light: Path) -> None:
    for name in ("items.parquet", "index/pool.shelf.json"):
        before = (copied / name).read_bytes()
        shutil.copy(light / name, copied / name)
        with pytest.raises(ExportError, match="mixed versions"):
            Recommender(copied, verify=False)
        (copied / name).write_bytes(before)
    (copied / "index/pool.shelf.flat.faiss").unlink()
    with pytest.raises(ExportError, match="not found"):
        Recommender(copied)


@pytest.mark.parametrize("name", ["model", "vocabularies", "selfcheck"])
def test_a_manifest_without_a_part_is_refused(copied: Path, name: str) -> None:
    said = json.loads((copied / "manifest.json").read_text())
    (copied / "manifest.json").write_text(json.dumps({part: value for part, value in said.items() if part != name}))
    with pytest.raises(ExportError, match=f"{name}: missing or incomplete"):
        Recommender(copied)


def test_half_a_file_is_refused_though_no_hash_is_compared(copied: Path) -> None:
    names = ["items.parquet", "index/pool.shelf.json", "index/pool.shelf.flat.faiss", "vocabularies/city.parquet"]
    for name in [*names, "selfcheck/golden.npz", "selfcheck/request.json"]:
        whole = (copied / name).read_bytes()
        (copied / name).write_bytes(whole[: len(whole) // 2])
        with pytest.raises(ExportError, match=name):
            check(copied, verify=False)
        (copied / name).write_bytes(whole)


def test_no_export_no_such_pool_and_a_way_out_are_refused(copied: Path, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="no exported version"):
        version_folder(tmp_path / "nowhere")
    with pytest.raises(ExportError, match="no index for pool 'cellar'"):
        Recommender(copied, pool="cellar")
    with pytest.raises(ExportError, match="outside of the folder"):
        inside(copied, "../secret")
    said = json.loads((copied / "manifest.json").read_text())
    (copied / "manifest.json").write_text(json.dumps(said | {"format_version": 99}))
    with pytest.raises(ExportError, match="format joint-export 99"):
        Recommender(copied)


def change_a_weight(folder: Path) -> None:
    """1% more in one weight of an expert."""
    model = onnx.load(folder / "user_tower.onnx", load_external_data=False)
    tensor = next(i for i in model.graph.initializer if i.name.startswith("heads.retrieval") and len(i.dims) > 1)
    weight = numpy_helper.to_array(tensor).copy()
    weight[np.unravel_index(np.abs(weight).argmax(), weight.shape)] *= 1.01
    tensor.CopyFrom(numpy_helper.from_array(weight, tensor.name))
    onnx.save(model, folder / "user_tower.onnx")


def permute_the_index(folder: Path) -> None:
    path = str(folder / "index/pool.shelf.flat.faiss")
    index = faiss.read_index(path)
    vectors = index.reconstruct_n(0, index.ntotal)
    other = faiss.IndexFlatIP(index.d)
    other.add(np.roll(vectors, 1, axis=0))
    faiss.write_index(other, path)


def _rewritten(folder: Path, column: str, values: Callable[[pa.ChunkedArray], pa.Array]) -> None:
    path = folder / "items.parquet"
    table = pq.read_table(path)
    place = table.column_names.index(column)
    changed = table.set_column(place, column, values(table.column(column)))
    pq.write_table(changed.replace_schema_metadata(table.schema.metadata), path)


def shift_the_ids(folder: Path) -> None:
    _rewritten(folder, "item_id", lambda ids: pa.array(np.roll(np.array(ids.to_pylist(), object), 1)))


def reverse_pi(folder: Path) -> None:
    _rewritten(folder, "pi", lambda pi: pi.combine_chunks().take(pa.array(np.arange(len(pi))[::-1])))


@pytest.mark.parametrize("mutate", [change_a_weight, permute_the_index, shift_the_ids, reverse_pi])
def test_a_mutation_that_no_hash_guards_is_caught(copied: Path, mutate: Callable[[Path], None]) -> None:
    check(copied, verify=False)
    mutate(copied)
    with pytest.raises(ExportError):
        check(copied)
    with pytest.raises(CheckError, match="does not answer as the training forward did"):
        check(copied, verify=False)


# ---- small parts


def test_padded_by_hand() -> None:
    assert padded(np.array([1, 2, 3]), np.array([1, 0, 2])).tolist() == [[1, 0], [0, 0], [2, 3]]
    assert padded(np.zeros((0, 2)), np.array([0])).tolist() == [[[0.0, 0.0]]]


def test_words_of_every_kind() -> None:
    assert Words(pa.array([7, 3, 5])).places([3, 5, 9, None, np.int64(7)], "x").tolist() == [1, 2, -1, -1, 0]
    assert Words(pa.array(["b", "a"])).places(["a", "c", None], "x").tolist() == [1, -1, -1]
    assert Words(pa.array([1.5, 2.0])).places([2, 1.5, 3.0], "x").tolist() == [1, 0, -1]
    assert Words(pa.array([], pa.int64())).places([3], "x").tolist() == [-1]
    assert Words(pa.array([2**63 + 1, 5], pa.uint64())).places([5, 2**63 + 1, -1], "x").tolist() == [1, 0, -1]
    with pytest.raises(RequestError, match="x: expected a number, found 'a'"):
        Words(pa.array([1.5])).places(["a"], "x")
