"""Discovery minutes: worked out by hand, against a slow loop, and through prepare, at once and day by day."""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from joint.data.dataset import Dataset
from joint.data.flat.dwm import Pairs, discovery_minutes
from joint.data.flat.map import read_map
from joint.data.flat.reader import prepare_log
from joint.data.problems import Problems
from joint.schema import Schema

HOUR, DAY = 3600, 86_400
WINDOW, WITHIN = 7 * DAY, DAY
Exposure = tuple[int, int, int, int]  # user, item, time, request
Playback = tuple[int, int, int, float, bool]  # user, item, time, minutes, exploring


def minutes(
    exposures: Sequence[Exposure], playbacks: Sequence[Playback], window: int = WINDOW, within: int = WITHIN
) -> list[float]:
    e = [np.array([row[i] for row in exposures], np.int64) for i in range(4)]
    p = [np.array([row[i] for row in playbacks]) for i in range(5)] if playbacks else [np.zeros(0, np.int64)] * 5
    return discovery_minutes(
        Pairs(*e[:3]), e[3], Pairs(*p[:3]), p[3].astype(float), p[4].astype(bool), window=window, within=within
    ).tolist()


def test_minutes_of_the_week_after_the_first_playback_wherever_watched() -> None:
    exposures = [(1, 7, 1000, 50), (1, 8, 1000, 50), (2, 7, 1000, 51)]
    playbacks = [
        (1, 7, 1060, 10.0, True),  # discovered
        (1, 7, 1060 + 3 * DAY, 30.0, False),  # elsewhere on the platform: counts
        (1, 7, 1060 + WINDOW - 1, 4.0, False),
        (1, 7, 1060 + WINDOW, 100.0, True),  # the window is over
        (2, 7, 1060, 5.0, False),  # user 2 plays it outside of the exploring collections
    ]
    assert minutes(exposures, playbacks) == [44.0, 0.0, 0.0]


def test_what_was_watched_before_is_not_discovered() -> None:
    before = (1, 7, 500, 1.0, False)
    assert minutes([(1, 7, 1000, 1)], [before, (1, 7, 1060, 10.0, True)]) == [0.0]
    # Also if that was a year ago, and even if it was a discovery then.
    assert minutes([(1, 7, 400 * DAY, 1)], [(1, 7, 500, 1.0, True), (1, 7, 400 * DAY, 9.0, True)]) == [0.0]


def test_the_latest_exposure_before_the_playback_gets_it() -> None:
    played = [(1, 7, 5000, 10.0, True)]
    exposures = [(1, 7, 1000, 9), (1, 7, 4000, 3), (1, 7, 5001, 4)]
    assert minutes(exposures, played) == [0.0, 10.0, 0.0]
    assert minutes(exposures[::-1], played) == [0.0, 10.0, 0.0]
    # In the same second the request with the highest id, once.
    assert minutes([(1, 7, 4000, 3), (1, 7, 4000, 8), (1, 7, 4000, 5)], played) == [0.0, 10.0, 0.0]


@pytest.mark.parametrize(
    ("shown", "gets"), [(5000, 10.0), (5000 - WITHIN, 10.0), (5000 - WITHIN - 1, 0.0), (5001, 0.0)]
)
def test_on_the_boundaries(shown: int, gets: float) -> None:
    assert minutes([(1, 7, shown, 1)], [(1, 7, 5000, 10.0, True)]) == [gets]


def test_two_playbacks_in_the_first_second() -> None:
    both = [(1, 7, 5000, 10.0, False), (1, 7, 5000, 2.0, True)]
    assert minutes([(1, 7, 5000, 1)], both) == minutes([(1, 7, 5000, 1)], both[::-1]) == [12.0]


def test_nothing_at_all() -> None:
    assert minutes([], [(1, 7, 5000, 10.0, True)]) == []
    assert minutes([(1, 7, 5000, 1)], []) == [0.0]


def slow(exposures: Sequence[Exposure], playbacks: Sequence[Playback], window: int, within: int) -> list[float]:
    """One pair of user and item at a time."""
    found = [0.0] * len(exposures)
    for user, item in {(p[0], p[1]) for p in playbacks}:
        played = sorted(p for p in playbacks if p[:2] == (user, item))
        first = played[0][2]
        if not any(p[4] for p in played if p[2] == first):
            continue
        before = [
            (e[2], e[3], n) for n, e in enumerate(exposures) if e[:2] == (user, item) and 0 <= first - e[2] <= within
        ]
        if before:
            found[max(before)[2]] = math.fsum(p[3] for p in played if p[2] < first + window)
    return found


