"""Flat logs -> a dataset, against a slow oracle in plain Python: whole, permuted, split, mutated, day by day."""

import datetime
import decimal
import math
import operator
import shutil
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from joint.data.dataset import Dataset
from joint.data.flat.map import read_map
from joint.data.flat.reader import prepare_log
from joint.data.problems import Problems
from joint.data.ragged import Ragged, draw
from joint.errors import UserError
from joint.schema import NEVER, SPLITS, Schema, Stage, day_number

MAP = """
name: shop
{request}
user: uid
item: iid
time: {{column: ts, unit: ms}}
timezone: Europe/Berlin
lag: {lag}
stages: {{flags: {{exposed: shown, ranked: in_ranking, coarse_neg: coarse}}}}
input_space: {{pre_ranking: [ranked, coarse_neg]}}
orders: {{rank_index: rank}}
labels:
  click: click
  minutes: {{column: ms_watched, scale: 0.5, matures_after: 1}}
features:
  device: {{kind: id}}
  tags: {{kind: ids, space: word}}
  hour: {{kind: float, normalise: standard}}
  place: {{kind: vector, size: 2}}
  speed: {{kind: bucket, quantiles: 3}}
  gender: {{kind: id, of: user}}
  age: {{kind: bucket, of: user, edges: [18, 40]}}
  category: {{kind: id, of: item}}
  words: {{kind: ids, of: item, space: word}}
  price: {{kind: float, of: item, normalise: log}}
  seen_on: {{kind: id, of: event, column: device, space: device}}
  watched: {{kind: float, of: event, column: ms_watched}}
items: {{file: items.parquet, key: iid, first_day: born}}
users: {{file: users.parquet, key: uid}}
pools: {{shown: {{when: exposed}}, kids: {{column: for_kids}}}}
histories:
  clicked: {{when: click >= 1, length: 3, events: [seen_on, watched]}}
  long: {{when: minutes > 2, length: 50}}
  seen: {{when: exposed, length: 4, file: past.parquet}}
"""
ZONE = "Europe/Berlin"
FLAGS = {"shown": Stage.EXPOSED, "in_ranking": Stage.RANKED, "coarse": Stage.COARSE_NEG}
DAY_MS = 86_400_000
FIRST = 1_711_800_000_000  # 2024-03-30 12:00 UTC, a day before Berlin's clocks change
Row = dict[str, Any]

TYPES: dict[str, pa.DataType] = {
    **{"req": pa.string(), "uid": pa.string(), "iid": pa.int64(), "ts": pa.int64(), "rank": pa.int32()},
    **{"shown": pa.int8(), "in_ranking": pa.bool_(), "coarse": pa.int8(), "click": pa.float32()},
    **{"ms_watched": pa.float64(), "device": pa.string(), "tags": pa.list_(pa.string()), "hour": pa.float64()},
    **{"place": pa.list_(pa.float32()), "speed": pa.int32(), "gender": pa.string(), "age": pa.float64()},
    **{"category": pa.int64(), "words": pa.list_(pa.string()), "price": pa.float32(), "born": pa.date32()},
    **{"for_kids": pa.bool_()},
}


@dataclass
class World:
    """The files that a user brings, as rows."""

    log: list[Row]
    items: list[Row]
    users: list[Row]
    past: list[Row]
    lag: str = "0s"
    request: str = "request: req"
    run: int = 0  # rows a derived request; 0: the log names requests
    gap: int = 0  # seconds

    types: dict[str, pa.DataType] = field(default_factory=lambda: dict(TYPES))


