"""Checkpoints: tables, both optimizers and the progress, in one folder a step, loadable at any world size.

`step-00001000/` holds PyTorch's distributed checkpoint, `progress.json` and, of all these files, `hashes.json`. It is
written under another name and then renamed, so what has this name is whole. Nothing random is kept, because all
randomness is a function of (seed, step, rank). Checkpoints are trusted files: their index is read by
`torch.distributed.checkpoint`, which unpickles it.
"""

from __future__ import annotations

import json
import math
import shutil
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed._shard.sharded_tensor import Shard, ShardedTensor
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torchrec.distributed import DistributedModelParallel
from torchrec.optim.keyed import CombinedOptimizer

from joint.batch import Batch
from joint.data.dataset import file_hash
from joint.data.order import Position
from joint.distributed import gather_objects, new_host_group, rank, world_size
from joint.errors import CheckpointError

PROGRESS, HASHES = "progress.json", "hashes.json"
T = TypeVar("T")
# What PyTorch's distributed checkpoint raises for files that are torn, altered, gone, or that no disk has room for.
FAILURES = (dcp.CheckpointException, OSError, ValueError, RuntimeError, LookupError, TypeError)


@dataclass(frozen=True)
class Progress:
    """How far a run is: steps done, the position of the next batch, and what was trained on.

    `seen`: (epoch, day number) -> requests. While training each rank counts its own; those of all ranks are its sum.
    """

    step: int = 0
    position: Position = Position()
    seen: Mapping[tuple[int, int], int] = field(default_factory=dict)

    def after(self, batch: Batch) -> Progress:
        """The progress once the batch at `position` has been trained on."""
        place = (self.position.epoch, self.position.day)
        seen = {**self.seen, place: self.seen.get(place, 0) + batch.requests}
        return Progress(self.step + 1, batch.position, seen)

    def of_all_ranks(self) -> Progress:
        """The same with the requests of all ranks; every rank takes part."""
        seen: Counter[tuple[int, int]] = Counter()
        for counted in gather_objects(dict(self.seen)):
            seen.update(counted)
        return Progress(self.step, self.position, seen)


class Saver:
    """Writes the checkpoints of a run into a folder, of which it keeps the `keep` newest. Every rank takes part.

    `beside`: copy the state, let training go on, and write in a thread; the next save waits for the one before it.
    Leaving the context waits for the last one.

    Raises:
        CheckpointError: a checkpoint cannot be written, on all ranks alike; the one before it is whole. When written
            beside training, the next `save` or `wait` says so.
    """

    def __init__(
        self,
        folder: Path,
        model: DistributedModelParallel,
        optimizer: CombinedOptimizer,
        *,
        keep: int,
        beside: bool = False,
    ) -> None:
        self.folder, self.keep, self.beside = folder, keep, beside
        self.model, self.optimizer = model, optimizer
        # Collectives of the writing thread must not mingle with those of training.
        self.group = new_host_group()
        self.thread: threading.Thread | None = None
        self.failure: BaseException | None = None

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if self.thread is not None:
            self.thread.join()
        if kind is None:
            self.wait()

    def save(self, progress: Progress) -> None:
        """Save the state as it is now as `FOLDER/step-…`.

        A checkpoint of that step that is there already (a broken one, since the run did not go on from it) is replaced.
        """
        self.wait()
        state = _state(self.model, self.optimizer)
        progress = progress.of_all_ranks()
        if not self.beside:
            self._write(state, progress)
            return
        self.thread = threading.Thread(
            target=self._write_beside, args=(_copy(state, self.group), progress), name="checkpoint"
        )
        self.thread.start()

    def wait(self) -> None:
        """Wait until what is being written is there."""
        if self.thread is not None:
            self.thread.join()
        self.thread, failure, self.failure = None, self.failure, None
        if failure is not None:
            raise failure

    def _write_beside(self, state: dict[str, Any], progress: Progress) -> None:
        try:
            self._write(state, progress)
        except BaseException as error:  # handed over, whatever it is
            self.failure = error

    def _write(self, state: dict[str, Any], progress: Progress) -> None:
        final = self.folder / f"step-{progress.step:08d}"
        temporary = self.folder / f".{final.name}.unfinished"

        def write() -> dict[str, str]:
            dcp.save(state, checkpoint_id=temporary, process_group=self.group)
            written = [*temporary.glob(f"__{rank()}_*")]
            if rank() == 0:
                (temporary / PROGRESS).write_text(_to_json(progress))
                written += [temporary / PROGRESS, temporary / ".metadata"]
            return {path.name: file_hash(path) for path in written}

        def publish() -> None:
            if rank() == 0:
                (temporary / HASHES).write_text(json.dumps(hashes, indent=1))
                _remove(final)
                temporary.rename(final)
                for old in steps(self.folder)[: -self.keep]:
                    _remove(old)

        if rank() == 0:
            for left in self.folder.glob(".step-*"):
                shutil.rmtree(left, ignore_errors=True)
        dist.barrier(self.group)
        hashes = {name: value for part in self._on_all_ranks(write, temporary) for name, value in part.items()}
        self._on_all_ranks(publish, temporary)

    def _on_all_ranks(self, part: Callable[[], T], temporary: Path) -> list[T]:
        """Do a part of a save on every rank; what each gives, or the same error on all where it fails on one."""
        result, problem = None, ""
        try:
            result = part()
        except FAILURES as error:
            problem = _reason(error)
        outcomes = gather_objects((result, problem), self.group)
        problem = next((said for _, said in outcomes if said), "")
        if problem:
            shutil.rmtree(temporary, ignore_errors=True)
            name = temporary.with_name(temporary.name[1:]).with_suffix("")
            raise CheckpointError(f"{name}: cannot be written ({problem}); the checkpoint before it is whole")
        return [given for given, _ in outcomes]


