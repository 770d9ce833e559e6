"""Bytes in words, and back: one form for all that is said of memory."""

from __future__ import annotations

import argparse
import re

UNITS = {"TB": 1e12, "GB": 1e9, "MB": 1e6, "kB": 1e3}


def size(text: str) -> int:
    """Bytes of a size like 80GB (decimal units)."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(KB|MB|GB|TB)", text.strip().upper())
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size; expected one like 80GB")
    return int(float(match[1]) * UNITS[match[2].replace("K", "k")])


def size_text(count: float) -> str:
    """Bytes as every command says them: in decimal units, three digits (2.03 kB, 36.0 GB, 120 GB)."""
    for unit, least in UNITS.items():
        if (value := count / least) >= 1:
            return f"{value:.{2 - (value >= 10) - (value >= 100)}f} {unit}"
    return f"{count:.0f} B"
