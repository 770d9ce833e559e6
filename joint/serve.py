"""`python -m joint.serve {check,recommend,http} DIR`: an exported folder checked, asked or served, without torch."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from joint.commands import run_command
from joint.errors import UserError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command that is asked for; returns the exit code."""
    parser = argparse.ArgumentParser(prog="joint.serve", description="Serve what joint.export wrote, without torch.")
    commands = parser.add_subparsers(dest="command", required=True)
    check = commands.add_parser("check", help="does it answer its golden requests as the training forward did?")
    recommend = commands.add_parser("recommend", help="answer one request")
    recommend.add_argument("--request", type=Path, required=True, help="a JSON object, or a list of which one is taken")
    recommend.add_argument("--place", type=int, default=0, help="which of a list (default: the first)")
    recommend.add_argument("--k", type=int, default=10)
    http = commands.add_parser("http", help="a demo over HTTP, not hardened: POST /recommend, GET /healthz")
    http.add_argument("--port", type=int, default=8000)
    for command in (check, recommend, http):
        command.add_argument("folder", type=Path, help="a version, or a folder of them: its newest")
    parsed = parser.parse_args(arguments)
    _check_packages()
    match parsed.command:
        case "check":
            _check(parsed.folder)
        case "recommend":
            _recommend(parsed.folder, _request(parsed.request, parsed.place), parsed.k)
        case _:
            from joint.serving.http import serve

            serve(parsed.folder, parsed.port)
    return 0


def _check(folder: Path) -> None:
    from joint.serving.check import check
    from joint.serving.manifest import version_folder

    folder = version_folder(folder)
    found = check(folder)
    told = ", ".join(f"{name} {value:.1e}" for name, value in found.items() if name != "overlap")
    print(f"{folder}: ok; largest differences to the training forward: {told}; overlap of ids {found['overlap']:.3f}")


def _recommend(folder: Path, request: object, k: int) -> None:
    from joint.serving import Recommender

    answer = Recommender(folder).recommend(request, k)  # type: ignore[arg-type]
    print(json.dumps(answer.to_json(), indent=1))


def _request(path: Path, place: int) -> object:
    try:
        found = json.loads(path.read_text())
        return found[place] if isinstance(found, list) else found
    except (OSError, ValueError, IndexError) as error:
        raise UserError(f"{path}: no request in it ({error})") from error


def _check_packages() -> None:
    from importlib.util import find_spec

    if find_spec("onnxruntime") is None:
        raise UserError("not installed: onnxruntime; pip install onnxruntime faiss-cpu")


if __name__ == "__main__":
    raise SystemExit(run_command(main))
