"""A version of an export: a folder that takes its name when it is whole, and the manifest that closes it."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from joint.errors import UserError
from joint.files import sha256, write_whole
from joint.serving.manifest import FORMAT, FORMAT_VERSION, NAME


@contextmanager
def new_version(out: Path) -> Iterator[tuple[Path, int]]:
    """A folder for the next version under OUT, which takes its name at the end; a failure leaves nothing.

    Its number follows every number that is a name there, whether of a whole version or not.

    Raises:
        UserError: the folder cannot be made, or its name was taken meanwhile.
    """
    number = 1 + max((int(path.name) for path in out.glob("*") if path.name.isdecimal()), default=0)
    folder = out / f".{number}.unfinished.{os.getpid()}"
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"{out}: cannot be made ({error.strerror})") from error
    try:
        yield folder, number
        _rename(folder, out / str(number))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _rename(folder: Path, name: Path) -> None:
    try:
        folder.rename(name)
    except OSError as error:
        raise UserError(f"{name}: cannot be given its name ({error.strerror}); was it made meanwhile?") from error


def write_manifest(folder: Path, said: Mapping[str, Any]) -> None:
    """Write the manifest, with the size and SHA-256 of every other file in the folder."""
    files = {
        str(path.relative_to(folder)): {"bytes": path.stat().st_size, "sha256": sha256(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != NAME
    }
    whole = {"format": FORMAT, "format_version": FORMAT_VERSION, **said, "files": files}
    write_whole(folder / NAME, json.dumps(whole, indent=1))
