"""The dataset on disk: what is written is read back, and whatever is wrong with its files is said in one line."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from joint.data.dataset import Dataset, DatasetWriter, write_part
from joint.data.ragged import Ragged
from joint.data.requests import Requests
from joint.data.vocabulary import ragged_vocabulary_ids, vocabulary_ids
from joint.errors import DataError
from joint.schema import Schema, read_schema

TRAIN = "requests/day=2024-02-28/part-train-0.parquet"


@pytest.fixture
def copy(funnel_path: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(funnel_path, tmp_path / "copy"))


def test_large_files_have_large_row_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("joint.data.dataset.LARGE", 2500)
    for count, groups in ((2499, [19] * 131 + [10]), (2500, [1024, 1024, 452])):
        requests = Requests({"request_id": np.arange(count), "timestamp": np.zeros(count, np.int64)})
        assert [*write_part(tmp_path, requests, day="2024-01-01", split="train", number=count).groups] == groups


def test_schema_and_requests_are_read_back(funnel_path: Path) -> None:
    dataset = Dataset(funnel_path)
    assert dataset.schema == read_schema(funnel_path)
    assert [(p.day, p.split, p.rows, max(p.groups)) for p in dataset.schema.parts] == [
        ("2024-02-28", "train", 150, 16),
        ("2024-02-28", "valid", 5, 5),
        ("2024-02-29", "train", 7, 7),
        ("2024-02-29", "valid", 5, 5),
        ("2024-03-01", "train", 90, 16),
        ("2024-03-01", "valid", 5, 5),
    ]
    assert {split: dataset.schema.requests(split) for split in ("train", "valid", "test")} == {
        "train": 247,
        "valid": 15,
        "test": 0,
    }
    train = dataset.read_split("train")
    assert train.scalars("timestamp").tolist() == [*range(150), *range(1000, 1007), *range(2000, 2090)]
    assert list(dataset.parts(["valid", "train"])) == ["2024-02-28", "2024-02-29", "2024-03-01"]
    # Row groups of a part, in any choice.
    part = dataset.schema.parts[0]
    chosen = dataset.read(part, [2, 0])
    assert sorted(chosen.scalars("request_id").tolist()) == [*range(16), *range(32, 48)]


def test_feature_and_history_by_name(funnel_path: Path) -> None:
    schema = read_schema(funnel_path)
    assert (schema.feature("seen_on").space, schema.feature("words").space) == ("device", "words")
    assert schema.history("watched").events == ("seen_on",)
    for find in (schema.feature, schema.history):
        with pytest.raises(KeyError):
            find("nothing")


def test_nothing_in_the_wanted_splits(funnel_path: Path) -> None:
    with pytest.raises(DataError, match="no request in split test; nothing to do"):
        Dataset(funnel_path).parts(["test"])


def edit_json(path: Path, change: Callable[[dict], object]) -> None:
    raw = json.loads((path / "dataset.json").read_text())
    change(raw)
    (path / "dataset.json").write_text(json.dumps(raw))


def truncate(path: Path, kept: float = 0.5) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * kept)])


def rewrite(path: Path, change: Callable[[pa.Table], pa.Table], **options: int) -> None:
    table = pq.ParquetFile(path).read()
    pq.write_table(change(table), path, **options)


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "no folder": (shutil.rmtree, r"copy/dataset\.json: not found; expected a prepared dataset"),
    "no description": (lambda d: (d / "dataset.json").unlink(), r"dataset\.json: not found"),
    "not json": (lambda d: (d / "dataset.json").write_text("{"), r"dataset\.json: not a dataset description"),
    "not text": (lambda d: (d / "dataset.json").write_bytes(b"\xff\xfe\x00"), "not a dataset description"),
    "a list": (lambda d: (d / "dataset.json").write_text("[1]"), "not a dataset description"),
    "no version": (lambda d: edit_json(d, lambda j: j.pop("version")), r"not a dataset description.*version"),
    "other version": (
        lambda d: edit_json(d, lambda j: j.update(version=99)),
        r"dataset\.json: format version 99; this program reads 2: prepare it again",
    ),
    "key missing": (lambda d: edit_json(d, lambda j: j.pop("parts")), r"not a dataset description.*parts"),
    "key unknown": (lambda d: edit_json(d, lambda j: j.update(extra=1)), r"not a dataset description.*extra"),
    "parts no list": (lambda d: edit_json(d, lambda j: j.update(parts=7)), "not a dataset description"),
    "items missing": (lambda d: (d / "items.parquet").unlink(), r"items\.parquet: not found, though dataset\.json"),
    "items truncated": (lambda d: truncate(d / "items.parquet"), r"items\.parquet: not a whole Parquet file"),
    "items empty": (lambda d: truncate(d / "items.parquet", 0), r"items\.parquet: not a whole Parquet file"),
    "fewer items": (
        lambda d: rewrite(d / "items.parquet", lambda t: t.slice(3)),
        r"items\.parquet: 47 items; dataset\.json says 50",
    ),
    "item column missing": (
        lambda d: rewrite(d / "items.parquet", lambda t: t.drop_columns("words")),
        r"items\.parquet: no column words; found: first_day, item_id, price",
    ),
    "part missing": (lambda d: (d / TRAIN).unlink(), r"part-train-0\.parquet: not found"),
    "part truncated": (lambda d: truncate(d / TRAIN), r"part-train-0\.parquet: not a whole Parquet file"),
    "part of text": (lambda d: (d / TRAIN).write_text("hello"), r"part-train-0\.parquet: not a whole Parquet file"),
    "other row count": (
        lambda d: rewrite(d / TRAIN, lambda t: t.slice(0, 100), row_group_size=16),
        r"part-train-0\.parquet: requests: 100 in 7 row groups; dataset\.json says 150 in 10 row groups",
    ),
    "other row groups": (lambda d: rewrite(d / TRAIN, lambda t: t), "150 in 1 row groups; dataset"),
    "columns missing": (
        lambda d: rewrite(d / TRAIN, lambda t: t.drop_columns(["click", "watched.seen_on"]), row_group_size=16),
        r"part-train-0\.parquet: no column watched\.seen_on, click; found: request_id, ",
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_opening_a_damaged_dataset(name: str, copy: Path) -> None:
    damage, message = DAMAGE[name]
    damage(copy)
    with pytest.raises(DataError, match=message) as caught:
        Dataset(copy)
    assert len(str(caught.value).splitlines()) == 1
    assert str(copy) in str(caught.value)


def test_a_part_torn_after_it_was_opened(copy: Path) -> None:
    dataset = Dataset(copy)
    content = bytearray((copy / TRAIN).read_bytes())
    content[4:2000] = bytes(1996)  # the footer is whole, the pages are not
    (copy / TRAIN).write_bytes(content)
    with pytest.raises(DataError, match=r"part-train-0\.parquet: row groups \[0\] cannot be read"):
        dataset.read(dataset.schema.parts[0], [0])


def some_requests(count: int = 3) -> Requests:
    lists = Ragged(np.arange(count), np.arange(count + 1))
    return Requests({"request_id": np.arange(count), "timestamp": np.arange(count) + 60, "candidates": lists})


def empty_schema() -> Schema:
    return Schema(name="x", items=1, features=(), histories=(), labels=(), stages=(), input_space={})


@pytest.mark.parametrize("odd", [np.nan, np.inf, -np.inf])
def test_a_label_that_is_no_number_is_named(odd: float, copy: Path) -> None:
    """Null says that a feedback was not observed; NaN in the file says that something went wrong before us."""
    schema = read_schema(copy)
    label, part = schema.labels[0], schema.parts[0]
    table = pq.read_table(copy / part.path, partitioning=None)
    lists = table.column(label).combine_chunks()
    values = lists.flatten().to_pylist()
    row = next(r for r in range(3, len(lists)) if len(lists[r]))
    values[lists.offsets[row].as_py()] = None
    changed = pa.ListArray.from_arrays(lists.offsets, pa.array(values, pa.float32()))
    place = table.column_names.index(label)
    pq.write_table(table.set_column(place, label, changed), copy / part.path, row_group_size=part.groups[0])
    Dataset(copy).read(part)
    row = next(r for r in range(row + 1, len(lists)) if len(lists[r]))
    values[lists.offsets[row].as_py()] = odd
    changed = pa.ListArray.from_arrays(lists.offsets, pa.array(values, pa.float32()))
    pq.write_table(table.set_column(place, label, changed), copy / part.path, row_group_size=part.groups[0])
    with pytest.raises(DataError, match=rf"{part.path}: column {label}, row {row}: {odd}; expected numbers, or null"):
        Dataset(copy).read(part)


def test_files_of_one_day_and_split_are_numbered(tmp_path: Path) -> None:
    with DatasetWriter(tmp_path / "out") as writer:
        for count, day, split in ((40, "2024-01-01", "train"), (3, "2024-01-01", "train"), (0, "2024-01-01", "test")):
            writer.add(some_requests(count), day=day, split=split)
        schema = writer.finish(empty_schema())
    assert [(part.path, part.groups, part.begin, part.end) for part in schema.parts] == [
        ("requests/day=2024-01-01/part-train-0.parquet", (16, 16, 8), 60, 99),
        ("requests/day=2024-01-01/part-train-1.parquet", (3,), 60, 62),
    ]
    assert all((tmp_path / "out" / part.path).is_file() for part in schema.parts)


def test_the_hash_is_of_the_content(tmp_path: Path) -> None:
    hashes = []
    for name, count in (("a", 3), ("b", 3), ("c", 4)):
        with DatasetWriter(tmp_path / name) as writer:
            writer.add(some_requests(count), day="2024-01-01", split="train")
            hashes.append(writer.finish(empty_schema()).hash)
    assert hashes[0] == hashes[1] != hashes[2]
    assert len(hashes[0]) == 16


def test_a_failure_leaves_nothing(tmp_path: Path) -> None:
    ragged = Requests({"request_id": np.arange(2), "candidates": some_requests(3).lists("candidates")})
    with DatasetWriter(tmp_path / "out") as writer, pytest.raises(pa.ArrowInvalid):
        writer.add(ragged, day="2024-01-01", split="train")
    assert list(tmp_path.iterdir()) == []


def test_overwriting(tmp_path: Path) -> None:
    def write(count: int, *, overwrite: bool) -> None:
        with DatasetWriter(tmp_path / "out", overwrite=overwrite) as writer:
            writer.add(some_requests(count), day=f"2024-01-0{count}", split="train")
            writer.finish(empty_schema())

    write(3, overwrite=True)
    with pytest.raises(DataError, match=r"out: exists already; choose another folder or say --overwrite"):
        write(4, overwrite=False)
    with pytest.raises(RuntimeError), DatasetWriter(tmp_path / "out", overwrite=True):
        raise RuntimeError  # the old one is still there
    assert [part.day for part in read_schema(tmp_path / "out").parts] == ["2024-01-03"]
    write(4, overwrite=True)
    assert [path.name for path in (tmp_path / "out" / "requests").iterdir()] == ["day=2024-01-04"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_is_no_dataset_is_never_overwritten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1").write_text("all of it")
    (tmp_path / "file").write_text("")
    for name in ("thesis", "file"):
        with pytest.raises(DataError, match=f"{name}: is not a dataset, and will not be overwritten"):
            DatasetWriter(tmp_path / name, overwrite=True)
    with pytest.raises(DataError, match="file/out: cannot be made"), DatasetWriter(tmp_path / "file" / "out"):
        pass
    monkeypatch.chdir(tmp_path / "thesis")
    with pytest.raises(DataError, match=r"\.: exists already"):
        DatasetWriter(".")
    assert (tmp_path / "thesis" / "chapter1").read_text() == "all of it"


def test_leftovers_of_a_killed_run_do_no_harm(tmp_path: Path) -> None:
    (tmp_path / ".out.unfinished" / "requests").mkdir(parents=True)
    (tmp_path / ".out.unfinished" / "requests" / "old").write_text("")
    with DatasetWriter(tmp_path / "out") as writer:
        writer.finish(empty_schema())
    assert [path.name for path in (tmp_path / "out").rglob("*")] == ["dataset.json"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_vocabulary_ids() -> None:
    ids, words = vocabulary_ids(pd.Series(["b", None, "a", "b", "c"]))
    assert (ids.tolist(), words) == ([2, 0, 1, 2, 3], ["a", "b", "c"])
    ids, words = vocabulary_ids(pd.Series([7, 3, 7]))
    assert (ids.tolist(), words) == ([2, 1, 2], [3, 7])


def test_ragged_vocabulary_ids() -> None:
    lists, words = ragged_vocabulary_ids(pd.Series([["b", "a"], [], ["b"], []]))
    assert (lists.values.tolist(), lists.offsets.tolist(), words) == ([2, 1, 2], [0, 2, 2, 3, 3], ["a", "b"])
    lists, words = ragged_vocabulary_ids(pd.Series([[], []], dtype=object))
    assert (lists.values.tolist(), lists.offsets.tolist(), words) == ([], [0, 0, 0], [])
