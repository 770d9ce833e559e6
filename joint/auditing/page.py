"""The page of an audit: one HTML file that holds its own pictures and tables. Needs matplotlib."""

from __future__ import annotations

import base64
import html
from collections.abc import Iterator
from typing import Any

from joint.auditing import figures
from joint.auditing.summary import number

STYLE = """
body { font: 16px/1.45 system-ui, sans-serif; color: #222; max-width: 1120px; margin: 2em auto; padding: 0 1em }
img { max-width: 100% } h2 { margin-top: 2em } code { background: #f3f3f3 }
table { border-collapse: collapse; margin: .6em 0 } td, th { padding: .2em .7em; text-align: right }
td:first-child, th:first-child, td.text { text-align: left } tr { border-bottom: 1px solid #ddd }
.leak { color: #a33a00; font-weight: bold } .clean { color: #005a8c } summary { cursor: pointer; color: #555 }
"""


def page(found: dict[str, Any]) -> str:
    """The HTML; `found` is what `audit.json` holds. Nothing in it is fetched from elsewhere."""
    title = f"Audit of {html.escape(found['dataset']['name'])}"
    body = "\n".join([*_verdict(found), *_sections(found)])
    head = f'<meta charset="utf-8"><title>{title}</title><style>{STYLE}</style>'
    return f'<!doctype html>\n<html lang="en"><head>{head}</head><body>\n<h1>{title}</h1>\n{body}\n</body></html>\n'


def _verdict(found: dict[str, Any]) -> Iterator[str]:
    data, leaks = found["dataset"], found["leaks"]
    requests = ", ".join(f"{count:,} {split}" for split, count in data["requests"].items() if count)
    yield f"<p>{data['items']:,} items; requests: {requests}; dataset hash <code>{html.escape(data['hash'])}</code></p>"
    yield "<h2>Leakage</h2>"
    if leaks:
        yield f'<p class="leak">{len(leaks)} finding{"s" * (len(leaks) > 1)}</p><ul>'
        yield from (f"<li>{html.escape(leak['line'])}</li>" for leak in leaks)
        yield "</ul>"
    else:
        yield '<p class="clean">None found.</p>'
    yield from (f"<p>Note: {html.escape(note['line'])}</p>" for note in found["notes"])
    yield _table([{"check": name.replace("_", " "), **check} for name, check in found["checks"].items()])


def _sections(found: dict[str, Any]) -> Iterator[str]:
    yield from _section(
        "Rows by stage and day",
        "How many candidates the log holds at each stage. A candidate carries several stages.",
        figures.stage_rows(found["rows"]),
        found["rows"],
    )
    if found["labels"]:
        about = "Of the exposures whose feedback was observed. A step between days or splits asks for a reason."
        yield from _section("Label rates", about, figures.label_rates(found["labels"]), found["labels"])
    about = "How many items or users have how many rows, in ranges that double; the percentages are of those with any."
    tails = [{"of": name.replace("_", " "), **_without(tail, "ranges")} for name, tail in found["long_tail"].items()]
    yield from _section("Long tails", about, figures.long_tails(found["long_tail"]), tails)
    if found["new"]:
        about = "Items and users of the later splits that training never had: no model of ids alone can know them."
        new = [{"split": s["split"], "of": k, **s[k]} for s in found["new"] for k in s if k != "split"]
        yield from _section("New in evaluation", about, figures.newcomer_rates(found["new"]), new + found["reach"])
    yield from _distances(found)
    about = "Unknown ids, NaN and empty lists; of requests and events by split, of items over the catalogue."
    yield from _section("Missing values", about, figures.missing_rates(found["missing"]), found["missing"])
    if found["histories"]:
        yield from _section("Histories", "Per request.", None, found["histories"])


def _distances(found: dict[str, Any]) -> Iterator[str]:
    if found["overlaps"]:
        pairs = [
            {"spaces": " and ".join(p["spaces"]), **_without(p, "spaces", "features_js")} for p in found["overlaps"]
        ]
        about = "Two stages' candidates over the whole log; a stage leaves the exposed ones out. Dark is alike."
        yield from _section("Overlap of spaces", about, figures.overlap_maps(found["overlaps"]), pairs)
    else:
        yield "<h2>Overlap of spaces</h2><p>The log holds a single stage: there is nothing to compare.</p>"
    if found["gaps"]:
        about = (
            "Filled: how far a feature's distribution over training exposures is from that over what a head must "
            "score, or over a later split. Hollow: what two draws of these sizes from one distribution would show."
        )
        table = [
            {"feature": name, "from": gap["from"], "to": gap["to"], **said}
            for gap in found["gaps"]
            for name, said in gap["features"].items()
        ]
        yield from _section("Training and serving", about, figures.feature_gaps(found["gaps"]), table)


def _section(title: str, about: str, png: bytes | None, rows: list[dict[str, Any]]) -> Iterator[str]:
    yield f"<h2>{title}</h2><p>{about}</p>"
    if png:
        data = base64.b64encode(png).decode()
        yield f'<img alt="{title}" src="data:image/png;base64,{data}">'
    yield f"<details><summary>The numbers</summary>{_table(rows)}</details>" if png else _table(rows)


def _table(rows: list[dict[str, Any]]) -> str:
    """Rows of one or more kinds under one header; '' for none."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    head = "".join(f"<th>{html.escape(name.replace('_', ' '))}</th>" for name in names)
    body = "".join("<tr>" + "".join(_cell(row.get(name, "")) for name in names) + "</tr>\n" for row in rows)
    return f"<table><tr>{head}</tr>\n{body}</table>" if rows else ""


def _cell(value: Any) -> str:
    if isinstance(value, str):
        kind = {"leak": "text leak", "clean": "text clean"}.get(value, "text")
        return f'<td class="{kind}">{html.escape(value)}</td>'
    return f"<td>{number(value)}</td>"


def _without(said: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in said.items() if name not in names}
