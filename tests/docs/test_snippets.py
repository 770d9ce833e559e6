"""Every command and snippet of the pages, those outside of docs/ too, is run, page by page, on tiny data.

A fence says what it holds. `bash`: a shell reads the block, and what it would start is run in this process, smaller.
`python`: run. `yaml`: resolved, as a config (over configs/joint.yaml unless it has a `base`), an ablation or a map.
`json`: parsed. `diff`: applied to a copy of the sources, which the page's further commands run. `text`: shown.
`title="FILE"` also writes the block there. Commands in the text and in usage lines, with their placeholders, must exist
with all the options that they name, and so must files. Benchmarks take minutes: their own parsers read their arguments.
"""

from __future__ import annotations

import io
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from argparse import ArgumentParser
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

from benchmarks.run import BENCHMARKS
from joint.__main__ import COMMANDS
from joint.commands import run_command
from joint.compare import _parser as compare_parser
from joint.comparison.ablation import read_ablation
from joint.config import load_config
from joint.data.flat.map import read_map

ROOT = Path(__file__).parents[2]
OUTSIDE = ("README.md", "CONTRIBUTING.md", "configs/README.md", "benchmarks/README.md")
PAGES = {name: ROOT / name for name in OUTSIDE} | {page.name: page for page in sorted((ROOT / "docs").glob("*.md"))}
AFTER = ("compare.md", "funnel.md", "serving.md", "predict.md", "many_ranks.md")  # they go on from what it made
NEEDS = dict.fromkeys(AFTER, "quick_start.md")
LANGUAGES = {"bash", "python", "yaml", "json", "diff", "text"}
NOT_RUN = {  # what no test can do here, and why
    "pip": "installs packages",
    "python3": "makes the environment",
    ".": "enters it",
    "tensorboard": "serves until it is stopped",
}
# A shell in which every program only says what it was called with.
PROGRAMS = (".", "pip", "python", "python3", "torchrun", "joint", "make", "tensorboard")
STAND_INS = "".join(f"function {name} {{ printf '%s\\0' {name} \"$@\" END; }}\n" for name in PROGRAMS)
MAP_FILES = ["items.file=i.parquet", "items.key=item_id", "users.file=u.parquet", "users.key=user_id"]
TARGETS = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M)
FENCE = re.compile(r"^```(\w*)(?: title=\"([^\"]+)\")?\n(.*?)^```$", re.M | re.S)
INLINE = re.compile(r"`((?:python -m|torchrun|joint|make) [^`\n]+)`")
USAGE = re.compile(r"^(?:python -m|torchrun|joint|make) .*(?:\n {8,}.*)*", re.M)
FILE = re.compile(r"`((?:joint|losses|towers|tests|benchmarks|configs|docs)/[\w./-]*)`")


class Block(NamedTuple):
    """A fenced block of a page."""

    line: int
    language: str
    title: str
    text: str


def blocks(name: str) -> list[Block]:
    page = PAGES[name].read_text()
    return [Block(page[: m.start()].count("\n") + 1, m[1], m[2] or "", m[3]) for m in FENCE.finditer(page)]


def module_of(argv: list[str]) -> tuple[str, list[str]]:
    """The command (`train`, `benchmarks.step`, `make`) and its arguments, however it is started."""
    if argv[0] == "joint" and len(argv) > 1:
        return argv[1], argv[2:]
    if argv[0] in ("python", "torchrun") and "-m" in argv:
        at = argv.index("-m") + 1
        return argv[at].removeprefix("joint."), argv[at + 1 :]
    return argv[0], argv[1:]


def smaller(command: str, arguments: list[str]) -> list[str]:
    """The same on a world of 360 requests, for one epoch, with batches that such a world has some of."""
    if command == "prepare" and arguments[0] == "simulate":
        kept = [a for a in arguments if a not in ("--size", "report", "--requests", "5000")]
        return [*kept, "requests=360", "users=60"]
    if command == "train":
        return [*arguments, "data.epochs=1", "data.requests_per_batch=32"]
    return arguments


