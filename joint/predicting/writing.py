"""What a finished run says of a dataset, written to files: logits of the logged candidates, and the best of the corpus.

The layout is that of `joint.data.predictions`, which reads the scores again: they can teach another run.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from joint import __version__
from joint.data.dataset import Dataset, file_hash
from joint.data.predictions import VERSION
from joint.distributed import rank
from joint.errors import ConfigError, DataError
from joint.evaluating.finished_run import Opened, open_model
from joint.predicting.predictor import Predictor
from joint.progress import progress
from joint.run import RunDirectory
from joint.schema import SPLITS, Part, Schema
from joint.versions import installed_versions

BLOCK = 1024  # requests in memory at a time, or one row group where that is larger


def predict(path: Path, data: Path, out: Path, *, splits: Sequence[str], heads: Sequence[str], k: int) -> None:
    """Write what a run's newest checkpoint says of a dataset to the folder `out`, which appears when all is done.

    Args:
        splits: whose requests; none named: all that there are.
        heads: whose scores; none named: those of all heads.
        k: items of a list; 0 writes no lists.

    Raises:
        DataError: `out` exists, the dataset cannot be read, or lacks what the run reads.
        ConfigError: the run has no such head.
        CheckpointError: there is no complete checkpoint.
    """
    if out.exists():
        raise DataError(f"{out}: exists already; choose another folder")
    if k < 0:
        raise ConfigError(f"--k {k}: expected 0 or more")
    with _opened(path, data) as opened:
        evaluator, dataset = opened.evaluator, opened.evaluator.assembler.dataset
        evaluator.truth = None  # what things are truly worth is not asked here, and costs time
        if unknown := [head for head in heads if head not in evaluator.heads]:
            raise ConfigError(f"--heads {unknown[0]}: expected a head of {path}: {', '.join(evaluator.heads)}")
        chosen = tuple(head for head in evaluator.heads if not heads or head in heads)
        splits = [split for split in SPLITS if (split in splits if splits else dataset.schema.requests(split))]
        parts = [part for day in dataset.parts(splits).values() for part in day]
        predictor = Predictor(evaluator, chosen, k)
        with _written_whole(out) as folder:
            hashes = _write(predictor, parts, folder)
            if rank() == 0:
                said = _description(opened, data, splits, predictor, hashes)
                (folder / "predict.json").write_text(json.dumps(said, indent=1))
        if rank() == 0:
            print(f"{out}: {sum(part.rows for part in parts):,} requests of {data}, by {path}, step {opened.step}")
            if predictor.unknown:
                print(f"{predictor.unknown:,} ids are not in the run's tables and were read as unknown")


@contextmanager
def _opened(path: Path, data: Path) -> Iterator[Opened]:
    """The run, on this dataset: its own, wherever it lies now, or another one."""
    run, dataset = RunDirectory(path), Dataset(data)
    run.load_config()  # what is no run at all is said to be none
    own = run.read_environment()["dataset"] == dataset.schema.hash
    overrides, other = ([f"data.path={data}"], None) if own else ([], dataset)
    with open_model(path, overrides, other, reference=False) as opened:
        if not own:
            _check_alike(opened.evaluator.assembler.plan.schema, dataset)
        yield opened


def _check_alike(schema: Schema, dataset: Dataset) -> None:
    """DataError unless the dataset has the features, histories, labels and pools of the schema."""

    def named(of: Schema) -> dict[str, object]:
        features = {
            f"feature {f.name}": (f.level, f.kind, f.space, f.size if f.kind == "vector" else 0) for f in of.features
        }
        histories = {f"history {h.name}": (h.events, h.competitors) for h in of.histories}
        return (
            features | histories | dict.fromkeys([*(f"label {n}" for n in of.labels), *(f"pool {n}" for n in of.pools)])
        )

    found = named(dataset.schema)
    for name, expected in named(schema).items():
        if name not in found:
            raise DataError(f"{dataset.directory}: has no {name}, which the run's dataset has")
        if found[name] != expected:
            raise DataError(f"{dataset.directory}: {name} is {found[name]}; of the run's dataset {expected}")


@contextmanager
def _written_whole(out: Path) -> Iterator[Path]:
    """A temporary folder that becomes `out`; a failure leaves nothing."""
    folder = out.absolute().with_name(f".{out.absolute().name}.unfinished")
    try:
        if rank() == 0:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
        yield folder
        if rank() == 0:
            folder.rename(out)
    except OSError as error:
        raise DataError(f"{out}: cannot be made ({error})") from error
    finally:
        if rank() == 0:
            shutil.rmtree(folder, ignore_errors=True)


def _description(
    opened: Opened, data: Path, splits: Sequence[str], predictor: Predictor, hashes: Sequence[str]
) -> dict[str, object]:
    return {
        "version": VERSION,
        "hash": hashlib.sha256("".join(hashes).encode()).hexdigest()[:16],
        "run": str(opened.run.path),
        "step": opened.step,
        "config": file_hash(opened.run.config),
        "path": str(data),
        "dataset": opened.evaluator.assembler.dataset.schema.hash,
        "splits": splits,
        "columns": predictor.columns,
        "k": predictor.k,
        "lists": predictor.lists,
        "ids": predictor.id_feature,
        "versions": {"joint": __version__, **installed_versions()},
    }


def _write(predictor: Predictor, parts: Sequence[Part], folder: Path) -> list[str]:
    """Write the files of all parts, blocks of row groups at a time; returns the hashes of those of scores."""
    dataset, hashes = predictor.evaluator.assembler.dataset, []
    total = sum(part.rows for part in parts)
    with progress(None, "predicting", unit="request", total=total) as bar:
        for part in parts:
            paths = folder / "scores" / part.path, folder / "top" / part.path
            with _PartFile(paths[0], part) as scores, _PartFile(paths[1], part) as top:
                step = max(1, BLOCK // part.groups[0])
                for first in range(0, len(part.groups), step):
                    requests = dataset.read(part, range(first, min(first + step, len(part.groups))))
                    found = predictor(requests)
                    if rank() == 0:
                        scores.write(found.scores)
                        top.write(found.top)
                    bar.update(len(requests))
            if rank() == 0:
                hashes.append(file_hash(paths[0]))
    return hashes


class _PartFile:
    """A file beside one of the dataset, in row groups of the same length; none is made for tables without columns."""

    def __init__(self, path: Path, part: Part) -> None:
        self.path, self.group = path, part.groups[0]
        self._writer: pq.ParquetWriter | None = None

    def __enter__(self) -> _PartFile:
        return self

    def __exit__(self, *_: object) -> None:
        if self._writer is not None:
            self._writer.close()

    def write(self, table: pa.Table) -> None:
        if not table.num_columns:
            return
        if self._writer is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._writer = pq.ParquetWriter(self.path, table.schema, compression="zstd")
        self._writer.write_table(table, row_group_size=self.group)
