"""Stand-ins of all that README.md and docs/ take from elsewhere: columns as they name them, values at random."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from benchmarks.recflow_days import make_day, write_day

ROOT = Path(__file__).parents[2]
MAY = [f"2024-05-{day:02}" for day in range(1, 11)]
EBNERD = "request_id item_id click dwell_s device_type is_subscriber age page_article_id"
KUAIRAND = "user_id item_id is_click long_view play_time_ms is_comment is_profile_enter is_like duration_ms"
USERS = "user_active_degree register_days follow_user_num"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, wheel: Path) -> Path:
    """A folder like a checkout, with made-up data where pages expect real data."""
    here = tmp_path_factory.mktemp("checkout")
    shutil.copytree(ROOT / "configs", here / "configs")
    (here / "docs").symlink_to(ROOT / "docs")
    (here / "data" / "downloads").mkdir(parents=True)
    shutil.copy(wheel, here / "data/downloads/recbole-1.2.1-py3-none-any.whl")
    for day in ("2024-02-02", "2024-02-03", "2024-02-04", "2024-02-05"):
        write_day(here / "data/release", day, make_day(day, 24, users=6, videos=200, ranked=30))
    for day in MAY:
        write(here / f"{day}.parquet", 400, "user_id video_id is_click", day)
    write(here / "KUAIRAND/events.parquet", 3000, KUAIRAND, MAY[0], days=10)
    write(here / "EBNERD/impressions.parquet", 1600, EBNERD, MAY[0])
    write(here / "EBNERD/history.parquet", 300, "user_id item_id", "2024-04-20")
    users = {"user_id": np.arange(40)} | {name: np.arange(40) % 7 for name in USERS.split()}
    pq.write_table(pa.table(users), here / "KUAIRAND/users.parquet")
    return here


def write(path: Path, rows: int, columns: str, day: str, *, days: int = 1) -> None:
    """A log of some days; of one with a `request_id`, a request has eight rows of one user and one time."""
    rng = np.random.default_rng(0)
    begin = np.datetime64(day, "ms").astype(np.int64)
    flags = ("is_", "click", "long")
    table = {name: rng.integers(0, 2 if name.startswith(flags) else 40, rows) for name in columns.split()}
    table["timestamp_ms"] = begin + np.sort(rng.integers(0, days * 86_400, rows)) * 1000
    if "request_id" in table:
        request = np.arange(rows) // 8
        once = dict.fromkeys(("device_type", "is_subscriber", "age", "page_article_id"), request % 7)
        table |= once | {"request_id": request, "user_id": request % 40, "timestamp_ms": begin + request * 3_600_000}
        table["item_id"] = np.arange(rows) % 40
    path.parent.mkdir(exist_ok=True)
    pq.write_table(pa.table(table), path)
