"""From the command to the first trained step, and where that time goes.

    python -m benchmarks.startup FOLDER [--rounds 5] [CONFIG]

`joint.train` on a prepared dataset, stopped after its first step, each time as a process of its own with one thread:
wall and processor seconds until its imports are done, and from there to the first step. Beside it what importing torch
and TorchRec alone takes.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

from joint.data.planted.simulate import parameters_of, simulate

LIBRARIES = "import torch, torchrec, pyarrow.parquet, torch.utils.tensorboard"
STEP = """
import json, time
began = time.perf_counter()
import joint.train
import joint.training
imported = time.perf_counter(), time.process_time()
from joint.reporting import Reporter

class First(Reporter):
    def step(self, *arguments, **named):
        wall, processor = time.perf_counter() - imported[0], time.process_time() - imported[1]
        print(json.dumps([imported[0] - began, imported[1], wall, processor]), flush=True)
        import os
        os._exit(0)

joint.training.Reporter = First
joint.train.main()
"""


def once(arguments: list[str]) -> list[float]:
    """Wall and processor seconds of the imports, and from there to the first step."""
    command = [sys.executable, "-c", STEP, *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    found: list[float] = json.loads(done.stdout.splitlines()[-1])
    return found


def libraries() -> float:
    """Processor seconds of importing what it is made of."""
    script = f"{LIBRARIES}\nimport time; print(time.process_time())"
    done = subprocess.run([sys.executable, "-c", script], check=True, stdout=subprocess.PIPE, text=True)
    return float(done.stdout.splitlines()[-1])


def main() -> None:
    """Prints the medians."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="benchmarks.startup", description=__doc__, formatter_class=form)
    parser.add_argument("folder", type=Path)
    parser.add_argument("config", nargs="?", default="configs/joint.yaml")
    parser.add_argument("--rounds", type=int, default=5)
    asked = parser.parse_args()
    world = asked.folder / "world"
    if not world.exists():
        simulate(world, parameters_of("biased", "small", []), seed=0, world="biased")
    rounds = []
    for turn in range(asked.rounds):
        places = [f"data.path={world}", f"run.dir={asked.folder / 'runs'}", f"run.name=run{os.getpid()}-{turn}"]
        rounds.append([libraries(), *once([asked.config, *places])])
    bare, *found = (statistics.median(column) for column in zip(*rounds, strict=True))
    print(f"libraries alone: {bare:.1f} processor seconds")
    print(f"imports: {found[0]:.1f} s, {found[1]:.1f} of processor time")
    print(f"from there to the first step: {found[2]:.1f} s, {found[3]:.1f} of processor time")


if __name__ == "__main__":
    main()
