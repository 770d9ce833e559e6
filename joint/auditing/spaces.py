"""How far apart spaces and splits are: items in common, distances between distributions, what is new."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import numpy as np

from joint.auditing.counts import Counts
from joint.data.dataset import Dataset
from joint.data.ragged import Ragged
from joint.schema import SPLITS, Feature, day_number

Counted = dict[str, np.ndarray]  # name -> counts, all of one length


def js_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Jensen-Shannon distance of two counts, normalised here: root of the divergence in bits, 0 .. 1; NaN if one is 0.

    Source: Endres and Schindelin 2003, "A new metric for probability distributions".
    """
    p, q = _shares(a), _shares(b)
    middle = (p + q) / 2
    with np.errstate(divide="ignore", invalid="ignore"):
        terms = [np.where(x > 0, x * np.log2(x / middle), 0 * x) for x in (p, q)]
    return float(np.sqrt(max((terms[0].sum() + terms[1].sum()) / 2, 0.0)))


def total_variation(a: np.ndarray, b: np.ndarray) -> float:
    """Half the absolute difference of two counts, normalised here: the mass to move, 0 .. 1; NaN if one is 0."""
    return float(np.abs(_shares(a) - _shares(b)).sum() / 2)


def jaccard(a: np.ndarray, b: np.ndarray) -> float:
    """Kinds that both counts have, over kinds that one has; NaN if none has any."""
    either = np.count_nonzero((a > 0) | (b > 0))
    return np.count_nonzero((a > 0) & (b > 0)) / either if either else float("nan")


def weighted_jaccard(a: np.ndarray, b: np.ndarray) -> float:
    """Sum of the smaller over sum of the larger shares (Ruzicka), 0 .. 1; NaN if one is 0."""
    p, q = _shares(a), _shares(b)
    return float(np.minimum(p, q).sum() / np.maximum(p, q).sum())


def chance_distance(a: np.ndarray, b: np.ndarray, *, census: bool = False) -> float:
    """`js_distance` of two draws, as large as these, from their mixture: what differs without any difference.

    Rows are drawn one by one, while real ones come in requests, so real chance is larger still.

    Args:
        census: b is no draw but the whole: a's size is drawn from b and held against b.
    """
    rng = np.random.default_rng(0)
    if census:
        return js_distance(rng.poisson(_shares(b) * a.sum()), b)
    mixture = (_shares(a) + _shares(b)) / 2
    return js_distance(rng.poisson(mixture * a.sum()), rng.poisson(mixture * b.sum()))


def overlaps(counts: Counts, features: Mapping[str, tuple[Feature, Ragged]]) -> list[dict[str, Any]]:
    """Every two spaces of the log, over all splits: items in common, and distances of popularity and features."""
    schema = counts.dataset.schema
    spaces = {name: _over_splits(counts, "space", name) for name in schema.stages}
    known = {name: some for name, some in spaces.items() if some is not None and some.any()}
    distributions = {name: item_distributions(some, features, counts) for name, some in known.items()}
    return [
        {
            "spaces": [one, two],
            "jaccard": jaccard(known[one], known[two]),
            "weighted_jaccard": weighted_jaccard(known[one], known[two]),
            "popularity_js": js_distance(known[one], known[two]),
            "features_js": {
                name: js_distance(distributions[one][name], distributions[two][name]) for name in distributions[one]
            },
        }
        for one, two in itertools.combinations(known, 2)
    ]


