"""Days of a made-up log in exactly the layout of the public RecFlow release, to test and to measure the reader.

    python -m benchmarks.recflow_days OUT --days 2024-02-03..2024-02-06 --requests 500

Both sampling periods (the day says which), the columns of the release with their stray space, int64 throughout, one
Feather file a day in `all_stage/` and `realshow/`. What the columns hold is random but consistent: nothing is learnt.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd

PERIOD_2 = "2024-02-05"
FLAGS = ("realshow", "rerank_pos", "rerank_neg", "rank_pos", "rank_neg", "coarse_neg", "prerank_neg")
FEEDBACK = {"effective_view": 0.38, "long_view": 0.23, "like": 0.04, "follow": 0.003, "forward": 0.02, "comment": 0.01}
CONTEXT = ("request_id", "request_timestamp", "user_id", "device_id", "age", "gender", "province")
VIDEO = ("video_id", "author_id", "category_level_one", "category_level_two", "upload_type", "upload_timestamp")
COLUMNS = (*CONTEXT, *VIDEO, "duration", *FLAGS, "rank_index", "rerank_index", "playing_time", *FEEDBACK)


def _slots(period: int, ranked: int) -> dict[str, np.ndarray]:
    """Flags and indices of the rows of one request, before exposure: int64 [rows] each."""
    cut = 10 if period == 1 else 40
    rows = 2 * cut + (38 if period == 1 else ranked)
    slots = {name: np.zeros(rows, np.int64) for name in (*FLAGS, "rank_index", "rerank_index")}
    slots["prerank_neg"][:cut] = 1
    slots["coarse_neg"][cut : 2 * cut] = 1
    later = np.arange(rows) - 2 * cut  # place among the rows that entered ranking
    if period == 1:  # 10 of each; two videos are in both rank_pos and rerank_pos
        slots["rank_pos"][(later >= 0) & (later < 10)] = 1
        slots["rank_neg"][(later >= 10) & (later < 20)] = 1
        slots["rerank_pos"][(later >= 8) & (later < 10) | (later >= 20) & (later < 28)] = 1
        slots["rerank_neg"][later >= 28] = 1
        slots["rank_index"] = np.where(later >= 0, later + 1, 0)
        slots["rerank_index"] = np.where(later >= 0, (later + 30) % 38 + 1, 0)
    else:
        again = np.where(later >= 0, (later * 7 + 3) % ranked, 0) if ranked % 7 else (later + 3) % ranked
        slots["rank_index"], slots["rerank_index"] = np.maximum(later, 0), again
        for name, place in (("rank", later), ("rerank", again)):
            slots[f"{name}_pos"][(later >= 0) & (place < 10)] = 1
            slots[f"{name}_neg"][(later >= 0) & (place >= ranked - 10)] = 1
    return slots


def make_day(
    day: str, requests: int, *, users: int = 200, videos: int = 20_000, seed: int = 0, ranked: int = 395
) -> pd.DataFrame:
    """The rows of a day, one request after another in time order, rows of a request in random order.

    Args:
        ranked: rows a request of the rank stage in the second period (395 in the release, at least 30).
    """
    number = int(np.datetime64(day).astype(np.int64))
    rng = np.random.default_rng((seed, number))
    slots = _slots(2 if day >= PERIOD_2 else 1, ranked)
    rows = len(slots["realshow"])
    user = (users * rng.random(requests) ** 2).astype(np.int64)
    request = {
        "request_id": number * 10_000_000 + rng.permutation(requests),
        "request_timestamp": (number * 86_400 - 8 * 3600) * 1000 + np.sort(rng.integers(0, 86_400_000, requests)),
        "user_id": user,
        "device_id": user + 5,
        "age": user % 8,
        "gender": user % 3,
        "province": user * 7 % 79,
    }
    order = np.argsort(rng.random((requests, rows)), axis=1)
    columns = {name: np.repeat(values, rows) for name, values in request.items()}
    columns |= {name: values[order].ravel() for name, values in slots.items()}
    # A stride that shares no factor with `videos` never meets a video twice in a request.
    stride = next(p for p in (7919, 104_729, 1_299_709) if videos % p)
    start = (videos * rng.random(requests) ** 3).astype(np.int64)
    video = columns["video_id"] = ((start[:, None] + stride * order) % videos).ravel()
    columns |= {
        "author_id": video // 3,
        "category_level_one": video % 140,
        "category_level_two": video % 784,
        "upload_type": video % 40,
        "upload_timestamp": 1_600_000_000 + video * 7919 % 100_000_000,
        "duration": 5_000 + video * 37 % 300_000 + (number % 2) * (video % 97 == 0),  # now and then it changes
    }
    shown = rng.choice([0, 1, 2, 3, 4, 5, 6, 8], requests, p=[0.02, 0.08, 0.1, 0.15, 0.25, 0.2, 0.19, 0.01])
    winner = columns["rerank_pos"].astype(bool)
    nth = np.cumsum(winner.reshape(requests, rows), axis=1).ravel()
    exposed = columns["realshow"] = (winner & (nth <= np.repeat(shown, rows))).astype(np.int64)
    columns["playing_time"] = exposed * rng.integers(0, 120_000, len(exposed))
    columns |= {name: exposed * (rng.random(len(exposed)) < share) for name, share in FEEDBACK.items()}
    return pd.DataFrame({name: columns[name] for name in COLUMNS})


def write_day(
    root: Path,
    day: str,
    frame: pd.DataFrame,
    *,
    order: Literal["time", "requests", "rows"] = "time",
    folders: tuple[str, ...] = ("all_stage", "realshow"),
    compression: Literal["lz4", "zstd", "uncompressed"] = "lz4",
) -> None:
    """Write a day's files, with the stray space of the release's ` category_level_two`.

    Args:
        order: rows as they are, requests in random order, or all rows in random order.
    """
    rng = np.random.default_rng(7)
    if order == "requests":
        place = frame.request_id.map(dict(zip(frame.request_id.unique(), rng.permutation(len(frame)), strict=False)))
        frame = frame.iloc[np.argsort(place.to_numpy(), kind="stable")]
    elif order == "rows":
        frame = frame.iloc[rng.permutation(len(frame))]
    frame = frame.rename(columns={"category_level_two": " category_level_two"})
    for folder in folders:
        path = root / folder / f"{day}.feather"
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = frame if folder == "all_stage" else frame[frame.realshow == 1]
        rows.reset_index(drop=True).to_feather(path, compression=compression)


def main() -> None:
    """Writes the files."""
    command = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    command.add_argument("out", type=Path)
    command.add_argument("--days", default="2024-02-03..2024-02-06", help="A..B")
    command.add_argument("--requests", type=int, default=500, help="a day")
    command.add_argument("--users", type=int, default=200)
    command.add_argument("--videos", type=int, default=20_000)
    command.add_argument("--seed", type=int, default=0)
    arguments = command.parse_args()
    first, last = (np.datetime64(day) for day in arguments.days.split(".."))
    for day in np.arange(first, last + 1).astype(str).tolist():
        frame = make_day(day, arguments.requests, users=arguments.users, videos=arguments.videos, seed=arguments.seed)
        write_day(arguments.out, day, frame)


if __name__ == "__main__":
    main()
