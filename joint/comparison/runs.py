"""Running what is planned, each run in a process of its own: what is finished is reused, a crash stays its own.

Ctrl-C, or SIGTERM, asks the runs in hand to save; the same command resumes them. Two comparisons may share a folder: a
run that one of them has in hand is left to it.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import IO, Any

from joint.comparison.ablation import Planned
from joint.comparison.folders import (
    Result,
    code_version,
    keep_code,
    note,
    notes_file,
    open_folder,
    output_file,
    place,
    read_json,
    read_result,
    run_of,
)
from joint.run import RunDirectory

PATHS = os.environ.get("PYTHONPATH", "").split(os.pathsep)
POLL_SECONDS = 0.2
SAY_SECONDS = 30  # between lines on a run in hand, where there is no terminal
SAVE_SECONDS = 120  # that a run in hand has to save when it is asked to stop


def command(config: Path) -> list[str]:
    """What trains a config file, with the packages that PYTHONPATH leads to, not those of the current folder (-P)."""
    return [sys.executable, "-P", "-m", "joint.train", str(config)]


@dataclass
class InHand:
    """A run whose process is at work."""

    number: int
    planned: Planned
    run: RunDirectory
    process: subprocess.Popen[bytes]
    lock: IO[Any]
    began: float


def carry_out(planned: Sequence[Planned], folder: Path, what: str = "runs", *, jobs: int, primary: str) -> list[Result]:
    """Run what is not finished yet, `jobs` at a time, and read how every run stands.

    The source is copied into `folder` first, and all are run with the copy. `what` names the runs in print.
    """
    folder.mkdir(parents=True, exist_ok=True)
    code, source = keep_code(folder)
    placed = [place(wanted, code) for wanted in planned]
    waiting = deque(
        (number, wanted, blocked)
        for number, (wanted, blocked) in enumerate(placed, 1)
        if read_result(wanted).state != "finished"
    )
    progress = Progress(len(placed), len(placed) - len(waiting), what, primary)
    active: list[InHand] = []
    with _stopped_by_sigterm():
        try:
            while waiting or active:
                while waiting and len(active) < jobs:
                    if begun := _begin(*waiting.popleft(), code, source, progress):
                        active.append(begun)
                time.sleep(POLL_SECONDS)
                progress.live(active, len(waiting), jobs)
                for hand in [hand for hand in active if hand.process.poll() is not None]:
                    active.remove(hand)
                    progress.ended(hand, _end(hand))
        finally:
            _stop(active, progress)
    return [read_result(wanted) for wanted, _ in placed]


def standing(planned: Sequence[Planned]) -> list[Result]:
    """How every run stands, nothing being run."""
    code = code_version()
    return [read_result(place(wanted, code)[0]) for wanted in planned]


def _begin(number: int, planned: Planned, blocked: str, code: str, source: Path, progress: Progress) -> InHand | None:
    """Start a run's process; None where another comparison has it in hand, or has finished it."""
    run = run_of(planned)
    run.path.mkdir(parents=True, exist_ok=True)
    lock = (run.path / ".lock").open("w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        lock.close()
        progress.say(f"{progress.place(number, planned)}: another process has it in hand; left to it")
        return None
    if read_result(planned).state == "finished":  # by another comparison, since we looked
        lock.close()
        return None
    open_folder(planned, code)
    progress.say(f"{progress.place(number, planned)} → {run.path}" + (f" ({blocked})" if blocked else ""))
    with output_file(run).open("ab") as output:
        process = subprocess.Popen(
            command(run.config),
            env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, (str(source.resolve()), *PATHS)))},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            pass_fds=[lock.fileno()],  # the lock lasts as long as the process, even if we are killed
            process_group=0,  # a terminal's Ctrl-C is for us: the run is asked to save instead
        )
    return InHand(number, planned, run, process, lock, time.monotonic())


def _end(hand: InHand) -> Result:
    """Note how a run ended."""
    _note_seconds(hand)
    if hand.process.returncode:
        note(hand.run, failed=f"exit code {hand.process.returncode}: {_last_line(output_file(hand.run))}")
    return read_result(hand.planned)


def _note_seconds(hand: InHand) -> None:
    """Leave a run to others, and add its time in hand to what it took before; one just begun has no notes of that."""
    hand.lock.close()
    seconds = read_json(notes_file(hand.run)).get("seconds", 0.0) + time.monotonic() - hand.began
    note(hand.run, seconds=round(seconds, 2))


