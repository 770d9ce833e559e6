"""Checkpoints: tables, both optimizers and the position, in one folder a step, loadable at any world size.

Nothing random is kept, because all randomness is a function of (seed, step, rank). Checkpoints are trusted files:
their index is read by `torch.distributed.checkpoint`, which unpickles it.
"""

from __future__ import annotations

import shutil
import warnings
from dataclasses import astuple, dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torchrec.distributed import DistributedModelParallel
from torchrec.optim.keyed import CombinedOptimizer

from joint.data.order import Position
from joint.distributed import rank
from joint.errors import CheckpointError


@dataclass(frozen=True)
class Progress:
    """How far a run is: steps done, and the position of the next batch."""

    step: int = 0
    position: Position = Position()


def save(
    folder: Path,
    model: DistributedModelParallel,
    optimizer: CombinedOptimizer,
    progress: Progress,
    *,
    keep: int,
) -> None:
    """Write `FOLDER/step-…` whole, then drop all but the `keep` newest. Every rank takes part.

    A checkpoint of that step that is there already (a broken one, since the run did not go on from it) is replaced.
    """
    final = folder / f"step-{progress.step:08d}"
    temporary = folder / f".{final.name}.unfinished"
    if rank() == 0:
        for left in folder.glob(".step-*"):
            shutil.rmtree(left)
    dist.barrier()
    numbers = torch.tensor([progress.step, *astuple(progress.position)])
    dcp.save(_state(model, optimizer) | {"progress": numbers}, checkpoint_id=temporary)
    dist.barrier()
    if rank() == 0:
        _remove(final)
        temporary.rename(final)
        for old in steps(folder)[:-keep]:
            _remove(old)
    dist.barrier()


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
    numbers = torch.zeros(4, dtype=torch.long)
    state = _state(model, optimizer) | {"progress": numbers}
    try:
        dcp.load(state, checkpoint_id=found[-1], planner=_Grown() if grown else None)
    except (dcp.CheckpointException, OSError, ValueError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[-1]
        before = f" to go on from {found[-2].name}" if len(found) > 1 else ""
        raise CheckpointError(f"{found[-1]}: cannot be loaded ({reason}); remove it{before}") from error
    model.load_state_dict(state["model"])
    if optimizer is not None:
        optimizer.load_state_dict(state["optimizer"])
    step, *place = numbers.tolist()
    return Progress(step, Position(*place))


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


def _state(model: DistributedModelParallel, optimizer: CombinedOptimizer | None) -> dict[str, object]:
    return {"model": model.state_dict()} | ({"optimizer": optimizer.state_dict()} if optimizer is not None else {})
