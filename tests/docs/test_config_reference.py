"""docs/config.md is what the dataclasses say today, of every key (`make golden` makes it anew)."""

from __future__ import annotations

import os
from dataclasses import fields
from difflib import unified_diff
from pathlib import Path

from joint.configuring.reference_page import TAGS, meaning, reference, sections

PAGE = Path(__file__).parents[2] / "docs" / "config.md"


def test_the_page_is_of_today() -> None:
    if os.environ.get("REWRITE"):
        PAGE.write_text(reference())
    differing = unified_diff(PAGE.read_text().splitlines(), reference().splitlines(), "page", "now", n=0, lineterm="")
    assert not (lines := list(differing)), "\n".join(["docs/config.md is out of date: make golden", *lines])


def test_every_key_has_a_meaning() -> None:
    keys = [(cls, item.name) for cls in sections() for item in fields(cls) if item.name not in TAGS]
    assert len(keys) > 150
    assert not [(cls.__name__, name) for cls, name in keys if not meaning(cls, name)]
