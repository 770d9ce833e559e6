"""Speed and memory of `joint.prepare recflow` on generated days of growing size, in both sampling periods.

    python -m benchmarks.recflow [--rows 300000 1000000 3000000] [--orders time]

Each row of the table is one process with one thread that prepares one day. Times are its CPU seconds (user and
system), reading to renaming; memory is its highest resident size beyond that of having imported the program.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.recflow_days import make_day, write_day

DAYS = {"2024-02-03": 58, "2024-02-10": 475}  # a day of each period, rows a request
VIDEOS = 400_000
ORDERS = ("time", "requests", "rows")  # how rows lie in the file: see `write_day`
CHILD = "--child"


def peak_mib() -> float:
    """The highest resident size of this process so far (getrusage's would count that of its parent too)."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def child(source: Path, out: Path) -> None:
    """Prepare in this process, and print what it took."""
    import pyarrow as pa

    from joint.data.recflow.reader import prepare_recflow

    pa.set_cpu_count(1)
    before = peak_mib()
    start = time.process_time()
    prepare_recflow(source, out, held_out=(0, 0), competitors=10)
    seconds = time.process_time() - start
    print(json.dumps({"seconds": seconds, "mib": peak_mib() - before}))


def measure(folder: Path, day: str, rows: int, order: str) -> str:
    """A line of the table."""
    requests = rows // DAYS[day]
    made = make_day(day, requests, users=max(requests // 6, 10), videos=VIDEOS)
    write_day(folder / "recflow", day, made, order=order, folders=("all_stage",))  # type: ignore[arg-type]
    count = len(made)
    del made
    command = [sys.executable, "-m", "benchmarks.recflow", CHILD, str(folder / "recflow"), str(folder / "dataset")]
    found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
    size = sum(path.stat().st_size for path in (folder / "dataset/requests").rglob("*.parquet"))
    speed = count / found["seconds"]
    period = 2 if DAYS[day] > 100 else 1
    return f"| {period} | {order} | {count:,} | {speed:,.0f} | {found['mib']:,.0f} | {size / count:.1f} |"


def main() -> None:
    """Prints the table."""
    if sys.argv[1:2] == [CHILD]:
        return child(Path(sys.argv[2]), Path(sys.argv[3]))
    command = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    command.add_argument("--rows", type=int, nargs="+", default=[300_000, 1_000_000, 3_000_000], help="a day")
    command.add_argument("--orders", choices=ORDERS, nargs="+", default=ORDERS)
    arguments = command.parse_args()
    print("| period | rows in the file by | rows a day | rows/s/core | peak MiB | bytes a row written |")
    print("|---|---|---|---|---|---|")
    for day in DAYS:
        for order in arguments.orders:
            for rows in arguments.rows:
                with tempfile.TemporaryDirectory() as folder:
                    print(measure(Path(folder), day, rows, order), flush=True)
    return None


if __name__ == "__main__":
    main()
