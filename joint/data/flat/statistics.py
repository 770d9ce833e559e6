"""What normalisation, buckets and groups need, fixed once on the training days of the first log."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from joint.data.flat.features import GROUP, GROUPS, Sample, needs_statistics, quantile_edges, statistics_of
from joint.data.flat.histories import ACTIVE_DAYS, active_days
from joint.data.flat.job import Job, active_pairs, in_buckets, starts_of
from joint.data.flat.tables import Lookup
from joint.data.ragged import draw
from joint.data.requests import Requests


def fix_statistics(job: Job, users: Lookup, items: Lookup, last_day: int) -> None:
    """What normalisation, buckets and groups need, from the requests up to `last_day` and the items known by then."""
    m = job.m
    features = {name: feature for name, feature in m.features.items() if needs_statistics(feature)}
    samples = {name: Sample() for name, feature in features.items() if feature.of != "item"}
    activity = np.zeros(ACTIVE_DAYS + 1, np.int64)
    if samples or m.group == "activity":
        for bucket, rows in in_buckets(job, "statistics"):
            if rows is not None:
                known = rows.take(np.flatnonzero(rows.scalars("log.day") <= last_day))
                _sample(job, known, users, samples)
                active = active_pairs(job, bucket, known)
                first = known.take(starts_of(known)) if len(known) else known
                counts = active_days(active, first.scalars("log.user"), first.scalars("log.day"))
                activity += np.bincount(counts, minlength=len(activity))
    job.statistics = {name: statistics_of(features[name], sample.sorted()) for name, sample in samples.items()}
    there = np.flatnonzero(job.vocabularies["item_id"].first_day <= last_day)
    for name in features.keys() - samples.keys():
        values = items.take(name, there)
        assert isinstance(values, np.ndarray)
        job.statistics[name] = statistics_of(features[name], np.sort(values[~np.isnan(values)]))
    job.statistics[GROUP] = quantile_edges(np.repeat(np.arange(len(activity)), activity), GROUPS)


def _sample(job: Job, rows: Requests, users: Lookup, samples: Mapping[str, Sample]) -> None:
    if not len(rows):
        return
    starts = starts_of(rows)
    first = rows.take(starts)
    place = np.arange(len(rows)) - np.repeat(starts, np.diff(np.append(starts, len(rows))))
    for name, sample in samples.items():
        level = job.m.features[name].of
        of = rows if level == "event" else first
        values = users.take(name, of.scalars("log.user")) if level == "user" else of.columns[name]
        assert isinstance(values, np.ndarray)
        keys = draw(of.scalars("log.request"), place if level == "event" else 0)
        sample.add(values, np.broadcast_to(keys, len(of)))
