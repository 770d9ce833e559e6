"""RecFlow -> dataset, against a slow second reading of the same files in plain Python, and random damage to them."""

from __future__ import annotations

import math
from collections import Counter
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.feather
import pytest

from benchmarks.recflow_days import make_day, write_day
from joint.data.dataset import Dataset
from joint.data.recflow import catalogue as recflow_catalogue
from joint.data.recflow import reader as recflow
from joint.data.recflow import rows as recflow_rows
from joint.data.recflow import write as recflow_write
from joint.data.recflow.reader import prepare_recflow
from joint.errors import DataError
from joint.schema import NEVER, SPLITS, Stage

DAYS = ("2024-02-02", "2024-02-03", "2024-02-04", "2024-02-05", "2024-02-06")  # three of period 1, two of period 2
CONTEXT = ("user_id", "device_id", "age", "gender", "province")
VIDEO = ("author_id", "category_level_one", "category_level_two", "upload_type", "upload_timestamp", "duration")
FEEDBACK = ("playing_time", "effective_view", "long_view", "like", "follow", "forward", "comment")
LATER = ("rank_pos", "rank_neg", "rerank_pos", "rerank_neg", "realshow")
FLAGS = ("prerank_neg", "coarse_neg", *LATER)
CHINA = timedelta(hours=8)


def small_day(day: str, requests: int = 12, **settings: Any) -> pd.DataFrame:
    frame = make_day(day, requests, users=6, videos=200, ranked=30, **settings)
    frame.loc[(frame.realshow == 1) & (frame.video_id % 7 == 0), ["rank_pos", "rerank_pos"]] = (
        0  # known by exposure alone
    )
    return frame


def release(root: Path, days: tuple[str, ...] = DAYS, **settings: Any) -> Path:
    for day in days:
        write_day(root, day, small_day(day), **settings)
    return root


def read_frames(root: Path) -> list[tuple[str, bool, pd.DataFrame]]:
    days = sorted({path.stem for path in root.glob("*/*.feather")})
    logged = {day: (root / "all_stage" / f"{day}.feather").exists() for day in days}
    frames = []
    for day in days:
        path = root / ("all_stage" if logged[day] else "realshow") / f"{day}.feather"
        table = pa.feather.read_table(path, memory_map=False)
        names = [{"pre_rank_neg": "prerank_neg"}.get(n.strip(), n.strip()) for n in table.column_names]
        assert sorted(set(names)) == sorted(names)
        frames.append(
            (day, logged[day], pd.DataFrame({n: c.to_pylist() for n, c in zip(names, table.columns, strict=True)}))
        )
    return frames


def is_right(row: dict[str, Any], day: str) -> bool:
    """Every rule of docs/recflow.md for one row."""
    if any(value is None or value != value for value in row.values()):
        return False
    if not all(0 <= row[name] < 2**31 - 2 for name in (*CONTEXT, "video_id", *VIDEO[:4])):
        return False
    if row["request_id"] < 0 or not all(0 <= row[n] < 2**31 for n in ("upload_timestamp", "duration", "playing_time")):
        return False
    if not all(row[name] in (0, 1) for name in (*FLAGS, *FEEDBACK[1:])):
        return False
    local = (
        datetime.fromtimestamp(0, UTC) + CHINA + timedelta(milliseconds=min(max(row["request_timestamp"], 0), 10**14))
    )
    cut, later = row["prerank_neg"] + row["coarse_neg"], sum(row[name] for name in LATER)
    if str(local.date()) != day or cut > 1 or (cut and later):
        return False
    if row["rank_pos"] + row["rank_neg"] > 1 or row["rerank_pos"] + row["rerank_neg"] > 1:
        return False
    if (day < "2024-02-05" and not cut + later) or (not row["realshow"] and any(row[name] for name in FEEDBACK)):
        return False
    indices = logged_orders(row, day)
    return all(value is None or 0 <= value < 2**15 for value in indices)


def logged_orders(row: dict[str, Any], day: str) -> tuple[int | None, int | None]:
    if day >= "2024-02-05":
        inside = [not row["prerank_neg"] and not row["coarse_neg"]] * 2
    else:
        inside = [row["rank_pos"] or row["rank_neg"], row["rerank_pos"] or row["rerank_neg"]]
    return tuple(row[n] if i else None for n, i in zip(("rank_index", "rerank_index"), inside, strict=True))  # type: ignore[return-value]


