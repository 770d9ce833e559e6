"""Where a run of a comparison is kept, when an old one will do, and what a run's folder tells of it.

Nothing is ever overwritten: where `seed-0` holds a run of another config, dataset or code, the new one goes to
`seed-0.2`, and so on. Beside what the trainer writes, `compare.json` holds the code version and the seconds so far.
"""

from __future__ import annotations

import ast
import hashlib
import itertools
import json
import math
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import joint
from joint.comparison.ablation import Planned
from joint.configuring import settings
from joint.errors import UserError
from joint.experiment import Config, Run
from joint.files import write_whole
from joint.fit import data_hash
from joint.run import RunDirectory

PACKAGES = ("joint", "losses", "towers")


@dataclass(frozen=True)
class Result:
    """A run as it was found: its metrics, or why it has none."""

    variant: str
    world: str
    seed: int
    path: Path
    state: Literal["finished", "failed", "unfinished", "missing"]
    metrics: dict[str, float] = field(default_factory=dict)  # finite ones
    note: str = ""  # of a failed run: the last it said; of a finished one: metrics that are not finite
    seconds: float = 0.0
    environment: dict[str, Any] = field(default_factory=dict)
    code: str = ""
    values: dict[str, float] = field(default_factory=dict)  # of a tuning trial: what it drew


def notes_file(run: RunDirectory) -> Path:
    """What a comparison knows of a run: variant, code version, the dataset's hash, seconds so far, how it failed."""
    return run.path / "compare.json"


def output_file(run: RunDirectory) -> Path:
    """All that the run's process printed, errors too."""
    return run.path / "output.log"


def read_json(path: Path) -> dict[str, Any]:
    """The object in a file; an empty one where there is none, or not a whole one."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def place(planned: Planned, code: str) -> tuple[Planned, str]:
    """The run in the folder where it is already or may begin; and what was in the way, '' for nothing."""
    wanted, blocked = planned.config.run.name, ""
    for number in itertools.count(1):
        name = f"{wanted}.{number}" if number > 1 else wanted
        config = replace(planned.config, run=replace(planned.config.run, name=name))
        run = RunDirectory(Path(config.run.dir) / name)
        differing = differs(run, config, code)
        if not differing:
            break
        blocked = blocked or f"{run.path} is kept: {differing}"
    return replace(planned, config=config), blocked


def differs(run: RunDirectory, config: Config, code: str) -> str:
    """What of a run's folder is not as wanted: code, dataset or config; '' where it fits or is free."""
    if not run.path.exists() or not any(path.name != ".lock" for path in run.path.iterdir()):
        return ""
    notes = read_json(notes_file(run))
    if not notes:
        return "it was not made by joint.compare"
    if notes.get("dataset") != data_hash(config.data):
        return "it is of another dataset"
    if notes.get("code") != code:
        return f"it is of code version {notes.get('code')}, now {code}"
    try:
        before, _ = run.load_config()
    except UserError:
        return "its config cannot be read"
    return "; ".join(settings.differences(without_places(before), without_places(config)))


def without_places(config: Config) -> Config:
    """The experiment without its folder and the dataset's path: the dataset's hash is compared instead."""
    return replace(config, run=Run(name="anywhere", seed=config.run.seed), data=replace(config.data, path=""))


def open_folder(planned: Planned, code: str) -> RunDirectory:
    """Make the folder of a placed run, with its config and what is compared of it."""
    run = run_of(planned)
    run.path.mkdir(parents=True, exist_ok=True)
    write_whole(run.config, settings.dump(planned.config))
    before = {"seconds": 0.0} | read_json(notes_file(run))
    dataset = data_hash(planned.config.data)
    note(run, **(before | {"variant": planned.variant, "code": code, "dataset": dataset, "failed": ""}))
    return run


def note(run: RunDirectory, **known: Any) -> None:
    """Add to `compare.json`."""
    write_whole(notes_file(run), json.dumps(read_json(notes_file(run)) | known, indent=1))


def run_of(planned: Planned) -> RunDirectory:
    """The folder that a planned run names."""
    return RunDirectory(Path(planned.config.run.dir) / planned.config.run.name)


def read_result(planned: Planned) -> Result:
    """How a placed run stands, from its folder."""
    run = run_of(planned)
    notes, measured = read_json(notes_file(run)), read_json(run.evaluation)
    finite = {name: float(value) for name, value in measured.items() if _finite(value)}
    state: Literal["finished", "failed", "unfinished", "missing"]
    state = "finished" if measured else "failed" if notes.get("failed") else "unfinished" if notes else "missing"
    lost = sorted(set(measured) - set(finite))
    return Result(
        planned.variant,
        planned.world,
        planned.seed,
        run.path,
        state,
        metrics=finite,
        note=f"not finite: {', '.join(lost)}" if lost else notes.get("failed", ""),
        seconds=notes.get("seconds", 0.0),
        environment=read_json(run.environment),
        code=notes.get("code", ""),
    )


def _finite(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def keep_code(folder: Path) -> tuple[str, Path]:
    """Copy the source to `FOLDER/.code/VERSION`, for runs to be made with: an edit meanwhile is in none of them.

    Returns the version and the copy's root.
    """
    copy = folder / f".code.{os.getpid()}"
    for package in PACKAGES:
        shutil.copytree(source_root() / package, copy / package, ignore=shutil.ignore_patterns("__pycache__"))
    code = code_version(copy)
    kept = folder / ".code" / code
    if kept.exists():
        shutil.rmtree(copy)
    else:
        kept.parent.mkdir(exist_ok=True)
        copy.rename(kept)
    return code, kept


def source_root() -> Path:
    """The folder that holds the packages of this program."""
    return Path(joint.__file__).parents[1]


def code_version(root: Path | None = None) -> str:
    """Hash of every source file that `joint.train` imports, at any depth: all code that a run depends on."""
    root, seen, waiting = root or source_root(), dict[str, str](), ["joint.train"]
    while waiting:
        name = waiting.pop()
        path = root.joinpath(*name.split("."))
        for file in (path.with_suffix(".py"), path / "__init__.py"):
            if name.split(".")[0] in PACKAGES and str(file) not in seen and file.is_file():
                text = file.read_bytes()
                seen[str(file)] = hashlib.sha256(text).hexdigest()
                waiting += [*_imported(ast.parse(text)), *(name.rsplit(".", 1)[:1] if "." in name else [])]
    names = sorted((str(Path(path).relative_to(root)), digest) for path, digest in seen.items())
    return hashlib.sha256(repr(names).encode()).hexdigest()[:12]


def _imported(tree: ast.Module) -> Iterator[str]:
    """The modules that a file may import; a name imported from a package may be one."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield str(node.module)
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
