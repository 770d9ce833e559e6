"""`manifest.json`: what an exported folder holds, what a request must bring, and whether the files are its own."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

from joint.data.cross import Cross
from joint.errors import first_line
from joint.files import sha256
from joint.keys import Key, Reads
from joint.schema import Feature, History
from joint.serving.errors import ExportError

FORMAT, FORMAT_VERSION = "joint-export", 1
NAME = "manifest.json"
TABLES = "tables.bin"
GRAPHS = {
    "user_tower": "user_tower.onnx",
    "item_tower": "item_tower.onnx",
    "prerank_head": "prerank_head.onnx",
    "ranking": "ranking.onnx",
}
REQUEST_GRAPHS = ("user_tower", "ranking")  # whose inputs come with a request


PARTS = {  # of a manifest, and what each has to name
    "model": {"name", "version", "model_hash"},
    "items": {"file", "count", "key", "features", "index"},
    "eligibility": {"pool", "not_eligible"},
    "selfcheck": {"file", "requests", "answers", "day", "k", "tolerance", "overlap"},
    "dims": {"v", "pu", "pi"},
    **{name: set() for name in ("features", "histories", "crosses", "stages", "fusion", "quotas", "vocabularies")},
    **{name: set() for name in ("heads", "tasks", "quantization", "metrics", "files")},
}


class Manifest:
    """The manifest of one version, in words of the schema.

    Raises:
        ExportError: it is not there, of another format, or lacks a part.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        path = folder / NAME
        try:
            self.json: dict[str, Any] = json.loads(path.read_text())
            found = self.json["format"], self.json["format_version"]
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise ExportError(f"{path}: no manifest of an export ({error!r})") from error
        if found != (FORMAT, FORMAT_VERSION):
            raise ExportError(f"{path}: format {found[0]} {found[1]}; this program reads {FORMAT} {FORMAT_VERSION}")
        for part, names in PARTS.items():
            said = self.json.get(part)
            if not isinstance(said, dict | list) or not all(name in said for name in names):
                expected = f" with {', '.join(sorted(names))}" if names else ""
                raise ExportError(f"{path}: {part}: missing or incomplete; expected {part}{expected}")

    @property
    def model_hash(self) -> str:
        """What tables and graphs are told apart by; vectors and indices carry it too."""
        return str(self.json["model"]["model_hash"])

    @property
    def stages(self) -> dict[str, dict[str, Any]]:
        """Graph -> its file, inputs, outputs and features."""
        return self.json["stages"]

    @cached_property
    def histories(self) -> dict[str, History]:
        """The histories that requests bring."""
        return {
            name: History(name=name, events=tuple(said["events"]), competitors=said["competitors"])
            for name, said in self.json["histories"].items()
        }

    @cached_property
    def request_features(self) -> dict[str, Feature]:
        """The request features that some graph reads."""
        keys = [key for graph in REQUEST_GRAPHS if graph in self.stages for key in self.reads(graph).keys]
        return {key.feature.name: key.feature for key in keys if key.side == "request"}

    def feature(self, name: str) -> dict[str, Any]:
        """What is said of an input."""
        return {said["name"]: said for said in self.json["features"]}[name]

    def reads(self, graph: str) -> Reads:
        """What the inputs of a graph are read from."""
        keys = tuple(_key(self.feature(name)) for name in self.stages[graph]["features"])
        crosses = {key.feature.name: Cross(**self.json["crosses"][key.feature.name]) for key in keys if _crossed(key)}
        lengths: dict[str, int] = self.stages[graph]["lengths"]
        competed = sorted({key.history for key in keys if key.side == "competitors"})
        return Reads(keys, lengths, {name: self.histories[name].competitors for name in competed}, crosses)

    def check_files(self) -> None:
        """Every file is the one that was written.

        Raises:
            ExportError: one is missing, changed, or of another version.
        """
        for name, said in self.json["files"].items():
            path = inside(self.folder, name)
            if not path.is_file():
                raise ExportError(f"{path}: not found, though the manifest names it")
            if path.stat().st_size != said["bytes"] or sha256(path) != said["sha256"]:
                raise ExportError(f"{path}: is not the file that was exported (its sha256 differs); mixed versions?")

    def check_model(self, found: object, path: Path) -> None:
        """ExportError unless vectors or an index were made by this very model."""
        if found != self.model_hash:
            raise ExportError(f"{path}: made by model {found}, the graphs are of {self.model_hash}; mixed versions")


def _crossed(key: Key) -> bool:
    return key.side == "cross"


def _key(said: Mapping[str, Any]) -> Key:
    feature = Feature(
        name=said["feature"], level=said["level"], kind=said["values"], space=said["space"], size=said["size"]
    )
    return Key(said["side"], feature, said["history"], hashed=said.get("hashed", 0))


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """ExportError where a file that is read here is not whole."""
    try:
        yield
    except (OSError, ValueError, LookupError, RuntimeError, EOFError, BadZipFile) as error:
        raise ExportError(f"{path}: cannot be read ({first_line(error)})") from error


def inside(folder: Path, name: str) -> Path:
    """The path of a file that a manifest names; ExportError where it would lead out of the folder."""
    path = folder / name
    if not path.resolve().is_relative_to(folder.resolve()):
        raise ExportError(f"{folder / NAME}: names {name}, which is outside of the folder")
    return path


def hash_of(paths: Iterable[Path]) -> str:
    """A short hash of files, in this order."""
    return hashlib.sha256("".join(map(sha256, paths)).encode()).hexdigest()[:16]


def versions(folder: Path) -> list[Path]:
    """The versions in an export folder, the newest last."""
    found = [path for path in folder.glob("*") if path.name.isdecimal() and (path / NAME).is_file()]
    return sorted(found, key=lambda path: int(path.name))


def version_folder(path: Path) -> Path:
    """The folder of a version: `path` itself, or the newest of those in it; ExportError where there is none."""
    if (path / NAME).is_file():
        return path
    if found := versions(path):
        return found[-1]
    raise ExportError(f"{path}: no exported version in it (python -m joint.export RUN --out {path} makes one)")