@pytest.mark.parametrize("seed", range(100))
def test_against_a_slow_loop(seed: int) -> None:
    rng = np.random.default_rng(seed)
    e = [(*map(int, rng.integers(0, (3, 4, 40))), n) for n in range(rng.integers(0, 60))]
    p = [
        (*map(int, rng.integers(0, (3, 4, 60))), float(rng.integers(1, 9)), bool(rng.random() < 0.7))
        for _ in range(rng.integers(0, 30))
    ]
    window, within = int(rng.integers(0, 30)), int(rng.integers(0, 20))
    assert minutes(e, p, window, within) == slow(e, p, window, within)  # type: ignore[arg-type]
    order = rng.permutation(len(e))
    assert minutes([e[i] for i in order], p[::-1], window, within) == [slow(e, p, window, within)[i] for i in order]  # type: ignore[arg-type]


# --- through prepare ------------------------------------------------------------------------------------------------

MAP = """
request: request
user: user
item: item
time: {{column: time, unit: s}}
labels:
  click: click
  dwm:
    scale: 2
    discovery: {{{where}minutes: watched, collection: page, exploring: [home, search], window: 2d, within: 6h}}
"""
START = 1_700_006_400  # 2023-11-15 00:00 UTC
KINDS = {"request": pa.int64(), "user": pa.string(), "item": pa.string(), "time": pa.int64(), "click": pa.int8()}
KINDS |= {"watched": pa.float64(), "page": pa.string()}


def make(seed: int, days: int = 9) -> tuple[list[dict], list[dict]]:
    """Exposures and playbacks; of the latter more of what was shown lately than of other items."""
    rng = np.random.default_rng(seed)
    log: list[dict] = []
    watch: list[dict] = []
    pages = ["home", "search", "continue", "live"]
    for request in range(40 * days):
        user, time = f"u{rng.integers(12)}", START + request * DAY // 40
        for item in rng.permutation(60)[:3]:
            row = {"request": request, "user": user, "item": f"i{item}", "time": time, "click": 0}
            log.append(row | {"watched": float(rng.integers(0, 4)), "page": pages[rng.integers(4)]})
            while rng.random() < 0.4:
                later = time + int(rng.exponential(DAY if rng.random() < 0.5 else HOUR))
                watch.append({"user": user, "item": f"i{item}", "time": min(later, START + days * DAY - 1)})
    for _ in range(30):
        watch.append(
            {
                "user": f"u{rng.integers(14)}",
                "item": f"i{rng.integers(70)}",
                "time": START + int(rng.integers(-DAY, DAY)),
            }
        )
    for row in watch:
        row |= {"watched": float(rng.integers(0, 9)), "page": pages[rng.integers(4)]}
    return log, watch


def table(rows: Sequence[dict], names: Sequence[str]) -> pa.Table:
    return pa.table({name: pa.array([row[name] for row in rows], KINDS[name]) for name in names})


def prepare(
    log: Sequence[dict], watch: Sequence[dict] | None, folder: Path, out: Path, *, append: bool = False
) -> Schema:
    folder.mkdir(exist_ok=True)
    pq.write_table(table(log, list(KINDS)), folder / "log.parquet")
    if watch is not None:
        pq.write_table(table(watch, ["user", "item", "time", "watched", "page"]), folder / "watch.parquet")
    (folder / "map.yaml").write_text(MAP.format(where="" if watch is None else "watch_log: watch.parquet, "))
    m, tree = read_map(folder / "map.yaml")
    return prepare_log([folder / "log.parquet"], out, m, tree, problems=Problems(skip=False), append=append)


def labels(out: Path) -> dict[tuple[int, str], float]:
    """(request, item) -> minutes."""
    dataset = Dataset(out)
    items = pq.read_table(out / "vocabularies" / "item_id.parquet")["value"].to_pylist()
    found = {}
    for part in dataset.schema.parts:
        read = dataset.read(part)
        candidates = read.lists("candidates")
        request = read.scalars("request_id")[candidates.rows]
        for r, i, x in zip(request, candidates.values, read.lists("dwm").values, strict=True):
            found[int(r), items[i]] = float(x)
    return found


def expected(log: Sequence[dict], watch: Sequence[dict]) -> dict[tuple[int, str], float]:
    played = [(r["user"], r["item"], r["time"], 2 * r["watched"], r["page"] in ("home", "search")) for r in watch]
    exposures = [(r["user"], r["item"], r["time"], r["request"]) for r in log]
    found = slow(exposures, [p for p in played if p[3] > 0], 2 * DAY, 6 * HOUR)
    return {(r["request"], r["item"]): x for r, x in zip(log, found, strict=True)}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("own", [True, False])
def test_prepare_and_append(seed: int, own: bool, tmp_path: Path) -> None:
    log, watch = make(seed)

    def until(rows: Sequence[dict], day: int, since: int = -9) -> list[dict]:
        return [row for row in rows if since * DAY <= row["time"] - START < day * DAY]

    schema = prepare(log, None if own else watch, tmp_path / "all", tmp_path / "once")
    assert schema.matures_after == {"dwm": 2.25}
    whole = expected(log, log if own else watch)
    assert labels(tmp_path / "once") == whole
    assert sum(x > 0 for x in whole.values()) > 50
    # Day by day the minutes of the last days grow; a watch log may hold the new days alone, or all of them.
    out = tmp_path / "out"
    prepare(until(log, 4), None if own else until(watch, 4), tmp_path / "days", out)
    assert labels(out) == expected(until(log, 4), until(log if own else watch, 4))
    for day in range(5, 10):
        seen = until(watch, day, -9 if day % 2 else day - 1)
        prepare(until(log, day, day - 1), None if own else seen, tmp_path / "days", out, append=True)
        assert labels(out) == expected(until(log, day), until(log if own else watch, day))
    assert labels(out) == whole


