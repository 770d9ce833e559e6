"""Hashed ids: any 64-bit integer finds a row, evenly, always the same, and what shares a row is reported."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from joint import ids
from joint.experiment import Table
from joint.ids import collision_rate, hashed_rows

MASK = 2**64 - 1


def by_hand(number: int, rows: int) -> int:
    """splitmix64's finaliser in Python's own integers."""
    state = 0x9E3779B97F4A7C15 ^ (number & MASK)
    state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 & MASK
    state = (state ^ (state >> 27)) * 0x94D049BB133111EB & MASK
    state = ((state ^ (state >> 31)) + 0x9E3779B97F4A7C15) & MASK
    return state % (rows - 1) + 1 if number else 0


def test_rows_are_those_of_the_formula_for_any_integer():
    numbers = [0, 1, 2, -1, 10**12, 2**63 - 1, -(2**63)]
    for rows in (2, 3, 1000, 10**9):
        found = hashed_rows(np.array(numbers), rows)
        assert found.tolist() == [by_hand(number, rows) for number in numbers]
        assert found.dtype == np.int64
    assert hashed_rows(np.zeros((0, 3), np.int32), 5).shape == (0, 3)


def test_rows_are_evenly_used_and_the_first_is_for_the_unknown_alone():
    counts = np.bincount(hashed_rows(np.arange(1, 100_001), 101), minlength=101)
    assert counts[0] == 0
    assert counts[1:].min() > 850  # 1,000 expected; 4.7 standard deviations
    assert counts[1:].max() < 1150


def test_the_collision_rate_is_what_a_loop_counts_and_large_ones_are_expected(monkeypatch):
    rows = [by_hand(number, 50) for number in range(1, 41)]
    shared = sum(rows.count(row) > 1 for row in rows) / 40
    assert collision_rate(40, 50) == pytest.approx(shared)
    assert [collision_rate(count, 50) for count in (0, 1)] == [0, 0]
    assert collision_rate(5, 2) == 1
    counted = collision_rate(50_000, 100_000)
    monkeypatch.setattr(ids, "MEASURED", 10)
    assert collision_rate(50_000, 100_000) == pytest.approx(counted, rel=0.02)
    assert collision_rate(5_000_000_000, 2) == 1


def test_a_hashed_table_says_how_many_rows():
    for rows in ("auto", 1):
        with pytest.raises(ValueError, match="hash needs a number of rows, at least 2; found rows"):
            Table(dim=4, hash=True, rows=rows)


def test_it_needs_no_torch():
    code = "import sys, joint.ids; raise SystemExit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
