"""One day of RecFlow, read once: its requests in time order, their candidates, effective views and videos.

A request's rows may lie anywhere in the file. Rows are first dealt into files by the quarter of an hour of their
request, as runs of rows that belong together; then each quarter is sorted by run, checked and appended. So a day of
any length takes the memory of a quarter of an hour, and a file whose requests are contiguous is never sorted by row.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from joint.data.problems import Problems
from joint.data.ragged import Ragged, offsets_of
from joint.data.recflow.catalogue import first_seen, merge_videos
from joint.data.recflow.files import CONTEXT, ORDERS, VIDEO, Day
from joint.data.recflow.records import BITS, REQUEST, ROW, RUN, VIDEO_RECORD, append, event_record, load
from joint.data.recflow.rows import Rows, read_rows
from joint.schema import NEVER, Stage

SLICE = 900_000  # milliseconds: rows of so much time are sorted together
TWO_DAYS = ("an id of another day", "an id that no other day has")  # found, expected
ANOTHER = ("another value", "the value of the request's first row")
EFFECTIVE = 1 << BITS.index("effective_view")


def scan_day(day: Day, folder: Path, *, competitors: int, problems: Problems, elsewhere: np.ndarray) -> None:
    """Write what a day holds to `folder`, which is empty: requests, candidates, events and videos (see `load`).

    Order: requests by time in milliseconds, then request_id; candidates and events of a request in file order. A row
    that repeats a video of its request is a problem; so is a request as a whole if its rows differ in time or context,
    or if its id is `elsewhere`, on another day. A video's features are those of its first row in this order. Days
    without all stages leave their requests, but no candidates or competitors.
    """
    places = _deal(day, folder, problems)
    heads = [_heads(load(_path(folder, place, "runs"), RUN)) for place in places]
    bad = _contradictory(day, np.concatenate([np.zeros(0, RUN), *heads]), elsewhere, problems)
    for place in places:
        runs, rows = load(_path(folder, place, "runs"), RUN), load(_path(folder, place, "rows"), ROW)
        requests, rows = _group(day, runs, rows, bad, problems)
        append(folder / "requests", requests)
        append(folder / "events", _events(requests, rows["candidate"], competitors if day.logged else 0, competitors))
        append(folder / f"videos-{place:02d}", _videos(day, rows))
        if day.logged:
            append(folder / "candidates", rows["candidate"])
        for kind in ("runs", "rows"):
            _path(folder, place, kind).unlink()
    parts = sorted(folder.glob("videos-*"))
    merge_videos(parts, folder / "videos")
    for part in parts:
        part.unlink()


def _path(folder: Path, place: int, kind: str) -> Path:
    return folder / f"{kind}-{place:02d}"


def _deal(day: Day, folder: Path, problems: Problems) -> list[int]:
    """Append the file's runs and rows to files by time; returns the slices that there are, in time order."""
    used: set[int] = set()
    for rows in read_rows(day, problems):
        runs = _runs(rows)
        records = _records(rows)
        places = (runs["time"] - day.begin) // SLICE
        held = Ragged(records, offsets_of(runs["rows"]))
        for place in np.unique(places).tolist():
            mine = places == place
            append(_path(folder, place, "runs"), runs[mine])
            append(_path(folder, place, "rows"), records if mine.all() else held.take(np.flatnonzero(mine)).values)
            used.add(place)
    return sorted(used)


def _runs(rows: Rows) -> np.ndarray:
    """Neighbouring rows of one request and context, as RUN records."""
    keys = [rows.columns[name] for name in ("request_id", "request_timestamp", *CONTEXT)]
    new = np.ones(len(rows.row), bool)
    new[1:] = np.logical_or.reduce([key[1:] != key[:-1] for key in keys])
    first = np.flatnonzero(new)
    runs = np.empty(len(first), RUN)
    runs["request_id"] = rows.columns["request_id"][first]
    runs["time"] = rows.columns["request_timestamp"][first]
    runs["row"] = rows.row[first]
    runs["rows"] = np.diff(first, append=len(new))
    for place, name in enumerate(CONTEXT):
        runs["context"][:, place] = rows.columns[name][first]
    return runs


def _records(rows: Rows) -> np.ndarray:
    """What a row says of its video, as ROW records."""
    records = np.empty(len(rows.row), ROW)
    candidate = records["candidate"]
    candidate["video"] = rows.columns["video_id"]
    candidate["stages"] = rows.stages
    candidate["playing_time"] = rows.columns["playing_time"]
    bits = np.zeros(len(rows.row), np.uint8)
    for place, name in enumerate(BITS):
        bits |= (rows.columns[name] != 0).view(np.uint8) << np.uint8(place)
    candidate["feedback"] = bits
    for place, name in enumerate(ORDERS):
        candidate["orders"][:, place] = rows.columns[name]
    for place, name in enumerate(VIDEO):
        records["features"][:, place] = rows.columns[name]
    return records