@pytest.mark.parametrize("seed", range(3))
def test_a_watch_log_that_reaches_beyond_the_last_day(seed: int, tmp_path: Path) -> None:
    """Its later playbacks count for the exposures that are there, and once, however often they are read."""
    log, watch = make(seed)
    out = tmp_path / "out"
    for day in range(4, 10):
        known = [row for row in log if row["time"] - START < day * DAY]
        new = known if day == 4 else [row for row in known if row["time"] - START >= (day - 1) * DAY]
        prepare(new, watch, tmp_path / "days", out, append=day > 4)
        assert labels(out) == expected(known, watch)


def test_a_discovery_is_counted_once(tmp_path: Path) -> None:
    def row(day: int, user: str) -> dict:
        time = START + day * DAY - HOUR
        return {"request": day, "user": user, "item": "i", "time": time, "click": 0, "watched": 0.0, "page": "home"}

    watch = [{"user": "u", "item": "i", "time": START + 3 * DAY + HOUR, "watched": 5.0, "page": "home"}]
    log = [row(1, "a"), row(2, "b"), row(3, "u")]
    prepare(log, watch, tmp_path / "days", out := tmp_path / "out")
    for day in (4, 5):
        assert labels(out)[3, "i"] == 10
        prepare([row(day, "a")], watch, tmp_path / "days", out, append=True)
    assert labels(out)[3, "i"] == 10


def test_a_discovery_goes_over_to_a_later_exposure(tmp_path: Path) -> None:
    def row(request: int, user: str, time: int) -> dict:
        fixed = {"item": "i", "click": 0, "watched": 0.0, "page": "home"}
        return {"request": request, "user": user, "time": START + time, **fixed}

    watch = [{"user": "u", "item": "i", "time": START + 3 * DAY + HOUR, "watched": 5.0, "page": "home"}]
    log = [row(1, "a", 0), row(2, "b", DAY), row(3, "u", 3 * DAY - HOUR)]
    prepare(log, watch, tmp_path / "days", out := tmp_path / "out")
    assert labels(out)[3, "i"] == 10
    prepare([row(4, "u", 3 * DAY + 60)], watch, tmp_path / "days", out, append=True)
    assert (labels(out)[3, "i"], labels(out)[4, "i"]) == (0, 10)


def test_the_logs_own_playbacks_after_midnight_are_kept(tmp_path: Path) -> None:
    """A request of the last day may have rows after it; the next day's files do not have them again."""

    def row(request: int, item: str, time: int, watched: float = 0) -> dict:
        return {"user": "u", "click": 0, "page": "home", "request": request, "item": item, "time": START + time} | {
            "watched": watched
        }

    first = [row(0, "a", 0), row(1, "b", DAY), row(2, "c", 3 * DAY - 60), row(2, "d", 3 * DAY + 60, 5)]
    second = [row(3, "d", 3 * DAY + HOUR, 7)]
    prepare(first, None, tmp_path / "days", out := tmp_path / "out")
    assert labels(out)[2, "d"] == 10
    prepare(second, None, tmp_path / "days", out, append=True)
    assert labels(out)[2, "d"] == 24  # and what is watched in the second request is no discovery of its own
    assert labels(out)[3, "d"] == 0


def test_what_was_not_exposed_has_no_minutes(tmp_path: Path) -> None:
    log = [
        {"request": n, "user": "u", "item": item, "time": START + n * DAY, "click": 0, "watched": 3.0, "page": "home"}
        for n in range(3)
        for item in (f"a{n}", f"b{n}")
    ]
    pq.write_table(
        table(log, list(KINDS)).append_column("shown", pa.array([True, False] * 3)), tmp_path / "log.parquet"
    )
    text = MAP.format(where="") + "stages: {flags: {exposed: shown, coarse_neg: hidden}}\n"
    (tmp_path / "map.yaml").write_text(text.replace("scale: 2", "scale: 2\n    matures_after: 3"))
    rows = pq.read_table(tmp_path / "log.parquet")
    pq.write_table(rows.append_column("hidden", pa.array([False, True] * 3)), tmp_path / "log.parquet")
    m, tree = read_map(tmp_path / "map.yaml")
    schema = prepare_log([tmp_path / "log.parquet"], tmp_path / "out", m, tree, problems=Problems(skip=False))
    found = labels(tmp_path / "out")
    assert {key: x for key, x in found.items() if key[1][0] == "a"} == {(n, f"a{n}"): 6.0 for n in range(3)}
    assert all(math.isnan(x) for key, x in found.items() if key[1][0] == "b")
    assert schema.matures_after == {"dwm": 3}
