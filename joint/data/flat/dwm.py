"""Discovery-induced watching minutes (RRA 4.1): what a user goes on to watch of an item that a request discovered.

A playback is a row of the watch log with more than 0 minutes, anywhere on the platform. Of a user and an item,

- the *first playback* is the earliest ever; it is a *discovery* if it happened in an exploring collection (if several
  share its second, one of them suffices);
- the discovery belongs to the latest exposure of the item to the user at or before it, and at most `within` before it;
  of several requests in that second, to the one with the highest id. Without such an exposure nobody gets it;
- its minutes are those of all playbacks of the pair from the first one on and less than `window` after it.

Every other exposure has 0 minutes: never played, played before, discovered elsewhere, or discovered through another
request. An item watched before can hence never be discovered again.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Pairs:
    """What happened between users and items, column by column; times in whole seconds."""

    user: np.ndarray  # integers from 0 on
    item: np.ndarray
    time: np.ndarray


def discovery_minutes(
    exposures: Pairs,
    request: np.ndarray,
    playbacks: Pairs,
    minutes: np.ndarray,
    exploring: np.ndarray,
    *,
    window: int,
    within: int,
) -> np.ndarray:
    """The minutes of every exposure, float64 [exposures].

    Args:
        request: id of the request of each exposure.
        minutes: of each playback, above 0.
        exploring: whether each playback was in an exploring collection, bool.
        window: seconds from the first playback on (exclusive).
        within: seconds from the exposure to the first playback (inclusive).
    """
    found = np.zeros(len(exposures.time))
    if not len(playbacks.time) or not len(found):
        return found
    _, pair = np.unique(_joined(exposures, playbacks), return_inverse=True)
    shown, played = pair[: len(found)], pair[len(found) :]
    first = np.full(pair.max() + 1, np.iinfo(np.int64).max)
    np.minimum.at(first, played, playbacks.time)
    discovered = np.zeros(len(first), bool)
    np.logical_or.at(discovered, played, exploring & (playbacks.time == first[played]))
    total = _totals(played, playbacks.time, minutes * (playbacks.time - first[played] < window), len(first))
    since = first[shown] - exposures.time
    able = np.flatnonzero(discovered[shown] & (since >= 0) & (since <= within))
    latest = able[np.lexsort((request[able], exposures.time[able], shown[able]))]
    last = np.append(shown[latest][1:] != shown[latest][:-1], True) if len(latest) else np.zeros(0, bool)
    found[latest[last]] = total[shown[latest[last]]]
    return found


def _joined(a: Pairs, b: Pairs) -> np.ndarray:
    """A number for the (user, item) of every entry of `a`, then of `b`."""
    user = np.concatenate([a.user, b.user]).astype(np.int64)
    item = np.concatenate([a.item, b.item]).astype(np.int64)
    return user * (item.max() + 1) + item


def _totals(group: np.ndarray, time: np.ndarray, minutes: np.ndarray, groups: int) -> np.ndarray:
    """Sums of each group, added up in the order of (time, minutes), so that the order of rows changes no bit."""
    order = np.lexsort((minutes, time, group))
    return np.bincount(group[order], minutes[order], minlength=groups)
