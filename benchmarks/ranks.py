"""Two ranks against two processes of one rank each, at the same time: what does working together cost?

    python -m benchmarks.ranks

One thread each, half of the requests of a global batch each, the same model: once most of the work is in tables
(`embedding`: wide rows, many ids, small towers), once in towers (`dense`). Both sides take turns; medians of the
combined requests per second. `exchanging` is the share of a rank's step inside gloo's operations, waiting for the other
included; `by process time` leaves waiting out, for machines that others use too; `checkpoint / training` is in
process time, at the default interval.
"""

from __future__ import annotations

import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from joint.checkpoint import Progress, Saver
from joint.config import load_config
from joint.data.assemble import Assembler
from joint.data.dataset import Dataset
from joint.data.loader import Loader
from joint.data.order import Position
from joint.distributed import process_group, rank, world_size
from joint.experiment import Config, Train
from joint.features import Plan
from joint.optimizers import build_optimizer, set_learning_rates
from joint.pipeline import build_pipeline
from joint.task import build_task
from towers.mixtures import set_step

CONFIG = Path(__file__).parents[1] / "configs" / "joint.yaml"
ROUNDS, WARM, STEPS = 3, 4, 16
HEADS = ("retrieval", "pre_ranking", "ranking")
CASES = {
    "embedding": [
        *(f"tables.{table}.dim=128" for table in ("user_id", "video_id", "author_id", "category_level_two", "watched")),
        *(f"heads.{head}.trunk.hidden=[8]" for head in HEADS),
        "encoders.attended.length=1",
        "heads.retrieval.dim=8",
        "heads.pre_ranking.dim=8",
        "objectives.order=",
    ],
    "dense": [f"heads.{head}.trunk.hidden=[512, 256]" for head in HEADS],
}


def config_of(case: str, data: str, requests: int) -> Config:
    """configs/joint.yaml as the case changes it, `requests` a global batch."""
    overrides = [*CASES[case], f"data.path={data}", f"data.requests_per_batch={requests}", "data.epochs=50"]
    return load_config(CONFIG, overrides)[0]


def worker(case: str, data: str, folder: Path) -> None:
    """One process of a round: print what it measured, as JSON."""
    together = "RANK" in os.environ
    config, dataset = config_of(case, data, 256 if together else 128), Dataset(data)
    with process_group() as device:
        plan = Plan(config, dataset.schema)
        model = build_task(plan, device)
        optimizer = build_optimizer(model, config.optimizer)
        pipeline = build_pipeline(model, optimizer, device)
        loader = Loader(Assembler(plan, dataset), rank=rank(), world_size=world_size())
        batches = loader.from_position(Position())
        model.train()

        def step(number: int) -> int:
            set_step(model, number)
            set_learning_rates(optimizer, config.optimizer, number)
            return pipeline.progress(batches).batch.requests

        for number in range(WARM):
            step(number)
        (folder / f"ready-{os.getpid()}").touch()
        while len([*folder.glob("ready-*")]) < 2:
            time.sleep(0.01)
        began, used = time.perf_counter(), time.process_time()
        requests = sum(step(WARM + number) for number in range(STEPS))
        seconds, used = time.perf_counter() - began, time.process_time() - used
        exchanging = _exchanging(lambda: step(WARM + STEPS)) if together else 0.0
        saved = _saved(Saver(folder / f"{os.getpid()}", model, optimizer, keep=1)) if not together else 0.0
        print(json.dumps({"rate": requests / seconds, "step": used / STEPS, "exchange": exchanging, "save": saved}))


def _exchanging(step: object) -> float:
    """The share of a step that the main thread spends in collectives."""
    from torch.profiler import ProfilerActivity, profile

    began = time.perf_counter()
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        for _ in range(3):
            step()  # type: ignore[operator]
    seconds = time.perf_counter() - began
    return sum(e.cpu_time_total for e in profiler.key_averages() if e.key.startswith("gloo:")) / 1e6 / seconds


def _saved(saver: Saver) -> float:
    """Process time of one checkpoint."""
    saver.save(Progress(1))
    used = time.process_time()
    for number in range(2, 5):
        saver.save(Progress(number))
    return (time.process_time() - used) / 3


def measure(case: str, data: str, *, together: bool) -> list[dict[str, float]]:
    """Two processes at the same time, as ranks of one run or each for itself."""
    with socket.socket() as probe, tempfile.TemporaryDirectory() as folder:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        probe.close()
        processes = []
        for number in range(2):
            environment = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
            if together:
                environment |= {"RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": "2"}
                environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            command = [sys.executable, "-m", "benchmarks.ranks", case, data, folder]
            processes.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True))
        lines = [process.communicate(timeout=600)[0].splitlines()[-1] for process in processes]
    return [json.loads(line) for line in lines]


def main() -> None:
    """Print the tables."""
    with tempfile.TemporaryDirectory() as folder:
        data = f"{folder}/world"
        prepare = [sys.executable, "-m", "joint.prepare", "simulate", data, "--world", "biased", "--size", "small"]
        subprocess.run(prepare, check=True, capture_output=True)
        print("| case | apart, requests/s | together | ratio | by process time | exchanging | checkpoint / training |")
        print("|---|---|---|---|---|---|---|")
        for case in CASES:
            rounds = [[measure(case, data, together=together) for together in (False, True)] for _ in range(ROUNDS)]
            apart, together = (statistics.median(sum(p["rate"] for p in r[k]) for r in rounds) for k in (0, 1))
            ratio = statistics.median(sum(p["rate"] for p in r[1]) / sum(p["rate"] for p in r[0]) for r in rounds)
            busy = statistics.median(sum(p["step"] for p in r[0]) / sum(p["step"] for p in r[1]) for r in rounds)
            exchange = statistics.median(p["exchange"] for r in rounds for p in r[1])
            save = statistics.median(p["save"] / p["step"] for r in rounds for p in r[0])
            every = Train().checkpoint_every
            print(
                f"| {case} | {apart:,.0f} | {together:,.0f} | {ratio:.2f} | {busy:.2f} | {exchange:.0%} "
                f"| {save / every:.2%} |"
            )


if __name__ == "__main__":
    if len(sys.argv) > 1:
        worker(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
    else:
        main()
