"""Bars: on a terminal, from the first rank, and for what takes its time; nowhere else."""

from __future__ import annotations

import io
import sys

import pytest

from joint import progress as module
from joint.progress import progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def as_stderr(monkeypatch: pytest.MonkeyPatch, stream: io.StringIO, patience: float = 0.0) -> io.StringIO:
    """Not a fixture: pytest puts its own stderr back between a test's fixtures and the test."""
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr(module, "PATIENCE", patience)
    return stream


def test_a_terminal_sees_what_and_how_much_and_nothing_is_left_behind(monkeypatch):
    terminal = as_stderr(monkeypatch, Terminal())
    with progress(None, "measuring test", unit="request", total=40) as bar:
        bar.update(20)
        bar.refresh()
        assert "measuring test:  50%" in terminal.getvalue()
        assert "20.0/40.0" in terminal.getvalue()
    assert terminal.getvalue().endswith("\r")
    assert "\n" not in terminal.getvalue()


def test_what_is_gone_through_is_what_was_given(monkeypatch):
    terminal = as_stderr(monkeypatch, Terminal())
    assert list(progress([3, 1, 2], "days", unit="day")) == [3, 1, 2]
    assert "days" in terminal.getvalue()


@pytest.mark.parametrize(
    ("stream", "patience", "rank"), [(Terminal, 60.0, "0"), (Terminal, 0.0, "1"), (io.StringIO, 0.0, "0")]
)
def test_what_is_quick_other_ranks_and_logs_show_none(monkeypatch, stream, patience, rank):
    monkeypatch.setenv("RANK", rank)
    shown = as_stderr(monkeypatch, stream(), patience)
    assert list(progress(range(5), "days", unit="day")) == [0, 1, 2, 3, 4]
    assert "days" not in shown.getvalue()
