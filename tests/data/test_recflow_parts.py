"""RecFlow: the small parts of its reader, by hand."""

from __future__ import annotations

import numpy as np

from joint.data.recflow.catalogue import first_seen, time_features
from joint.data.recflow.records import VIDEO_RECORD, event_record
from joint.data.recflow.write import active_days, days_active, group_edges, newest_events
from joint.schema import NEVER


def test_records_of_a_video_become_its_first_one():
    records = np.zeros(6, VIDEO_RECORD)
    records["id"] = [7, 3, 7, 3, 7, 5]
    records["features"][:, 0] = [1, 2, 1, 9, 1, 4]
    records["first_day"] = [10, 10, 11, 11, 12, 12]
    records["exposed"] = [NEVER, 10, 12, 11, 11, NEVER]
    records["changed"] = [False, False, True, False, False, False]  # within an earlier merge
    first = first_seen(records)
    assert first["id"].tolist() == [3, 5, 7]
    assert first["features"][:, 0].tolist() == [2, 4, 1]
    assert first["first_day"].tolist() == [10, 12, 10]
    assert first["exposed"].tolist() == [10, NEVER, 11]
    assert first["changed"].tolist() == [True, False, True]
    assert len(first_seen(records[:0])) == 0


def test_time_features_are_those_of_a_clock_in_china():
    seconds = np.array([1707062399, 1707062400])  # Sunday 2024-02-04 23:59:59 in China, and the second after it
    assert {name: values.tolist() for name, values in time_features(seconds).items()} == {
        "weekday": [7, 1],
        "hour": [24, 1],
        "minute": [60, 1],
    }


def test_groups_begin_above_the_quintiles():
    assert group_edges(np.arange(11)) == (3, 5, 7, 9)
    assert group_edges(np.array([4, 4, 4])) == (5, 5, 5, 5)
    assert group_edges(np.zeros(0, int)) == ()


def test_active_days_of_users():
    active = active_days([np.array([2, 5]), np.array([5]), np.array([5, 9])])
    assert days_active(active, np.array([1, 2, 5, 9, 10])).tolist() == [0, 1, 3, 1, 0]
    assert days_active(active_days([]), np.array([3])).tolist() == [0]


def test_newest_events_keep_their_order():
    events = np.zeros(6, event_record(0))
    events["user"] = [4, 1, 4, 4, 1, 4]
    events["time"] = [1, 2, 3, 4, 5, 6]
    newest = newest_events(events, 2)
    assert newest["user"].tolist() == [1, 1, 4, 4]
    assert newest["time"].tolist() == [2, 5, 4, 6]
