"""A joint run beside trainings of one head each, in two comparisons: what they cost, and how good the heads are.

    python -m benchmarks.apart FOLDER [--config configs/joint.yaml] [--seeds 5] [key=value ...]

Own losses: the config without its distillation, beside each head alone with the objectives that need no other head;
alone, a head draws only the candidates that these are over. Aligned: the config as it is, beside the same, but the
student is taught by the ranking head that was trained alone: `joint.predict` writes its logits of all logged
candidates, which counts, and the student's run reads them. A seed is a small planted world and a run of every kind on
it, in turn. Cost is processor time of a process with one thread: of the training loops, loaders included, and of
predicting; by part of a step it is `benchmarks.step`'s to tell. Quality is of the test part: means over seeds, and the
standard error of the difference.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import torch

import joint.training
from benchmarks.peers.ours import Timing
from joint.config import load_config
from joint.data.dataset import Dataset
from joint.data.planted.simulate import parameters_of, simulate
from joint.experiment import Config, heads_of
from joint.fit import predictions_of
from joint.predicting.writing import predict
from joint.schema import STAGES

HEADS = ("retrieval", "pre_ranking", "ranking")
METRICS = ("retrieval/recall@50", "retrieval/auc/view", "pre_ranking/auc/view", "ranking/auc/view")
FIRST_WORLD = 100  # the first of the worlds that are kept for choosing
COMPARED = {  # comparison -> its joint run, and the trainings apart
    "own losses": ("joint, own losses", ("retrieval", "pre_ranking", "ranking")),
    "aligned": ("joint", ("retrieval", "ranking", "ranking's logits", "pre_ranking, taught")),
}


def alone(config: Config, head: str, *, taught: bool = False) -> list[str]:
    """The overrides that leave one head, its objectives, and the candidates that these are over."""
    kept = {n: o for n, o in config.objectives.items() if o.head == head and (taught or len(o.needs) < 2)}
    spaces = {space for o in kept.values() for space in o.needs.get(head, ())}
    flags = [STAGES["exposed" if space in ("positive", "exposed_neg") else space] for space in spaces]
    unread = [n for n in config.data.candidates if n != "exposed" and not any(STAGES[n] & flag for flag in flags)]
    others = [other for other in HEADS if other != head]
    return [
        *(f"heads.{other}=null" for other in others),
        *(f"evaluation.quotas.{other}=null" for other in others),
        *(f"objectives.{name}=null" for name in config.objectives if name not in kept),
        *(f"data.candidates.{name}=0" for name in unread),
    ]


def taught_by(config: Config, scores: Path) -> list[str]:
    """The overrides that leave the student, and its teacher's written logits."""
    distilled = [name for name, o in config.objectives.items() if len(o.needs) > 1]
    columns = [f"tasks.{task}.score=ranking.{task}" for task in config.tasks]
    return [
        *alone(config, "pre_ranking", taught=True),
        *(f"objectives.{name}.teacher=logged" for name in distilled),
        *(f"data.scores={scores}", *columns),
    ]


class Seed:
    """A world, and the runs on it."""

    def __init__(self, folder: Path, path: Path, overrides: Sequence[str], seed: int) -> None:
        self.folder, self.path = folder / str(seed), path
        world = self.folder / "world"
        if not world.exists():
            simulate(world, parameters_of("biased", "small", []), seed=FIRST_WORLD + seed, world="biased")
        shutil.rmtree(self.folder / "runs", ignore_errors=True)
        shutil.rmtree(self.folder / "scores", ignore_errors=True)
        self.overrides = [f"data.path={world}", f"run.dir={self.folder / 'runs'}", f"run.seed={seed}", *overrides]
        self.config = load_config(path, self.overrides)[0]
        self.seconds: dict[str, float] = {}
        self.numbers: dict[str, dict[str, float]] = {}

    def train(self, name: str, overrides: Sequence[str]) -> None:
        """A training: its processor seconds, and what its heads are measured as."""
        config, _ = load_config(self.path, [*self.overrides, *overrides, f"run.name={name}"])
        joint.training.train(config, Dataset(config.data.path, predictions=predictions_of(config.data)))
        self.seconds[name] = Timing.timed.processor
        self.numbers[name] = json.loads((self.folder / "runs" / name / "eval.json").read_text())

    def all(self) -> None:
        """Every kind."""
        distilled = [f"objectives.{name}=null" for name, o in self.config.objectives.items() if len(o.needs) > 1]
        assert tuple(heads_of(self.config)) == HEADS
        self.train("joint", [])
        self.train("joint, own losses", distilled)
        for head in HEADS:
            self.train(head, alone(self.config, head))
        began, scores = time.process_time(), self.folder / "scores"
        run, world = self.folder / "runs" / "ranking", self.folder / "world"
        predict(run, world, scores, splits=["train"], heads=["ranking"], k=0)
        self.seconds["ranking's logits"] = time.process_time() - began
        self.train("pre_ranking, taught", taught_by(self.config, scores))


def show(seeds: Sequence[Seed]) -> None:
    """Both comparisons: a line a training, and a line a metric."""
    for comparison, (one, several) in COMPARED.items():
        seconds = {name: statistics.median(seed.seconds[name] for seed in seeds) for name in (one, *several)}
        apart = sum(seconds[name] for name in several)
        print(f"\n| {comparison} | processor s | of those apart |\n|---|---|---|")
        for name, cost in seconds.items():
            print(f"| {name} | {cost:.1f} | {cost / apart:.2f} |")
        print(f"\n| {comparison} | joint | apart | difference |\n|---|---|---|---|")
        for metric in METRICS:
            own = next(name for name in several if name.split(",")[0] == metric.split("/")[0])
            pairs = [(seed.numbers[one][metric], seed.numbers[own][metric]) for seed in seeds]
            apart_mean, joint_mean = (statistics.mean(pair[side] for pair in pairs) for side in (1, 0))
            spread = statistics.stdev(a - b for a, b in pairs) / math.sqrt(len(pairs)) if len(pairs) > 1 else math.nan
            print(f"| {metric} | {joint_mean:.4f} | {apart_mean:.4f} | {joint_mean - apart_mean:+.4f} ± {spread:.4f} |")


def main() -> None:
    """Prints the costs and the metrics."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="benchmarks.apart", description=__doc__, formatter_class=form)
    parser.add_argument("folder", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--config", type=Path, default=Path("configs/joint.yaml"))
    parser.add_argument("--seeds", type=int, default=5)
    asked = parser.parse_intermixed_args()
    torch.set_num_threads(1)
    joint.training.Reporter = Timing  # type: ignore[misc]
    seeds = [Seed(asked.folder, asked.config, asked.overrides, seed) for seed in range(asked.seeds)]
    for seed in seeds:
        seed.all()
    show(seeds)


if __name__ == "__main__":
    main()
