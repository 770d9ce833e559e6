"""A small flat log worked out by hand; mistakes of the map and of the files; appending; the command line."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from joint.data.dataset import Dataset
from joint.data.flat import append as log_append
from joint.data.flat import reader as logs
from joint.data.flat.map import read_map
from joint.data.problems import Problems
from joint.data.ragged import Ragged
from joint.errors import ConfigError, DataError, UserError
from joint.schema import NEVER, Feature, History, Schema, day_number

MINIMAL = """
user: user
item: item
time: {column: time, unit: s}
labels: {click: click}
"""
DAY = 86_400
MONDAY = 1_704_067_200  # 2024-01-01 00:00 UTC


def write(folder: Path, text: str = MINIMAL, **columns: object) -> Path:
    """A log and its map."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "map.yaml").write_text(text)
    path = folder / "log.parquet"
    pq.write_table(pa.table({k: c if isinstance(c, pa.Array) else pa.array(c) for k, c in columns.items()}), path)
    return path


def three_days(folder: Path, text: str = MINIMAL, **further: object) -> Path:
    """Three rows, one a day."""
    columns: dict[str, object] = {
        "user": ["ann", "bob", "ann"],
        "item": [30, 10, 20],
        "time": [MONDAY, MONDAY + DAY, MONDAY + 2 * DAY],
        "click": [1, 0, 1],
    }
    return write(folder, text, **(columns | further))


def prepare(files: Path | Sequence[Path], out: Path, *, append: bool = False, skip: bool = False) -> Schema:
    files = [files] if isinstance(files, Path) else files
    m, tree = read_map(files[0].parent / "map.yaml")
    return logs.prepare_log(files, out, m, tree, problems=Problems(skip=skip), append=append)


def rows_of(column: object) -> list[list]:
    assert isinstance(column, Ragged)
    return [column.values[a:b].tolist() for a, b in zip(column.offsets, column.offsets[1:], strict=False)]


def words(out: Path, space: str) -> list:
    return pq.read_table(out / "vocabularies" / f"{space}.parquet")["value"].to_pylist()


# --- by hand --------------------------------------------------------------------------------------------------------


def test_the_smallest_map(tmp_path: Path) -> None:
    schema = prepare(three_days(tmp_path), tmp_path / "out")
    assert schema.features == (
        Feature(name="user_id", level="request", kind="id", size=3),
        Feature(name="item_id", level="item", kind="id", size=4),
    )
    assert (schema.name, schema.items, schema.labels, schema.stages) == ("log", 3, ("click",), ("exposed",))
    assert [(part.day, part.split, part.rows) for part in schema.parts] == [
        ("2024-01-01", "train", 1), ("2024-01-02", "valid", 1), ("2024-01-03", "test", 1),
    ]  # fmt: skip
    # Ids in the order of the first day: 30 was seen on Monday.
    assert (words(tmp_path / "out", "item_id"), words(tmp_path / "out", "user_id")) == ([30, 10, 20], ["ann", "bob"])
    dataset = Dataset(tmp_path / "out")
    assert dataset.first_day[""].tolist() == [day_number(f"2024-01-0{day}") for day in (1, 2, 3)]
    test = dataset.read_split("test")
    assert test.scalars("timestamp").tolist() == [MONDAY + 2 * DAY]
    assert rows_of(test.lists("candidates")) == [[2]]


EVERY_KIND = """
request: r
user: u
item: i
time: when
timezone: Europe/Berlin
lag: 1h
stages: {column: how, values: {shown: [exposed, ranked], ranked: [ranked], cut: [coarse_neg]}}
input_space: {ranking: [ranked]}
orders: {rank_index: place}
labels: {click: c, minutes: {column: ms, scale: 0.001, matures_after: 2}}
features:
  device: {kind: id}
  topics: {kind: ids}
  hour: {kind: float}
  far: {kind: float, normalise: log}
  taste: {kind: vector, size: 2}
  speed: {kind: bucket, edges: [10, 20]}
  colour: {kind: id, of: item}
  seen_on: {kind: id, of: event, column: device, space: device}
histories:
  clicked: {when: click >= 1, length: 2, events: [seen_on]}
  watched: {when: minutes > 1}
pools: {shown: {when: exposed}}
group: {column: tier}
"""


def every_kind(folder: Path) -> Path:
    """Five requests of one user, and a sixth of another, over four days. Times are Berlin's, without saying so."""
    rows = [  # request, user, item, time, how, place, click, ms, device, colour, tier
        ("r1", 5, "a", "2024-01-01T00:30", "shown", 0, 1, 3000, "tv", "red", "gold"),
        ("r1", 5, "b", "2024-01-01T00:30", "ranked", 1, None, None, "tv", "blue", "gold"),
        ("r1", 5, "c", "2024-01-01T00:30", "cut", None, 0, 0, "tv", None, "gold"),
        ("r2", 5, "d", "2024-01-02T10:00", "shown", 0, 1, 1000, None, "red", "gold"),
        ("r3", 5, "a", "2024-01-02T10:59:59", "shown", 0, 1, None, "app", "green", "gold"),
        ("r4", 5, "b", "2024-01-02T11:00:01", "shown", 0, 0, 9000, "app", "blue", "iron"),
        ("r5", 5, "c", "2024-01-03T12:00", "shown", 0, 0, 0, "app", None, "iron"),
        ("r6", 6, "d", "2024-01-04T00:00", "shown", 0, 0, 0, "app", "red", None),
    ]
    names = ("r", "u", "i", "when", "how", "place", "c", "ms", "device", "colour", "tier")
    columns: dict[str, object] = {name: [row[n] for row in rows] for n, name in enumerate(names)}
    columns["when"] = pa.array(np.array([row[3] for row in rows], "datetime64[s]"))
    first = [row[0] for row in rows]
    columns["topics"] = [{"r1": ["x", "y"], "r2": []}.get(request) for request in first]
    columns["hour"] = [{"r1": 0.5}.get(request) for request in first]
    columns["far"] = [{"r1": -(np.e - 1), "r2": 0.0}.get(request) for request in first]
    columns["taste"] = [{"r1": [1.0, -1.0]}.get(request) for request in first]
    columns["speed"] = [{"r1": 9.5, "r2": 10, "r3": 20.0, "r4": 99}.get(request) for request in first]
    return write(folder, EVERY_KIND, **columns)


