"""MovieLens: every layout gives one dataset, the protocol is what it says, and bad files are refused in one line."""

import subprocess
import sys
import zipfile
from collections import defaultdict
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from joint.data import movielens
from joint.data.dataset import Dataset
from joint.data.movielens import prepare_movielens
from joint.data.movielens_files import read_tables
from joint.data.ragged import Ragged, draw
from joint.errors import DataError
from joint.schema import SPLITS, Schema, Stage

Write = Callable[[Any, Path], None]
Layouts = dict[str, Write]
SEED, RUN = 7, 4


def prepare(source: Path, out: Path, *, overwrite: bool = False, run: int = RUN, seed: int = SEED) -> Schema:
    return prepare_movielens(source, out, run=run, seed=seed, overwrite=overwrite)


def words(dataset: Dataset, space: str) -> list:
    return pq.read_table(dataset.directory / "vocabularies" / f"{space}.parquet")["value"].to_pylist()


def rows_of(lists: Ragged) -> list[list]:
    return [lists.values[a:b].tolist() for a, b in zip(lists.offsets, lists.offsets[1:], strict=False)]


# --- the protocol ---------------------------------------------------------------------------------------------------


def oracle(log: Any, seed: int, run: int, most: int) -> dict[str, list[tuple]]:
    """Split -> requests (user, time, items, ratings, history, liked), one rating at a time, in raw ids."""
    users = sorted({row[0] for row in log.ratings})
    items = [item[0] for item in log.items]
    found: dict[str, list[tuple]] = {split: [] for split in SPLITS}
    by_user = defaultdict(list)
    for user, item, rating, time in log.ratings:
        tie = int(draw(seed, users.index(user), items.index(item)))
        by_user[user].append((time, tie, item, rating))
    for user, events in by_user.items():
        events.sort()
        positives = [place for place, event in enumerate(events) if event[3] >= 4]
        test = valid = len(events)
        held_out = min(5, len(positives) // 4)
        if held_out:
            test = positives[-held_out]
            positives = positives[:-held_out]
            held_out = min(5, len(positives) // 4)
            valid = positives[-held_out] if held_out else test
        spans = [("train", begin, min(begin + run, valid)) for begin in range(0, valid, run)]
        spans += [("valid", valid, test), ("test", test, len(events))]
        for split, begin, end in spans:
            if begin < end:
                before = events[:begin]
                newest = most if split == "train" else len(events)
                history = [(item, rating) for _, _, item, rating in before][-newest:]
                liked = [item for _, _, item, rating in before if rating >= 4][-newest:]
                shown = [(item, rating) for _, _, item, rating in events[begin:end]]
                found[split].append((user, events[begin][0], shown, history, liked))
    return found


def prepared(dataset: Dataset, split: str) -> list[tuple]:
    """The same of a dataset."""
    requests = dataset.read_split(split)
    user, item = words(dataset, "user_id"), words(dataset, "item_id")

    def pairs(items: Ragged, values: Ragged, scale: float) -> list[list[tuple]]:
        return [
            [(item[i], value * scale) for i, value in zip(row, of, strict=True)]
            for row, of in zip(rows_of(items), rows_of(values), strict=True)
        ]

    return list(
        zip(
            [user[i - 1] for i in requests.scalars("user_id")],
            requests.scalars("timestamp").tolist(),
            pairs(requests.lists("candidates"), requests.lists("rating"), 1),
            pairs(requests.lists("rated"), requests.lists("rated.rating"), 0.5),
            [[item[i] for i in row] for row in rows_of(requests.lists("liked"))],
            strict=True,
        )
    )


@pytest.mark.parametrize(("run", "most", "chunk"), [(4, 1000, 131_072), (10, 7, 25), (1, 1000, 50)])
def test_protocol_against_a_slow_one(
    run: int, most: int, chunk: int, log: Any, layouts: Layouts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(movielens, "HISTORY", most)
    monkeypatch.setattr(movielens, "CHUNK", chunk)
    layouts["grouplens"](log, tmp_path / "raw")
    prepare(tmp_path / "raw", tmp_path / "out", run=run)
    dataset = Dataset(tmp_path / "out")
    expected = oracle(log, SEED, run, most)
    for split in SPLITS:
        found = prepared(dataset, split)
        assert sorted(found) == sorted(expected[split])
        assert [row[1] for row in found] == sorted(row[1] for row in found)
    assert len({row[0] for row in expected["test"]}) == len(expected["test"]) > 20
    assert len(expected["test"]) > len(expected["valid"]) > 15
    users = {split: {row[0] for row in rows} for split, rows in expected.items()}
    assert users["train"] - users["test"]  # some users have too few positives, and only train
    assert users["valid"] <= users["test"] <= users["train"]
    if chunk < 100:
        assert len([part for part in dataset.schema.parts if part.split == "train"]) > 1


def test_other_columns_of_requests(dataset: Dataset) -> None:
    requests = dataset.read_split("train")
    ids = requests.scalars("request_id")
    assert len(set(ids.tolist())) == len(ids)
    assert (requests.lists("stages").values == int(Stage.EXPOSED)).all()
    assert requests.lists("candidates").lengths.min() >= 1
    events: dict[int, int] = defaultdict(int)
    groups = {}
    for user, group, count in zip(
        requests.scalars("user_id"), requests.scalars("group"), requests.lists("candidates").lengths, strict=True
    ):
        events[user] += count
        groups[user] = group
    per_group = [[events[user] for user in groups if groups[user] == group] for group in range(5)]
    assert [len(counts) for counts in per_group] == [8] * 5
    assert all(max(low) <= min(high) for low, high in pairwise(per_group))
    others = dataset.read_split("test")
    assert all(groups[u] == g for u, g in zip(others.scalars("user_id"), others.scalars("group"), strict=True))


def test_ties_of_time_are_broken_by_the_seed_and_not_by_the_file(log: Any, layouts: Layouts, tmp_path: Path) -> None:
    layouts["grouplens"](log, tmp_path / "raw")
    first = prepare(tmp_path / "raw", tmp_path / "first")
    log.ratings.reverse()
    layouts["grouplens"](log, tmp_path / "raw")
    assert prepare(tmp_path / "raw", tmp_path / "reversed").hash == first.hash
    prepare(tmp_path / "raw", tmp_path / "other", seed=8)
    one, other = (prepared(Dataset(tmp_path / name), "test") for name in ("first", "other"))
    assert sorted(one) != sorted(other)


def test_one_user_and_one_rating(log: Any, layouts: Layouts, tmp_path: Path) -> None:
    log.ratings[1:] = []
    layouts["csv"](log, tmp_path / "raw")
    schema = prepare(tmp_path / "raw", tmp_path / "out")
    assert [schema.requests(split) for split in SPLITS] == [1, 0, 0]
    assert prepared(Dataset(tmp_path / "out"), "train")[0][3:] == ([], [])


# --- the layouts ----------------------------------------------------------------------------------------------------


def zipped(folder: Path, path: Path) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("__MACOSX/._README", b"\x00")
        for file in folder.rglob("*"):
            archive.write(file, Path("any", "depth") / file.relative_to(folder))
    return path


@pytest.mark.parametrize("layout", ["grouplens", "recbole", "one_million"])
@pytest.mark.parametrize("archive", [False, True])
def test_layouts_give_the_same_bytes(
    layout: str, archive: bool, log: Any, layouts: Layouts, tmp_path: Path, dataset: Dataset
) -> None:
    layouts[layout](log, tmp_path / "raw")
    source = zipped(tmp_path / "raw", tmp_path / "raw.whl") if archive else tmp_path / "raw"
    schema = prepare(source, tmp_path / "out", seed=0)
    assert schema.hash == dataset.schema.hash
    assert (schema.features, schema.histories) == (dataset.schema.features, dataset.schema.histories)


@pytest.mark.parametrize("archive", [False, True])
def test_csv_gives_the_same_without_users(
    archive: bool, log: Any, layouts: Layouts, tmp_path: Path, dataset: Dataset
) -> None:
    layouts["csv"](log, tmp_path / "raw")
    source = zipped(tmp_path / "raw", tmp_path / "raw.zip") if archive else tmp_path / "raw"
    prepare(source, tmp_path / "out", seed=0)
    made = Dataset(tmp_path / "out")
    known = {"age", "gender", "occupation", "zip_code"}
    assert made.schema.features == tuple(f for f in dataset.schema.features if f.name not in known)
    for split in SPLITS:
        assert prepared(made, split) == prepared(dataset, split)
    assert (tmp_path / "out" / "items.parquet").read_bytes() == (dataset.directory / "items.parquet").read_bytes()


def test_catalogue(log: Any, dataset: Dataset) -> None:
    items = pq.read_table(dataset.directory / "items.parquet").to_pylist()
    year, genres = words(dataset, "year"), words(dataset, "genres")
    assert words(dataset, "item_id") == [item[0] for item in log.items]
    assert year == sorted({item[2] for item in log.items} - {""})
    for place, (row, (_, title, made, kinds)) in enumerate(zip(items, log.items, strict=True)):
        assert row["item_id"] == place + 1
        assert row["title"] == title
        assert row["year"] == (year.index(made) + 1 if made else 0)
        assert row["genres"] == [genres.index(kind) + 1 for kind in kinds]
    assert {"None", "NA", "", '"Quoted" Movie', 'One " Quote', "L'Été"} <= {row["title"] for row in items}


def test_users(log: Any, dataset: Dataset) -> None:
    requests = dataset.read_split("train")
    described = {row[0]: row for row in log.users}
    spaces = ("user_id", "age", "gender", "occupation", "zip_code")
    found = {
        ids[0]: tuple((str(words(dataset, name)[i - 1]) if i else "") for name, i in zip(spaces, ids, strict=True))
        for ids in zip(*(requests.scalars(name).tolist() for name in spaces), strict=True)
    }
    assert len(found) == len(log.users) + 1
    for user, *rest in found.values():
        if int(user) not in described:  # rated, but not in the users file
            assert rest == [""] * 4
            continue
        _, age, gender, occupation, zip_code = described[int(user)]
        low, high = (int(word) for word in rest[0].replace("+", "-150").split("-"))
        assert low <= age <= high
        assert rest[1:] == [gender, occupation, zip_code[0]]
    assert {"T", "0"} & set(words(dataset, "zip_code")) == {"T", "0"}
    assert "none" in words(dataset, "occupation")


def test_half_stars_and_bom_and_windows_lines(log: Any, layouts: Layouts, tmp_path: Path) -> None:
    log.ratings = [(user, item, rating - 0.5, time) for user, item, rating, time in log.ratings]
    layouts["csv"](log, tmp_path / "raw")
    for path in (tmp_path / "raw").iterdir():
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    prepare(tmp_path / "raw", tmp_path / "out")
    train = Dataset(tmp_path / "out").read_split("train")
    assert set(train.lists("rated.rating").values.tolist()) == {1, 3, 5, 7, 9}
    assert set(train.lists("rating").values.tolist()) == {0.5, 1.5, 2.5, 3.5, 4.5}


# --- what can be wrong with the files -------------------------------------------------------------------------------


def edit(path: Path, old: str, new: str, encoding: str = "latin-1") -> None:
    """Replace the first `old`; '^' stands for the first line."""
    text = path.read_bytes().decode(encoding)
    _, rest = text.split("\n", 1)
    changed = f"{new}\n{rest}" if old == "^" else text.replace(old, new, 1)
    assert changed != text
    path.write_bytes(changed.encode(encoding))


def drop_column(path: Path, separator: str, column: int) -> None:
    lines = [line.split(separator) for line in path.read_text("utf-8").splitlines()]
    path.write_text("".join(separator.join(v[:column] + v[column + 1 :]) + "\n" for v in lines), "utf-8")


DAMAGE: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "ratings missing": ("grouplens", lambda p: (p / "u.data").unlink(), r"raw: no MovieLens found; expected one of"),
    "users missing": ("grouplens", lambda p: (p / "u.user").unlink(), r"raw/u\.user: not found"),
    "movies missing": ("csv", lambda p: (p / "movies.csv").unlink(), r"raw/movies\.csv: not found"),
    "two releases": (
        "csv",
        lambda p: (p / "u.data").write_text(""),
        r"raw: holds several releases \(ratings\.csv, u\.d",
    ),
    "no ratings": (
        "grouplens",
        lambda p: (p / "u.data").write_text(""),
        r"raw/u\.data: not a table of user, item, rat",
    ),
    "header only": (
        "csv",
        lambda p: (p / "ratings.csv").write_text("userId,movieId,rating,timestamp\n"),
        r"raw/ratings\.csv: no rating; expected at least one",
    ),
    "column missing": (
        "csv",
        lambda p: drop_column(p / "ratings.csv", ",", 2),
        r"raw/ratings\.csv: no column rating; found: userId, movieId, timestamp",
    ),
    "three columns": (
        "grouplens",
        lambda p: drop_column(p / "u.data", "\t", 3),
        r"raw/u\.data: 3 columns; expected 4: user, item, rating, timestamp",
    ),
    "a fifth column": (
        "one_million",
        lambda p: edit(p / "ml-1m/ratings.dat", "\n", "::9\n"),
        r"raw/ml-1m/ratings\.dat: (not a table|5 columns)",
    ),
    "more values than columns": (
        "csv",
        lambda p: (p / "ratings.csv").write_text("userId,movieId,rating,timestamp\n3,7,4.0,880000000,\n"),
        r"raw/ratings\.csv: rows hold more values than the header has columns \(userId, movieId",
    ),
    "column twice": (
        "csv",
        lambda p: edit(p / "ratings.csv", "^", "userId,user_id,rating,timestamp"),
        r"raw/ratings\.csv: no column user, item; found: userId, user_id",
    ),
    "genres missing": (
        "csv",
        lambda p: drop_column(p / "movies.csv", ",", 2),
        r"raw/movies\.csv: (no column|not a table)",
    ),
    "flags missing": (
        "grouplens",
        lambda p: edit(p / "u.genre", "Drama|2\n", ""),
        r"raw/u\.item: 10 columns; expected 9",
    ),
    "text for a number": (
        "grouplens",
        lambda p: edit(p / "u.data", "^", "3\tten\t4\t880000000"),
        r"raw/u\.data: row 1: item is 'ten'; expected a whole number from 0 to",
    ),
    "missing value": (
        "grouplens",
        lambda p: edit(p / "u.data", "^", "3\t\t4\t880000000"),
        r"raw/u\.data: row 1: item is 'nan'; expected a whole number",
    ),
    "part of an item": (
        "csv",
        lambda p: edit(p / "ratings.csv", "\n", "\n3,17.5,4,880000000\n"),
        r"raw/ratings\.csv: row 1: item is '17\.5'; expected a whole number",
    ),
    "rating too high": (
        "recbole",
        lambda p: edit(p / "dataset_example/ml-100k/ml-100k.inter", "\n", "\n3\t17\t6\t880000000\n"),
        r"ml-100k\.inter: row 1: rating is '6'; expected a number from 0\.5 to 5",
    ),
    "infinite rating": ("grouplens", lambda p: edit(p / "u.data", "^", "3\t9\tinf\t1"), "row 1: rating is 'inf'"),
    "milliseconds": (
        "csv",
        lambda p: edit(p / "ratings.csv", "\n", "\n3,17,4,880000000000\n"),
        r"row 1: timestamp is '880000000000'; expected a whole number from 0 to 4294967296",
    ),
    "NUL": ("grouplens", lambda p: edit(p / "u.data", "^", "3\t1\x00x\t4\t880000000"), r"raw/u\.data: row 1: item is"),
    "item not in the catalogue": (
        "one_million",
        lambda p: edit(p / "ml-1m/ratings.dat", "\n", "\n3::999::4::880000000\n"),
        r"raw/ml-1m/ratings\.dat: row 2: the catalogue has no item 999",
    ),
    "rated twice": (
        "csv",
        lambda p: edit(p / "ratings.csv", "\n", "\n3,7,4,880000000\n3,8,4,880000000\n3,7,2,880000001\n"),
        r"raw/ratings\.csv: row 3: user 3, item 7 a second time; expected once",
    ),
    "movie twice": (
        "csv",
        lambda p: edit(p / "movies.csv", "\n", "\n900,A (1999),\n900,B (1999),Drama\n", "utf-8"),
        r"raw/movies\.csv: row 2: item 900 a second time",
    ),
    "user twice": (
        "grouplens",
        lambda p: edit(p / "u.user", "^", "900|1|M|x|1\n900|2|F|y|1"),
        r"raw/u\.user: row 2: user 900 a second time",
    ),
    "age in words": (
        "grouplens",
        lambda p: edit(p / "u.user", "^", "900|old|M|x|1"),
        r"raw/u\.user: row 1: age is 'old'",
    ),
    "movie without number": (
        "csv",
        lambda p: edit(p / "movies.csv", "\n", "\nA,B (1999),\n", "utf-8"),
        r"raw/movies\.csv: row 1: item is 'A'; expected a whole number",
    ),
    "latin-1 in csv": (
        "csv",
        lambda p: (p / "movies.csv").write_bytes(b"movieId,title,genres\n1,Caf\xe9 (1999),Drama\n"),
        r"raw/movies\.csv: not a table of item, title, genres \('utf-8' codec can't decode byte 0xe9",
    ),
    "open quote": (
        "csv",
        lambda p: (p / "movies.csv").write_text('movieId,title,genres\n1,"A (1999),Drama\n'),
        r"raw/movies\.csv: not a table of item, title, genres \(.*EOF inside string",
    ),
}


def refused(source: Path, out: Path, message: str, **options: bool) -> None:
    beside = sorted(out.parent.rglob("*"))
    with pytest.raises(DataError, match=message) as caught:
        prepare(source, out, **options)
    assert len(str(caught.value).splitlines()) == 1
    assert sorted(out.parent.rglob("*")) == beside  # nothing is left in OUT or beside it


@pytest.mark.parametrize("name", DAMAGE)
def test_bad_files(name: str, log: Any, layouts: Layouts, tmp_path: Path) -> None:
    layout, damage, message = DAMAGE[name]
    layouts[layout](log, tmp_path / "raw")
    damage(tmp_path / "raw")
    refused(tmp_path / "raw", tmp_path / "out", message)


def test_bad_sources(log: Any, layouts: Layouts, tmp_path: Path) -> None:
    out = tmp_path / "new" / "out"  # not even its parent is made
    refused(tmp_path / "nowhere", out, r"nowhere: not found; expected a MovieLens directory, zip or wheel")
    (tmp_path / "text").write_text("hello")
    refused(tmp_path / "text", out, r"text: neither a directory nor a whole zip archive")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", out, r"empty: no MovieLens found; expected one of ml-100k\.inter, u\.data")
    refused(zipped(tmp_path / "empty", tmp_path / "empty.zip"), out, r"empty\.zip: no MovieLens found")
    layouts["grouplens"](log, tmp_path / "raw")
    whole = zipped(tmp_path / "raw", tmp_path / "whole.zip").read_bytes()
    (tmp_path / "torn.zip").write_bytes(whole[: len(whole) // 2])
    refused(tmp_path / "torn.zip", out, r"torn\.zip: neither a directory nor a whole zip archive")
    middle = whole.index(b"u.data") + 200
    (tmp_path / "rotten.zip").write_bytes(whole[:middle] + bytes(300) + whole[middle + 300 :])
    refused(tmp_path / "rotten.zip", out, r"rotten\.zip/any/depth/u\.data: cannot be read")
    assert not out.parent.exists()


def test_years_and_titles_that_are_none_are_unknown(log: Any, layouts: Layouts, tmp_path: Path) -> None:
    layouts["recbole"](log, tmp_path / "raw")
    path = tmp_path / "raw/dataset_example/ml-100k/ml-100k.item"
    edit(path, "\n", "\n900\tunkonwn\tunkonwn\tunknown\n901\t\tV\t\n902\tA\t19951\tDrama\n", "utf-8")
    items = read_tables(tmp_path / "raw").items
    assert items.year[:3].isna().all()
    assert items.title[:3].tolist() == ["unkonwn", "", "A"]
    assert items.genres[:3].tolist() == [["unknown"], [], ["Drama"]]


def test_out_that_exists(log: Any, layouts: Layouts, tmp_path: Path) -> None:
    layouts["grouplens"](log, tmp_path / "raw")
    first = prepare(tmp_path / "raw", tmp_path / "out")
    refused(tmp_path / "raw", tmp_path / "out", r"out: exists already; choose another folder or say --overwrite")
    refused(tmp_path / "raw", tmp_path / "raw", r"raw: is not a dataset, and will not be overwritten", overwrite=True)
    (tmp_path / "bad").mkdir()
    refused(tmp_path / "bad", tmp_path / "out", "no MovieLens found", overwrite=True)
    assert Dataset(tmp_path / "out").schema.hash == first.hash  # a failed attempt keeps the old one
    other = prepare(tmp_path / "raw", tmp_path / "out", overwrite=True, run=2)
    assert Dataset(tmp_path / "out").schema.hash == other.hash != first.hash


# --- the command ----------------------------------------------------------------------------------------------------


def command(*arguments: object) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "joint.prepare", *map(str, arguments)]
    return subprocess.run(line, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2])


def test_command(log: Any, layouts: Layouts, tmp_path: Path) -> None:
    layouts["grouplens"](log, tmp_path / "raw")
    done = command("movielens", tmp_path / "raw", tmp_path / "out", "--run", 5, "--seed", 3)
    assert (done.returncode, done.stderr) == (0, "")
    schema = Dataset(tmp_path / "out").schema
    assert schema.provenance == {
        "source": str(tmp_path / "raw"),
        "run": 5,
        "seed": 3,
        "ratings": len(log.ratings),
    }
    for said in ("Harper", "Terms of use", "60 items", f"{schema.requests('train'):,} train", schema.hash):
        assert said in done.stdout


def test_command_ends_with_2_and_one_line(tmp_path: Path) -> None:
    done = command("movielens", tmp_path / "nowhere", tmp_path / "out")
    assert done.returncode == 2
    assert done.stderr == f"{tmp_path}/nowhere: not found; expected a MovieLens directory, zip or wheel\n"
    done = command("movielens", tmp_path, tmp_path / "out", "--run", 0)
    assert done.returncode == 2
    assert "--run is 0; expected 1 or more" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_numbers_of_the_real_protocol_constants() -> None:
    """What the doc string promises."""
    assert (movielens.POSITIVE, movielens.HELD_OUT) == (4.0, 5)
    assert np.iinfo(np.int32).max > movielens.CHUNK * movielens.HISTORY  # Arrow's list offsets are int32
