"""Starts a run again and again and kills it on the way, for `test_faults`: `python kills.py PLAN.json`.

Every start is a fork of this process, which has imported everything: half a second in place of ten.

The plan: `arguments` of `joint.train`, its `run` directory, the number of `ranks` and `kills`, a list of
[step that some rank has reported, "now", "saving" or "hanging" (stopped, not killed), rank to kill]. `timeout`: seconds
that ranks wait for one another. Prints, for every start, the exit codes of the ranks (-9: killed) and the seconds that
the others lived on.
"""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import sys
import time
from datetime import timedelta
from pathlib import Path

import joint.distributed
import joint.train
import joint.training
from joint.commands import run_command


def fork(rank: int, ranks: int, port: int, arguments: list[str]) -> int:
    """Start one rank as torchrun would; returns its process id."""
    pid = os.fork()
    if pid:
        return pid
    if ranks > 1:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks))
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    code = 1
    try:
        code = run_command(lambda: joint.train.main(arguments))
    except BaseException as error:
        print(f"rank {rank}: {error!r}", file=sys.stderr, flush=True)
    finally:
        os._exit(code)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def reached(run: Path) -> int:
    """The last step in metrics.jsonl."""
    try:
        return max((json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()), default=0)
    except (OSError, ValueError):
        return 0


def said(run: Path) -> int:
    """The length of train.log, which grows once the ranks have found each other."""
    return (run / "train.log").stat().st_size if (run / "train.log").is_file() else 0


def wait_for(run: Path, said_before: int, step: int, when: str, pids: list[int]) -> None:
    """Return when that moment has come, or the ranks have ended."""
    while said(run) == said_before and not ended(pids):
        time.sleep(0.002)
    while reached(run) < step and not ended(pids):
        time.sleep(0.002)
    while when == "saving" and not [*(run / "checkpoints").glob(".step-*")] and not ended(pids):
        time.sleep(0.0002)
    time.sleep(random.uniform(0, 0.02))


def ended(pids: list[int]) -> bool:
    return any(os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) for pid in pids)


def main(plan: dict[str, object]) -> list[dict[str, object]]:
    random.seed(0)
    joint.distributed.TIMEOUT = timedelta(seconds=float(str(plan["timeout"])))
    run, ranks, starts = Path(str(plan["run"])), int(str(plan["ranks"])), []
    for kill in [*plan["kills"], None]:  # type: ignore[misc]
        port, said_before = free_port(), said(run)
        pids = [fork(rank, ranks, port, list(plan["arguments"])) for rank in range(ranks)]  # type: ignore[call-overload]
        if kill:
            step, when, victim = kill
            wait_for(run, said_before, step, when, pids)
            os.kill(pids[victim], signal.SIGSTOP if when == "hanging" else signal.SIGKILL)
        began = time.monotonic()
        if kill and when == "hanging":
            os.waitid(os.P_PID, pids[1 - victim], os.WEXITED | os.WNOWAIT)
            os.kill(pids[victim], signal.SIGKILL)
        codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
        starts.append({"codes": codes, "seconds": time.monotonic() - began, "reached": reached(run)})
    return starts


if __name__ == "__main__":
    print(json.dumps(main(json.loads(Path(sys.argv[1]).read_text()))))
