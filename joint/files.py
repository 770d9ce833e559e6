"""Files that are written whole or not at all, and what tells them apart."""

from __future__ import annotations

import contextlib
import hashlib
from pathlib import Path


def write_whole(path: Path, text: str) -> None:
    """Write a file under another name, then rename it: it is never seen half-written, and a failure leaves nothing."""
    unfinished = path.with_name(f".{path.name}.unfinished")
    try:
        unfinished.write_text(text, encoding="utf-8")
        unfinished.replace(path)
    finally:
        with contextlib.suppress(OSError):  # it is there after a failure alone
            unfinished.unlink()


def sha256(path: Path) -> str:
    """The SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