def test_every_kind_of_column(tmp_path: Path) -> None:
    schema = prepare(every_kind(tmp_path), out := tmp_path / "out")
    kinds = {feature.name: (feature.level, feature.kind, feature.space, feature.size) for feature in schema.features}
    assert kinds == {
        "user_id": ("request", "id", "user_id", 3),
        "item_id": ("item", "id", "item_id", 5),
        "device": ("request", "id", "device", 3),
        "topics": ("request", "ids", "topics", 3),
        "hour": ("request", "float", "hour", 0),
        "far": ("request", "float", "far", 0),
        "taste": ("request", "vector", "taste", 2),
        "speed": ("request", "id", "speed", 4),
        "colour": ("item", "id", "colour", 3),
        "seen_on": ("event", "id", "device", 3),
    }
    assert schema.histories == (
        History(name="clicked", events=("seen_on",), timed=True),
        History(name="watched", timed=True),
    )
    assert (schema.orders, schema.matures_after) == (("rank_index",), {"minutes": 2})
    assert (schema.pools, schema.input_space) == (("shown",), {"ranking": ("ranked",)})
    assert [(part.day, part.rows) for part in schema.parts] == [
        ("2024-01-01", 1), ("2024-01-02", 3), ("2024-01-03", 1), ("2024-01-04", 1),
    ]  # fmt: skip
    assert words(out, "item_id") == ["a", "b", "c", "d"]
    assert words(out, "device") == ["tv", "app"]  # by the first day, then by the word
    assert words(out, "group") == ["gold", "iron"]
    dataset = Dataset(out)
    first = day_number("2024-01-01")
    assert dataset.first_day[""].tolist() == [first, first, first, first + 1]
    assert dataset.first_day["shown"].tolist() == [first, first + 1, first + 2, first + 1]
    assert [words(out, "colour")[i - 1] if i else None for i in np.asarray(dataset.catalogue["colour"])] == [
        "red",
        "blue",
        None,
        "red",
    ]
    parts = [dataset.read(part, further=dataset.further_columns()).columns for part in schema.parts]

    def scalars(name: str) -> list:
        return [x for columns in parts for x in columns[name].tolist()]  # type: ignore[union-attr]

    def lists(name: str) -> list:
        return [row for columns in parts for row in rows_of(columns[name])]

    assert scalars("timestamp")[0] == MONDAY - 30 * 60  # half past midnight in Berlin is of the day before in UTC
    assert scalars("group") == [1, 1, 1, 2, 2, 0]
    assert scalars("device") == [1, 0, 2, 2, 2, 2]
    assert lists("topics") == [[1, 2], [], [], [], [], []]
    assert scalars("hour") == [0.5, 0, 0, 0, 0, 0]
    assert scalars("far") == pytest.approx([-1, 0, 0, 0, 0, 0])
    assert lists("taste") == [[1, -1]] + [[0, 0]] * 5
    assert scalars("speed") == [1, 2, 3, 3, 0, 0]
    # r3 is less than the lag of an hour after r2, r4 more; only the newest two are kept.
    assert lists("clicked") == [[], [0], [0], [0, 3], [3, 0], []]
    assert lists("clicked.seen_on") == [[], [1], [1], [1, 0], [0, 2], []]
    # What is chosen by minutes is known two days and an hour later.
    assert lists("watched") == [[], [], [], [], [0], []]
    assert lists("watched.timestamp")[4] == [MONDAY - 30 * 60]
    candidates = dict(
        zip(
            lists("candidates")[0],
            zip(*(lists(n)[0] for n in ("stages", "rank_index", "click", "minutes")), strict=True),
            strict=True,
        )
    )
    assert candidates[0] == (512 + 8, 0, 1, 3)
    assert candidates[1][:2] == (8, 1)
    assert np.isnan(candidates[1][2:]).all()
    assert candidates[2] == (4, -1, 0, 0)


def test_the_maps_of_the_documentation(tmp_path: Path) -> None:
    docs = Path(__file__).parents[2] / "docs"
    for name in ("kuairand", "ebnerd"):
        assert read_map(docs / "maps" / f"{name}.yaml")[0].name == name
    smallest, discovery, features, histories = re.findall(
        r"```yaml(?: title=\"map.yaml\")?\n(.*?)```", (docs / "own_logs.md").read_text(), re.DOTALL
    )
    keys = smallest.replace("labels: {click: is_click}\n", "")
    files = "users: {file: u.parquet, key: u}\nitems: {file: i.parquet, key: i}\n"
    for text in (smallest, keys + discovery, smallest + files + features + histories):
        (tmp_path / "map.yaml").write_text(text)
        assert read_map(tmp_path / "map.yaml")[0].item == "video_id"


