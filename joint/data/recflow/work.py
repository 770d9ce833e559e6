"""Days worked on in parallel, each remembered when it is done, so that an interrupted command can go on."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import TypeVar

from joint.errors import DataError
from joint.progress import progress

STATE = 2  # raised when unfinished work of an older program is of no use any more
A = TypeVar("A")
B = TypeVar("B")


def recorded(path: Path, key: list[object], work: Callable[[], B], still_good: Callable[[B], bool]) -> B:
    """What `work` returned (JSON) when it was last done under this key, if that is still good; else it is done now."""
    said = json.loads(json.dumps([STATE, *key]))
    try:
        done = json.loads(path.read_text())
        if done["key"] == said and still_good(done["result"]):
            return done["result"]
    except (OSError, ValueError, LookupError, TypeError):
        pass
    path.unlink(missing_ok=True)
    result = work()
    fresh = path.with_name(path.name + ".new")
    fresh.write_text(json.dumps({"key": said, "result": result}))
    fresh.rename(path)
    return result


def in_parallel(work: Callable[[A], B], tasks: Sequence[A], jobs: int, title: str) -> list[B]:
    """`work` of every task, in order, by up to `jobs` processes; of several errors the first task's is raised."""
    if min(jobs, len(tasks)) <= 1:
        return [work(task) for task in progress(tasks, title, unit="day")]
    context = multiprocessing.get_context("spawn")  # pyarrow's threads do not survive a fork
    pool = ProcessPoolExecutor(min(jobs, len(tasks)), context, initializer=_leave_with_parent)
    try:
        with _interrupts_ignored():
            results = [pool.submit(work, task) for task in tasks]
        return [result.result() for result in progress(results, title, unit="day")]
    except BrokenProcessPool as error:
        raise DataError(
            f"{title}: a process was killed, perhaps for want of memory; the same command goes on (fewer --jobs?)"
        ) from error
    except KeyboardInterrupt:
        for worker in multiprocessing.active_children():  # a day may take minutes; the same command goes on
            worker.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


@contextlib.contextmanager
def _interrupts_ignored() -> Iterator[None]:
    """Processes that begin in here ignore Ctrl-C for good, from their first import on: the parent ends them."""
    held = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, held)


def tidy(folder: Path, days: Sequence[str]) -> None:
    """Remove from an unfinished dataset all that is neither state nor the request files of one of these days."""
    (folder / "state" / "days").mkdir(parents=True, exist_ok=True)
    kept = {folder / "state", folder / "requests", *(folder / "requests" / f"day={day}" for day in days)}
    for path in [*folder.glob("*"), *folder.glob("requests/*")]:
        if path not in kept:
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def _leave_with_parent() -> None:
    """End this worker when its parent is killed: it must not write while the next command does."""

    def wait() -> None:
        parent = multiprocessing.parent_process()
        assert parent is not None
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
