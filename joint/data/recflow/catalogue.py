"""Videos of slices, days and the whole log: merged by ranges of ids, so that no table is held whole in memory."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np

from joint.data.recflow.files import UTC_OFFSET, VIDEO
from joint.data.recflow.records import VIDEO_RECORD, append, count, load, read
from joint.schema import NEVER, Feature, first_day_column

SAMPLE = 4096  # every so many ids one is looked at to cut the ids into ranges
RANGE = 2**21  # records merged at a time, about
IDS = VIDEO[: VIDEO.index("upload_timestamp")]
TIMES = {"weekday": 8, "hour": 25, "minute": 61}  # feature -> size of its id space
COLUMN_TYPES: dict[str, type] = {
    **dict.fromkeys(("video_id", *IDS), np.int32),
    **{f"upload_{name}": np.int8 for name in TIMES},
    "duration": np.float32,
    **{first_day_column(pool): np.int32 for pool in ("", "exposed")},
}


def first_seen(videos: np.ndarray) -> np.ndarray:
    """One record an id, in order of ids: its first one, with the day of its first exposure in any.

    Args:
        videos: VIDEO_RECORD in time order.
    """
    # The place rides in the low bits: a sort of plain integers is stable then, and several times faster than argsort.
    key = np.sort(videos["id"].astype(np.int64) << 32 | np.arange(len(videos)))
    order, ids = key & 0xFFFFFFFF, key >> 32
    new = np.ones(len(ids), bool)
    new[1:] = ids[1:] != ids[:-1]
    first, later = videos.take(order[new]), videos.take(order[~new])
    same = (np.cumsum(new) - 1)[~new]
    differs = later["features"].ravel() != first["features"][same].ravel()
    first["changed"][same[np.flatnonzero(differs) // len(VIDEO)]] = True
    first["changed"][same[later["changed"]]] = True
    shown = later["exposed"] != NEVER
    np.minimum.at(first["exposed"], same[shown], later["exposed"][shown])
    return first


def merge_videos(paths: Sequence[Path], out: Path) -> None:
    """Merge files of VIDEO_RECORD, each in order of ids, into one; a video's features are the first file's."""
    samples = [load(path, VIDEO_RECORD)["id"][::SAMPLE].copy() for path in paths]
    edges = np.sort(np.concatenate([np.zeros(0, np.int32), *samples]))[RANGE // SAMPLE :: RANGE // SAMPLE]
    held = [np.zeros(0, VIDEO_RECORD)] * len(paths)
    begins = [0] * len(paths)
    out.unlink(missing_ok=True)
    for edge in [*edges.tolist(), np.iinfo(np.int32).max]:  # all ids below it, of every file
        pieces = [np.zeros(0, VIDEO_RECORD)]
        for number, path in enumerate(paths):
            end = int(np.searchsorted(samples[number], edge)) * SAMPLE
            block = np.concatenate([held[number], read(path, VIDEO_RECORD, begins[number], end)])
            cut = int(np.searchsorted(block["id"], edge))
            pieces.append(block[:cut])
            held[number], begins[number] = block[cut:], end
        append(out, first_seen(np.concatenate(pieces)))


class Catalogue:
    """The merged videos: row number = item index. Its tables are memory-mapped, so that processes share them.

    Args:
        folder: holds `videos`, as `merge_videos` writes it; `build` adds a file for every table.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __len__(self) -> int:
        return count(self.folder / "videos", VIDEO_RECORD)

    def build(self) -> tuple[dict[str, np.ndarray], tuple[Feature, ...], int]:
        """Write the tables.

        Returns the columns of `items.parquet`, the item features, and the number of videos of which some later row
        has other features than the first.
        """
        kinds = {name: np.dtype(kind) for name, kind in COLUMN_TYPES.items()}
        for name in (*kinds, "lookup"):
            (self.folder / name).unlink(missing_ok=True)
        sizes = dict.fromkeys(("video_id", *IDS), 0)
        changed = 0
        for begin in range(0, len(self), RANGE):
            block = read(self.folder / "videos", VIDEO_RECORD, begin, begin + RANGE)
            for name, values in _item_columns(block).items():
                append(self.folder / name, values.astype(kinds[name]))
                if name in sizes:
                    sizes[name] = max(sizes[name], int(values.max()) + 1)
            changed += int(block["changed"].sum())
        self._build_lookup(sizes["video_id"] - 1)
        features = [Feature(name=name, level="item", kind="id", size=size) for name, size in sizes.items()]
        features += [
            Feature(name=f"upload_{name}", level="item", kind="id", space=name, size=size)
            for name, size in TIMES.items()
        ]
        columns = {name: load(self.folder / name, kind) for name, kind in kinds.items()}
        return columns, (*features, Feature(name="duration", level="item", kind="float")), changed

    def _build_lookup(self, rows: int) -> None:
        """Dense ids, as RecFlow's, get a table: one look-up a candidate instead of a search."""
        if rows > 4 * len(self) + 1_000_000:
            return
        lookup = np.memmap(self.folder / "lookup", np.int32, "w+", shape=rows)
        for begin in range(0, len(self), RANGE):
            ids = self._ids[begin : begin + RANGE] - 1
            lookup[ids] = np.arange(begin, begin + len(ids))

    def index(self, videos: np.ndarray) -> np.ndarray:
        """Item indices, int32, of video ids that are in the catalogue; -1 stays -1."""
        found = self._lookup[videos] if len(self._lookup) else np.searchsorted(self._ids, videos + 1).astype(np.int32)
        return np.where(videos < 0, np.int32(-1), found)

    @cached_property
    def _lookup(self) -> np.ndarray:
        return load(self.folder / "lookup", np.dtype(np.int32))

    @cached_property
    def _ids(self) -> np.ndarray:
        return load(self.folder / "video_id", np.dtype(np.int32))


def time_features(seconds: np.ndarray) -> dict[str, np.ndarray]:
    """Weekday (Monday 1 .. 7), hour + 1 and minute + 1 in China of UNIX seconds, int8: the ids of RecFlow's code."""
    local = seconds.astype(np.int64) + UTC_OFFSET
    parts = {"weekday": (local // 86_400 + 3) % 7, "hour": local // 3600 % 24, "minute": local // 60 % 60}
    return {name: (part + 1).astype(np.int8) for name, part in parts.items()}  # 1970-01-01 was a Thursday


def _item_columns(videos: np.ndarray) -> dict[str, np.ndarray]:
    features = {name: videos["features"][:, place] for place, name in enumerate(VIDEO)}
    times = time_features(features["upload_timestamp"])
    return {
        "video_id": videos["id"] + 1,
        **{name: features[name] + 1 for name in IDS},
        **{f"upload_{name}": values for name, values in times.items()},
        "duration": np.log1p(features["duration"].astype(np.float32) / 1000),
        first_day_column(""): videos["first_day"],
        first_day_column("exposed"): videos["exposed"],
    }