# --- mistakes of the map --------------------------------------------------------------------------------------------


def test_all_mistakes_of_a_map_at_once(tmp_path: Path) -> None:
    (tmp_path / "map.yaml").write_text(
        "user: u\nitem: i\nitme: i\ntime: {column: t, unit: min}\ngap: 3 hours\nspread: 1w\n"
        "labels:\n  click: {}\n  group: g\n"
        "features:\n  a: {kind: bucket}\n  b: {kind: flaot}\n  c: {kind: id, normalise: log}\n"
    )
    with pytest.raises(ConfigError) as caught:
        read_map(tmp_path / "map.yaml")
    lines = [line.removeprefix(f"{tmp_path}/") for line in str(caught.value).splitlines()]
    assert [line.split(": ")[0] for line in lines] == [f"map.yaml:{n}" for n in (3, 4, 5, 6, 8, 11, 12, 13)]
    assert "itme: unknown key; did you mean time?" in lines[0]
    assert "'min' is not one of s, ms, us" in lines[1]
    assert "expected a duration such as 0s, 30m, 12h or 7d, found '3 hours'" in lines[2]
    assert "found '1w'" in lines[3]
    assert "labels.click: expected either column or discovery" in lines[4]
    assert "exactly a bucket has one of them" in lines[5]
    assert "did you mean float?" in lines[6]
    assert "features.c.normalise: only a float has it" in lines[7]


MISTAKES: dict[str, tuple[str, str]] = {
    "durations": ("gap: 3 hours", r":6: gap: expected a duration such as 0s, 30m, 12h or 7d, found '3 hours'"),
    "run and gap": ("run: 3\ngap: 3h", "run: from 1 to 1000000, and not together with gap"),
    "run and request": ("run: 3\nrequest: r", "request: has its own column; run and gap are for logs without one"),
    "own name": ("histories: {group: {when: exposed}}", "histories.group: the dataset has a column of that name"),
    "name twice": ("histories: {click: {when: exposed}}", r"histories\.click: also in labels; choose another name"),
    "odd name": ("histories: {a b: {when: exposed}}", "expected a name of letters, digits and _"),
    "space": (
        "features: {f: {kind: id, space: ../../x}}",
        r":6: features\.f\.space: expected a name of letters, digits",
    ),
    "long lag": ("lag: 99999999999999999999d", r":6: lag: expected a duration of at most 36500d, found '9{20}d'"),
    "long gap": ("gap: 36501d", r":6: gap: expected a duration of at most 36500d, found '36501d'"),
    "length": (
        f"histories: {{h: {{when: exposed, length: {10**20}}}}}",
        r"histories\.h\.length: must be from 1 to 1000000",
    ),
    "long run": (f"run: {10**20}", "run: from 1 to 1000000"),
    "size": (f"features: {{f: {{kind: vector, size: {10**20}}}}}", "quantiles and size must be at most 1000000"),
    "NaN edge": ("features: {f: {kind: bucket, edges: [.nan]}}", r"features\.f\.edges: must be finite and ascend"),
    "stage": ("stages: {flags: {expsoed: x}}", "expsoed is not a logged stage; did you mean exposed"),
    "random": ("stages: {flags: {random: x}}", "random is not a logged stage"),
    "half of stages": ("stages: {column: x}", "expected either flags, or column and values"),
    "head": ("input_space: {rank: [ranked]}", "input_space.rank: no such head; did you mean ranking"),
    "condition": ("histories: {h: {when: click is 1}}", "expected exposed or LABEL >= NUMBER"),
    "label": ("histories: {h: {when: clicks > 0}}", "no label clicks with a column; did you mean click"),
    "event": ("histories: {h: {when: exposed, events: [e]}}", "no feature e of: event"),
    "no history": ("histories: {h: {length: 3}}", "expected when, file or both"),
    "users": ("features: {f: {kind: id, of: user}}", "users: missing; a feature of the user is in its file"),
    "items": ("pools: {p: {column: c}}", "items: missing; the column is in its file"),
    "pool": ("pools: {p: {}}", "expected either when or column"),
    "zone": ("timezone: Europe/Belrin", "timezone: 'Europe/Belrin' is not a time zone"),
    "column": ("request: usr", r"map\.yaml:6: request: .*log\.parquet has no column usr; did you mean user\?"),
    "type": ("features: {f: {kind: ids, column: click}}", "column click has int64; expected lists of integers or of"),
    "two columns": (
        "request: x\nfeatures: {item_name: {kind: id}}",
        r"map.yaml:6: request: .*no column x.*\n.*:7: features.item_name: .*no column item_name",
    ),
    "file": ("items: {file: none.parquet, key: item}", r"none\.parquet: not found; expected a Parquet file"),
    "clash of ids": (
        "features: {f: {kind: id, column: item, space: user_id}}",
        "has integer values; .*column user has string",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_of_the_map(name: str, tmp_path: Path) -> None:
    more, message = MISTAKES[name]
    log = three_days(tmp_path, MINIMAL + more)
    with pytest.raises(UserError, match=message):
        prepare(log, tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"log.parquet", "map.yaml"}


@pytest.mark.parametrize("wrong", ["matures_after: .nan", "matures_after: .inf", "matures_after: 1e9", "scale: .nan"])
def test_a_label_of_no_finite_number(wrong: str, tmp_path: Path) -> None:
    log = three_days(tmp_path, MINIMAL.replace("{click: click}", f"{{click: {{column: click, {wrong}}}}}"))
    with pytest.raises(ConfigError, match=r":5: labels\.click\.\w+: must be (from 0 to 36500|a finite number)$"):
        prepare(log, tmp_path / "out")


# --- mistakes of the files ------------------------------------------------------------------------------------------


def cut(path: Path, kept: float) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * kept)])


