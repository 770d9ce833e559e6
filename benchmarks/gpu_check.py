"""Everything that only a machine with CUDA can show, in under ten minutes, as one JSON to post: `make gpu-check`.

    python -m benchmarks.gpu_check [OUT.json]

The same tiny run on CPU, on the GPU, on two GPUs where there are two (NCCL), in bfloat16, with tables behind a cache
(UVM), placed by the planner, and with fused Adam; losses against those of the CPU, requests per second, and the tests
marked `gpu`. Exit code 0: all agree; 1: something does not; 2: there is no GPU.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

CONFIG = Path(__file__).parents[1] / "configs" / "joint.yaml"
COMMON = ("train.log_every=1", "train.evaluate_every_epochs=0", "data.epochs=1", "optimizer.tables.lr=0.01")
COMMON += ("evaluation.whole_catalogue=[]", "evaluation.baselines=false")  # most of the time of so short a run
TABLES = ("user_id", "video_id")
FIRST, CLOSE = 10, 1e-3  # over the first steps; sums are in another order, so later losses drift apart
ROUNDED = 0.02  # the same in bfloat16
LIMIT, TESTS_LIMIT = 60, 120  # seconds that a run may take, and all tests: seven runs and they stay below ten minutes
CASES: dict[str, tuple[int, tuple[str, ...]]] = {
    "cpu": (0, ()),
    "gpu": (1, ()),
    "two_gpus": (2, tuple(f"tables.{table}.sharding=row_wise" for table in TABLES)),
    "uvm_caching": (1, tuple(f"tables.{table}.memory=uvm_caching" for table in TABLES)),
    "planner": (1, tuple(f"tables.{table}.sharding=planner" for table in TABLES)),
    "bfloat16": (1, ("train.precision=bfloat16",)),
    "fused_adam": (1, ("optimizer.tables.kind=adam", "optimizer.tables.lr=0.001")),
}
SAME_LOSSES = {"gpu": CLOSE, "two_gpus": CLOSE, "uvm_caching": CLOSE, "planner": CLOSE, "bfloat16": ROUNDED}


def run(name: str, folder: Path) -> dict[str, Any]:
    """Train a case; its losses by step and its speed, or the end of what it said."""
    gpus, overrides = CASES[name]
    arguments = [str(CONFIG), f"run.name={name}", f"run.dir={folder}", f"data.path={folder}/world", *COMMON, *overrides]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(gpus)] if gpus > 1 else []
    visible = {"CUDA_VISIBLE_DEVICES": ""} if not gpus else {}
    began = time.monotonic()
    try:
        done = subprocess.run(
            [sys.executable, *torchrun, "-m", "joint.train", *arguments],
            env=os.environ | {"OMP_NUM_THREADS": "1"} | visible,
            capture_output=True,
            text=True,
            timeout=LIMIT,
        )
    except subprocess.TimeoutExpired:
        return {"error": f"took more than {LIMIT} seconds"}
    if done.returncode:
        return {"error": done.stderr[-4000:]}
    lines = [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss/total" in line]
    rates = sorted(line["speed/requests_per_second"] for line in steps)
    return {
        "seconds": time.monotonic() - began,
        "requests_per_second": rates[len(rates) // 2],
        "losses": [line["loss/total"] for line in steps],
        "metrics": json.loads((folder / name / "eval.json").read_text()),
    }


def agrees(found: dict[str, Any], cpu: dict[str, Any], close: float) -> bool:
    """Whether the first losses are those of the CPU, up to a part of them."""
    if "losses" not in found or "losses" not in cpu:
        return False
    pairs = list(zip(found["losses"][:FIRST], cpu["losses"][:FIRST], strict=False))
    return all(abs(a - b) <= close * abs(b) for a, b in pairs)


def run_tests() -> tuple[bool, str]:
    """Whether a test marked `gpu` failed, and the end of what was said."""
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "tests/training"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TESTS_LIMIT)
    except subprocess.TimeoutExpired:
        return True, f"took more than {TESTS_LIMIT} seconds"
    return done.returncode != 0, done.stdout[-2000:]


def check(folder: Path) -> dict[str, Any]:
    """All cases and the tests; `failed` names what did not do as it should."""
    world = ["simulate", str(folder / "world"), "--world", "biased", "--size", "small"]
    subprocess.run([sys.executable, "-m", "joint.prepare", *world], check=True, capture_output=True)
    names = [name for name, (gpus, _) in CASES.items() if gpus <= torch.cuda.device_count()]
    cases = {name: run(name, folder) for name in names}
    tests_failed, said = run_tests()
    failed = [name for name, found in cases.items() if "error" in found]
    failed += [n for n, close in SAME_LOSSES.items() if n in cases and not agrees(cases[n], cases["cpu"], close)]
    failed += ["tests"] if tests_failed else []
    return {
        "failed": sorted(set(failed)),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "environment": [json.loads(path.read_text()) for path in sorted(folder.glob("*/environment.json"))],
        "cases": cases,
        "tests": said,
    }


def main(out: Path) -> int:
    """Write the JSON and print the table of speeds; returns the exit code."""
    if not torch.cuda.is_available():
        print("no CUDA device was found; joint.train works on CPU, and this checks what only a GPU can show")
        return 2
    with tempfile.TemporaryDirectory() as folder:
        found = check(Path(folder))
    out.write_text(json.dumps(found, indent=1))
    for name, case in found["cases"].items():
        rate = f"{case['requests_per_second']:,.0f} requests/s" if "error" not in case else "failed"
        print(f"{name:12} {rate}")
    print(f"{out} is written; " + (f"not as on CPU: {', '.join(found['failed'])}" if found["failed"] else "all agree"))
    return 1 if found["failed"] else 0


if __name__ == "__main__":
    raise SystemExit(main(Path(sys.argv[1] if len(sys.argv) > 1 else "gpu_check.json")))
