"""Plans of tables: what a config says is what TorchRec is told, offline and for any number of ranks."""

from __future__ import annotations

import re

import pytest
import torch

import joint.plan
import joint.sharding
import joint.train
from joint.commands import run_command
from joint.errors import ConfigError
from joint.experiment import Table
from joint.ids import hashed_rows
from joint.optimizers import optimize_tables_in_backward
from joint.sharding import _plan_by_rule, ids_per_request, sharding_of
from joint.sizes import size, size_text
from joint.task import JointTask


@pytest.mark.parametrize(
    ("sharding", "rows", "ranks", "expected"),
    [
        ("auto", 99_999, 8, "table_wise"),
        ("auto", 100_000, 8, "row_wise"),
        ("auto", 100_000, 1, "table_wise"),
        ("row_wise", 9, 2, "row_wise"),
        ("table_wise", 10**9, 128, "table_wise"),
        ("planner", 10, 128, "planner"),
    ],
)
def test_a_table_goes_as_its_settings_say(sharding, rows, ranks, expected):
    assert sharding_of("t", rows, Table(dim=4, sharding=sharding), device="cpu", ranks=ranks) == expected


def test_what_a_device_cannot_do_is_a_mistake():
    with pytest.raises(ConfigError, match=r"tables\.t\.sharding: 9 rows leave a rank of 8 empty; use table_wise"):
        sharding_of("t@ranking", 9, Table(dim=4, sharding="row_wise"), device="cpu", ranks=8)
    for memory in ("uvm", "uvm_caching"):
        with pytest.raises(ConfigError, match=rf"tables\.t\.memory: {memory} is for CUDA, found cpu"):
            sharding_of("t", 9, Table(dim=4, memory=memory), device="cpu", ranks=1)
        assert sharding_of("t", 9, Table(dim=4, memory=memory), device="cuda", ranks=1) == "table_wise"


def test_a_rank_of_a_second_machine_is_sent_to_a_gpu_of_its_own(configure, assemble, monkeypatch):
    monkeypatch.setattr(joint.sharding, "world_size", lambda: 4)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    plan = assemble.plan(configure())
    module = JointTask(plan)
    optimize_tables_in_backward(module.embeddings, plan.config.optimizer, device="cuda")
    found = _plan_by_rule(module, plan, torch.device("cuda", 0))
    tables = [table for part in found.plan.values() for table in part.values()]
    placements = [shard.placement for table in tables for shard in table.sharding_spec.shards]
    assert {p.rank() for p in placements} == {0, 1, 2, 3}
    assert all(p.device() == torch.device("cuda", p.rank() % 2) for p in placements)


def test_adam_of_tables_is_for_cuda(tiny_file, capsys):
    assert run_command(lambda: joint.train.main([str(tiny_file), "optimizer.tables.kind=adam"])) == 2
    assert capsys.readouterr().err == "optimizer.tables.kind: adam is for CUDA; on CPU there is rowwise_adagrad\n"


def test_the_planner_reckons_with_whole_histories_and_quotas(configure, assemble):
    found = ids_per_request(assemble.plan(configure()))
    assert found["user_id"] == 1
    assert found["liked.item_id"] == 6
    assert found["candidate.item_id"] == 10 + 6  # a screen of exposures, and six random items
    assert found["pool.item_id"] == pytest.approx(61 / 16)


def test_a_plan_for_tables_that_no_machine_holds(tiny_file, capsys):
    """1e9 rows of 64 floats and an Adagrad sum each: 260 GB."""
    big = ["tables.item_id={dim: 64, rows: 1000000000}", "tables.genres.dim=64", "data.requests_per_batch=65536"]
    overrides = [*big, "encoders.rated_sequence.events=[]", "data.shards=128"]
    assert joint.plan.main([str(tiny_file), *overrides, "--world-size", "128", "--hbm", "80GB"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "128 ranks on cuda, 80.0 GB each; 512 requests a rank and step"
    table = next(line for line in lines if line.startswith("item_id")).split()
    assert table[1:6] == ["1,000,000,000", "64", "row_wise", "fused", "128"]
    assert 260 <= float(table[6]) < 270
    held = [re.fullmatch(r"ranks? (\d+)(?:-(\d+))? +([\d.]+) (GB|MB) each, \d+% of its memory", line) for line in lines]
    ranks = [(int(m[1]), int(m[2] or m[1]), float(m[3])) for m in held if m]
    assert ranks[0][0] == 0
    assert ranks[-1][1] == 127
    assert [end + 1 for _, end, _ in ranks[:-1]] == [begin for begin, _, _ in ranks[1:]]
    total = sum((end - begin + 1) * gigabytes for begin, end, gigabytes in ranks)
    assert 260 < total < 320
    assert lines[-1].startswith("expected bottleneck: exchanging rows between ranks (")


def test_a_plan_that_cannot_be_is_one_line(tiny_file, capsys):
    overrides = ["tables.item_id={dim: 8, rows: 1000000000}", "--world-size", "2", "--hbm", "10GB"]
    assert run_command(lambda: joint.plan.main([str(tiny_file), *overrides])) == 2
    err = capsys.readouterr().err
    assert err.startswith("no plan fits: rows and rowwise_adagrad take 36.0 GB, and 2 ranks of 10.0 GB have 17.0 GB")
    assert err.count("\n") == 1


def test_sizes_are_read_in_decimal_units():
    assert [size(text) for text in ("80GB", "1.5 tb", "3MB")] == [80 * 10**9, 1500 * 10**9, 3 * 10**6]
    for text in ("80", "GB", "-1GB", "80GiB"):
        with pytest.raises(Exception, match="is not a size; expected one like 80GB"):
            size(text)


def test_bytes_are_said_in_the_largest_unit_that_leaves_a_digit_before_the_point():
    said = {
        0: "0 B",
        999: "999 B",
        1000: "1.00 kB",
        2_268: "2.27 kB",
        36e9: "36.0 GB",
        999e9: "999 GB",
        1.5e12: "1.50 TB",
    }
    assert {count: size_text(count) for count in said} == said


@pytest.mark.parametrize("count", [1_500, 80 * 10**9, 1_500 * 10**9])
def test_what_is_said_is_read_again(count):
    assert size(size_text(count)) == count


def test_hashed_tables_train_and_say_what_they_share(tiny_file, capsys):
    override = "tables.item_id={dim: 8, rows: 30, hash: true, sharding: row_wise}"
    assert joint.train.main([str(tiny_file), override, "data.epochs=1"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"table item_id is hashed: \d\d\.\d% of 61 ids share one of 30 rows with another", out)
    assert "outside their table" not in out


def test_hashed_ids_reach_their_rows(configure, assemble):
    plain = assemble(configure())
    hashed = assemble(configure("tables.item_id={dim: 8, rows: 1000003, hash: true}"))
    name = "candidate.item_id"
    before, after = (batch.sparse["dim8"][name].values().numpy() for batch in (plain, hashed))
    assert (after == hashed_rows(before, 1_000_003)).all()
    assert len(set(after.tolist())) > 5