def _stop(active: Sequence[InHand], progress: Progress) -> None:
    """Have the runs in hand save and end."""
    if active:
        progress.say(f"stopping: {len(active)} run(s) in hand save first; the same command resumes them")
    for hand in active:
        hand.process.terminate()
    for hand in active:
        try:
            hand.process.wait(SAVE_SECONDS)
        except (subprocess.TimeoutExpired, KeyboardInterrupt):
            hand.process.kill()
            hand.process.wait()
        _note_seconds(hand)


@contextmanager
def _stopped_by_sigterm() -> Iterator[None]:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


class Progress:
    """Says which run of how many, its step and live metric, and the time left."""

    def __init__(self, total: int, reused: int, what: str, primary: str) -> None:
        self.total, self.primary = total, primary
        self.terminal = sys.stdout.isatty()
        self.seconds: list[float] = []  # of the runs that ended while we looked
        self.said = time.monotonic()
        self.say(f"{total} {what}, {reused} of them finished before")

    def say(self, text: str) -> None:
        """A line that stays."""
        print(("\r\033[K" if self.terminal else "") + text, flush=True)

    def place(self, number: int, planned: Planned) -> str:
        """'[3/20] sdcl, seed 1'."""
        arm = planned.arm.replace("-", " ")
        name = arm if arm.startswith("trial") else f"seed {planned.seed}" + (f" {arm}" if arm else "")
        return f"[{number}/{self.total}] " + ", ".join(part for part in (planned.variant, planned.world, name) if part)

    def live(self, active: Sequence[InHand], waiting: int, jobs: int) -> None:
        """The state of the runs in hand: rewritten on a terminal, else a line now and then."""
        if not active or (not self.terminal and time.monotonic() - self.said < SAY_SECONDS):
            return
        self.said = time.monotonic()
        left = self._left(active, waiting, jobs)
        texts = [f"{timedelta(seconds=round(left))} left"] if left is not None else []
        texts += [f"{self.place(hand.number, hand.planned)}: {live(hand.run, self.primary)}" for hand in active]
        text = "  |  ".join(texts)
        if self.terminal:
            print(f"\r\033[K{text[: shutil.get_terminal_size().columns - 1]}", end="", flush=True)
        else:
            print(text, flush=True)

    def ended(self, hand: InHand, result: Result) -> None:
        """A line on how a run ended."""
        seconds = time.monotonic() - hand.began
        self.seconds += [seconds] if result.state == "finished" else []
        said = {
            "finished": f"{self.primary} {result.metrics.get(self.primary, float('nan')):.4f}",
            "failed": f"FAILED, {result.note}; all it said is in {output_file(hand.run)}",
        }.get(result.state, "stopped before its end; the same command resumes it")
        self.say(f"{self.place(hand.number, hand.planned)}: {said} ({timedelta(seconds=round(seconds))})")

    def _left(self, active: Sequence[InHand], waiting: int, jobs: int) -> float | None:
        """Seconds left, from the runs that ended, or else from how far those in hand are; None: not known yet."""
        now = time.monotonic()
        shares = {hand.number: share for hand in active if (share := _share(hand.run))}
        guesses = self.seconds or [(now - h.began) / shares[h.number] for h in active if h.number in shares]
        if not guesses:
            return None
        each = sum(guesses) / len(guesses)
        return (sum(max(each - (now - hand.began), 0.0) for hand in active) + waiting * each) / min(
            jobs, len(active) + waiting
        )


def live(run: RunDirectory, primary: str) -> str:
    """How far a run is, and its newest number: the primary metric where it has been measured, else its first loss."""
    found: dict[str, float] = {}
    for line in _tail(run.metrics):
        with suppress(ValueError):
            found |= json.loads(line)
    losses = [name for name in found if name.startswith("loss/")]
    name = primary if primary in found else losses[0] if losses else ""
    number = f", {name} {found[name]:.4f}" if name else ""
    return f"step {found['step']:.0f}{number}" if "step" in found else "starting"


def _share(run: RunDirectory) -> float:
    """Of a run's steps, the share that is done; 0 where it has not said."""
    for line in reversed(_tail(run.log)):
        if match := re.match(r"step +(\d+)/(\d+) ", line):
            return int(match[1]) / int(match[2])
    return 0.0


def _last_line(path: Path) -> str:
    lines = [line.strip() for line in _tail(path) if line.strip()]
    return lines[-1][:300] if lines else "it said nothing"


def _tail(path: Path, size: int = 65_536) -> list[str]:
    """The last lines of a file that may be growing; none of one that is not there."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - size))
            return file.read().decode(errors="replace").splitlines()
    except OSError:
        return []
