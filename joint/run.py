"""The run directory: where each thing of a run is, and whether it belongs to this config.

runs/NAME/  config.yaml · environment.json · train.log · metrics.jsonl · tensorboard/ ·
            checkpoints/step-00001000/ · eval.json · eval/requests.parquet
"""

from __future__ import annotations

import json
import math
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from joint import __version__
from joint.checkpoint import steps
from joint.config import load_config
from joint.configuring import settings
from joint.distributed import world_size
from joint.errors import CheckpointError, ConfigError
from joint.experiment import Config, Run
from joint.files import write_whole
from joint.schema import Schema

MOST_SAID = 10  # keys that a message names
# No variable of the environment is an input of a run; those that libraries under it may heed are kept for the record.
READ_BY_LIBRARIES = (
    "OMP_",
    "MKL_",
    "OPENBLAS_",
    "ATEN_",
    "DNNL_",
    "ONEDNN_",
    "CUBLAS_",
    "NVIDIA_TF32",
    "TORCH_ALLOW_TF32",
)


@dataclass(frozen=True)
class RunDirectory:
    """The names of a run's files; nothing else joins their paths."""

    path: Path

    @property
    def config(self) -> Path:
        """The config as resolved; itself a valid config file."""
        return self.path / "config.yaml"

    @property
    def environment(self) -> Path:
        """Versions, machine, threads, dtypes, seed, ranks and the dataset's hash, of the first start."""
        return self.path / "environment.json"

    @property
    def log(self) -> Path:
        """The lines that were printed."""
        return self.path / "train.log"

    @property
    def metrics(self) -> Path:
        """One JSON object per report: the numbers of TensorBoard."""
        return self.path / "metrics.jsonl"

    @property
    def tensorboard(self) -> Path:
        """Event files."""
        return self.path / "tensorboard"

    @property
    def checkpoints(self) -> Path:
        """One folder a checkpoint."""
        return self.path / "checkpoints"

    @property
    def evaluation(self) -> Path:
        """The metrics of the finished run on the test part."""
        return self.path / "eval.json"

    @property
    def negative_weights(self) -> Path:
        """The picture that `joint.weights` draws."""
        return self.path / "negative_weights.png"

    @property
    def evaluated_requests(self) -> Path:
        """The ratios of eval.json by request of the test part: `METRIC.total`, `METRIC.count`."""
        return self.path / "eval" / "requests.parquet"

    @property
    def begun(self) -> bool:
        """Whether there is something to resume. A run that never saved may be started again with another config."""
        return self.config.is_file() and bool(steps(self.checkpoints))

    def check_dataset(self, schema: Schema) -> None:
        """CheckpointError if the run was made from another dataset, or its environment.json cannot be read."""
        found = self.read_environment()["dataset"]
        if found != schema.hash:
            raise CheckpointError(f"{self.path}: made from a dataset of hash {found}, this one's is {schema.hash}")

    def read_environment(self) -> dict[str, Any]:
        """What environment.json says; CheckpointError if it cannot be read, or names no dataset."""
        try:
            found: dict[str, Any] = json.loads(self.environment.read_text())
            return found | {"dataset": found["dataset"]}
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise CheckpointError(f"{self.environment}: cannot be read ({error})") from error

    def load_config(self, overrides: Sequence[str] = ()) -> tuple[Config, settings.Tree]:
        """The run's own config, under overrides of how it is measured.

        Raises:
            CheckpointError: there is none.
            ConfigError: an override is of something else.
        """
        if not self.config.is_file():
            raise CheckpointError(f"{self.path}: not a run directory (no config.yaml in it)")
        for override in overrides:
            key = override.partition("=")[0]
            if not key.startswith(("evaluation.", "data.path")) and ".fusion" not in key:
                raise ConfigError(f"{override}: of a trained run only evaluation.* and fusion weights may be changed")
        return load_config(self.config, overrides)


