"""A wrong combination of packages is one line, though importing it would fail."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]


@pytest.mark.parametrize("command", [["joint.train", "configs/sdcl.yaml"], ["joint.evaluate", "runs/none"]])
def test_a_broken_fbgemm_is_named_before_it_is_imported(command, tmp_path):
    for name, version in (("torch", "2.13.0"), ("torchrec", "1.8.0"), ("fbgemm_gpu_cpu", "1.7.0")):
        (tmp_path / f"{name}-{version}.dist-info").mkdir()
        metadata = f"Metadata-Version: 2.1\nName: {name.replace('_', '-')}\nVersion: {version}\n"
        (tmp_path / f"{name}-{version}.dist-info" / "METADATA").write_text(metadata)
    for package in ("torch", "torchrec", "fbgemm_gpu"):
        (tmp_path / f"{package}.py").write_text("raise OSError('Could not load this library')\n")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(REPOSITORY)])}
    done = subprocess.run(
        [sys.executable, "-m", *command], cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 2, done.stderr
    assert "pip install" in done.stderr
    assert len(done.stderr.splitlines()) == 1
