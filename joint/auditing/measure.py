"""An audit: one pass over a dataset, then everything that is told of it, as plain numbers by name."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np

from joint.auditing.checks import CHECKS, LEFT_OUT, Leaks, Seen, check_catalogue, check_chunk, time_limits, unchecked
from joint.auditing.chunks import chunks
from joint.auditing.counts import LABEL_COUNTS, Counts, missing
from joint.auditing.spaces import gaps, item_codes, newcomers, overlaps
from joint.data.dataset import Dataset
from joint.progress import progress
from joint.schema import SPLITS

Report = dict[str, Any]  # what `audit.json` holds


def audit(dataset: Dataset, *, sample: int | None = None) -> Report:
    """Check every row and count: `docs/audit.md` says what each number is.

    Args:
        sample: about so many requests of a file feed the similarities and distances; None: all.

    Raises:
        DataError: a file cannot be read, or there are no requests.
    """
    dataset.parts(SPLITS)  # says so if there is nothing
    leaks, counts = _pass(dataset, sample)
    schema = dataset.schema
    features = item_codes(dataset, counts)
    found = {
        "dataset": {"name": schema.name, "path": str(dataset.directory), "hash": schema.hash, "items": schema.items}
        | {"sample": sample, "requests": {split: schema.requests(split) for split in SPLITS}},
        "checks": _checks(dataset, leaks),
        "leaks": [vars(leak) | {"line": str(leak)} for leak in leaks.leaks()],
        "notes": [vars(note) | {"line": str(note)} for note in leaks.notes()],
        "rows": _rows(counts),
        "labels": _labels(counts),
        "long_tail": _long_tails(counts),
        "new": newcomers(counts),
        "reach": [
            {"split": split, "pool": pool, "exposures": int(total), "in_pool": int(inside)}
            for (split, pool), (inside, total) in counts.reach.items()
        ],
        "overlaps": overlaps(counts, features),
        "gaps": gaps(counts, features),
        "missing": _missing(counts),
        "histories": _histories(counts),
        "oddities": dict(zip(("repeated_candidates", "exposed_and_cut"), counts.oddities.tolist(), strict=True)),
    }
    plain: Report = _plain(found)
    return plain


def to_json(report: Report) -> str:
    """The text of `audit.json`."""
    return json.dumps(report, indent=1, allow_nan=False)


def _pass(dataset: Dataset, sample: int | None) -> tuple[Leaks, Counts]:
    leaks, seen, counts = Leaks(), Seen(), Counts(dataset, sample)
    parts, limits = dataset.schema.parts, time_limits(dataset.schema)
    for found in check_catalogue(dataset):
        leaks.add("items.parquet", found)
    counts.set_bins(next(chunks(dataset, max(parts, key=lambda part: part.rows))))
    # The later splits first: they are few and can be remembered while training is held against them.
    with progress(None, "auditing", unit="request", total=sum(part.rows for part in parts)) as bar:
        for part in sorted(parts, key=lambda part: -SPLITS.index(part.split)):
            for chunk in chunks(dataset, part):
                for found in check_chunk(chunk, limits):
                    leaks.add(part.path, found)
                for found in seen.exposures(chunk):
                    leaks.add(part.path, found)
                seen.requests(chunk)
                counts.add(chunk)
                bar.update(len(chunk.requests))
    for file, found in seen.repeated():
        leaks.add(file, found)
    return leaks, counts


def _checks(dataset: Dataset, leaks: Leaks) -> dict[str, Report]:
    """Per check: what it counts, how many were found, and what could not be checked."""
    notes = unchecked(dataset)
    counts = {name: sum(leak.count for leak in leaks.all() if leak.check == name) for name in CHECKS}
    wrong = {name: "note" if name in LEFT_OUT else "leak" for name in CHECKS}
    return {
        name: {
            "counts": what,
            "found": counts[name],
            "status": wrong[name] if counts[name] else "not checked" if name in notes else "clean",
            "note": notes.get(name, ""),
        }
        for name, what in CHECKS.items()
    }


def _rows(counts: Counts) -> list[Report]:
    """Requests, candidates and candidates of every stage, by day and split."""
    names = ("requests", "candidates", *counts.dataset.schema.stages)
    return [
        {"day": day, "split": split} | dict(zip(names, numbers.tolist(), strict=True))
        for (day, split), numbers in sorted(counts.rows.items(), key=_by_day)
    ]


def _labels(counts: Counts) -> list[Report]:
    """What was observed of a label, by day and split."""
    found = []
    for (day, split), table in sorted(counts.labels.items(), key=_by_day):
        for label, numbers in zip(counts.dataset.schema.labels, table, strict=True):
            said = dict(zip(LABEL_COUNTS, numbers.tolist(), strict=True))
            observed = said["observed"] or math.nan
            rates = {"positive_rate": said["positive"] / observed, "mean": said["sum"] / observed}
            found.append({"day": day, "split": split, "label": label} | said | rates)
    return found


def _by_day(entry: tuple[tuple[str, str], np.ndarray]) -> tuple[str, int]:
    (day, split), _ = entry
    return day, SPLITS.index(split)


def _long_tails(counts: Counts) -> dict[str, Report]:
    """How exposures fall on items and users, and candidates of all stages on items, over all splits."""
    kinds = {"items_by_exposure": "shown", "items_by_all_stages": "logged", "users_by_exposure": "exposures"}
    found = {}
    if set(counts.dataset.schema.stages) <= {"exposed"}:
        del kinds["items_by_all_stages"]  # the same
    for name, kind in kinds.items():
        if known := [some for split in SPLITS if (some := counts.get(kind, split)) is not None]:
            total = sum(known[1:], known[0].astype(np.int64))
            found[name] = long_tail(total[1:] if kind == "exposures" else total)  # user 0 is everyone unknown
    return found


def long_tail(counts: np.ndarray) -> Report:
    """How unevenly rows fall on things (items or users), with `counts[i]` of them on thing i.

    `ranges`: how many things have 1, 2 to 3, 4 to 7, ... rows. `top_share`: of the rows, on the most frequent
    hundredth (rounded up) of the things that have any. `gini`: of those things; 0 is even.
    """
    some = np.sort(counts[counts > 0]).astype(np.float64)
    exponents = np.bincount(np.frexp(some)[1] - 1)  # frexp is exact where a logarithm is rounded
    n, total = len(some), some.sum()
    top = some[n - math.ceil(n / 100) :].sum() / total if n else math.nan
    gini = 2 * (np.arange(1, n + 1) * some).sum() / (n * total) - (n + 1) / n if n else math.nan
    ranges = [{"from": 2**e, "to": 2 ** (e + 1) - 1, "things": int(c)} for e, c in enumerate(exponents)]
    return {"things": len(counts), "seen": n, "rows": total, "top_share": top, "gini": gini, "ranges": ranges}


def _missing(counts: Counts) -> list[Report]:
    """The share of a feature's values that are missing: requests and events by split, items over the catalogue."""
    found = [(name, split, int(absent), int(rows)) for split, name, (absent, rows) in counts.all("missing")]
    for feature in counts.dataset.schema.features:
        if feature.level == "item":
            absent = missing(feature, counts.dataset.catalogue[feature.name])
            found.append((feature.name, "catalogue", int(absent.sum()), len(absent)))
    return [
        {"feature": name, "of": of, "missing": absent, "rows": rows, "rate": absent / rows if rows else math.nan}
        for name, of, absent, rows in found
    ]


def _histories(counts: Counts) -> list[Report]:
    return [
        {"history": name, "split": split, "mean_length": events / lists if lists else math.nan}
        | {"empty_share": empty / lists if lists else math.nan}
        for split, name, (lists, empty, events) in counts.all("history")
    ]


def _plain(value: Any) -> Any:
    """For JSON: no NumPy scalars, and null for a number that is none."""
    if isinstance(value, dict):
        return {key: _plain(some) for key, some in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(some) for some in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value
