"""What an audit says in the terminal: every leak, a line each, then the dataset in some thirty lines."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

LABELS = 8  # shown; the rest are in audit.json
MOST = 3  # features or pairs of spaces named in a line


def summary(found: dict[str, Any]) -> str:
    """The lines; `found` is what `audit.json` holds."""
    lines = [*_verdict(found), "", *_sizes(found), *_labels(found), *_long_tails(found), *_new(found)]
    return "\n".join([*lines, *_overlaps(found), *_gaps(found), *_missing(found), *_oddities(found)])


def number(value: float | None) -> str:
    """Four significant digits at most, thousands with a comma, '-' for none."""
    if value is None:
        return "-"
    return f"{value:,.0f}" if value == int(value) or abs(value) >= 1000 else f"{value:.3g}"


def percent(share: float | None) -> str:
    """A share as a percentage."""
    return "-" if share is None else f"{100 * share:.3g}%"


def _verdict(found: dict[str, Any]) -> Iterator[str]:
    leaks, checks = found["leaks"], found["checks"]
    open_ = [name for name, check in checks.items() if check["status"] == "not checked"]
    clean = sum(check["status"] == "clean" for check in checks.values())
    found_ = f"{len(leaks)} finding{'s' * (len(leaks) > 1)}" if leaks else "none found"
    yield f"leakage: {found_}; {clean} of {len(checks)} checks are clean"
    yield from (f"  LEAK {leak['line']}" for leak in leaks)
    yield from (f"  note: {note['line']}" for note in found["notes"])
    notes: dict[str, list[str]] = {}
    for name in open_:
        notes.setdefault(checks[name]["note"], []).append(name)
    yield from (f"  not checked: {', '.join(names)}: {note}" for note, names in notes.items())


def _sizes(found: dict[str, Any]) -> Iterator[str]:
    data, rows = found["dataset"], found["rows"]
    requests = ", ".join(f"{count:,} {split}" for split, count in data["requests"].items() if count)
    days = sorted({row["day"] for row in rows})
    span = days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}, {len(days)} days"
    yield f"{data['name']}: {data['items']:,} items; requests: {requests}; {span}"
    stages = [name for name in rows[0] if name not in ("day", "split", "requests", "candidates")]
    totals = {name: sum(row[name] for row in rows) for name in ("candidates", *stages)}
    yield "rows: " + ", ".join(f"{name} {count:,}" for name, count in totals.items())


def _labels(found: dict[str, Any]) -> Iterator[str]:
    labels = list(dict.fromkeys(row["label"] for row in found["labels"]))
    for label in labels[:LABELS]:
        said = []
        for split in dict.fromkeys(row["split"] for row in found["labels"]):
            rows = [row for row in found["labels"] if (row["label"], row["split"]) == (label, split)]
            exposures, observed, positive, total = (
                sum(row[k] for row in rows) for k in ("exposures", "observed", "positive", "sum")
            )
            if observed:
                seen = f" ({percent(observed / exposures)} observed)" if observed < exposures else ""
                said.append(f"{split} {percent(positive / observed)} > 0, mean {number(total / observed)}{seen}")
        yield f"label {label}: {'; '.join(said) or 'never observed'}"


def _long_tails(found: dict[str, Any]) -> Iterator[str]:
    for name, tail in found["long_tail"].items():
        yield (
            f"{name.replace('_', ' ')}: {tail['seen']:,} of {tail['things']:,} have any; the top 1% have "
            f"{percent(tail['top_share'])} of {tail['rows']:,.0f} rows; Gini {number(tail['gini'])}"
        )


def _new(found: dict[str, Any]) -> Iterator[str]:
    for said in found["new"]:
        items, users = said["items"], said.get("users")
        who = f"; {users['new']:,} of {users['all']:,} users" if users else ""
        yield (
            f"new in {said['split']}: {items['new']:,} of {items['all']:,} exposed items "
            f"({percent(items['share_of_rows'])} of exposures) were never exposed in training{who}"
        )
    for pool in dict.fromkeys(said["pool"] for said in found["reach"]):
        held = [said for said in found["reach"] if said["pool"] == pool and said["exposures"]]
        shares = ", ".join(f"{percent(said['in_pool'] / said['exposures'])} of {said['split']}" for said in held)
        yield f"pool {pool}: holds, on their day, {shares} exposures"


def _overlaps(found: dict[str, Any]) -> Iterator[str]:
    for pair in sorted(found["overlaps"], key=lambda pair: pair["popularity_js"])[:MOST]:
        yield (
            f"close spaces: {' and '.join(pair['spaces'])}: items in common (Jaccard) {number(pair['jaccard'])}, "
            f"weighted {number(pair['weighted_jaccard'])}, popularity JS {number(pair['popularity_js'])}"
        )


def _gaps(found: dict[str, Any]) -> Iterator[str]:
    for gap in found["gaps"]:
        far = list(gap["features"].items())[:MOST]
        said = ", ".join(f"{name} {number(d['js'])} (chance {number(d['chance_js'])})" for name, d in far)
        yield f"JS distance, {gap['from']} to {gap['to']}: {said}"


def _missing(found: dict[str, Any]) -> Iterator[str]:
    absent = sorted((said for said in found["missing"] if said["missing"]), key=lambda said: -said["rate"])
    said = ", ".join(f"{some['feature']} {percent(some['rate'])} of {some['of']}" for some in absent[: 2 * MOST])
    yield f"missing: {said or 'nothing'}"


def _oddities(found: dict[str, Any]) -> Iterator[str]:
    odd = found["oddities"]
    if odd["repeated_candidates"]:
        yield f"note: {odd['repeated_candidates']:,} candidates repeat an item of their request"
    if odd["exposed_and_cut"]:
        yield f"note: {odd['exposed_and_cut']:,} exposed candidates are flagged as cut before ranking"
