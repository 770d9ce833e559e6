"""The program on a GPU that is none: which device every tensor of the dense part is on, and what autocast makes of it.

See `pretended_gpu.py`: tables, streams and NCCL are not there. A machine with a GPU has `make gpu-check` instead.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch

import joint.train
from joint.predicting.writing import predict

HERE = Path(__file__).parent
# As in test_distributed: no dropout, and no step along a gradient that is nothing but rounding.
EQUAL = (
    "data.epochs=1",
    "heads.retrieval.trunk.dropout=0",
    "encoders.rated_sequence.by.dropout=0",
    "heads.retrieval.item_hidden=[]",
    "optimizer={tables: {lr: 0.01}, dense: {lr: 0.001}}",
)
BESIDE = ("train.save_beside_training=true", "train.checkpoint_every=3")

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="there is a real one"),
    pytest.mark.skipif(not shutil.which("g++"), reason="the shim needs g++"),
]


def on_gpu(folder: Path, *jobs: tuple[str, list[str]], limit: int) -> None:
    """Do the jobs as a machine with a GPU would."""
    libraries = Path(torch.__file__).parent / "lib"
    compiler = ["g++", "-shared", "-fPIC", "-std=c++20", "-I", str(libraries.with_name("include"))]
    linked = ["-L", str(libraries), "-lc10", "-ltorch_cpu", f"-Wl,-rpath,{libraries}"]
    source, shim = str(HERE / "pretended_gpu.cpp"), str(folder / "shim.so")
    subprocess.run([*compiler, source, "-o", shim, *linked], check=True)
    done = subprocess.run(
        [sys.executable, str(HERE / "pretended_gpu.py")],
        input=json.dumps(jobs),
        env=os.environ | {"PYTHONPATH": str(HERE.parents[1]), "OMP_NUM_THREADS": "1", "LD_PRELOAD": shim},
        capture_output=True,
        text=True,
        timeout=limit,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]


@pytest.fixture(scope="module")
def both(tiny_data, tiny_text: Callable[[Path], str], tmp_path_factory) -> Path:
    """A folder with the runs `cpu`, `gpu` and (there, in bfloat16) `rounded`; what `cpu` predicts on both devices."""
    folder = tmp_path_factory.mktemp("devices")
    file, runs = folder / "tiny.yaml", folder / "runs"
    file.write_text(tiny_text(runs))
    assert joint.train.main([str(file), "run.name=cpu", *EQUAL]) == 0
    predict(runs / "cpu", tiny_data, folder / "of-cpu", splits=["test"], heads=[], k=3)
    on_gpu(
        folder,
        ("train", [str(file), "run.name=gpu", *EQUAL, *BESIDE]),
        ("train", [str(file), "run.name=rounded", *EQUAL, "train.precision=bfloat16"]),
        ("predict", [str(runs / "cpu"), str(tiny_data), str(folder / "of-gpu"), "--split", "test", "--k", "3"]),
        limit=900,
    )
    return folder


def lines(folder: Path, run: str) -> list[dict[str, float]]:
    """metrics.jsonl without what depends on the machine."""
    found = [json.loads(line) for line in (folder / "runs" / run / "metrics.jsonl").read_text().splitlines()]
    return [{n: v for n, v in line.items() if not n.startswith(("speed/", "memory/"))} for line in found]


def test_a_run_on_the_gpu_is_that_on_the_cpu(both):
    expected, found = lines(both, "cpu"), lines(both, "gpu")
    assert len(expected) == len(found) == 1 + 8 + 1 + 1  # costs, steps, the validation part, the test part
    for before, after in zip(expected[1:9], found[1:9], strict=True):
        assert after == pytest.approx(before, rel=1e-6)
    for before, after in zip(expected[9:], found[9:], strict=True):
        # Blocks are larger there: two scores 1e-7 apart may change places, one pair of a user group's few hundred.
        assert after == pytest.approx(before, rel=1e-6, abs=5e-3)


def test_a_checkpoint_of_the_cpu_predicts_the_same_there(both):
    files = sorted(path.relative_to(both / "of-cpu") for path in (both / "of-cpu").rglob("*.parquet"))
    assert files
    for file in files:
        one, two = (pq.read_table(both / side / file).to_pylist() for side in ("of-cpu", "of-gpu"))
        for expected, found in zip(one, two, strict=True):
            for name, value in expected.items():
                rounded = "." in name or name == "scores"  # logits, else ids and names
                assert found[name] == (pytest.approx(value, rel=1e-5, abs=1e-6) if rounded else value)


def test_autocast_rounds_by_the_rules_for_cuda(both):
    for exact, rounded in zip(lines(both, "cpu")[1:9], lines(both, "rounded")[1:9], strict=True):
        assert rounded["loss/total"] == pytest.approx(exact["loss/total"], rel=0.02)
        assert rounded["loss/total"] != exact["loss/total"]


@pytest.mark.slow
def test_every_config_trains_and_is_measured_there(tmp_path):
    test = str(HERE / "test_configs.py")
    on_gpu(tmp_path, ("pytest", [test, "-x", "-k", "trains_three_steps", "-p", "no:cacheprovider"]), limit=3000)