def gaps(counts: Counts, features: Mapping[str, tuple[Feature, Ragged]]) -> list[dict[str, Any]]:
    """Exposures of training against what heads must score, and training against later splits, feature by feature."""
    home = next(split for split in SPLITS if counts.get("shown", split) is not None)
    shown = counts.get("space", home, "exposed")
    if shown is None:
        return []

    def of_items(items: np.ndarray) -> Counted:
        return item_distributions(items, features, counts)

    exposures = of_items(shown)
    found = []
    for name, some in _served(counts, home).items():
        census = name.startswith(("catalogue", "pool"))
        found.append(_gap(f"{home} exposures", name, exposures, of_items(some), census=census))
    for split in SPLITS[SPLITS.index(home) + 1 :]:
        if (later := counts.get("space", split, "exposed")) is not None:
            requests = ({n: some for s, n, some in counts.all("feature") if s == place} for place in (home, split))
            a, b = (one | other for one, other in zip((exposures, of_items(later)), requests, strict=True))
            found.append(_gap(home, split, a, b))
    return found


def item_distributions(items: np.ndarray, features: Mapping[str, tuple[Feature, Ragged]], counts: Counts) -> Counted:
    """The counts of every item feature's codes, where item i comes `items[i]` times."""
    return {
        name: np.bincount(codes.values, np.repeat(items, codes.lengths), counts.codes.size(feature))
        for name, (feature, codes) in features.items()
    }


def item_codes(dataset: Dataset, counts: Counts) -> dict[str, tuple[Feature, Ragged]]:
    """The features of the catalogue, coded."""
    declared = [feature for feature in dataset.schema.features if feature.level == "item"]
    return {f.name: (f, counts.codes(f.name, f, dataset.catalogue[f.name])) for f in declared}


def newcomers(counts: Counts) -> list[dict[str, Any]]:
    """Per later split: items and users that training never had. Over all rows."""
    found = []
    for split in SPLITS[1:]:
        shown = counts.get("shown", split)
        if shown is None or (before := counts.get("shown", "train")) is None:
            continue
        logged = counts.get("logged", "train")
        assert logged is not None
        said: dict[str, Any] = (
            {"split": split} | _new("items", shown, before) | _new("items_never_logged", shown, logged)
        )
        users, known = counts.get("users", split), counts.get("users", "train")
        if users is not None and known is not None:
            said |= _new("users", users[1:], known[1:])  # 0 is everyone unknown
        found.append(said)
    return found


def _new(what: str, now: np.ndarray, before: np.ndarray) -> dict[str, Any]:
    """How many kinds there are, how many of them are new, and their share of the rows."""
    new = (now > 0) & (before == 0)
    share = now[new].sum() / now.sum() if now.any() else float("nan")
    return {what: {"all": np.count_nonzero(now), "new": np.count_nonzero(new), "share_of_rows": float(share)}}


def _served(counts: Counts, split: str) -> dict[str, np.ndarray]:
    """What heads must score: their input spaces, the catalogue and its pools as they were on the split's last day."""
    schema = counts.dataset.schema
    heads = {f"{head} input": counts.get("head", split, head) for head in schema.input_space}
    found = {name: some for name, some in heads.items() if some is not None and some.any()}
    last = max(day_number(part.day) for part in schema.parts if part.split == split)
    for pool, first_day in counts.dataset.first_day.items():
        found[f"pool {pool}" if pool else "catalogue"] = (first_day <= last).astype(np.int32)
    return found


def _gap(one: str, two: str, a: Counted, b: Counted, *, census: bool = False) -> dict[str, Any]:
    """Features of both, the farthest first."""
    found = {
        name: {
            "js": js_distance(a[name], b[name]),
            "total_variation": total_variation(a[name], b[name]),
            "chance_js": chance_distance(a[name], b[name], census=census),
        }
        for name in a
        if name in b and a[name].any() and b[name].any()
    }
    return {"from": one, "to": two, "features": dict(sorted(found.items(), key=lambda entry: -entry[1]["js"]))}


def _over_splits(counts: Counts, kind: str, name: str) -> np.ndarray | None:
    found = [some for split in SPLITS if (some := counts.get(kind, split, name)) is not None]
    return sum(found[1:], found[0]) if found else None


def _shares(counts: np.ndarray) -> np.ndarray:
    total = counts.sum()
    return counts / total if total else np.full(len(counts), np.nan)
