"""How a command shows that it is at work: one kind of bar."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm

PATIENCE = 0.5  # seconds before a bar appears: what is quick needs none


def progress(over: Iterable[Any] | None, what: str, *, unit: str, total: int | None = None) -> Any:
    """A bar while `over` is gone through; None: as its `update` says, in a `with`. It is gone when all is done.

    On stderr, by the first rank, and only where that is a terminal: logs and pipes never see one.
    """
    silent = None if os.environ.get("RANK", "0") == "0" else True  # None: silent without a terminal
    settings = {"delay": PATIENCE, "leave": False, "dynamic_ncols": True, "unit_scale": True, "disable": silent}
    return tqdm(over, desc=what, unit=f" {unit}s", total=total, **settings)
