"""The worked examples of docs/own_logs.md on the public samples, where those lie beside the repository."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from joint.data.dataset import Dataset
from joint.data.flat.map import read_map
from joint.data.flat.reader import prepare_log
from joint.data.problems import Problems

ROOT = Path(__file__).parents[2]
SAMPLES = ROOT.parent / "shared" / "data"
KUAIRAND, EBNERD = SAMPLES / "kuairand27k_likehate", SAMPLES / "ebnerd_fixture"
CONFIG = """
run: {{name: kuairand, dir: {runs}}}
data: {{path: {dataset}, requests_per_batch: 1024, candidates: {{exposed: all, random: 4}}, not_eligible: [seen]}}
tasks: {{click: {{label: click}}, long: {{label: long_view}}}}
tables: {{user_id: {{dim: 4}}, item_id: {{dim: 4}}, activity: {{dim: 4}}, played: {{dim: 4}}}}
encoders:
  clicked: {{history: clicked, features: [item_id], events: [played], length: 20, by: {{kind: mean}}}}
heads:
  retrieval: {{features: [user_id, activity, clicked, item_id], dim: 4, trunk: {{kind: mmoe, experts: 2, hidden: [4]}}}}
  pre_ranking: {{features: [user_id, clicked, item_id], dim: 4, trunk: {{kind: snr, hidden: [4]}}}}
  ranking: {{features: [user_id, followed, clicked, item_id, duration], trunk: {{kind: snr, hidden: [4]}}}}
objectives:
  teacher: {{head: ranking, loss: binary, space: [exposed]}}
  student: {{head: pre_ranking, loss: binary, space: [exposed]}}
  retrieve: {{head: retrieval, loss: multi_class, space: [corpus]}}
evaluation: {{task: click, quotas: {{retrieval: 200, pre_ranking: 50, ranking: 10}}}}
"""


def example(name: str, files: list[Path], out: Path, *overrides: str, skip: bool = False) -> tuple[Dataset, Problems]:
    problems = Problems(skip=skip)
    m, tree = read_map(ROOT / "docs" / "maps" / f"{name}.yaml", overrides)
    prepare_log(files, out, m, tree, problems=problems)
    return Dataset(out), problems


@pytest.fixture(scope="module")
def kuairand(tmp_path_factory: pytest.TempPathFactory) -> tuple[Dataset, Problems]:
    if not KUAIRAND.is_dir():
        pytest.skip("the KuaiRand sample is not here")
    folder = tmp_path_factory.mktemp("kuairand")
    # As docs/own_logs.md says: of this sample only the rows with a like are exposures like any other.
    pq.write_table(
        pq.read_table(KUAIRAND / "events.parquet", filters=pc.field("is_like") == 1), folder / "likes.parquet"
    )
    users = f"users.file={KUAIRAND / 'users.parquet'}"
    return example("kuairand", [folder / "likes.parquet"], folder / "dataset", users, skip=True)


def test_kuairand(kuairand: tuple[Dataset, Problems]) -> None:
    dataset, problems = kuairand
    raw = pq.read_table(KUAIRAND / "events.parquet", filters=pc.field("is_like") == 1).to_pandas()
    once = raw.drop_duplicates(["user_id", "item_id", "timestamp_ms"])
    twice = "column item_id: found a second row of this user, item and time; expected it once"
    assert dict(problems.counts) == ({twice: len(raw) - len(once)} if len(once) < len(raw) else {})
    parts = [dataset.read(part) for part in dataset.schema.parts]
    assert sum(len(part.lists("candidates").values) for part in parts) == len(once)
    assert sum(part.lists("click").values.sum() for part in parts) == once.is_click.sum()
    minutes = sum(part.lists("minutes").values.sum(dtype=np.float64) for part in parts)
    assert minutes == pytest.approx(once.play_time_ms.sum() / 60_000, rel=1e-4)
    assert dataset.schema.items == once.item_id.nunique()
    # No request holds an item that its history of seen items has from a later second.
    seen = {part.day: dataset.read(part, further=["seen.timestamp"]) for part in dataset.schema.parts}
    for requests in seen.values():
        times = requests.lists("seen.timestamp")
        assert (times.values < requests.scalars("timestamp")[times.rows]).all()


def test_ebnerd(tmp_path: Path) -> None:
    if not EBNERD.is_dir():
        pytest.skip("the EB-NeRD sample is not here")
    history = f"histories.read.file={EBNERD / 'history.parquet'}"
    dataset, problems = example("ebnerd", [EBNERD / "impressions.parquet"], tmp_path / "out", history)
    raw = pq.read_table(EBNERD / "impressions.parquet").to_pandas()
    past = pq.read_table(EBNERD / "history.parquet").to_pandas()
    assert not problems.counts
    parts = [dataset.read(part) for part in dataset.schema.parts]
    assert sum(len(part) for part in parts) == raw.request_id.nunique() == 1046
    assert sum(part.lists("click").values.sum() for part in parts) == raw.click.sum() == 1047
    assert sum((~np.isnan(part.lists("dwell").values)).sum() for part in parts) == raw.dwell_s.notna().sum()
    first = parts[0]
    users = pq.read_table(tmp_path / "out" / "vocabularies" / "user_id.parquet")["value"].to_numpy()
    for row in range(len(first)):
        user, second = users[first.scalars("user_id")[row] - 1], first.scalars("timestamp")[row]
        before = (past.user_id == user).sum() + (
            (raw.user_id == user) & (raw.click == 1) & (raw.timestamp_ms // 1000 < second)
        ).sum()
        assert first.lists("read").lengths[row] == min(100, before)


@pytest.mark.slow
def test_a_prepared_log_trains(kuairand: tuple[Dataset, Problems], tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(CONFIG.format(dataset=kuairand[0].directory, runs=tmp_path / "runs"))
    done = subprocess.run(
        [sys.executable, "-m", "joint.train", tmp_path / "config.yaml"], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    assert "share of the click positives left" in done.stdout