def stages_of(row: dict[str, Any], day: str) -> int:
    flags = sum(Stage[name.upper() if name != "realshow" else "EXPOSED"] for name in FLAGS if row[name])
    if not row["prerank_neg"] and not row["coarse_neg"]:
        flags |= Stage.RANKED
        if day >= "2024-02-05" or row["rerank_pos"] or row["rerank_neg"] or row["realshow"]:
            flags |= Stage.RERANKED
    return int(flags)


def requests_of(frame: pd.DataFrame, day: str, wrong: Counter[str]) -> list[list[dict[str, Any]]]:
    """The kept rows of each request, requests in time order."""
    rows = [row for row in frame.to_dict("records") if is_right(row, day)]
    wrong["rows"] += len(frame) - len(rows) if len(frame) else 1  # an empty file is one thing that is wrong
    held: dict[int, list[dict[str, Any]]] = {}
    for row in rows:
        held.setdefault(row["request_id"], []).append(row)
    requests = []
    for rows in held.values():
        kept = []
        if len({tuple(row[name] for name in ("request_timestamp", *CONTEXT)) for row in rows}) == 1:
            kept = list({row["video_id"]: row for row in reversed(rows)}.values())[::-1]
            kept.sort(key=rows.index)
            requests.append(kept)
        wrong["rows"] += len(rows) - len(kept)
    return sorted(requests, key=lambda rows: (rows[0]["request_timestamp"], rows[0]["request_id"]))


def of_one_day(days: list[list[list[dict[str, Any]]]], wrong: Counter[str]) -> list[list[list[dict[str, Any]]]]:
    """Without the requests whose id is on two days."""
    times = Counter(rows[0]["request_id"] for requests in days for rows in requests)
    wrong["rows"] += sum(len(rows) for requests in days for rows in requests if times[rows[0]["request_id"]] > 1)
    return [[rows for rows in requests if times[rows[0]["request_id"]] == 1] for requests in days]


def clock(seconds: int) -> list[int]:
    local = datetime.fromtimestamp(seconds, UTC) + CHINA
    return [local.isoweekday(), local.hour + 1, local.minute + 1]


