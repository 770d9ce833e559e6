"""What an installed copy has: one command for all, the configs, and a README that leads nowhere it cannot."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from importlib import import_module
from importlib.metadata import version
from pathlib import Path

import pytest

from joint import __main__ as console
from joint import __version__
from joint.config import load_config
from joint.versions import installed_versions

HOUSE = Path(__file__).parents[2]


@pytest.mark.parametrize("name", console.COMMANDS)
def test_every_command_is_a_module_with_a_main(name: str) -> None:
    assert callable(import_module(f"joint.{name}").main)


def test_every_module_that_is_a_command_is_listed() -> None:
    runs_itself = re.compile(r'^if __name__ == "__main__":', re.MULTILINE)
    found = {path.stem for path in (HOUSE / "joint").glob("*.py") if runs_itself.search(path.read_text())}
    assert found - {"__main__"} == set(console.COMMANDS)


def test_the_console_runs_a_command_and_ends_as_it_does() -> None:
    command = [sys.executable, "-m", "joint", "config", "configs/joint.yaml", "evaluation.task=vew"]
    done = subprocess.run(command, cwd=HOUSE, capture_output=True, text=True)
    assert done.returncode == 2
    assert "did you mean view?" in done.stderr


def test_the_versions_are_those_of_the_packages(capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    monkeypatch.setattr(sys, "argv", ["joint", "--version"])
    assert console.main() == 0
    said = capsys.readouterr().out
    assert said.endswith("\n")
    found = dict(part.split(" ") for part in said.strip().split(", "))
    assert (found.pop("joint"), found["torch"]) == (__version__, version("torch"))
    assert found == installed_versions()


def test_what_is_not_installed_is_said_so(capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    monkeypatch.setattr("joint.versions.installed_versions", lambda: {"torch": "2.13.0"})
    monkeypatch.setattr(sys, "argv", ["joint", "--version"])
    assert console.main() == 0
    assert capsys.readouterr().out == f"joint {__version__}, torch 2.13.0, torchrec not installed\n"


def test_a_wrong_command_is_named_with_the_nearest() -> None:
    done = subprocess.run([sys.executable, "-m", "joint", "trian"], cwd=HOUSE, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("joint: no command 'trian'; did you mean train?")


def test_configs_are_found_outside_the_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config, _ = load_config("configs/papers/rra.yaml")
    assert config.run.name == "rra"


def test_an_overlay_of_the_users_own_may_have_a_base_that_came_along(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs/own.yaml").write_text("base: joint.yaml\nobjectives: {order: null}\n")
    assert "order" not in load_config("configs/own.yaml")[0].objectives


def test_a_config_of_the_users_own_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").mkdir()
    own = (HOUSE / "configs/joint.yaml").read_text().replace("{name: joint}", "{name: own}")
    (tmp_path / "configs/joint.yaml").write_text(own)
    assert load_config("configs/joint.yaml")[0].run.name == "own"


def test_the_wheel_has_every_folder_of_configs() -> None:
    folders = {path.parent.relative_to(HOUSE) for path in (HOUSE / "configs").rglob("*.yaml")}
    packages = re.search(r"^CONFIGS = \[(.*?)\]", (HOUSE / "setup.py").read_text(), re.MULTILINE | re.DOTALL)
    assert packages
    assert set(re.findall(r'"(.*?)"', packages[1])) == {f"joint.{'.'.join(folder.parts)}" for folder in folders}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """The wheel of a copy of what it is made from, where nothing was built before."""
    copy, out = tmp_path_factory.mktemp("copy"), tmp_path_factory.mktemp("out")
    for name in ("joint", "losses", "towers", "configs"):
        shutil.copytree(HOUSE / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(HOUSE / name, copy)
    pip = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--quiet", "-w", str(out), "."]
    done = subprocess.run(pip, cwd=copy, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "DEPRECATION" not in done.stderr
    return zipfile.ZipFile(next(out.glob("*.whl")))


def test_the_wheel_runs_outside_the_checkout(wheel: zipfile.ZipFile, tmp_path: Path) -> None:
    wheel.extractall(tmp_path / "site")
    command = [sys.executable, "-m", "joint", "config", "configs/recommended.yaml"]
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "site")}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "soft_pairwise" in done.stdout
    folders = {name.split("/")[0] for name in wheel.namelist() if ".dist-info/" not in name}
    assert folders == {"joint", "losses", "towers"}


def test_the_page_of_an_index_links_to_nothing_beside_it(wheel: zipfile.ZipFile) -> None:
    metadata = wheel.read(next(name for name in wheel.namelist() if name.endswith("/METADATA"))).decode()
    links = re.findall(r"\]\(([^)]*)\)", metadata)
    assert links  # TorchRec's own page, say
    assert not [link for link in links if not link.startswith("http")]
    assert "docs/quick_start.md" in metadata  # the names are still there