def tear(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[4:200] = bytes(196)  # the footer is whole, the pages are not
    path.write_bytes(content)


FILES: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (Path.unlink, r"log\.parquet: not found; expected a Parquet file"),
    "truncated": (lambda p: cut(p, 0.6), r"log\.parquet: not a whole Parquet file"),
    "empty": (lambda p: cut(p, 0), r"log\.parquet: not a whole Parquet file"),
    "text": (lambda p: p.write_text("user,item\n1,2\n"), r"log\.parquet: not a whole Parquet file"),
    "torn": (tear, r"log\.parquet: cannot be read .*; expected a whole Parquet file"),
    "a folder": (lambda p: [change() for change in (p.unlink, p.mkdir)], r"log\.parquet: not"),
    "no rows": (lambda p: pq.write_table(pq.read_table(p).slice(0, 0), p), r"log\.parquet: no good row in the log"),
    "two days": (lambda p: pq.write_table(pq.read_table(p).slice(1), p), r"requests on 2 days; expected at least 3"),
    "column gone": (
        lambda p: pq.write_table(pq.read_table(p).drop_columns("click"), p),
        r"map\.yaml:5: labels\.click: .*log\.parquet has no column click",
    ),
    "column twice": (
        lambda p: pq.write_table(pq.read_table(p).append_column("user", pa.array([1, 2, 3])), p),
        r"two columns user$",
    ),
    "words for numbers": (
        lambda p: pq.write_table(pq.read_table(p).set_column(3, "click", pa.array(["y", "n", "y"])), p),
        r"labels\.click: .*column click has string; expected numbers",
    ),
    "times without a unit": (
        lambda p: pq.write_table(pq.read_table(p).set_column(2, "time", pa.array([1, 2, 3], pa.timestamp("s"))), p),
        r"column time has timestamp\[ms\]; expected numbers, as the map gives a unit",
    ),
}


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("name", FILES)
def test_a_bad_file(name: str, skip: bool, tmp_path: Path) -> None:
    damage, message = FILES[name]
    damage(log := three_days(tmp_path))
    with pytest.raises(UserError, match=message) as caught:
        prepare(log, tmp_path / "out", skip=skip)
    assert len(str(caught.value).splitlines()) == 1
    assert not list(tmp_path.glob("*out*"))


def test_a_type_that_changes_between_files(tmp_path: Path) -> None:
    first = three_days(tmp_path / "a")
    second = three_days(tmp_path / "b", item=["x", "y", "z"])
    with pytest.raises(DataError, match=r"b/log\.parquet: column item has string values .*a/log\.parquet has integer"):
        prepare([first, second], tmp_path / "out")
    prepare(
        [first, three_days(tmp_path / "c", item=pa.array([1, 2, 3], pa.int8()))], tmp_path / "out"
    )  # as good as int64


