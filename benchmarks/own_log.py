"""Speed and memory of `joint.prepare parquet` on made-up logs of growing size.

    python -m benchmarks.own_log [--rows 300000 1000000 3000000]

Ten rows a request, two histories (100 clicks and 200 views) and two features; as many users and items more as there are
more rows. Each line is one process with one thread; times are its processor seconds, reading to renaming, memory its
highest resident size beyond that of having imported the program.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from benchmarks.recflow import CHILD, peak_mib

FIRST, DAYS, WIDTH = 1_700_000_000, 10, 10
MAP = """
user: user_id
item: item_id
time: {column: time, unit: s}
request: request_id
labels: {click: clicked}
features: {author: {kind: id, of: item, column: author}}
histories:
  clicked: {when: click >= 1, length: 100}
  seen: {when: exposed, length: 200}
"""


def make_log(path: Path, rows: int) -> None:
    """A log of chance, in the order of time."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    random = np.random.default_rng(0)
    requests = rows // WIDTH
    user = random.integers(0, max(10, requests // 20), requests)
    items = max(100, rows // 30)
    item = ((random.integers(0, items, requests)[:, None] + 7919 * np.arange(WIDTH)) % items).ravel()  # once a request
    request = np.arange(requests)
    columns = {
        "request_id": request.repeat(WIDTH),
        "user_id": user.repeat(WIDTH),
        "item_id": item,
        "author": item // 20,
        "time": (FIRST + request * (DAYS * 86_400) // requests).repeat(WIDTH),
        "clicked": (random.random(requests * WIDTH) < 0.2).astype(np.int8),
    }
    pq.write_table(pa.table(columns), path)


def child(folder: Path) -> None:
    """Prepare in this process, and print what it took."""
    import pyarrow as pa

    from joint.prepare import SOURCES, parser

    pa.set_cpu_count(1)
    arguments = parser().parse_args(
        ["parquet", str(folder / "log.parquet"), str(folder / "dataset"), "--map", str(folder / "map.yaml")]
    )
    before, began = peak_mib(), time.process_time()
    SOURCES["parquet"][0].prepare(arguments)
    print(json.dumps({"seconds": time.process_time() - began, "mib": peak_mib() - before}))


def main() -> None:
    """Prints the table."""
    if sys.argv[1:2] == [CHILD]:
        return child(Path(sys.argv[2]))
    command = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    command.add_argument("--rows", type=int, nargs="+", default=[300_000, 1_000_000, 3_000_000])
    print("| rows | rows/s/core | peak MiB | bytes a row written |\n|---|---|---|---|")
    for rows in command.parse_args().rows:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            (folder / "map.yaml").write_text(MAP)
            make_log(folder / "log.parquet", rows)
            run = [sys.executable, "-m", "benchmarks.own_log", CHILD, name]
            found = json.loads(subprocess.run(run, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
            size = sum(path.stat().st_size for path in (folder / "dataset/requests").rglob("*.parquet"))
        print(f"| {rows:,} | {rows / found['seconds']:,.0f} | {found['mib']:,.0f} | {size / rows:.1f} |", flush=True)
    return None


if __name__ == "__main__":
    main()
