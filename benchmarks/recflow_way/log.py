"""A made-up day of RecFlow's layout: as a dataset of ours, and as the arrays and dictionaries their scripts load."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from benchmarks.recflow_days import make_day, write_day
from joint.data.dataset import Dataset
from joint.data.recflow.reader import prepare_recflow

BEFORE, TRAIN, HELD_OUT = "2024-02-01", "2024-02-02", "2024-02-03"
HELD_OUT_REQUESTS = 1000
REQUESTS_A_USER = 40  # a day, so that most histories of the second day are full
HISTORY = 50

REQUEST = ("request_id", "user_id", "request_timestamp", "device_id", "age", "gender", "province")
VIDEO = ("video_id", "author_id", "category_level_two", "upload_type", "upload_timestamp", "category_level_one")
SAMPLE = ("video_id", "author_id", "duration", *VIDEO[2:], "effective_view")  # of a stage
PAST = ("video_id", "author_id", "category_level_two", "category_level_one", "upload_type")
STAGES = ("realshow", "rerank_pos", "rerank_neg", "rank_pos", "rank_neg", "coarse_neg")


@dataclass(frozen=True)
class Files:
    """What the released scripts hold of a day while they train on it; ids raw, as in the release.

    exposures: int64 [rows, 14], `REQUEST`, `VIDEO` and effective_view.
    requests: int64 [requests, 7], `REQUEST`.
    sequences: request_id -> int64 [50, 10], the newest behaviour last; a row is real if its column 7, a time, is.
    stages: request_id -> stage -> int64 [n, 8], `SAMPLE`; a stage without a video is left out.
    """

    exposures: np.ndarray
    requests: np.ndarray
    sequences: Mapping[int, np.ndarray]
    stages: Mapping[int, Mapping[str, np.ndarray]]


def prepared(folder: Path, videos: int, requests: int) -> tuple[Dataset, Files]:
    """A day to train on, of so many requests. The day before it feeds histories alone; a small one is held out."""
    users = max(1, requests // REQUESTS_A_USER)
    made = {}
    sizes = {BEFORE: requests, TRAIN: requests, HELD_OUT: min(HELD_OUT_REQUESTS, requests)}
    for day, count in sizes.items():
        frame = made[day] = make_day(day, count, users=users, videos=videos)
        write_day(folder / "log", day, frame, folders=("realshow",) if day == BEFORE else ("all_stage",))
    prepare_recflow(folder / "log", folder / "dataset", held_out=(0, 1))
    dataset = Dataset(folder / "dataset")
    return dataset, files_of(made[TRAIN], dataset)


def files_of(day: pd.DataFrame, dataset: Dataset) -> Files:
    """The day of training as their scripts load it; histories as our dataset has them."""
    requests = dataset.read_split("train")
    past = requests.lists("effective").newest(HISTORY)
    behaviours = np.stack([np.asarray(dataset.catalogue[name]) - 1 for name in PAST], axis=1)[past.values]
    place = HISTORY - np.repeat(past.offsets[1:], past.lengths) + np.arange(len(past.values))
    sequences = np.zeros((len(requests), HISTORY, 10), np.int64)
    sequences[past.rows, place, :5] = behaviours
    sequences[past.rows, place, 7] = 1
    ids = requests.scalars("request_id").tolist()
    shown = day[day.realshow == 1]
    return Files(
        exposures=shown[[*REQUEST, *VIDEO, "effective_view"]].to_numpy(),
        requests=day[[*REQUEST]].drop_duplicates().to_numpy(),
        sequences=dict(zip(ids, sequences, strict=True)),
        stages=_stages(day, ids),
    )


def _stages(day: pd.DataFrame, ids: list[int]) -> dict[int, dict[str, np.ndarray]]:
    found: dict[int, dict[str, np.ndarray]] = {request: {} for request in ids}
    for stage in STAGES:
        rows = day[day[stage] == 1].sort_values("request_id", kind="stable")
        request, first = np.unique(rows.request_id, return_index=True)
        for key, samples in zip(request.tolist(), np.split(rows[[*SAMPLE]].to_numpy(), first[1:]), strict=True):
            found[key][stage] = samples
    return found