def _group(
    day: Day, runs: np.ndarray, rows: np.ndarray, bad: np.ndarray, problems: Problems
) -> tuple[np.ndarray, np.ndarray]:
    """Requests (REQUEST) in order, and their rows one request after another, without the ids `bad` and wrong rows."""
    order = np.lexsort((runs["request_id"], runs["time"]))  # stable: file order within a request
    if (order[1:] < order[:-1]).any():
        rows = Ragged(rows, offsets_of(runs["rows"])).take(order).values
        runs = runs[order]
    new = np.ones(len(runs), bool)
    new[1:] = (runs["time"][1:] != runs["time"][:-1]) | (runs["request_id"][1:] != runs["request_id"][:-1])
    heads, request = runs[new], np.cumsum(new) - 1
    good = ~np.isin(runs["request_id"], bad)
    kept, number = np.repeat(good, runs["rows"]), np.repeat(request, runs["rows"])
    twice = _repeated(number, rows["candidate"]["video"], kept)
    if len(twice):
        run = int(np.searchsorted(np.cumsum(runs["rows"]), twice[0], side="right"))
        place = ("video_id", int(runs["row"][run] + twice[0] - offsets_of(runs["rows"])[run]))
        video = rows["candidate"]["video"][twice[0]]
        day.report(problems, place, video, "a video of an earlier row", "a video once a request", len(twice))
        kept[twice] = False
    if not kept.all():
        rows, number = rows[kept], number[kept]
    requests = np.empty(len(heads), REQUEST)
    for name in ("request_id", "time", "context"):
        requests[name] = heads[name]
    requests["rows"] = np.bincount(number, minlength=len(heads))
    return requests[requests["rows"] > 0], rows


def _heads(runs: np.ndarray) -> np.ndarray:
    """Runs sorted by request, those of a request that say the same and follow each other (in the file) as one."""
    runs = runs[np.argsort(runs["request_id"], kind="stable")]
    new = np.ones(len(runs), bool)
    new[1:] = (runs["request_id"][1:] != runs["request_id"][:-1]) | (runs["time"][1:] != runs["time"][:-1])
    new[1:] |= (runs["context"][1:] != runs["context"][:-1]).any(axis=1)
    heads = runs[new]
    heads["rows"] = np.add.reduceat(runs["rows"], np.flatnonzero(new))
    return heads


def _contradictory(day: Day, heads: np.ndarray, elsewhere: np.ndarray, problems: Problems) -> np.ndarray:
    """Ids of the requests of a day that are left out: another day has them too, or their rows do not say the same.

    Args:
        heads: of the whole day, as `_heads` of every slice.
        elsewhere: ids that another day has.
    """
    heads = heads[np.lexsort((heads["row"], heads["request_id"]))]
    first, request = np.unique(heads["request_id"], return_index=True, return_inverse=True)[1:]
    context = {name: heads["context"][:, place] for place, name in enumerate(CONTEXT)}
    values = {"request_id": heads["request_id"], "request_timestamp": heads["time"], **context}
    bad = np.zeros(len(first), bool)
    for name, found in values.items():
        differs = np.isin(found, elsewhere) if name == "request_id" else found != found[first][request]
        at = np.flatnonzero(differs & ~bad[request])
        if not len(at):
            continue
        new = np.zeros(len(first), bool)
        new[request[at]] = True
        where = at[heads["row"][at].argmin()]
        kind, expected = TWO_DAYS if name == "request_id" else ANOTHER
        place = (name, int(heads["row"][where]))
        day.report(problems, place, found[where], kind, expected, int(heads["rows"][new[request]].sum()))
        bad |= new
    return heads["request_id"][first[bad]]


def _repeated(request: np.ndarray, video: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """Places of kept rows whose request has the video in an earlier row."""
    key = (request << 32 | video)[kept]
    ordered = np.sort(key)
    if not (ordered[1:] == ordered[:-1]).any():
        return np.zeros(0, np.int64)
    order = np.argsort(key, kind="stable")
    later = order[1:][key[order[1:]] == key[order[:-1]]]
    return np.sort(np.flatnonzero(kept)[later])


def _events(requests: np.ndarray, candidates: np.ndarray, most: int, width: int) -> np.ndarray:
    """Effective views in order, with the first `most` videos of rank_pos of their requests, -1 up to `width`."""
    offsets = offsets_of(requests["rows"])
    request = np.repeat(np.arange(len(requests)), requests["rows"])
    place = np.flatnonzero(candidates["feedback"] & EFFECTIVE)
    events = np.empty(len(place), event_record(width))
    events["user"] = requests["context"][request[place], 0]
    events["time"] = requests["time"][request[place]] // 1000
    events["video"] = candidates["video"][place]
    if not width:
        return events
    winners = np.flatnonzero(candidates["stages"] & Stage.RANK_POS)
    before = np.searchsorted(winners, offsets)  # winners before each request
    nth = np.arange(len(winners)) - before[request[winners]]
    winners, nth = winners[nth < most], nth[nth < most]
    table = np.full((len(requests), width), -1, np.int32)
    table[request[winners], nth] = candidates["video"][winners]
    events["competitors"] = table[request[place]]
    return events


def _videos(day: Day, rows: np.ndarray) -> np.ndarray:
    videos = np.empty(len(rows), VIDEO_RECORD)
    videos["id"] = rows["candidate"]["video"]
    videos["features"] = rows["features"]
    videos["first_day"] = day.number
    exposed = (rows["candidate"]["stages"] & Stage.EXPOSED) != 0
    videos["exposed"] = np.where(exposed, day.number, NEVER)
    videos["changed"] = False
    return first_seen(videos)
