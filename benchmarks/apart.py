"""One joint run beside three trainings of one head each: what they cost, and how good the heads are.

    python -m benchmarks.apart FOLDER [--seeds 3] [key=value ...]

`configs/joint.yaml`, and that with all heads but one left out, each with the objectives that need no other head: apart,
the pre-ranking head has no teacher, so the joint run is there without its distillation as well. Cost is the processor
time of the training loops, loaders included, of a process with one thread, in turn; by part of a step it is
`benchmarks.step`'s to tell. Quality is of the test part, means over seeds.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
from collections.abc import Sequence
from pathlib import Path

import torch

import joint.training
from benchmarks.peers.ours import Timing
from joint.config import load_config
from joint.data.dataset import Dataset
from joint.data.planted.simulate import parameters_of, simulate

HEADS = {  # head -> its own objectives; the others need two heads
    "retrieval": ("retrieve", "masked"),
    "pre_ranking": ("student", "negatives", "order"),
    "ranking": ("teacher",),
}
ALL = (*HEADS["retrieval"], *HEADS["pre_ranking"], *HEADS["ranking"], "distill")
METRICS = ("retrieval/recall@50", "retrieval/auc/view", "pre_ranking/auc/view", "ranking/auc/view")


def alone(head: str) -> list[str]:
    """The overrides that leave one head."""
    heads = [f"heads.{other}=null" for other in HEADS if other != head]
    quotas = [f"evaluation.quotas.{other}=null" for other in HEADS if other != head]
    return [*heads, *quotas, *(f"objectives.{name}=null" for name in ALL if name not in HEADS[head])]


def trained(folder: Path, name: str, overrides: Sequence[str]) -> tuple[float, dict[str, float]]:
    """Processor seconds of a training, and what its heads are measured as."""
    places = [f"data.path={folder / 'world'}", f"run.dir={folder / 'runs'}", f"run.name={name}"]
    config, _ = load_config(Path("configs/joint.yaml"), [*places, *overrides])
    joint.training.train(config, Dataset(config.data.path))
    numbers = json.loads((folder / "runs" / name / "eval.json").read_text())
    return Timing.timed.processor, {metric: numbers[metric] for metric in METRICS if metric in numbers}


def main() -> None:
    """Prints the costs and the metrics."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="benchmarks.apart", description=__doc__, formatter_class=form)
    parser.add_argument("folder", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--seeds", type=int, default=3)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    joint.training.Reporter = Timing  # type: ignore[misc]
    if not (asked.folder / "world").exists():
        simulate(asked.folder / "world", parameters_of("biased", "small", []), seed=0, world="biased")
    shutil.rmtree(asked.folder / "runs", ignore_errors=True)
    kinds = {"joint": [], "joint-without-distill": ["objectives.distill=null"]}
    kinds |= {head: alone(head) for head in HEADS}
    found: dict[str, list[tuple[float, dict[str, float]]]] = {kind: [] for kind in kinds}
    for seed in range(asked.seeds):
        for kind, overrides in kinds.items():
            name, more = f"{kind}-{seed}", [*asked.overrides, f"run.seed={seed}"]
            found[kind].append(trained(asked.folder, name, [*overrides, *more]))
    seconds = {kind: statistics.median(cost for cost, _ in runs) for kind, runs in found.items()}
    apart = sum(seconds[head] for head in HEADS)
    print("| training | processor s | of the three |\n|---|---|---|")
    for kind, cost in seconds.items():
        print(f"| {kind} | {cost:.1f} | {cost / apart:.2f} |")
    print("\n| metric | joint | apart | difference |\n|---|---|---|---|")
    for metric in METRICS:
        one, three = (
            statistics.mean(numbers[metric] for _, numbers in found[kind]) for kind in ("joint", metric.split("/")[0])
        )
        print(f"| {metric} | {one:.4f} | {three:.4f} | {one - three:+.4f} |")


if __name__ == "__main__":
    main()