def open_run(config: Config, schema: Schema, scores: str = "", *, continues: Path | None = None) -> RunDirectory:
    """The directory of a config's run; nothing is written.

    Args:
        scores: hash of the predictions that it learns from.
        continues: the run that this one is to go on from, if any.

    Raises:
        CheckpointError: it holds checkpoints of another config, of another start, or from other data or predictions.
    """
    run = RunDirectory(Path(config.run.dir) / config.run.name)
    if run.begun:
        before, _ = run.load_config()
        differing = settings.differences(_decisive(before), _decisive(config))
        if differing:
            found = "; ".join(differing[:MOST_SAID]) + ("; …" if len(differing) > MOST_SAID else "")
            said = "made by another config; choose another run.name. Differing (what the run has != what you say)"
            raise CheckpointError(f"{run.path}: {said}: {found}")
        run.check_dataset(schema)
        environment = run.read_environment()
        if (found := environment.get("scores", "")) != scores:
            raise CheckpointError(f"{run.path}: begun with scores of hash {found!r}; data.scores now has {scores!r}")
        before_it = environment.get("continues") or ""
        if continues and not before_it:
            raise CheckpointError(f"{run.path}: was begun without --continue; choose another run.name")
        if continues and Path(before_it).resolve() != continues.resolve():
            raise CheckpointError(f"{run.path}: was begun with --continue {before_it}, not {continues}")
    return run


def make_run(
    run: RunDirectory, config: Config, schema: Schema, scores: str = "", *, continues: Path | None = None
) -> None:
    """Write the run's config and environment, unless it is being resumed; CheckpointError where that cannot be."""
    if run.begun:
        return
    try:
        run.path.mkdir(parents=True, exist_ok=True)
        environment = _environment(config, schema, continues) | {"scores": scores}
        write_whole(run.environment, json.dumps(environment, indent=1))
        write_whole(run.config, settings.dump(config))
    except OSError as error:
        raise CheckpointError(f"{run.path}: cannot be made ({error.strerror})") from error


def write_metrics(run: RunDirectory, found: Mapping[str, float], requests: Mapping[str, np.ndarray]) -> None:
    """Write eval.json, without the metrics that have no unit (nan), and before it the metrics of every request."""
    run.evaluated_requests.parent.mkdir(exist_ok=True)
    temporary = run.evaluated_requests.with_name(".requests.unfinished")
    pq.write_table(pa.table(dict(requests)), temporary, compression="zstd")
    temporary.replace(run.evaluated_requests)
    known = {name: value for name, value in sorted(found.items()) if not math.isnan(value)}
    write_whole(run.evaluation, json.dumps(known, indent=1))


def _decisive(config: Config) -> Config:
    """What a run may not change when it goes on: all but places, and when it speaks and saves.

    Run directories and datasets may be moved; the dataset's hash says whether it is the same.
    """
    return replace(
        config,
        run=Run(name="anywhere", seed=config.run.seed),
        data=replace(config.data, path=""),
        train=replace(config.train, log_every=1, checkpoint_every=1),
    )


def _environment(config: Config, schema: Schema, continues: Path | None) -> dict[str, object]:
    packages = (
        "torch",
        "torchrec",
        "fbgemm-gpu",
        "fbgemm-gpu-cpu",
        "numpy",
        "pyarrow",
        "pandas",
        "omegaconf",
    )
    versions = {}
    for package in packages:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return {
        "joint": __version__,
        "python": platform.python_version(),
        "machine": f"{platform.machine()} {platform.system()}, {os.cpu_count()} cores",
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "ranks": world_size(),
        "threads_per_rank": torch.get_num_threads(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "seed": config.run.seed,
        "dtypes": {"tables": "float32", "parameters": "float32", "products": config.train.precision},
        "variables": {name: value for name, value in sorted(os.environ.items()) if name.startswith(READ_BY_LIBRARIES)},
        "versions": versions,
        "dataset": schema.hash,
        "days": schema.days(config.data.train, config.data.days),
        "continues": str(continues) if continues else None,
    }
