"""What a run reports: the figures of an interval, and nothing twice however often it was interrupted."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2

from joint.reporting import Reporter
from joint.run import RunDirectory
from joint.train import main


@pytest.fixture
def directory(tmp_path: Path) -> RunDirectory:
    return RunDirectory(tmp_path)


def step(reporter: Reporter, loss: float, **more: float) -> None:
    counts = {"requests": 4, "candidates": 20, "unknown": 0, "seconds": 2.0, "waited": 0.5} | more
    reporter.step({"student": torch.tensor(loss), "total": torch.tensor(2 * loss)}, **counts)


def lines_of(directory: RunDirectory) -> list[dict[str, float]]:
    return [json.loads(line) for line in directory.metrics.read_text().splitlines()]


def board_of(directory: RunDirectory, name: str) -> list[tuple[int, float]]:
    events = EventAccumulator(str(directory.tensorboard)).Reload()
    return [(event.step, round(event.value, 4)) for event in events.Scalars(name)]


def test_an_interval_is_the_mean_of_its_steps_and_counts_only_their_time(directory, capsys):
    reporter = Reporter(directory, total_steps=10, resumed_from=0)
    step(reporter, 1.0)
    step(reporter, 2.0, waited=1.5, unknown=3)
    assert reporter.counts() == (8, 40, 3)
    reporter.interval(2, (16, 80, 0), {"optimizer/lr_dense": 0.1})  # of two ranks
    step(reporter, 5.0)
    reporter.interval(3, (4, 20, 3), {"optimizer/lr_dense": 0.1})
    reporter.close()
    first, second = lines_of(directory)
    assert first["loss/student"] == 1.5
    assert first["loss/total"] == 3.0
    assert first["speed/requests_per_second"] == 4.0
    assert first["speed/candidates_per_second"] == 20.0
    assert first["speed/data_wait_fraction"] == 0.5
    assert first["optimizer/lr_dense"] == 0.1
    assert 50 < first["memory/peak_mb"] < 64_000
    assert second["loss/student"] == 5.0
    assert first["data/unknown_ids"] == 0
    assert second["data/unknown_ids"] == 3
    assert second["speed/data_wait_fraction"] == 0.25
    out = capsys.readouterr().out
    assert out == directory.log.read_text()
    pace, losses, later, _ = out.splitlines()
    assert re.fullmatch(
        r"step      2/10  0:00:\d\d left, 4 requests/s, 20 candidates/s, waiting 50%, [\d.]+ [MG]B", pace
    )
    assert losses == "  student 1.5000  total 3.0000"
    assert later.endswith("B, 3 ids outside their table")


def test_the_time_left_goes_on_at_the_pace_since_the_start_of_this_process(directory, monkeypatch, capsys):
    now = iter([100.0, 160.0, 190.0])  # started, after four steps, after six
    monkeypatch.setattr("joint.reporting.time.perf_counter", lambda: next(now))
    reporter = Reporter(directory, total_steps=18, resumed_from=12)
    for at in (16, 18):
        step(reporter, 1.0)
        reporter.interval(at, (4, 20, 0), {})
    reporter.close()
    assert [line["speed/seconds_left"] for line in lines_of(directory)] == [pytest.approx(30), 0]
    assert board_of(directory, "speed/seconds_left") == [(16, 30.0), (18, 0.0)]
    assert [line[:27] for line in capsys.readouterr().out.splitlines()[::2]] == [
        "step     16/18  0:00:30 lef",
        "step     18/18  0:00:00 lef",
    ]


def test_lines_fit_a_terminal_however_many_objectives_there_are(directory, capsys):
    reporter = Reporter(directory, total_steps=10**6, resumed_from=0)
    losses = {f"an_objective_{n}": torch.tensor(float(n)) for n in range(20)}
    reporter.step(losses, requests=10**6, candidates=10**8, unknown=0, seconds=0.1, waited=0.05)
    reporter.interval(10, (10**6, 10**8, 0), {})
    reporter.close()
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 120
    assert all(line.startswith("  an_objective_") for line in lines[1:])
    assert " ".join(lines[1:]).split() == [word for n in range(20) for word in (f"an_objective_{n}", f"{n}.0000")]


def test_every_chart_shows_something_and_the_board_has_what_someone_looks_at(tiny_file, tmp_path):
    """With learned weights of negatives, validation after an epoch, and the test part."""
    weights = "objectives.negatives.space=[random]"
    assert main([str(tiny_file), weights, "data.epochs=1"]) == 0
    run = RunDirectory(tmp_path / "runs" / "tiny")
    events = EventAccumulator(str(run.tensorboard)).Reload()
    layout = layout_pb2.Layout()
    (shown,) = events.Tensors("custom_scalars__config__")
    layout.ParseFromString(shown.tensor_proto.string_val[0])
    titles = [category.title for category in layout.category]
    after, end = "by epoch, on valid", "at the end, on test"
    assert titles == ["loss", after, end, "weights of negatives, by user group", "speed"]
    names = events.Tags()["scalars"]
    lines = {
        f"{category.title}: {chart.title}": {n for n in names for tag in chart.multiline.tag if re.match(tag, n)}
        for category in layout.category
        for chart in category.chart
    }
    assert not [title for title, found in lines.items() if not found]
    assert lines["loss: by objective"] == {
        f"loss/{name}" for name in ("teacher", "student", "distill", "negatives", "retrieve")
    }
    heads = ("retrieval", "pre_ranking", "ranking")
    assert lines[f"{end}: recall@3"] == {f"test/{head}/recall@3" for head in heads}
    assert lines[f"{end}: AUC of like"] == {f"test/{head}/auc/like" for head in heads}
    assert len(lines[f"{end}: positives left in the funnel"]) == 3
    assert all(
        re.search(r"/like/\d+$", name) for name in lines["weights of negatives, by user group: like, matching_ns"]
    )
    written = {(name, e["step"]) for e in lines_of(run) for name in e if name != "step"}
    drawn = {(name, event.step) for name in names for event in events.Scalars(name)}
    curves = {pair for pair in written if not pair[0].startswith(("test/", "cost/"))}
    assert curves <= drawn <= written
    # A point each that no training moves: the tab Time Series would begin with them.
    assert {f"cost/{head}/parameters" for head in heads} <= {name for name, at in written if at == 0}
    assert not [name for name in names if name.startswith("cost/")]
    # Of what is measured once, at the end, only what has a place in a chart; all of it is in the table and eval.json.
    of_the_end = {name for name in names if name.startswith("test/")}
    assert of_the_end == set().union(*lines.values()) & of_the_end
    assert len(of_the_end) < 20 < len(json.loads((run.path / "eval.json").read_text()))
    for tag, said in (("run", "multiply-adds"), ("test", "recall@10")):
        (shown,) = events.Tensors(f"{tag}/text_summary")
        text = shown.tensor_proto.string_val[0].decode().removeprefix("```\n").removesuffix("\n```")
        assert text in run.log.read_text()
        assert said in text


def test_a_resumed_run_reports_nothing_twice(directory):
    for begin, end in ((0, 5), (3, 6)):  # saved at 3, killed after 5, resumed
        reporter = Reporter(directory, total_steps=6, resumed_from=begin)
        for number in range(begin + 1, end + 1):
            reporter.numbers(number, {"loss/total": 10 * begin + number})
        reporter.numbers(end, {"test/recall": end, "without a unit": float("nan")})
        reporter.close()
        if end < 6:
            with directory.metrics.open("a") as file:
                file.write('{"step": 3, "lo')  # torn by the kill
    expected = [(1, 1), (2, 2), (3, 3), (4, 34), (5, 35), (6, 36)]
    entries = lines_of(directory)
    assert [(e["step"], e["loss/total"]) for e in entries if "loss/total" in e] == expected
    assert [e for e in entries if "loss/total" not in e] == [{"step": 6, "test/recall": 6}]
    assert board_of(directory, "loss/total") == expected


def test_other_ranks_are_silent(directory, monkeypatch, capsys):
    monkeypatch.setattr("joint.reporting.rank", lambda: 1)
    reporter = Reporter(directory, total_steps=10, resumed_from=0)
    step(reporter, 1.0)
    assert reporter.counts() == (4, 20, 0)
    reporter.interval(1, (4, 20, 0), {})
    reporter.close()
    assert capsys.readouterr().out == ""
    assert list(directory.path.iterdir()) == []