class Reader:
    """Does what pages say in a folder, each once and after those that it needs."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.done, self.ran = folder, set[str](), list[list[str]]()
        self.map = ""

    def read(self, name: str) -> None:
        """Run all that a page shows."""
        if name in self.done:
            return
        if name in NEEDS:
            self.read(NEEDS[name])
        scope: dict[str, object] = {}
        changed: Path | None = None
        for block in blocks(name):
            assert block.language in LANGUAGES, f"{name}:{block.line}: say what the block holds"
            if block.title:
                (self.folder / block.title).write_text(block.text)
            if block.language == "bash":
                for argv in said(block.text, self.folder):
                    if argv not in self.ran:  # another page has the same command
                        run(*module_of(argv), sources=changed)
                    self.ran.append(argv)
            elif block.language == "diff":
                changed = changed or copy_of_sources(self.folder / "changed")
                apply(block.text, changed)
            elif block.language == "python":
                exec(compile(block.text, f"{name}:{block.line}", "exec"), scope)
            elif block.language == "yaml" and not changed:
                self.resolve(name, block)
            elif block.language == "json":
                json.loads(block.text)
        self.done.add(name)

    def resolve(self, name: str, block: Block) -> None:
        """Raises what a command would say of this YAML; a part of a map is laid over those before it."""
        keys = yaml.safe_load(block.text)
        is_map = name == "own_logs.md" and "heads" not in keys
        base = "" if keys.keys() & {"base", "user", "run"} else f"base: {self.map if is_map else 'joint.yaml'}\n"
        path = self.folder / (block.title or (f"{block.line}.yaml" if is_map else f"configs/{block.line}.yaml"))
        path.write_text(base + block.text)
        if is_map:
            self.map = path.name
            read_map(path, MAP_FILES)
        elif "variants" in keys:
            read_ablation(path, any_data=True)
        else:
            load_config(path)


def said(script: str, folder: Path) -> Iterator[list[str]]:
    """What a shell would start, argument by argument, in order."""
    done = subprocess.run(["bash", "-euc", STAND_INS + script], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for call in done.stdout.split("\0END\0")[:-1]:
        yield call.split("\0")


def copy_of_sources(folder: Path) -> Path:
    """The program, to be changed."""
    for package in ("joint", "losses", "towers"):
        shutil.copytree(ROOT / package, folder / package, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "ruff.toml", folder)
    return folder


def apply(diff: str, sources: Path) -> None:
    """Change the sources; they must still pass the linter."""
    for command in (["git", "apply", "--recount", "-"], ["ruff", "check", "."], ["ruff", "format", "--check", "."]):
        tool = [sys.executable, "-m"] * (command[0] == "ruff")
        done = subprocess.run([*tool, *command], input=diff, cwd=sources, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


def run(command: str, arguments: list[str], *, sources: Path | None) -> None:
    """Run a command as its page says, smaller; of `compare`, which trains for hours, only the plan is made.

    With changed `sources` it needs a process of its own.
    """
    if command in NOT_RUN:
        return
    if command == "make" or command.startswith("benchmarks."):
        understood(command, arguments)
        return
    assert command in COMMANDS, f"no command {command}"
    if command == "compare":
        planned(arguments)
        return
    if sources:
        call = [sys.executable, "-m", f"joint.{command}", *smaller(command, arguments)]
        done = subprocess.run(call, env=os.environ | {"PYTHONPATH": str(sources)}, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [command, *smaller(command, arguments)])
        assert run_command(import_module(f"joint.{command}").main) == 0, f"{command} {arguments}"


def planned(arguments: list[str]) -> None:
    parsed = compare_parser().parse_intermixed_args(arguments)
    paths = [Path(text) for text in parsed.targets if "=" not in text]
    assert all(path.exists() for path in paths)
    if not paths[0].is_dir():
        read_ablation(paths[0], [text for text in parsed.targets if "=" in text], any_data=True)


class UnderstoodError(Exception):
    """A program has read its arguments; it need not go on."""


def understood(command: str, arguments: list[str]) -> None:
    """`make` has such targets; a benchmark takes such arguments, by its own parser or, where it has none, no others."""
    if command == "make":  # is CI itself, or installs first
        assert set(arguments) - {"…"} <= {"EXTRA=gpu", *TARGETS}, arguments
        return
    assert all((ROOT / argument).is_file() for argument in arguments if argument.startswith("configs/")), arguments
    if command == "benchmarks.run" and arguments[:1] not in ([], ["NAME"]):
        command, arguments = f"benchmarks.{arguments[0]}", arguments[1:] or BENCHMARKS[arguments[0]][1]
    file = ROOT / f"{command.replace('.', '/')}.py"
    file = file if file.is_file() else file.with_suffix("") / "__main__.py"
    if "ArgumentParser" not in file.read_text():
        assert not arguments or command == "benchmarks.run", f"{command} takes no arguments"
        return

    def stopping(parse: Callable[..., Any]) -> Callable[..., Any]:
        def stop(*given: Any) -> None:
            parse(*given)
            raise UnderstoodError

        return stop

    with pytest.MonkeyPatch.context() as patch:
        for name in ("parse_args", "parse_intermixed_args"):
            patch.setattr(ArgumentParser, name, stopping(getattr(ArgumentParser, name)))
        patch.setattr(sys, "argv", [command, *arguments])
        with pytest.raises(UnderstoodError):
            runpy.run_module(command, run_name="__main__")


def options_of(command: str, arguments: list[str]) -> str:
    """The help of a command (of a source of `prepare`, and the like), which names its options."""
    words = [*arguments[:1], "--help"] if command in ("prepare", "serve") else ["--help"]
    out = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out):
        patch.setattr(sys, "argv", [command, *words])
        with pytest.raises(SystemExit, match="0"):
            import_module(f"joint.{command}").main()
    return out.getvalue()


@pytest.fixture(scope="module")
def reader(folder: Path) -> Iterator[Reader]:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        yield Reader(folder)


@pytest.mark.parametrize("name", PAGES)
def test_what_a_page_shows_runs(name: str, reader: Reader) -> None:
    reader.read(name)


@pytest.mark.parametrize("name", PAGES)
def test_what_a_page_names_is_there(name: str) -> None:
    """Commands in the text and usage lines: they exist, with these options. Files of the repository exist."""
    page = PAGES[name].read_text()
    written = {block.title for block in blocks(name)}
    assert not [file for file in FILE.findall(page) if not (ROOT / file).exists() and file not in written]
    usage = [line for block in blocks(name) if block.language == "text" for line in USAGE.findall(block.text)]
    for line in [*INLINE.findall(page), *usage]:
        command, arguments = module_of(re.sub(r"[][…|]", " ", line).split())
        if command.startswith("-") or command in ("torchrun", "COMMAND"):  # options of `joint` and of torchrun itself
            continue
        if command == "make" or command.startswith("benchmarks."):
            understood(command, arguments)
        elif command not in COMMANDS:  # a module that is no command of `joint`
            assert (ROOT / f"joint/{command.replace('.', '/')}.py").is_file(), line
        else:
            known = options_of(command, arguments)
            assert not [option for option in arguments if option.startswith("--") and option not in known], line