def make_world(seed: int, *, requests: int = 30, days: int = 5, per_request: int = 4) -> World:
    rng = np.random.default_rng(seed)
    words = ["ü", "b", "c", "d e", ""]
    items: list[Row] = [
        {
            "iid": int(iid),
            "category": [None, 5, 7, -1][rng.integers(4)],
            "words": None if rng.random() < 0.1 else [words[i] for i in rng.permutation(5)[: rng.integers(0, 3)]],
            "price": None if rng.random() < 0.2 else float(np.float32(rng.normal() * 9)),
            "born": None if rng.random() < 0.3 else int(19_808 + rng.integers(0, days + 3)),
            "for_kids": bool(rng.random() < 0.5),
        }
        for iid in rng.permutation(40)[:25] * 10**15 - 10**16
    ]
    users = [
        {"uid": f"u{u}", "gender": [None, "f", "m"][u % 3], "age": [None, 17.0, 18.0, 40.5][u % 4]} for u in range(6)
    ]
    shown = [item["iid"] for item in items[:18]] + [123, -5]  # two that the catalogue does not describe
    log: list[Row] = []
    for number in range(requests):
        start = FIRST + int(rng.integers(0, days * DAY_MS // 1000)) * 1000 + int(rng.integers(0, 3)) * 400
        common = {
            "req": f"r{number}",
            "uid": f"u{rng.integers(0, 8)}",
            "device": [None, "tv", "phone"][rng.integers(3)],
            "tags": [words[i] for i in rng.permutation(5)[: rng.integers(0, 3)]],
            "hour": None if rng.random() < 0.1 else float(rng.integers(0, 24)),
            "place": None if rng.random() < 0.2 else [float(number), 0.5],
            "speed": None if rng.random() < 0.1 else int(rng.integers(0, 9)),
        }
        for iid in rng.permutation(shown)[: rng.integers(1, per_request + 1)]:
            exposed = bool(rng.random() < 0.7)
            log.append(
                common
                | {
                    "iid": int(iid),
                    "ts": start + int(rng.integers(0, 3)) * 700,
                    "shown": int(exposed),
                    "in_ranking": exposed or bool(rng.random() < 0.5),
                    "coarse": 0,
                    "click": None if rng.random() < 0.1 else float(exposed and rng.random() < 0.6),
                    "ms_watched": None if rng.random() < 0.1 else float(rng.integers(0, 12)),
                    "rank": None if rng.random() < 0.3 else int(rng.integers(0, 9)),
                }
            )
            log[-1]["coarse"] = int(not exposed and not log[-1]["in_ranking"])
    past = [
        {
            "uid": f"u{rng.integers(0, 9)}",
            "iid": int(rng.permutation([*shown, 999])[0]),
            "ts": FIRST - int(rng.integers(1, 10**9)),
        }
        for _ in range(12)
    ]
    return World(log, items, users, past)


def write(world: World, folder: Path, *, files: Sequence[Sequence[Row]] | None = None) -> list[Path]:
    """The files of a world; the log in one file, or in several."""
    folder.mkdir(parents=True, exist_ok=True)

    def table(rows: Sequence[Row], names: Sequence[str]) -> pa.Table:
        return pa.table({name: pa.array([row[name] for row in rows], world.types[name]) for name in names})

    request = f"run: {world.run}" if world.run else f"gap: {world.gap}s" if world.gap else world.request
    (folder / "map.yaml").write_text(MAP.format(request=request, lag=world.lag))
    pq.write_table(
        table(world.items, ["iid", "category", "words", "price", "born", "for_kids"]), folder / "items.parquet"
    )
    pq.write_table(table(world.users, ["uid", "gender", "age"]), folder / "users.parquet")
    pq.write_table(table(world.past, ["uid", "iid", "ts"]), folder / "past.parquet")
    names = [
        "req",
        "uid",
        "iid",
        "ts",
        *FLAGS,
        "click",
        "ms_watched",
        "rank",
        "device",
        "tags",
        "hour",
        "place",
        "speed",
    ]
    paths = []
    for number, rows in enumerate(files if files is not None else [world.log]):
        paths.append(folder / f"log-{number}.parquet")
        pq.write_table(table(rows, names), paths[-1], row_group_size=7)
    return paths


def prepare(files: Sequence[Path], out: Path, *, skip: bool = False, append: bool = False) -> tuple[Schema, Problems]:
    problems = Problems(skip=skip)
    m, tree = read_map(files[0].parent / "map.yaml")
    return prepare_log(files, out, m, tree, problems=problems, append=append), problems


# --- the oracle: one row, one request, one event at a time ----------------------------------------------------------


def word_hash(word: Any) -> int:
    if isinstance(word, str):
        return int(pd.util.hash_array(np.array([word], object), categorize=False)[0])
    return int(np.int64(word).view(np.uint64))


def tie(row: Row) -> int:
    return int(draw(np.array([row["ts"] * 1000]), np.array([word_hash(row["iid"])], np.uint64))[0])


def day_of(ms: int) -> int:
    return day_number(str(pd.Timestamp(ms, unit="ms", tz="UTC").tz_convert(ZONE).date()))


def flags_of(row: Row) -> Stage:
    return Stage(sum(int(stage) for name, stage in FLAGS.items() if row[name]))


def finite(value: object, *, nan: bool = False) -> bool:
    return value is None or (nan and math.isnan(value)) or abs(value) < 3.4e38  # type: ignore[arg-type]


def good_row(row: Row, keys: Sequence[str]) -> bool:
    if any(row[name] is None for name in (*keys, *FLAGS)):
        return False
    flags = flags_of(row)
    return (
        631_152_000_000 <= row["ts"] < 4_102_444_800_000
        and all(int(row[name]) in (0, 1) for name in FLAGS)
        and flags != 0
        and not (flags & Stage.COARSE_NEG and flags & (Stage.RANKED | Stage.EXPOSED))
        and finite(row["click"])
        and finite(row["ms_watched"])
        and finite(row["hour"], nan=True)
        and (row["place"] is None or (len(row["place"]) == 2 and all(math.isfinite(x) for x in row["place"])))
        and (row["rank"] is None or -1 <= row["rank"] < 2**15)
    )


def good_past(row: Row) -> bool:
    return (
        all(row[name] is not None for name in ("uid", "iid", "ts")) and 631_152_000_000 <= row["ts"] < 4_102_444_800_000
    )


def unique(rows: list[Row], key: str, lost: Counter) -> list[Row]:
    """The rows of an items or users file: those without a key are lost, and of a key all but the first good one."""
    found: dict[object, Row] = {}
    for row in rows:
        good = row[key] is not None and row[key] not in found
        good = good and finite(row.get("age"), nan=True) and finite(row.get("price"), nan=True)
        lost[key] += not good
        if good:
            found[row[key]] = row
    return list(found.values())


REQUEST_FEATURES = ("device", "tags", "hour", "place", "speed")


def value(row: Row, name: str) -> Any:
    if name == "tags":
        return tuple(word for word in row[name] or [] if word is not None)
    if name == "place":
        return tuple(row[name] or (0.0, 0.0))
    return None if isinstance(row[name], float) and math.isnan(row[name]) else row[name]


def preferred(row: Row) -> tuple:
    """Of rows that are there twice the smallest of this is kept."""
    labels = [
        math.inf if row[name] is None else -row[name] * scale for name, scale in (("click", 1), ("ms_watched", 0.5))
    ]
    return row["ts"], -int(flags_of(row)), *labels


def logged_requests(rows: list[Row], lost: Counter) -> list[list[Row]]:
    requests = []
    by_request = defaultdict(list)
    for row in rows:
        by_request[row["req"]].append(row)
    for name in by_request:
        kept: dict[int, Row] = {}
        for row in sorted(by_request[name], key=preferred):
            if row["iid"] in kept:
                lost["twice"] += 1
            kept.setdefault(row["iid"], row)
        request = sorted(kept.values(), key=lambda row: (row["ts"], tie(row)))
        wrong = len({row["uid"] for row in request}) > 1 or request[-1]["ts"] - request[0]["ts"] > 3_600_000
        if wrong or any(len({value(row, f) for row in request}) > 1 for f in REQUEST_FEATURES):
            lost["request"] += len(request)
        else:
            requests.append(request)
    return requests


def derived_requests(world: World, rows: list[Row], lost: Counter) -> list[list[Row]]:
    requests: list[list[Row]] = []
    by_user = defaultdict(list)
    for row in rows:
        by_user[row["uid"], day_of(row["ts"])].append(row)
    for user in by_user:
        kept: dict[tuple, Row] = {}
        for row in sorted(by_user[user], key=preferred):
            lost["twice"] += (row["iid"], row["ts"]) in kept
            kept.setdefault((row["iid"], row["ts"]), row)
        ordered = sorted(kept.values(), key=lambda row: (row["ts"], tie(row)))
        run: list[Row] = []
        for place, row in enumerate(ordered):
            if world.gap:
                new = place and row["ts"] - ordered[place - 1]["ts"] > world.gap * 1000
            else:
                new = place % world.run == 0
            if run and (new or row["iid"] in {other["iid"] for other in run}):
                requests.append(run)
                run = []
            run.append(row)
        requests.append(run)
    return requests


def derived_id(request: list[Row]) -> int:
    first = request[0]
    keys = (word_hash(first["uid"]), first["ts"] * 1000, word_hash(first["iid"]))
    return int(draw(*(np.array([key]).astype(np.uint64) for key in keys))[0].astype(np.int64))


CONDITIONS: dict[str, tuple[str, float, Callable, float, int, int]] = {
    # column, scale, comparison, number, days until known, length
    "clicked": ("click", 1, operator.ge, 1, 0, 3),
    "long": ("ms_watched", 0.5, operator.gt, 2, 1, 50),
    "seen": ("shown", 1, operator.ge, 1, 0, 4),
}


def expected(world: World) -> tuple[list[Row], list[Row], Counter]:
    """The requests in time order, the catalogue, and how many rows were lost."""
    lost: Counter = Counter()
    derived = bool(world.run or world.gap)
    keys = ("uid", "iid", "ts") if derived else ("req", "uid", "iid", "ts")
    rows = [row for row in world.log if good_row(row, keys)]
    lost["row"] = len(world.log) - len(rows)
    requests = derived_requests(world, rows, lost) if derived else logged_requests(rows, lost)
    seconds = {"0s": 0, "2s": 2, "1h": 3600}[world.lag]
    rows = [row for request in requests for row in request]
    days = sorted({day_of(request[0]["ts"]) for request in requests})
    split = dict(zip(days, ["train"] * (len(days) - 2) + ["valid", "test"], strict=True))
    train = [request[0] for request in requests if split[day_of(request[0]["ts"])] == "train"]
    hours = [row["hour"] for row in train if value(row, "hour") is not None]
    speeds = [row["speed"] for row in train if row["speed"] is not None]
    edges = np.unique(np.quantile(speeds, [1 / 3, 2 / 3])) if speeds else np.zeros(0)
    active = {(row["uid"], day_of(request[0]["ts"])) for request in requests for row in request}

    def activity(row: Row) -> int:
        return sum((row["uid"], day_of(row["ts"]) - before) in active for before in range(1, 31))

    bins = np.unique(np.quantile([activity(row) for row in train], [0.2, 0.4, 0.6, 0.8]))
    users = {row["uid"]: row for row in unique(world.users, "uid", lost)}
    past = [row for row in world.past if good_past(row)]
    lost["past"] = len(world.past) - len(past)
    found = []
    for request in requests:
        first = request[0]
        second = first["ts"] // 1000
        user = users.get(first["uid"], {"gender": None, "age": None})
        histories: dict[str, list] = {}
        for name, (column, scale, compare, number, wait, length) in CONDITIONS.items():
            events = [r for r in rows if r["shown"] and r[column] is not None and compare(r[column] * scale, number)]
            events += past if name == "seen" else []
            late = seconds + wait * 86_400
            mine = [r for r in events if r["uid"] == first["uid"] and r["ts"] // 1000 < second - late]
            mine = sorted(mine, key=lambda r: (r["ts"], tie(r)))[-length:]
            histories[name] = [(r["iid"], r["ts"] // 1000) for r in mine]
            if name == "clicked":
                histories["clicked.seen_on"] = [r["device"] for r in mine]
                histories["clicked.watched"] = [np.float32(value(r, "ms_watched") or 0) for r in mine]
        mean, deviation = (np.mean(hours), np.std(hours) or 1.0) if hours else (0, 1)
        found.append(
            {
                "request": derived_id(request) if derived else np.uint64(word_hash(first["req"])).astype(np.int64),
                "timestamp": second,
                "day": day_of(first["ts"]),
                "split": split[day_of(first["ts"])],
                "user": first["uid"],
                "group": int(np.sum(bins < activity(first))),
                "device": first["device"],
                "tags": list(value(first, "tags")),
                "hour": 0.0 if value(first, "hour") is None else (first["hour"] - mean) / deviation,
                "place": list(value(first, "place")),
                "speed": 0 if first["speed"] is None else int(np.sum(edges <= first["speed"])) + 1,
                "gender": user["gender"],
                "age": 0 if user["age"] is None else 1 + (user["age"] >= 18) + (user["age"] >= 40),
                **histories,
                "candidates": [
                    (
                        r["iid"],
                        int(flags_of(r)),
                        *(None if r[n] is None else r[n] * s for n, s in (("click", 1), ("ms_watched", 0.5))),
                        -1 if r["rank"] is None else r["rank"],
                    )
                    for r in request
                ],
            }
        )
    return sorted(found, key=lambda r: (r["timestamp"], r["request"])), catalogue(world, requests, past, lost), lost


def catalogue(world: World, requests: list[list[Row]], past: list[Row], lost: Counter) -> list[Row]:
    first: dict[int, int] = {}
    shown: dict[int, int] = {}
    last = max(day_of(request[0]["ts"]) for request in requests)
    events = [(row["iid"], day_of(request[0]["ts"]), row["shown"]) for request in requests for row in request]
    for iid, day, exposed in events + [(row["iid"], day_of(row["ts"]), False) for row in past]:
        first[iid] = min(day, first.get(iid, NEVER))
        if exposed:
            shown[iid] = min(day, shown.get(iid, NEVER))
    described = {row["iid"]: row for row in unique(world.items, "iid", lost)}
    for iid, row in described.items():
        if row["born"] is not None and row["born"] <= last:
            first[iid] = min(row["born"], first.get(iid, NEVER))
    blank: Row = {"category": None, "words": [], "price": None, "for_kids": False}
    found = []
    for iid in sorted(first, key=lambda iid: (first[iid], iid)):
        row = described.get(iid, blank)
        price = row["price"]
        found.append(
            {
                "iid": iid,
                "first_day": first[iid],
                "first_day.shown": shown.get(iid, NEVER),
                "first_day.kids": first[iid] if row["for_kids"] else NEVER,
                "category": row["category"],
                "words": row["words"] or [],
                "price": 0.0 if price is None else math.copysign(math.log1p(abs(price)), price),
            }
        )
    return found


# --- the dataset in the same words ----------------------------------------------------------------------------------


def lists(column: Any) -> list[list]:
    assert isinstance(column, Ragged)
    return [column.values[a:b].tolist() for a, b in zip(column.offsets, column.offsets[1:], strict=False)]


def found(out: Path) -> tuple[list[Row], list[Row]]:
    dataset = Dataset(out)
    schema = dataset.schema
    words = {path.stem: [None, *pq.read_table(path)["value"].to_pylist()] for path in (out / "vocabularies").iterdir()}
    items = words["item_id"][1:]
    requests = []
    for part in schema.parts:
        read = dataset.read(part, further=dataset.further_columns())
        c: dict[str, Any] = dict(read.columns)
        seen_on = [[words["device"][i] for i in row] for row in lists(c["clicked.seen_on"])]
        labels = [lists(c[name]) for name in ("stages", "click", "minutes", "rank_index")]
        for i in range(len(read)):
            candidates = zip(lists(c["candidates"])[i], *(label[i] for label in labels), strict=True)
            requests.append(
                {
                    "request": c["request_id"][i],
                    "timestamp": c["timestamp"][i],
                    "day": day_number(part.day),
                    "split": part.split,
                    "user": words["user_id"][c["user_id"][i]],
                    "group": c["group"][i],
                    "device": words["device"][c["device"][i]],
                    "tags": [words["word"][w] for w in lists(c["tags"])[i]],
                    "hour": c["hour"][i],
                    "place": lists(c["place"])[i],
                    "speed": c["speed"][i],
                    "gender": words["gender"][c["gender"][i]],
                    "age": c["age"][i],
                    **{
                        name: [
                            (items[j], t)
                            for j, t in zip(lists(c[name])[i], lists(c[f"{name}.timestamp"])[i], strict=True)
                        ]
                        for name in CONDITIONS
                    },
                    "clicked.seen_on": seen_on[i],
                    "clicked.watched": lists(c["clicked.watched"])[i],
                    "candidates": [
                        (items[j], s, *(None if math.isnan(x) else x for x in of), rank)
                        for j, s, *of, rank in candidates
                    ],
                }
            )
    columns = {
        **dataset.catalogue,
        **{f"first_day.{pool}" if pool else "first_day": of for pool, of in dataset.first_day.items()},
    }
    assert columns["item_id"].tolist() == list(range(1, schema.items + 1))  # type: ignore[union-attr]
    rows = [
        {
            "iid": items[i],
            **{name: columns[name][i] for name in ("first_day", "first_day.shown", "first_day.kids", "price")},  # type: ignore[index]
            "category": words["category"][columns["category"][i]],  # type: ignore[index]
            "words": [words["word"][w] for w in lists(columns["words"])[i]],
        }
        for i in range(schema.items)
    ]
    return requests, rows


def check(out: Path, world: World) -> Counter:
    """The dataset is what the oracle says; returns what the oracle lost."""
    requests, items, lost = expected(world)
    in_dataset, catalogue_found = found(out)
    assert len(in_dataset) == len(requests)
    for mine, its in zip(in_dataset, requests, strict=True):
        assert mine.keys() == its.keys()
        for name, wanted in its.items():
            if name in ("hour", "place", "clicked.watched"):
                assert mine[name] == pytest.approx(wanted, rel=1e-6), name
            else:
                assert mine[name] == wanted, (name, mine, its)
    assert len(catalogue_found) == len(items)
    for mine, its in zip(catalogue_found, items, strict=True):
        assert mine.pop("price") == pytest.approx(its.pop("price"), rel=1e-6)
        assert mine == its
    return lost


# --- tests ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("lag", ["0s", "2s", "1h"])
def test_a_logged_funnel(seed: int, lag: str, tmp_path: Path) -> None:
    world = replace(make_world(seed), lag=lag)
    schema, _ = prepare(write(world, tmp_path), tmp_path / "out")
    check(tmp_path / "out", world)
    assert {split: schema.requests(split) > 0 for split in SPLITS} == dict.fromkeys(SPLITS, True)
    assert schema.matures_after == {"minutes": 1}
    assert schema.stages == ("coarse_neg", "ranked", "exposed")
    assert list(tmp_path.glob(".out*")) == []
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "dataset.json", "items.parquet", "requests", "state", "vocabularies",
    ]  # fmt: skip


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("run", "gap"), [(1, 0), (5, 0), (0, 3600), (0, 1)])
def test_requests_that_the_log_does_not_name(seed: int, run: int, gap: int, tmp_path: Path) -> None:
    world = replace(make_world(seed, requests=60, days=4), run=run, gap=gap)
    prepare(write(world, tmp_path), tmp_path / "out")
    check(tmp_path / "out", world)


def test_the_order_of_rows_and_files_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world = make_world(7, requests=80)
    hashes = [prepare(write(world, tmp_path / "a"), tmp_path / "a" / "out")[0].hash]
    rng = np.random.default_rng(0)
    for name, bucket, parts in (("b", 250_000, 1), ("c", 20, 3), ("d", 5, 7)):
        monkeypatch.setattr("joint.data.flat.put.BUCKET", bucket)
        monkeypatch.setattr("joint.data.flat.build.CHUNK", parts)
        shuffled = replace(world, log=[world.log[i] for i in rng.permutation(len(world.log))])
        for rows in (shuffled.items, shuffled.users, shuffled.past):
            rng.shuffle(rows)
        files = [shuffled.log[i::parts] for i in range(parts)] + [[]]
        hashes.append(prepare(write(shuffled, tmp_path / name, files=files), tmp_path / name / "out")[0].hash)
    assert len(set(hashes)) == 1


def tree_bytes(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_the_same_files_give_the_same_bytes(tmp_path: Path) -> None:
    files = write(make_world(1), tmp_path)
    for name in "ab":
        prepare(files, tmp_path / name)
    assert tree_bytes(tmp_path / "a") == tree_bytes(tmp_path / "b")


def by_day(world: World) -> dict[int, list[Row]]:
    """The rows of each day; a request's are all of the day on which it starts."""
    start: dict[str, int] = {}
    for row in world.log:
        start[row["req"]] = min(row["ts"], start.get(row["req"], row["ts"]))
    days: dict[int, list[Row]] = defaultdict(list)
    for row in world.log:
        days[day_of(row["ts"] if world.run or world.gap else start[row["req"]])].append(row)
    return dict(sorted(days.items()))


@pytest.mark.parametrize("run", [0, 3])
def test_day_by_day_is_the_same_as_at_once(run: int, tmp_path: Path) -> None:
    world = replace(make_world(3, requests=120, days=7), run=run, lag="2s")
    files = write(world, tmp_path, files=list(by_day(world).values()))
    out = tmp_path / "out"
    prepare(files[:3], out)
    statistics = (out / "state" / "statistics.json").read_bytes()
    for file in files[3:]:
        before = {p.name: p.stat().st_ino for p in (out / "requests").rglob("part-train-*")}
        prepare([file], out, append=True)
        after = {p.name: p.stat().st_ino for p in (out / "requests").rglob("part-train-*")}
        assert before.items() <= after.items()  # what trained is not written again
        assert (out / "state" / "statistics.json").read_bytes() == statistics
    prepare(files, tmp_path / "once")
    (mine, my_items), (its, its_items) = found(out), found(tmp_path / "once")
    assert my_items == its_items
    fixed_on_the_first_days = dict.fromkeys(("hour", "speed", "group"))
    assert [row | fixed_on_the_first_days for row in mine] == [row | fixed_on_the_first_days for row in its]
    assert tree_bytes(out / "vocabularies") == tree_bytes(tmp_path / "once" / "vocabularies")
    # Several days at once are no different from one after the other.
    prepare(files[:3], tmp_path / "two")
    prepare(files[3:], tmp_path / "two", append=True)
    assert found(tmp_path / "two") == found(out)
    assert tree_bytes(tmp_path / "two" / "requests") == tree_bytes(out / "requests")


def test_a_history_file_may_reach_beyond_the_last_day(tmp_path: Path) -> None:
    """Its later events change nothing until their day is appended, and then they are there once."""
    world = make_world(4, requests=120, days=7)
    days = list(by_day(world).values())
    rng = np.random.default_rng(0)
    world.past += [
        {"uid": f"u{rng.integers(0, 9)}", "iid": 10_000 + n, "ts": FIRST + int(rng.integers(0, 7 * DAY_MS))}
        for n in range(60)
    ]
    files = write(world, tmp_path, files=days)
    out = tmp_path / "out"
    prepare(files[:3], out)
    for known in range(3, len(files) + 1):
        last = max(day_of(row["ts"]) for rows in days[:known] for row in rows)
        past = [row for row in world.past if day_of(row["ts"]) <= last]
        write(replace(world, past=past), folder := tmp_path / str(known), files=days[:known])
        prepare(sorted(folder.glob("log-*")), tmp_path / f"once{known}")
        if known > 3:
            prepare([files[known - 1]], out, append=True)
        (mine, my_items), (its, its_items) = found(out), found(tmp_path / f"once{known}")
        assert my_items == its_items
        assert [row["seen"] for row in mine] == [row["seen"] for row in its]
        assert tree_bytes(out / "vocabularies") == tree_bytes(tmp_path / f"once{known}" / "vocabularies")
    assert sum(event[0] >= 10_000 for row in mine for event in row["seen"]) > 20


# --- mutations ------------------------------------------------------------------------------------------------------

HUGE = 2**62
Mutation = Callable[[np.random.Generator, World, Row], object]
HARMLESS: dict[str, Mutation] = {
    "no feedback": lambda rng, w, row: row.update(click=None, ms_watched=None),
    "negative item": lambda rng, w, row: row.update(iid=-HUGE),
    "huge item": lambda rng, w, row: row.update(iid=HUGE + int(rng.integers(2))),
    "empty user": lambda rng, w, row: [other.update(uid="") for other in w.log if other["req"] == row["req"]],
    "long request": lambda rng, w, row: [other.update(req="x" * 999) for other in w.log if other["req"] == row["req"]],
    "no features": lambda rng, w, row: [
        other.update(dict.fromkeys(REQUEST_FEATURES)) for other in w.log if other["req"] == row["req"]
    ],
    "missing hour": lambda rng, w, row: [o.update(hour=math.nan) for o in w.log if o["req"] == row["req"]],
    "null among tags": lambda rng, w, row: [o.update(tags=["b", None]) for o in w.log if o["req"] == row["req"]],
    "a user without a row": lambda rng, w, row: w.users.clear(),
    "items without a row": lambda rng, w, row: w.items.clear(),
    "no past": lambda rng, w, row: w.past.clear(),
    "negative minutes": lambda rng, w, row: row.update(ms_watched=-1.0),
    "float ids": lambda rng, w, row: (w.types.update(speed=pa.float64()), row)[1],
    "other types": lambda rng, w, row: w.types.update(
        uid=pa.large_string(), click=pa.float64(), ts=pa.uint64(), device=pa.dictionary(pa.int8(), pa.string())
    ),
}
BAD: dict[str, Mutation] = {
    "no request": lambda rng, w, row: row.update(req=None),
    "no user": lambda rng, w, row: row.update(uid=None),
    "no item": lambda rng, w, row: row.update(iid=None),
    "no time": lambda rng, w, row: row.update(ts=None),
    "seconds for milliseconds": lambda rng, w, row: row.update(ts=row["ts"] // 1000),
    "time of a far future": lambda rng, w, row: row.update(ts=HUGE),
    "time 0": lambda rng, w, row: row.update(ts=0),
    "NaN label": lambda rng, w, row: row.update(click=math.nan),
    "infinite label": lambda rng, w, row: row.update(ms_watched=-math.inf),
    "label beyond float32": lambda rng, w, row: row.update(ms_watched=1e300),
    "flag 2": lambda rng, w, row: row.update(shown=2),
    "flag null": lambda rng, w, row: row.update(in_ranking=None),
    "no stage": lambda rng, w, row: row.update(shown=0, in_ranking=False, coarse=0),
    "cut and shown": lambda rng, w, row: row.update(shown=1, coarse=1),
    "cut and ranked": lambda rng, w, row: row.update(in_ranking=True, coarse=1),
    "infinite hour": lambda rng, w, row: [o.update(hour=math.inf) for o in w.log if o["req"] == row["req"]],
    "short vector": lambda rng, w, row: row.update(place=[1.0]),
    "NaN in a vector": lambda rng, w, row: row.update(place=[1.0, math.nan]),
    "rank out of int16": lambda rng, w, row: row.update(rank=40_000),
    "row twice": lambda rng, w, row: w.log.append(dict(row)),
    "user without id": lambda rng, w, row: w.users.append({"uid": None, "gender": "f", "age": 3.0}),
    "user described twice": lambda rng, w, row: w.users.append(w.users[0] | {"gender": "x"}) if w.users else row,
    "infinite age": lambda rng, w, row: w.users.insert(0, {"uid": row["uid"], "gender": "f", "age": math.inf}),
    "only users without id": lambda rng, w, row: w.users.__setitem__(
        slice(None), [{"uid": None, "gender": "", "age": 1.0}]
    ),
    "item described twice": lambda rng, w, row: w.items.append(w.items[0] | {"price": 4.0}) if w.items else row,
    "past without user": lambda rng, w, row: w.past.append({"uid": None, "iid": 3, "ts": FIRST}),
    "past without time": lambda rng, w, row: w.past.append({"uid": "u1", "iid": 3, "ts": None}),
    "past in seconds": lambda rng, w, row: w.past.append({"uid": "u1", "iid": 3, "ts": FIRST // 1000}),
    "item twice": lambda rng, w, row: w.log.append(row | {"ts": row["ts"] + int(rng.integers(-1, 2)), "click": None}),
}
REQUEST_BAD: dict[str, Mutation] = {
    "two users": lambda rng, w, row: w.log.append(row | {"iid": 77, "uid": "someone"}),
    "two hours apart": lambda rng, w, row: w.log.append(row | {"iid": 77, "ts": row["ts"] + 7_200_000}),
    "two devices": lambda rng, w, row: w.log.append(row | {"iid": 77, "device": "watch"}),
    "two lists of tags": lambda rng, w, row: w.log.append(row | {"iid": 77, "tags": ["c", "c", "c"]}),
    "two places": lambda rng, w, row: w.log.append(row | {"iid": 77, "place": [9.0, 9.0]}),
}


def one_line(error: UserError) -> str:
    assert len(str(error).splitlines()) == 1
    return str(error)


@pytest.mark.parametrize("name", [*BAD, *REQUEST_BAD])
def test_a_bad_row_stops_or_is_left_out_and_counted(name: str, tmp_path: Path) -> None:
    world = make_world(5, requests=20, days=4)
    row = next(row for row in world.log if row["shown"] and row["place"])
    (BAD | REQUEST_BAD)[name](np.random.default_rng(0), world, row)
    files = write(world, tmp_path)
    with pytest.raises(
        UserError, match=r"\w+(-0)?\.parquet: row \d+: column \w+: found .*; --on-error skip leaves"
    ) as caught:
        prepare(files, tmp_path / "out")
    assert "; expected" in one_line(caught.value)
    assert not list(tmp_path.glob("*out*"))
    schema, problems = prepare(files, tmp_path / "out", skip=True)
    lost = check(tmp_path / "out", world)
    assert sum(problems.counts.values()) == lost.total() > 0
    assert schema.provenance["skipped"] == dict(problems.counts)
    assert len(problems.lines()) == 1


@pytest.mark.parametrize("seed", [*range(60), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(60, 300))])
def test_a_mutated_log_gives_what_its_good_rows_give(seed: int, tmp_path: Path) -> None:
    rng = np.random.default_rng(seed)
    world = replace(make_world(seed, requests=14, days=4), run=int(seed % 5 == 0) * 2, gap=int(seed % 5 == 1) * 600)
    mutations = HARMLESS | BAD | ({} if world.run or world.gap else REQUEST_BAD)
    for name in rng.choice(list(mutations), rng.integers(1, 5)):
        mutations[name](rng, world, world.log[rng.integers(len(world.log))])
    world.log = [world.log[i] for i in rng.permutation(len(world.log))]
    files = write(world, tmp_path, files=[world.log[: len(world.log) // 2], world.log[len(world.log) // 2 :]])
    _, problems = prepare(files, tmp_path / "out", skip=True)
    lost = check(tmp_path / "out", world)
    assert sum(problems.counts.values()) == lost.total()
    if lost.total():
        with pytest.raises(UserError) as caught:
            prepare(files, tmp_path / "stopped")
        one_line(caught.value)
    else:
        assert prepare(files, tmp_path / "stopped")[0].hash == Dataset(tmp_path / "out").schema.hash


def refusal(files: Sequence[Path], out: Path, *, skip: bool) -> list[str]:
    """The lines of a refusal, or nothing, and then there is a dataset."""
    try:
        prepare(files, out, skip=skip)
    except UserError as error:
        return str(error).splitlines()
    Dataset(out)
    return []


ODD: list[tuple[pa.DataType, object]] = [
    (pa.null(), None),
    (pa.bool_(), True),
    (pa.int8(), -1),
    (pa.uint64(), 2**64 - 1),
    (pa.float16(), np.float16(1)),
    (pa.float32(), 1e38),
    (pa.float64(), math.nan),
    (pa.decimal128(5, 2), decimal.Decimal("1.5")),
    (pa.decimal256(60, 0), decimal.Decimal(10) ** 50),
    (pa.string_view(), "x"),
    (pa.large_string(), "u1"),
    (pa.binary(), b"\xff"),
    (pa.timestamp("us"), datetime.datetime(2024, 4, 1)),
    (pa.date32(), datetime.date(2024, 4, 1)),
    (pa.time32("s"), datetime.time(1)),
    (pa.duration("s"), datetime.timedelta(1)),
    (pa.struct([("a", pa.int8())]), {"a": 1}),
    (pa.map_(pa.string(), pa.int8()), [("a", 1)]),
    (pa.list_(pa.null()), [None]),
    (pa.list_(pa.int64()), [1, 2]),
    (pa.list_(pa.float64()), [math.inf, 1.0]),
    (pa.list_(pa.float32(), 2), [1.0, 2.0]),
    (pa.list_(pa.binary()), [b"x"]),
    (pa.list_(pa.list_(pa.int8())), [[1]]),
    (pa.large_list(pa.string()), ["b"]),
]


@pytest.mark.slow
@pytest.mark.parametrize("kind", range(len(ODD)), ids=lambda kind: str(ODD[kind][0]))
def test_a_column_of_another_type_is_read_or_refused(kind: int, tmp_path: Path) -> None:
    log = write(make_world(3, requests=12, days=4), tmp_path)
    rng = np.random.default_rng(kind)
    for path in (log[0], *(tmp_path / f"{name}.parquet" for name in ("items", "users", "past"))):
        table = pq.read_table(path)
        for column in rng.permutation(table.num_columns)[:6]:
            values = [ODD[kind][1] if (row + kind) % 3 or column % 2 else None for row in range(len(table))]
            name = table.column_names[column]
            pq.write_table(table.set_column(int(column), name, pa.array(values, ODD[kind][0])), path)
            shutil.rmtree(tmp_path / "out", ignore_errors=True)
            lines = refusal(log, tmp_path / "out", skip=bool(column % 2))
            assert all(str(tmp_path) in line for line in lines)
        pq.write_table(table, path)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["log-0.parquet", "items.parquet", "users.parquet", "past.parquet", "map.yaml"])
def test_flipped_bytes(name: str, tmp_path: Path) -> None:
    log = write(make_world(3, requests=12, days=4), tmp_path)
    content = (tmp_path / name).read_bytes()
    for seed in range(60):
        rng = np.random.default_rng(seed)
        flipped = np.frombuffer(content, np.uint8).copy()
        flipped[rng.integers(0, len(flipped), 2)] = rng.integers(0, 256, 2)
        (tmp_path / name).write_bytes(flipped.tobytes())
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        assert all(str(tmp_path) in line for line in refusal(log, tmp_path / "out", skip=True)) or name == "map.yaml"