NO_TEXT = pa.StringArray.from_buffers(3, pa.array([0, 1, 2, 3], pa.int32()).buffers()[1], pa.py_buffer(b"a\xffc"))
ROWS: dict[str, tuple[dict, str]] = {
    "not text": (
        {"user": NO_TEXT},
        r"row 2: column user: found b'\\xff'; expected a whole number below 2\^63 or UTF-8 text",
    ),
    "beyond int64": (
        {"item": pa.array([1, 2**63, 3], pa.uint64())},
        "row 2: column item: found 9223372036854775808; expected",
    ),
    "half an item": ({"item": [1.0, 2.5, 3.0]}, r"row 2: column item: found 2\.5; expected a whole number below 2\^63"),
    "NaN item": ({"item": pa.array([1.0, np.nan, 3.0])}, "row 2: column item: found nan; expected an id"),
    "null item": ({"item": [1, None, 3]}, "row 2: column item: found null; expected an id"),
    "all null": ({"item": pa.nulls(3)}, r"row 1: column item: found null; expected an id \(and 2 more such rows\)"),
    "wrong unit": (
        {"time": [MONDAY * 1000] * 3},
        "row 1: column time: .*expected a time from 1990 to 2099; is its unit s",
    ),
    "backwards": ({"time": [-MONDAY] * 3}, "row 1: column time: found -1704067200; expected a time from 1990"),
    "long but not text": (
        {"user": NO_TEXT.cast(pa.large_string())},
        "row 2: column user: found b'\\\\xff'; expected a whole",
    ),
    "infinite item": ({"item": [1.0, np.inf, 3.0]}, "row 2: column item: found inf; expected a whole number"),
    "a list of no text": (
        {"item": [1, 2, 3], "tags": pa.ListArray.from_arrays([0, 1, 2, 3], NO_TEXT)},
        "row 2: column tags: found bytes that are no text; expected a list of whole numbers below",
    ),
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", ROWS)
def test_a_bad_row(name: str, tmp_path: Path) -> None:
    columns, message = ROWS[name]
    tags = "features: {tags: {kind: ids}}" if "tags" in columns else ""
    log = three_days(tmp_path, MINIMAL + tags, **columns)
    with pytest.raises(DataError, match=rf"log\.parquet: {message}.*; --on-error skip leaves such rows out$"):
        prepare(log, tmp_path / "out")
    assert not list(tmp_path.glob("*out*"))


def test_what_is_skipped_adds_up_by_column_and_kind(tmp_path: Path) -> None:
    bad: dict[str, list] = {"user": [None, None, "bob"], "click": [0, 0, np.inf]}
    columns = {name: [*column, *column] for name, column in bad.items()}
    columns |= {"item": [1, 2, 3, 4, 5, 6], "time": [MONDAY] * 6}
    three_days(tmp_path / "a")
    files = [tmp_path / "a" / "log.parquet", write(tmp_path / "b", MINIMAL, **columns)]
    schema = prepare(files, tmp_path / "out", skip=True)
    assert schema.provenance["skipped"] == {
        "column user: found null; expected an id": 4,
        "column click: found NaN, infinity or too large a number; expected a finite number or null": 2,
    }


def test_a_bad_time_is_shown_as_one_reads_it(tmp_path: Path) -> None:
    wrong = pa.array(["2124-04-01T10:30:00", "2024-01-02T00:00:00", "2024-01-03T00:00:00"])
    text = MINIMAL.replace("{column: time, unit: s}", "time")
    for zone in ("UTC", "Asia/Shanghai"):
        log = three_days(tmp_path, text, time=wrong.cast(pa.timestamp("us")).cast(pa.timestamp("us", zone)))
        at = "10:30:00+00:00" if zone == "UTC" else "18:30:00+08:00"
        with pytest.raises(DataError, match=re.escape(f"column time: found 2124-04-01 {at}; expected a time")):
            prepare(log, tmp_path / "out")


def test_an_error_without_a_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare(three_days(tmp_path), out := tmp_path / "out")
    log = fourth_day(tmp_path)
    opened = pq.ParquetFile

    def fails(path: Path, **further: object) -> pq.ParquetFile:
        if Path(path).parent.name == "state":
            raise OSError("")
        return opened(path, **further)

    monkeypatch.setattr(pq, "ParquetFile", fails)
    with pytest.raises(DataError, match=r"active\.parquet: cannot be read \(OSError\)"):
        prepare(log, out, append=True)


STAMPS = [pa.timestamp("ms"), pa.timestamp("us"), pa.timestamp("ns"), pa.timestamp("us", "UTC")]
STAMPS += [pa.timestamp("ms", "+02:00"), pa.timestamp("ns", "Asia/Tokyo"), pa.date32(), pa.date64()]


@pytest.mark.parametrize("zone", ["UTC", "Europe/Berlin"])
@pytest.mark.parametrize("kind", STAMPS, ids=str)
def test_every_kind_of_time(kind: pa.DataType, zone: str, tmp_path: Path) -> None:
    text = MINIMAL.replace("{column: time, unit: s}", "time") + f"timezone: {zone}"
    days = pa.array(np.datetime64("2024-06-01") + np.arange(3)).cast(pa.timestamp("s"))
    schema = prepare(three_days(tmp_path / "good", text, time=days.cast(kind)), tmp_path / "out")
    hours = -2 if zone != "UTC" and not getattr(kind, "tz", None) else 0
    first = int(np.datetime64("2024-06-01", "s").astype(np.int64)) + hours * 3600
    assert [part.begin for part in schema.parts] == [first, first + DAY, first + 2 * DAY]
    bits = pa.int32() if kind == pa.date32() else pa.int64()
    for wrong in (2**30, -(2**30), 0) if kind == pa.date32() else (2**62, -(2**62), 0, -(2**63)):
        values = [wrong, None, *days.cast(kind).cast(bits).to_pylist()]
        log = write(
            tmp_path, text, user=["a"] * 5, item=[1, 2, 3, 4, 5], time=pa.array(values, bits).cast(kind), click=[0] * 5
        )
        with pytest.raises(DataError, match=r"row 1: column time: found .*; expected a time from 1990 to 2099"):
            prepare(log, tmp_path / "stopped")
        schema = prepare(log, tmp_path / f"out{wrong}", skip=True)
        assert schema.provenance["skipped"] == {
            f"column time: found {found}; expected a time from 1990 to 2099": 1 for found in ("null", "another time")
        }


def test_times_without_a_zone_when_clocks_change(tmp_path: Path) -> None:
    text = MINIMAL.replace("{column: time, unit: s}", "time") + "timezone: Europe/Berlin"
    local = ["2024-03-31T02:30", "2024-10-27T01:30", "2024-10-28T00:00", "2024-10-27T02:30", "2024-10-27T03:00"]
    times = pa.array(np.array(local, "datetime64[ms]"))
    write(tmp_path, text, user=["a"] * 5, item=[1, 2, 3, 4, 5], time=times, click=[0] * 5)
    prepare(tmp_path / "log.parquet", out := tmp_path / "out")
    dataset = Dataset(out)
    found = np.concatenate([dataset.read(part).scalars("timestamp") for part in dataset.schema.parts])
    # 02:30 was not there in spring, and twice in autumn: a run's time is that of its first row, 01:30.
    utc = np.array(["2024-03-31T01:00", "2024-10-26T23:30", "2024-10-27T23:00"], "datetime64[s]").astype(np.int64)
    assert found.tolist() == utc.tolist()
    write(tmp_path, text, user=["a"] * 3, item=[1, 2, 3], time=times.take([0, 3, 2]), click=[0] * 3)
    prepare(tmp_path / "log.parquet", tmp_path / "twice")
    twice = Dataset(tmp_path / "twice").read_split("valid").scalars("timestamp")
    assert twice.tolist() == [int(np.datetime64("2024-10-27T01:30", "s").astype(np.int64))]


def test_numbers_of_a_unit_are_exact(tmp_path: Path) -> None:
    text = MINIMAL.replace("unit: s", "unit: us") + "gap: 1s"
    micro = MONDAY * 1_000_000 + np.array([0, 1_000_000, 2_000_001, DAY * 10**6, 2 * DAY * 10**6])
    for name, times in (("whole", micro), ("float", micro.astype(float)), ("unsigned", micro.astype(np.uint64))):
        log = write(tmp_path / name, text, user=["a"] * 5, item=[1, 2, 3, 4, 5], time=times, click=[0] * 5)
        assert prepare(log, tmp_path / name / "out").parts[0].rows == 2  # the third is a microsecond too late


# --- appending ------------------------------------------------------------------------------------------------------


def fourth_day(folder: Path, **further: object) -> Path:
    columns: dict[str, object] = {
        "user": ["eve", "ann"],
        "item": [5, 30],
        "time": [MONDAY + 3 * DAY] * 2,
        "click": [1, 1],
    }
    return write(folder, **(columns | further))  # type: ignore[arg-type]


def test_append_keeps_ids_and_moves_splits(tmp_path: Path) -> None:
    first = prepare(three_days(tmp_path), out := tmp_path / "out")
    catalogue = pq.read_table(out / "items.parquet")
    schema = prepare(fourth_day(tmp_path), out, append=True)
    assert [(part.day, part.split, part.path.rsplit("/")[-1]) for part in schema.parts] == [
        ("2024-01-01", "train", "part-train-0.parquet"),
        ("2024-01-02", "train", "part-train-0.parquet"),
        ("2024-01-03", "valid", "part-valid-0.parquet"),
        ("2024-01-04", "test", "part-test-0.parquet"),
    ]
    assert pq.read_table(out / schema.parts[1].path)["split"].to_pylist() == ["train"]
    assert words(out, "item_id") == [30, 10, 20, 5]
    assert words(out, "user_id") == ["ann", "bob", "eve"]
    assert pq.read_table(out / "items.parquet").slice(0, 3).equals(catalogue)
    assert schema.hash != first.hash
    assert not list(tmp_path.glob(".out*"))


REFUSED: dict[str, tuple[Callable[[Path], Path], str]] = {
    "a day it holds": (
        lambda t: three_days(t),
        "expected a time after 2024-01-03, the last day that the dataset holds",
    ),
    "another map": (lambda t: three_days(t, MINIMAL + "lag: 1h"), "was prepared with another map: lag: '0s' != '1h'"),
    "other ids": (lambda t: fourth_day(t, item=["x", "y"]), "column item has string values; the dataset has integer"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_appended(name: str, tmp_path: Path) -> None:
    make, message = REFUSED[name]
    prepare(three_days(tmp_path), out := tmp_path / "out")
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    with pytest.raises(DataError, match=message):
        prepare(make(tmp_path), out, append=True)
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    assert not list(tmp_path.glob(".out*"))


@pytest.mark.parametrize("name", ["statistics.json", "active.parquet"])
def test_append_to_a_dataset_whose_state_is_damaged(name: str, tmp_path: Path) -> None:
    prepare(three_days(tmp_path), out := tmp_path / "out")
    cut(out / "state" / name, 0.5)
    with pytest.raises(DataError, match=rf"state/{name}: cannot be read"):
        prepare(fourth_day(tmp_path), out, append=True)


def test_append_to_nothing_and_to_others(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"dataset\.json: not found"):
        prepare(three_days(tmp_path), tmp_path / "out", append=True)
    prepare(three_days(tmp_path), out := tmp_path / "out")
    text = (out / "dataset.json").read_text()
    (out / "dataset.json").write_text(text.replace('"map": {', '"mop": {'))
    with pytest.raises(DataError, match=r"is not of joint\.prepare parquet"):
        prepare(fourth_day(tmp_path), out, append=True)


def test_a_request_that_goes_on_after_midnight(tmp_path: Path) -> None:
    text = MINIMAL + "request: request"
    three_days(tmp_path, text, request=[1, 2, 3], time=[MONDAY, MONDAY + DAY, MONDAY + 3 * DAY - 1])
    prepare(tmp_path / "log.parquet", out := tmp_path / "out")
    columns: dict[str, object] = {
        "user": ["ann", "bob"],
        "item": [1, 2],
        "time": [MONDAY + 3 * DAY] * 2,
        "click": [0, 0],
    }
    log = write(tmp_path, text, request=[3, 4], **columns)
    with pytest.raises(DataError, match="found a request that the dataset holds already; expected new requests"):
        prepare(log, out, append=True)
    schema = prepare(log, out, append=True, skip=True)
    assert schema.provenance["skipped"] == {
        "column request: found a request that the dataset holds already; expected new requests; append whole ones": 1
    }
    assert Dataset(out).read_split("test").scalars("request_id").tolist() == [4]


def test_events_of_the_log_after_midnight_are_kept(tmp_path: Path) -> None:
    """The request began on the last day, and no later file has its rows again."""
    text = MINIMAL + "request: request\nhistories: {seen: {when: exposed}}"
    columns: dict[str, list] = {"user": ["ann"] * 4, "click": [1] * 4, "item": [1, 2, 3, 4], "request": [1, 2, 3, 3]}
    times = [MONDAY, MONDAY + DAY, MONDAY + 3 * DAY - 60, MONDAY + 3 * DAY + 60]
    prepare(write(tmp_path, text, **columns, time=times), out := tmp_path / "out")
    later: dict[str, list] = {name: column[:1] for name, column in columns.items()}
    later |= {"request": [4], "time": [MONDAY + 3 * DAY + 3600]}
    prepare(write(tmp_path, text, **later), out, append=True)
    assert rows_of(Dataset(out).read_split("test").lists("seen")) == [[0, 1, 2, 3]]


def test_a_crash_leaves_the_old_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare(three_days(tmp_path), out := tmp_path / "out")
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    log = fourth_day(tmp_path)
    for module, name in ((logs, "put_aside"), (logs, "write_days"), (logs, "take_over"), (log_append, "write_part")):
        monkeypatch.setattr(module, name, lambda *_, **__: 1 // 0)
        with pytest.raises(ZeroDivisionError):
            prepare(log, out, append=True)
        monkeypatch.undo()
        assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
        assert not list(tmp_path.glob(".out*"))
    code = "import os, joint.data.flat.reader as logs; logs.write_days = lambda *_: os._exit(9)"
    assert command(log, out, "--map", tmp_path / "map.yaml", "--append", first=code).returncode == 9
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    assert [part.day for part in prepare(log, out, append=True).parts][-1] == "2024-01-04"


def test_files_on_another_disk_are_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError("another disk")

    for name in ("linked", "copied"):
        prepare(three_days(tmp_path / name), tmp_path / name / "out")
        prepare(fourth_day(tmp_path / name), tmp_path / name / "out", append=True)
        monkeypatch.setattr("os.link", refuse)
    assert len({Dataset(tmp_path / name / "out").schema.hash for name in ("linked", "copied")}) == 1


def test_old_items_keep_their_features(tmp_path: Path) -> None:
    text = MINIMAL + "features: {colour: {kind: id, of: item}, sold: {kind: float, of: item, normalise: standard}}"
    three_days(tmp_path, text, colour=["red", "blue", "red"], sold=[1.0, 5.0, None])
    prepare(tmp_path / "log.parquet", out := tmp_path / "out")
    columns: dict[str, object] = {
        "user": ["eve", "ann"],
        "item": [5, 30],
        "time": [MONDAY + 3 * DAY] * 2,
        "click": [1, 1],
    }
    log = write(tmp_path, text, colour=["green", "black"], sold=[3.0, 9.0], **columns)
    prepare(log, out, append=True)
    assert words(out, "colour") == ["red", "blue", "green"]
    dataset = Dataset(out)
    assert dataset.catalogue["colour"].tolist() == [1, 2, 1, 3]  # type: ignore[union-attr]
    # Only item 30 was there when the training day ended: mean 1, and a deviation of 0, which counts as 1.
    assert dataset.catalogue["sold"].tolist() == [0, 4, 0, 2]  # type: ignore[union-attr]


def test_labels_may_be_booleans_or_decimals(tmp_path: Path) -> None:
    for name, click in (("a", [True, False, None]), ("b", pa.array([1, 0, None]).cast(pa.decimal128(22, 2)))):
        prepare(three_days(tmp_path / name, click=click), tmp_path / name / "out")
        dataset = Dataset(tmp_path / name / "out")
        clicks = [dataset.read_split(split).lists("click").values.tolist() for split in ("train", "valid", "test")]
        assert clicks[:2] == [[1], [0]]
        assert np.isnan(clicks[2]).all()


def test_an_item_of_an_old_day_joins_a_pool_later(tmp_path: Path) -> None:
    text = MINIMAL + "stages: {flags: {exposed: shown, coarse_neg: cut}}\npools: {shown: {when: exposed}}"
    three_days(tmp_path, text, shown=[0, 1, 1], cut=[1, 0, 0])
    prepare(tmp_path / "log.parquet", out := tmp_path / "out")
    first = day_number("2024-01-01")
    assert Dataset(out).first_day["shown"].tolist() == [NEVER, first + 1, first + 2]
    columns: dict[str, object] = {
        "user": ["eve", "ann"],
        "item": [5, 30],
        "time": [MONDAY + 3 * DAY] * 2,
        "click": [1, 1],
    }
    prepare(write(tmp_path, text, shown=[0, 1], cut=[1, 0], **columns), out, append=True)
    assert Dataset(out).first_day["shown"].tolist() == [first + 3, first + 1, first + 2, NEVER]
    assert Dataset(out).first_day[""].tolist() == [first, first + 1, first + 2, first + 3]


# --- the command ----------------------------------------------------------------------------------------------------


def command(*arguments: object, first: str = "") -> subprocess.CompletedProcess[str]:
    code = (
        f"{first}\n"
        "import argparse; from joint.commands import run_command; from joint.data.flat import reader as logs\n"
        "def main():\n    parser = argparse.ArgumentParser(); logs.add_arguments(parser)\n"
        "    print(logs.prepare(parser.parse_args()).hash); return 0\n"
        "raise SystemExit(run_command(main))"
    )
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
    )


def test_the_command_line(tmp_path: Path) -> None:
    log, out = three_days(tmp_path, click=[1, 0, np.nan]), tmp_path / "out"
    done = command(log, log, out, "--map", tmp_path / "map.yaml")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"{log}: row 3: column click: found nan; expected a finite number or null;")
    assert len(done.stderr.splitlines()) == 1
    done = command(log, log, out, "--map", tmp_path / "map.yaml", "--on-error", "skip", "--set", "splits.valid_days=0")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[:2] == [
        "skipped 2 rows: column click: found NaN, infinity or too large a number; expected a finite number or null",
        "skipped 2 rows: column item: found a second row of this user, item and time; expected it once",
    ]
    done = command(log, out, "--map", tmp_path / "map.yaml")
    assert (done.returncode, done.stderr) == (2, f"{out}: exists already; choose another folder or say --overwrite\n")


def test_paths_are_relative_to_the_map_and_overrides_to_the_working_folder(tmp_path: Path) -> None:
    (tmp_path / "map.yaml").write_text(MINIMAL + "items: {file: some/items.parquet, key: i}")
    m, _ = read_map(tmp_path / "map.yaml")
    assert m.items
    assert m.items.file == str(tmp_path / "some/items.parquet")
    m, _ = read_map(tmp_path / "map.yaml", ["items.file=my/items.parquet"])
    assert m.items
    assert m.items.file == "my/items.parquet"


def test_nothing_is_left_of_what_was_put_aside(tmp_path: Path) -> None:
    prepare(every_kind(tmp_path), tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "dataset.json", "items.parquet", "requests", "state", "vocabularies",
    }  # fmt: skip
    shutil.rmtree(tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"log.parquet", "map.yaml"}


# --- scores of another model ----------------------------------------------------------------------------------------

SCORED = MINIMAL + "scores: {rank_click: {column: logit}, p_click: {column: p, of: probability}}\n"


def test_scores_of_another_model_are_kept_as_logits(tmp_path: Path) -> None:
    schema = prepare(three_days(tmp_path, SCORED, logit=[1.5, None, -2.0], p=[0.5, 0.8, 0.0]), tmp_path / "out")
    assert schema.scores == ("rank_click", "p_click")
    dataset = Dataset(tmp_path / "out")
    parts = [dataset.read(part, further=schema.scores) for part in schema.parts]
    kept = [[float(part.lists(name).values[0]) for part in parts] for name in schema.scores]
    np.testing.assert_allclose(kept[0], [1.5, np.nan, -2.0])
    np.testing.assert_allclose(kept[1], [0, np.log(4), np.log(1e-6)], rtol=1e-5, atol=1e-7)  # 0 is kept 1e-6 away
    assert "rank_click" not in dataset.read(schema.parts[0]).columns  # who does not ask does not pay


@pytest.mark.parametrize(
    ("column", "message"),
    [({"p": [0.5, 1.2, 0.1]}, "column p: found 1.2; expected a number from 0 to 1, or null"),
     ({"logit": [0.0, float("inf"), 1.0]}, "column logit: found inf; expected a finite number")],
)  # fmt: skip
def test_a_score_that_is_none(tmp_path: Path, column: dict[str, object], message: str) -> None:
    columns: dict[str, object] = {"logit": [0.0, 0.0, 1.0], "p": [0.5, 0.5, 0.5]}
    with pytest.raises(DataError, match=re.escape(message)):
        prepare(three_days(tmp_path, SCORED, **columns | column), tmp_path / "out")


def test_a_score_may_not_be_called_like_a_label(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"scores.click: also in labels"):
        prepare(three_days(tmp_path, MINIMAL + "scores: {click: {column: click}}\n"), tmp_path / "out")


def test_what_was_prepared_before_there_were_scores_can_be_read_and_appended_to(tmp_path: Path) -> None:
    prepare(three_days(tmp_path / "a"), tmp_path / "out")
    description = tmp_path / "out" / "dataset.json"
    said = json.loads(description.read_text())
    del said["scores"], said["provenance"]["map"]["scores"]
    description.write_text(json.dumps(said))
    assert Dataset(tmp_path / "out").schema.scores == ()
    later = write(tmp_path / "b", user=["ann"], item=[10], time=[MONDAY + 3 * DAY], click=[1])
    assert len(prepare(later, tmp_path / "out", append=True).parts) == 4
    with_scores = write(
        tmp_path / "c", SCORED, user=["ann"], item=[10], time=[MONDAY + 4 * DAY], click=[1], logit=[0.5], p=[0.5]
    )
    with pytest.raises(DataError, match="was prepared with another map"):
        prepare(with_scores, tmp_path / "out", append=True)
