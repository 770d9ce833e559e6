"""Rows a second of peers, a bare TorchRec loop and our trainer on the same rows and model sizes.

    python -m benchmarks.peers FOLDER [--peers ours bare rechub deepctr fuxi recbole] [--models mmoe dssm] [--rounds 5]

FOLDER keeps the rows and an environment for each peer, made by pip where it is not there yet. Every run is a process
of its own with one thread; they take turns, so that what else the machine does falls on all alike; medians over the
rounds, each of another seed. A run's time is that of its training loop over its own loader, imports and evaluation left
out; AUC is that of clicks of the test rows.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import venv
from collections.abc import Sequence
from pathlib import Path

from benchmarks.peers.data import write

BASE = ["torch==2.13.0", "pyarrow"]
PACKAGES = {  # what the environment of a peer has; that of this process has ours
    "rechub": [*BASE, "torch-rechub==0.9.0"],
    "deepctr": [*BASE, "deepctr-torch==0.3.0", "requests"],  # which it imports and does not ask for
    "fuxi": [*BASE, "fuxictr==2.3.10"],
    # Without these bounds a fresh install of it does not start.
    "recbole": [
        "torch==2.13.0",
        "recbole==1.2.1",
        "numpy<2",
        "pandas<2.3",
        "scipy<1.14",
        "pyarrow<20",
        "setuptools<81",
    ],
}
NAMES = {
    **{"ours": "joint.train", "bare": "a bare TorchRec loop", "rechub": "torch-rechub 0.9.0"},
    **{"deepctr": "deepctr-torch 0.3.0", "fuxi": "FuxiCTR 2.3.10 (MMoE written here)"},
    "recbole": "RecBole 1.2.1 (DeepFM, one task; DSSM, pointwise)",
}
MODELS = {
    "mmoe": ["ours", "bare", "rechub", "deepctr", "fuxi", "recbole"],
    "dssm": ["ours", "bare", "rechub", "recbole"],
}
REDUCED = ("ours", "bare")  # who has bfloat16


def main() -> None:
    """Prints a table for each model."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="benchmarks.peers", description=__doc__, formatter_class=form)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--peers", nargs="*", choices=NAMES, default=[*NAMES])
    parser.add_argument("--models", nargs="*", choices=MODELS, default=[*MODELS])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--batch", type=int, default=4096)
    asked = parser.parse_args()
    if not (asked.folder / "data" / "dataset").exists():
        write(asked.folder / "data", asked.rows)
    for model in asked.models:
        peers = [peer for peer in MODELS[model] if peer in asked.peers]
        runs = [(peer, bf16) for peer in peers for bf16 in ((False, True) if peer in REDUCED else (False,))]
        found: dict[tuple[str, bool], list[dict[str, float]]] = {key: [] for key in runs}
        for seed in range(asked.rounds):
            for peer, bf16 in runs:
                sizes = ["--batch", str(asked.batch), "--seed", str(seed)]
                more = ["--model", model, *sizes, *(["--bf16"] if bf16 else [])]
                found[peer, bf16].append(run(asked.folder, peer, more))
        print(f"\n| {model} | rows/s | rows/s of processor time | to ours | AUC | peak MB |\n|---|---|---|---|---|---|")
        ours = rate(found["ours", False], "processor") if ("ours", False) in found else float("nan")
        for (peer, bf16), results in found.items():
            speeds = [rate(results, clock) for clock in ("wall", "processor")]
            auc, peak = (statistics.median(result[name] for result in results) for name in ("auc", "peak_mb"))
            name = NAMES[peer] + (", bfloat16" if bf16 else "")
            print(
                f"| {name} | {speeds[0]:,.0f} | {speeds[1]:,.0f} | {speeds[1] / ours:.2f} | {auc:.4f} | {peak:,.0f} |"
            )


def rate(results: Sequence[dict[str, float]], clock: str) -> float:
    """The median of rows a second by a clock."""
    return statistics.median(result["samples"] / result[clock] for result in results)


def run(folder: Path, peer: str, arguments: Sequence[str]) -> dict[str, float]:
    """What a run of a peer printed last, as a process with one thread."""
    python = environment(folder / "venvs" / peer, PACKAGES[peer]) if peer in PACKAGES else Path(sys.executable)
    command = [str(python), "-m", f"benchmarks.peers.{peer}", str(folder / "data"), *arguments]
    one = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "ARROW_NUM_THREADS"), "1")
    done = subprocess.run(command, env=os.environ | one, capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not lines:
        raise SystemExit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr[-2000:]}")
    print(peer, *arguments, lines[-1], file=sys.stderr, flush=True)
    result: dict[str, float] = json.loads(lines[-1])
    return result


def environment(place: Path, packages: Sequence[str]) -> Path:
    """The Python of an environment with these packages, made if it is not there."""
    python = place / "bin" / "python"
    if not (place / "complete").exists():
        venv.create(place, with_pip=True, clear=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", *packages], check=True)
        (place / "complete").touch()
    return python


if __name__ == "__main__":
    main()