def steps(folder: Path) -> list[Path]:
    """The complete checkpoints of a folder, oldest first."""
    return sorted(path for path in folder.glob("step-*") if (path / ".metadata").is_file())


def load_latest(
    folder: Path, model: DistributedModelParallel, optimizer: CombinedOptimizer | None = None, *, grown: bool = False
) -> Progress:
    """Load the newest complete checkpoint in place; the start of a run when there is none.

    Without an optimizer only the model is loaded (evaluation). `grown`: what has more rows now than it had then, such
    as a table whose vocabulary has grown, gets those that were saved, and keeps the others as they are.

    Raises:
        CheckpointError: it does not fit this model, or cannot be read.
    """
    found = steps(folder)
    if not found:
        return Progress()
    state = _state(model, optimizer)
    try:
        _check_files(found[-1])
        progress = _from_json((found[-1] / PROGRESS).read_text())
        dcp.load(state, checkpoint_id=found[-1], planner=_Grown() if grown else None)
    except FAILURES as error:
        before = f" to go on from {found[-2].name}" if len(found) > 1 else ""
        raise CheckpointError(f"{found[-1]}: cannot be loaded ({_reason(error)}); remove it{before}") from error
    model.load_state_dict(state["model"])
    if optimizer is not None:
        optimizer.load_state_dict(state["optimizer"])
        # By which the tables' Adam mends its bias: FBGEMM counts it, and TorchRec keeps it in no state.
        optimizer.set_optimizer_step(progress.step)
    return progress if rank() == 0 else Progress(progress.step, progress.position)


def _check_files(folder: Path) -> None:
    """ValueError unless every file is as it was written, which PyTorch would not notice. Each rank reads its share."""
    hashes = json.loads((folder / HASHES).read_text())
    mine = sorted(hashes)[rank() :: world_size()]
    altered = [name for name in mine if not (folder / name).is_file() or file_hash(folder / name) != hashes[name]]
    for name in (name for names in gather_objects(altered) for name in names):
        raise ValueError(f"{name} is not as it was written")


def _reason(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[-1]


def _to_json(progress: Progress) -> str:
    seen = [{"epoch": epoch, "day": day, "requests": count} for (epoch, day), count in sorted(progress.seen.items())]
    return json.dumps({"step": progress.step, "position": asdict(progress.position), "seen": seen}, indent=1)


def _from_json(text: str) -> Progress:
    raw = json.loads(text)
    seen = {(entry["epoch"], entry["day"]): entry["requests"] for entry in raw["seen"]}
    return Progress(raw["step"], Position(**raw["position"]), seen)


class _Grown(dcp.DefaultLoadPlanner):
    """Takes tensors with more rows than were saved for a part of what was saved."""

    def create_local_plan(self) -> dcp.LoadPlan:
        """What to read: saved rows that this rank holds; nothing for those that came later."""
        assert self.metadata is not None
        saved = self.metadata.state_dict_metadata
        for name, value in self.state_dict.items():
            before = saved.get(name)
            if isinstance(before, TensorStorageMetadata) and before.size and before.size[1:] == value.size()[1:]:
                saved[name] = replace(before, size=max(before.size, value.size()))
        return super().create_local_plan()


def read_model(path: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint's model by name, whole, whatever ranks wrote it; no process group is needed.

    Raises:
        CheckpointError: it cannot be read.
    """
    prefix = "model."
    try:
        found = FileSystemReader(path).read_metadata().state_dict_metadata
        state = {
            name: torch.empty(tuple(kept.size), dtype=kept.properties.dtype)
            for name, kept in found.items()
            if name.startswith(prefix) and isinstance(kept, TensorStorageMetadata)
        }
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that there is no process group is what is meant
            dcp.load(state, checkpoint_id=path, no_dist=True)
    except (dcp.CheckpointException, OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{path}: cannot be loaded ({str(error).strip().splitlines()[-1]})") from error
    return {name.removeprefix(prefix): tensor for name, tensor in state.items()}


def _remove(path: Path) -> None:
    """Under another name first: half removed, it must not pass for whole."""
    if path.exists():
        shutil.rmtree(path.rename(path.with_name(f".{path.name}.removed")))


def size_of(model: DistributedModelParallel, optimizer: CombinedOptimizer) -> int:
    """Bytes of all ranks' tensors in a checkpoint."""

    def count(value: Any) -> int:
        if isinstance(value, dict):
            return sum(count(child) for child in value.values())
        if isinstance(value, ShardedTensor):
            return math.prod(value.size()) * value.dtype.itemsize
        return value.numel() * value.element_size() if isinstance(value, Tensor) else 0

    return count(_state(model, optimizer))


def _state(model: DistributedModelParallel, optimizer: CombinedOptimizer | None) -> dict[str, Any]:
    return {"model": model.state_dict()} | ({"optimizer": optimizer.state_dict()} if optimizer is not None else {})


def _copy(value: Any, group: dist.ProcessGroup) -> Any:
    """A state dict that training does not change, in the memory of the host."""
    if isinstance(value, dict):
        return {key: _copy(child, group) for key, child in value.items()}
    if isinstance(value, list):
        return [_copy(child, group) for child in value]
    if not isinstance(value, ShardedTensor):
        return value.detach().to("cpu", copy=True) if isinstance(value, Tensor) else value
    hosted = value.cpu(process_group=group)
    if hosted is not value:
        return hosted
    parts = [Shard(part.tensor.clone(), part.metadata) for part in value.local_shards()]
    return ShardedTensor._init_from_local_shards_and_global_metadata(parts, value.metadata(), process_group=group)