def oracle(
    root: Path, *, history: int, competitors: int, window: int = 30
) -> tuple[list[dict[str, Any]], dict[int, list[Any]], int]:
    """Requests in order, the catalogue by video id, and the number of rows left out."""
    wrong: Counter[str] = Counter()
    frames = read_frames(root)
    held = []
    for day, whole, frame in frames:
        if not whole:
            exposed = {name: int(name == "realshow") for name in (*FLAGS, "rank_index") if name not in frame}
            frame = frame.assign(**exposed)
        held.append(requests_of(frame, day, wrong))
    held = of_one_day(held, wrong)
    logged = [day for (day, whole, _), requests in zip(frames, held, strict=True) if whole and requests]
    splits = dict(zip(logged, ["train"] * (len(logged) - 2) + ["valid", "test"], strict=True))
    events: dict[int, list[tuple[int, int, list[int]]]] = {}
    active: dict[int, set[int]] = {}
    videos: dict[int, list[Any]] = {}
    out: list[dict[str, Any]] = []
    edges: list[int] = []
    for (day, whole, _), requests in zip(frames, held, strict=True):
        number = (datetime.fromisoformat(day) - datetime(1970, 1, 1)).days
        seen = {user: len([d for d in days if number - window <= d < number]) for user, days in active.items()}
        for rows in requests:
            head = rows[0]
            seconds, user = head["request_timestamp"] // 1000, head["user_id"]
            past = [event for event in events.get(user, []) if event[0] < seconds][-history:]
            if whole:
                indices = [logged_orders(row, day) for row in rows]
                out.append(
                    {"request_id": head["request_id"], "timestamp": seconds, "day": day, "split": splits[day]}
                    | {"active": seen.get(user, 0), "candidates": [row["video_id"] for row in rows]}
                    | {name: head[name] + 1 for name in CONTEXT}
                    | dict(zip(("weekday", "hour", "minute"), clock(seconds), strict=True))
                    | {"effective": [e[1] for e in past], "effective.timestamp": [e[0] for e in past]}
                    | {"effective.competitors": [video for event in past for video in event[2]]}
                    | {"stages": [stages_of(row, day) for row in rows]}
                    | {
                        n: [-1 if i[k] is None else i[k] for i in indices]
                        for k, n in enumerate(("rank_index", "rerank_index"))
                    }
                    | {n: [row[n] if row["realshow"] else None for row in rows] for n in FEEDBACK}
                )
            winners = [row["video_id"] for row in rows if row["rank_pos"]][:competitors] if whole else []
            winners += [-1] * (competitors - len(winners))
            for row in rows:
                if row["realshow"] and row["effective_view"]:
                    events.setdefault(user, []).append((seconds, row["video_id"], winners))
                video = videos.setdefault(row["video_id"], [[row[name] for name in VIDEO], number, NEVER])
                if row["realshow"]:
                    video[2] = min(video[2], number)
            active.setdefault(user, set()).add(number)
        today = sorted(seen.get(user, 0) for user in {rows[0]["user_id"] for rows in requests})
        if splits.get(day) == "train":
            edges = [today[k * (len(today) - 1) // 5] + 1 for k in (1, 2, 3, 4)] if today else []
    for request in out:
        days_active = request.pop("active")
        request["group"] = sum(days_active >= edge for edge in edges)
    return out, videos, wrong["rows"]


def found(out: Path, competitors: int) -> tuple[list[dict[str, Any]], dict[int, list[Any]]]:
    """The dataset in the form of the oracle."""
    dataset = Dataset(out)
    video = dataset.catalogue["video_id"] - 1
    columns = [dataset.catalogue[name] for name in VIDEO[:4]]
    clocks = [dataset.catalogue[f"upload_{name}"] for name in ("weekday", "hour", "minute")]
    rows = zip(
        video,
        dataset.first_day[""],
        dataset.first_day["exposed"],
        *columns,
        *clocks,
        dataset.catalogue["duration"],
        strict=True,
    )
    videos = {int(v): [[int(x) for x in rest[:-1]], int(a), int(e), float(rest[-1])] for v, a, e, *rest in rows}
    requests: list[dict[str, Any]] = []
    for split in SPLITS:
        parts = [part for part in dataset.schema.parts if part.split == split]
        for part in parts:
            columns = dataset.read(part, further=dataset.further_columns()).columns
            for i in range(part.rows):
                request: dict[str, Any] = {"day": part.day, "split": split}
                for name, column in columns.items():
                    if name == "day":
                        continue
                    values = column[i] if isinstance(column, np.ndarray) else column.take(np.array([i])).values
                    values = values.tolist()
                    if name in ("candidates", "effective", "effective.competitors"):
                        values = [int(video[v]) if v >= 0 else -1 for v in values]
                    if name in FEEDBACK:
                        values = [None if math.isnan(v) else v for v in values]
                    request[name] = values
                requests.append(request)
    if not competitors:
        requests = [request | {"effective.competitors": []} for request in requests]
    return requests, videos


def assert_equal(root: Path, out: Path, *, history: int = 5, competitors: int = 3, window: int = 30) -> int:
    """The dataset says what the files say; returns the number of rows left out."""
    expected, videos, wrong = oracle(root, history=history, competitors=competitors, window=window)
    requests, catalogue = found(out, competitors)
    for request in expected:
        minutes = [None if v is None else float(np.float32(v / 60_000)) for v in request["playing_time"]]
        request["playing_time"] = minutes
    assert requests == expected
    for raw in videos.values():
        *ids, uploaded, duration = raw[0]
        raw[0] = [i + 1 for i in ids] + clock(uploaded)
        raw.append(pytest.approx(math.log1p(duration / 1000), rel=1e-6))
    assert catalogue == videos
    assert list(catalogue) == sorted(catalogue)
    return wrong


def prepare(root: Path, out: Path, **settings: Any) -> Any:
    return prepare_recflow(root, out, **{"history": 5, "competitors": 3} | settings)


@pytest.mark.parametrize("order", ["time", "requests", "rows"])
def test_dataset_says_what_the_files_say_wherever_rows_lie(tmp_path, order, monkeypatch):
    monkeypatch.setattr(recflow_rows, "CHUNK", 97)
    monkeypatch.setattr(recflow_write, "ROWS", 300)
    monkeypatch.setattr(recflow_catalogue, "RANGE", 16)
    monkeypatch.setattr(recflow_catalogue, "SAMPLE", 4)
    root = release(tmp_path / "recflow", order=order)
    schema = prepare(root, tmp_path / "out")
    assert assert_equal(root, tmp_path / "out") == 0
    assert len([part for part in schema.parts if part.day == DAYS[0]]) > 1
    times = [(part.day, part.begin, part.end) for part in schema.parts]
    assert times == sorted(times)
    assert [schema.requests(split) for split in SPLITS] == [36, 12, 12]
    assert not list(tmp_path.glob(".*"))


def test_the_made_up_files_have_something_to_find(tmp_path):
    requests, videos, _ = oracle(release(tmp_path), history=5, competitors=3)
    stages = [s for request in requests for s in request["stages"]]
    assert all(any(s & flag for s in stages) for flag in Stage if flag != Stage.RANDOM)
    assert max(len(request["effective"]) for request in requests) == 5
    assert len({request["group"] for request in requests}) > 1
    assert {video[2] == NEVER for video in videos.values()} == {True, False}
    assert any(video[1] < video[2] < NEVER for video in videos.values())


def test_groups_count_the_days_of_the_window_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(recflow, "WINDOW", 2)
    root = tmp_path / "in"
    for number, day in enumerate(DAYS):  # few requests: users come and go
        write_day(root, day, small_day(day, requests=3 + number % 2, seed=number))
    prepare(root, tmp_path / "out", held_out=(1, 1))
    assert_equal(root, tmp_path / "out", window=2)
    assert len({request["group"] for request in found(tmp_path / "out", 3)[0]}) > 1


def test_without_competitors_and_with_sparse_ids(tmp_path):
    for day in DAYS:
        frame = small_day(day)
        frame["video_id"] = frame.video_id * 10_000_000 + 5  # far too sparse for a look-up table
        write_day(tmp_path / "in", day, frame)
    schema = prepare(tmp_path / "in", tmp_path / "out", competitors=0, history=50)
    assert_equal(tmp_path / "in", tmp_path / "out", competitors=0, history=50)
    assert schema.history("effective").competitors == 0
    assert schema.feature("video_id").size == 199 * 10_000_000 + 7


def test_a_day_without_all_stage_makes_no_requests_but_feeds_histories(tmp_path, capsys):
    root = release(tmp_path / "recflow")
    (root / "all_stage" / "2024-02-03.feather").unlink()
    schema = prepare(root, tmp_path / "out")
    assert_equal(root, tmp_path / "out")
    assert "no all_stage/2024-02-03.feather" in capsys.readouterr().err
    assert {part.day for part in schema.parts} == set(DAYS) - {"2024-02-03"}
    assert schema.provenance["days_of_exposures_only"] == ["2024-02-03"]
    frame = small_day("2024-02-03").query("realshow == 1").drop(columns=[*FLAGS, "rank_index", "rerank_index"])
    frame.reset_index(drop=True).to_feather(root / "realshow" / "2024-02-03.feather")
    assert prepare(root, tmp_path / "bare").hash == schema.hash  # stage columns say nothing new of exposures


def test_names_and_types_of_columns_do_not_matter(tmp_path):
    plain, odd = release(tmp_path / "plain"), tmp_path / "odd"
    for day, kind in zip(DAYS, ("int64", "int32", "uint64", "int64", "int32"), strict=True):
        frame = small_day(day)
        flags = {name: frame[name].astype("bool" if kind == "int32" else "uint8") for name in FLAGS}
        ids = {name: frame[name].astype(kind) for name in ("video_id", "author_id", "user_id")}
        frame = frame.assign(**flags, **ids)[sorted(frame)]
        write_day(odd, day, frame.rename(columns={"prerank_neg": " pre_rank_neg ", "like": "like "}))
    write_day(odd, DAYS[0], small_day(DAYS[0]), compression="uncompressed")
    assert prepare(plain, tmp_path / "a").hash == prepare(odd, tmp_path / "b").hash


def test_features_of_a_video_are_those_of_its_first_row(tmp_path):
    root = release(tmp_path / "recflow")
    schema = prepare(root, tmp_path / "out")
    rows = pd.concat([frame for _, _, frame in read_frames(root)])
    changing = rows.groupby("video_id")[list(VIDEO)].nunique().gt(1).any(axis=1).sum()
    assert schema.provenance["videos_whose_features_change"] == changing > 0


def test_events_of_the_same_second_and_of_the_same_request_are_no_history(tmp_path):
    frames = {day: small_day(day) for day in DAYS}
    for frame in frames.values():
        frame["request_timestamp"] -= frame.request_timestamp % 40_000_000  # a few moments a day
        frame["request_timestamp"] += frame.request_id % 2  # and milliseconds apart within them
        begin = frame.request_timestamp.max() // 86_400_000 * 86_400_000 - 28_800_000
        frame["request_timestamp"] = frame.request_timestamp.clip(begin, begin + 86_399_999)
    for day, frame in frames.items():
        write_day(tmp_path / "in", day, frame)
    prepare(tmp_path / "in", tmp_path / "out", history=50, skip=True)
    assert_equal(tmp_path / "in", tmp_path / "out", history=50)


VALUES = (-1, 0, 1, 2, 7, 2**15, 2**31 - 3, 2**31 - 2, 2**31, 2**62, None)


def damage_values(frame: pd.DataFrame, rng: np.random.Generator) -> pd.DataFrame:
    """Some cells of a few columns become other values."""
    frame = frame.astype("Int64")
    for name in rng.choice(frame.columns, rng.integers(1, 4), replace=False):
        at = rng.choice(len(frame), rng.integers(1, 6), replace=False)
        value = VALUES[rng.integers(len(VALUES))] if rng.random() < 0.6 else frame[name].iloc[rng.integers(len(frame))]
        frame.loc[at, name] = value
    return frame


def damage_rows(frame: pd.DataFrame, rng: np.random.Generator) -> pd.DataFrame:
    """Rows are repeated, lost, moved, or (seldom) all lost."""
    at = rng.integers(0, len(frame), rng.integers(0, 2 * len(frame)) if rng.random() < 0.9 else 0)
    return frame.iloc[at]


def damage_columns(frame: pd.DataFrame, rng: np.random.Generator) -> pd.DataFrame:
    """A column gets another type, another name, or is lost."""
    name = rng.choice(frame.columns)
    kind = rng.integers(5)
    if kind == 0:
        return frame.drop(columns=name)
    if kind == 1:
        return frame.rename(columns={name: f" {name}  "})
    return frame.assign(**{name: frame[name].astype(["float64", "str", "uint64"][kind - 2])})


@pytest.mark.parametrize("seed", range(36))
def test_damaged_files_end_in_one_line_or_in_what_is_left_of_them(tmp_path, seed):
    rng = np.random.default_rng(seed)
    days, root = DAYS[1:], tmp_path / "recflow"
    for day in days:
        write_day(root, day, small_day(day, requests=5))
    for day in rng.choice(days, rng.integers(1, 3), replace=False):
        path = root / rng.choice(["all_stage", "realshow"], p=[0.85, 0.15]) / f"{day}.feather"
        how = [damage_values, damage_values, damage_rows, damage_columns, None][seed % 5]
        if how:
            how(pd.read_feather(path), rng).reset_index(drop=True).to_feather(path)
        else:
            data = bytearray(path.read_bytes())
            if rng.random() < 0.5:
                data = data[: rng.integers(0, len(data))]
            else:
                data[rng.integers(0, len(data))] ^= 1 << rng.integers(8)
            path.write_bytes(data)
    try:
        schema = prepare(root, tmp_path / "out", skip=True)
    except DataError as error:
        assert "\n" not in str(error)  # noqa: PT017
        assert str(root) in str(error)  # noqa: PT017
        with pytest.raises(DataError):
            prepare(root, tmp_path / "out")
        assert not (tmp_path / "out").exists()
        return
    wrong = assert_equal(root, tmp_path / "out")
    assert wrong == sum(schema.provenance["skipped"].values())
    if wrong:
        with pytest.raises(DataError, match="--on-error skip"):
            prepare(root, tmp_path / "strict")
    else:
        assert prepare(root, tmp_path / "strict").hash == schema.hash
