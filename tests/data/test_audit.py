"""The audit's statistics against pandas and scipy on a whole log, its files, its command line and exit codes."""

from __future__ import annotations

import base64
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy.spatial.distance import jensenshannon

from joint.audit import main, write_whole
from joint.auditing import chunks as audit_chunks
from joint.auditing.counts import Codes, missing
from joint.auditing.measure import Report, audit, long_tail, to_json
from joint.auditing.spaces import chance_distance, jaccard, js_distance, total_variation, weighted_jaccard
from joint.auditing.summary import summary
from joint.commands import run_command
from joint.data.dataset import Dataset, DatasetWriter
from joint.data.ragged import Ragged
from joint.data.requests import Column, Requests
from joint.errors import DataError
from joint.schema import STAGES, Feature, Schema, Stage, day_number, read_schema

ROOT = Path(__file__).parents[2]
LABELS = ["click", "minutes", "share"]
STAGE_NAMES = ["coarse_neg", "ranked", "rank_neg", "rank_pos", "exposed"]


@pytest.fixture(scope="session")
def log(funnel_path: Path) -> pd.DataFrame:
    """The log as pandas reads it: one row a request."""
    tables = []
    for part in read_schema(funnel_path).parts:
        tables.append(pd.read_parquet(funnel_path / part.path, partitioning=None).assign(day=part.day))
    return pd.concat(tables, ignore_index=True)


@pytest.fixture(scope="session")
def rows(log: pd.DataFrame) -> pd.DataFrame:
    """One row a candidate, with a bool column a stage."""
    flat = log.explode(["candidates", "stages", *LABELS]).dropna(subset="candidates")
    flat = flat.astype({"candidates": int, "stages": int} | dict.fromkeys(LABELS, float))
    return flat.assign(**{name: (flat.stages & int(STAGES[name])) != 0 for name in STAGE_NAMES})


@pytest.fixture(scope="session")
def report(funnel_path: Path) -> Report:
    return audit(Dataset(funnel_path))


def in_space(rows: pd.DataFrame, name: str) -> pd.DataFrame:
    return rows[rows.exposed] if name == "exposed" else rows[rows[name] & ~rows.exposed]


def item_counts(rows: pd.DataFrame) -> np.ndarray:
    return rows.candidates.value_counts().reindex(range(50), fill_value=0).to_numpy()


def test_rows_by_stage_day_and_split(report: Report, log: pd.DataFrame, rows: pd.DataFrame) -> None:
    expected = rows.groupby(["day", "split"])[STAGE_NAMES].sum()
    expected.insert(0, "requests", log.groupby(["day", "split"]).size())
    expected.insert(1, "candidates", rows.groupby(["day", "split"]).size())
    found = pd.DataFrame(report["rows"]).set_index(["day", "split"])
    pd.testing.assert_frame_equal(found, expected, check_dtype=False)


def test_label_rates(report: Report, rows: pd.DataFrame) -> None:
    found = pd.DataFrame(report["labels"]).set_index(["day", "split", "label"])
    for (day, split), some in rows[rows.exposed].groupby(["day", "split"]):
        for label in LABELS:
            one, known = found.loc[(day, split, label)], some[label].dropna()
            assert one[["exposures", "observed", "positive"]].tolist() == [len(some), len(known), (known > 0).sum()]
            assert one["mean"] == pytest.approx(known.mean())
            assert one["positive_rate"] == pytest.approx((known > 0).mean())
    assert len(found) == 3 * 6


def test_feedback_on_unexposed_is_all_that_is_found(report: Report, rows: pd.DataFrame) -> None:
    hidden = rows[~rows.exposed]
    expected = hidden[LABELS].notna().sum(axis=1).groupby([hidden.day, hidden.split]).sum()
    found = {(leak["file"][13:23], leak["file"].split("-")[-2]): leak["count"] for leak in report["leaks"]}
    assert found == expected.to_dict()
    assert {leak["check"] for leak in report["leaks"]} == {"feedback_on_unexposed"}


def test_overlaps(report: Report, rows: pd.DataFrame, funnel_path: Path) -> None:
    prices = pd.read_parquet(funnel_path / "items.parquet").price.to_numpy()
    edges = np.quantile(prices, np.linspace(0, 1, 21)[1:-1])
    assert len(report["overlaps"]) == 10
    for pair in report["overlaps"]:
        some = [in_space(rows, name) for name in pair["spaces"]]
        one, two = (set(space.candidates) for space in some)
        assert pair["jaccard"] == pytest.approx(len(one & two) / len(one | two))
        a, b = (item_counts(space) / len(space) for space in some)
        assert pair["weighted_jaccard"] == pytest.approx(np.minimum(a, b).sum() / np.maximum(a, b).sum())
        assert pair["popularity_js"] == pytest.approx(jensenshannon(a, b, base=2))
        assert pair["features_js"]["item_id"] == pytest.approx(pair["popularity_js"])  # an id an item
        binned = [np.bincount(np.digitize(prices[space.candidates], edges), minlength=20) for space in some]
        assert pair["features_js"]["price"] == pytest.approx(jensenshannon(*binned, base=2))


def test_gaps(report: Report, log: pd.DataFrame, rows: pd.DataFrame, funnel_path: Path) -> None:
    words = pd.read_parquet(funnel_path / "items.parquet").words
    gaps = {(gap["from"], gap["to"]): gap["features"] for gap in report["gaps"]}
    assert list(gaps) == [
        ("train exposures", "pre_ranking input"),
        ("train exposures", "catalogue"),
        ("train", "valid"),
    ]

    def of_words(items: pd.Series) -> np.ndarray:
        return np.bincount(np.concatenate([words[i] for i in items]), minlength=9)

    train = rows[rows.split == "train"]
    shown = train[train.exposed].candidates
    entered = train[train.coarse_neg | train.ranked].candidates  # what was exposed had entered too
    served = {"pre_ranking input": entered, "catalogue": pd.Series(range(50))}
    for name, items in served.items():
        found = gaps["train exposures", name]["words"]
        a, b = of_words(shown), of_words(items)
        assert found["js"] == pytest.approx(jensenshannon(a, b, base=2))
        assert found["total_variation"] == pytest.approx(np.abs(a / a.sum() - b / b.sum()).sum() / 2)
    later = gaps["train", "valid"]
    events = (
        log["watched.seen_on"].groupby(log.split).apply(lambda lists: np.bincount(np.concatenate([*lists]), None, 4))
    )
    assert later["watched.seen_on"]["js"] == pytest.approx(jensenshannon(events["train"], events["valid"], base=2))
    users = [np.bincount(log[log.split == split].user_id, minlength=20) for split in ("train", "valid")]
    assert later["user_id"]["js"] == pytest.approx(jensenshannon(*users, base=2))
    assert set(later) == {"user_id", "device", "hour", "item_id", "price", "words", "watched.seen_on"}
    assert list(later.values()) == sorted(later.values(), key=lambda said: -said["js"])


def test_newcomers_missing_and_histories(report: Report, log: pd.DataFrame, rows: pd.DataFrame) -> None:
    (new,) = report["new"]
    train, valid = (rows[rows.split == split] for split in ("train", "valid"))
    shown = valid[valid.exposed].candidates
    unseen = ~shown.isin(train[train.exposed].candidates)
    assert new["items"] == {"all": shown.nunique(), "new": shown[unseen].nunique(), "share_of_rows": unseen.mean()}
    users = log[(log.split == "valid") & (log.user_id > 0)].user_id
    known = users.isin(log[log.split == "train"].user_id)
    assert new["users"] == {"all": users.nunique(), "new": users[~known].nunique(), "share_of_rows": (~known).mean()}
    rates = {(said["feature"], said["of"]): said["rate"] for said in report["missing"]}
    assert rates["device", "train"] == pytest.approx((log[log.split == "train"].device == 0).mean())
    assert rates["hour", "valid"] == 0
    histories = {(said["history"], said["split"]): said for said in report["histories"]}
    lengths = log[log.split == "train"].saved.map(len)
    assert histories["saved", "train"]["mean_length"] == pytest.approx(lengths.mean())
    assert histories["saved", "train"]["empty_share"] == pytest.approx((lengths == 0).mean())


def test_long_tails_are_of_the_log(report: Report, rows: pd.DataFrame) -> None:
    users = rows[rows.exposed & (rows.user_id > 0)].user_id.value_counts()
    tails = {"items_by_exposure": item_counts(rows[rows.exposed]), "items_by_all_stages": item_counts(rows)}
    tails["users_by_exposure"] = users.reindex(range(1, 20), fill_value=0).to_numpy()
    assert {name: long_tail(counts) for name, counts in tails.items()} == report["long_tail"]


def test_a_long_tail_by_hand() -> None:
    tail = long_tail(np.array([0, 1, 1, 2, 3, 4, 0, 7, 8, 1024]))
    assert [(r["from"], r["to"], r["things"]) for r in tail["ranges"] if r["things"]] == [
        (1, 1, 2),
        (2, 3, 2),
        (4, 7, 2),
        (8, 15, 1),
        (1024, 2047, 1),
    ]
    assert (tail["things"], tail["seen"], tail["rows"]) == (10, 8, 1050)
    assert tail["top_share"] == 1024 / 1050  # one thing is the hundredth of eight, rounded up
    values = np.array([1, 1, 2, 3, 4, 7, 8, 1024])
    assert tail["gini"] == pytest.approx(np.abs(values[:, None] - values).mean() / (2 * values.mean()))
    even = long_tail(np.full(200, 5))
    assert (even["top_share"], even["gini"]) == (pytest.approx(0.01), pytest.approx(0))
    assert np.isnan(long_tail(np.zeros(3, int))["gini"])


def test_newcomers_and_the_catalogue_of_the_last_day(tmp_path: Path) -> None:
    """By hand: training shows items 0 (once) and 1, the test 0, 1 (twice) and 2, which training had as a candidate."""
    shown, hidden = int(Stage.EXPOSED), int(Stage.RANKED)
    schema = Schema(
        name="new",
        items=4,
        features=(Feature(name="item_id", level="item", kind="id", size=5),),
        histories=(),
        labels=(),
        stages=("ranked", "exposed"),
        input_space={},
    )
    days = {"train": ([0, 1, 1, 2], [shown, shown, shown, hidden]), "test": ([0, 1, 1, 2], [shown] * 4)}
    with DatasetWriter(tmp_path / "log") as writer:
        first = np.array([0, day_number("2024-01-01"), 0, day_number("2024-01-02")], np.int32)
        writer.items({"item_id": np.arange(1, 5), "first_day": first})
        for number, (split, (items, stages)) in enumerate(days.items()):
            at = np.arange(4)
            scalars: dict[str, Column] = {"request_id": at + 9 * number, "timestamp": at + 9 * number, "group": at * 0}
            lists = Ragged(np.array(items, np.int32), np.arange(5))
            more: dict[str, Column] = {"candidates": lists, "stages": lists.with_values(np.array(stages, np.uint16))}
            writer.add(Requests(scalars | more), day=f"2024-01-0{number + 1}", split=split)
        writer.finish(schema)
    report = audit(Dataset(tmp_path / "log"))
    assert report["new"] == [
        {
            "split": "test",
            "items": {"all": 3, "new": 1, "share_of_rows": 0.25},
            "items_never_logged": {"all": 3, "new": 0, "share_of_rows": 0},
        }
    ]
    catalogue = next(gap for gap in report["gaps"] if gap["to"] == "catalogue")
    # Items 0, 1 and 2: item 3 comes a day after training's last, item 1 on it.
    expected = jensenshannon([1, 2, 0], [1, 1, 1], base=2)
    assert catalogue["features"]["item_id"]["js"] == pytest.approx(expected)


def test_distances_by_hand() -> None:
    a, b, other, none = (np.array(counts) for counts in ([2, 2, 0], [4, 4, 0], [0, 0, 9], [0, 0, 0]))
    assert (js_distance(a, b), total_variation(a, b), weighted_jaccard(a, b), jaccard(a, b)) == (0, 0, 1, 1)
    assert (js_distance(a, other), total_variation(a, other), weighted_jaccard(a, other)) == (1, 1, 0)
    assert jaccard(a, np.array([0, 1, 1])) == 1 / 3
    assert all(np.isnan(f(a, none)) for f in (js_distance, total_variation, weighted_jaccard))
    assert np.isnan(jaccard(none, none))


def test_chance_is_what_two_draws_differ_by() -> None:
    rng = np.random.default_rng(5)
    p = rng.dirichlet(np.full(300, 0.3))
    drawn = [rng.multinomial(n, p) for n in (5000, 400)]
    assert chance_distance(*drawn) == pytest.approx(js_distance(*drawn), rel=0.15)
    whole = np.ones(300, int)
    few = rng.multinomial(2000, whole / 300)
    assert chance_distance(few, whole, census=True) == pytest.approx(js_distance(few, whole), rel=0.15)


def test_codes_of_every_kind() -> None:
    codes, column = Codes(), np.array([3.0, np.nan, 1.0, 2.0])
    price = Feature(name="price", level="item", kind="float")
    assert codes("price", price, column).values.tolist() == [20, 0, 1, 11]  # of 20 bins by quantiles; 0 is missing
    assert codes("price", price, np.array([-9.0, 99.0])).values.tolist() == [1, 20]
    vector = Feature(name="v", level="request", kind="vector", size=2)
    lists = Ragged(np.array([0.0, 5.0, 1.0, np.nan]), np.array([0, 2, 2, 4]))
    assert codes("v", vector, lists).values.tolist() == [1, 21 + 20, 20, 21]
    assert (codes.size(vector), codes.size(price)) == (42, 21)
    ids = Feature(name="i", level="item", kind="ids", size=4)
    assert codes("i", ids, Ragged(np.array([3, 4, -1]), np.array([0, 3]))).values.tolist() == [3, 0, 0]
    assert missing(vector, lists).tolist() == [False, True, False]
    assert missing(ids, Ragged(np.array([0, 3, 0]), np.array([0, 2, 2, 3]))).tolist() == [False, True, True]
    assert missing(price, column).tolist() == [False, True, False, False]


def without(report: Report, *names: str) -> Report:
    return {name: value for name, value in report.items() if name not in names}


def test_chunks_change_nothing(report: Report, funnel_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audit_chunks, "CHUNK", 16)
    small, whole = audit(Dataset(funnel_path)), json.loads(to_json(report))
    for one in (small, whole):
        for gap in one["gaps"]:
            gap["features"].pop("hour", None)  # the bins of its floats are those of the first chunk
    assert small == whole


def test_a_sample_feeds_distances_alone(report: Report, funnel_path: Path) -> None:
    distances = ("dataset", "gaps", "overlaps", "histories")
    some, again = (audit(Dataset(funnel_path), sample=20) for _ in range(2))
    assert some == again
    assert without(some, *distances) == without(report, *distances)
    assert all(some[name] != report[name] for name in distances)
    everything = audit(Dataset(funnel_path), sample=10_000)
    assert everything["overlaps"] == report["overlaps"]


def test_pools_say_what_they_hold(funnel_path: Path, tmp_path: Path, rows: pd.DataFrame) -> None:
    path = Path(shutil.copytree(funnel_path, tmp_path / "copy"))
    items = pd.read_parquet(path / "items.parquet")
    first = np.where(np.arange(50) < 20, 0, 19_782)  # 2024-02-29
    items.assign(**{"first_day.new": first.astype(np.int32)}).to_parquet(path / "items.parquet")
    said = json.loads((path / "dataset.json").read_text())
    (path / "dataset.json").write_text(json.dumps(said | {"pools": ["new"]}))
    found = audit(Dataset(path))
    shown = rows[rows.exposed]
    inside = (shown.candidates < 20) | (shown.day >= "2024-02-29")
    assert {(said["split"], said["pool"]): (said["in_pool"], said["exposures"]) for said in found["reach"]} == {
        (split, "new"): (inside[shown.split == split].sum(), (shown.split == split).sum())
        for split in ("valid", "train")
    }
    assert ("train exposures", "pool new") in {(gap["from"], gap["to"]) for gap in found["gaps"]}
    assert "pool new: holds, on their day, " in summary(found)


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    """The exit code of the command."""
    monkeypatch.setattr(sys, "argv", ["joint.audit", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        raise SystemExit(run_command(main))
    return int(str(end.value.code))


def without_leaks(path: Path) -> None:
    """Feedback on unexposed candidates becomes unobserved."""
    for part in path.rglob("part-*.parquet"):
        table = pd.read_parquet(part, partitioning=None)
        for label in LABELS:
            table[label] = [
                np.where(np.asarray(stages) & int(Stage.EXPOSED), np.asarray(values, float), np.nan).astype(np.float32)
                for stages, values in zip(table.stages, table[label], strict=True)
            ]
        groups = next(p.groups for p in read_schema(path).parts if path / p.path == part)
        table.to_parquet(part, row_group_size=groups[0])


def test_exit_codes(
    funnel_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = Path(shutil.copytree(funnel_path, tmp_path / "copy"))
    assert run(monkeypatch, path, "--out", tmp_path / "out") == 1
    assert "leakage: 6 findings" in capsys.readouterr().out
    without_leaks(path)
    assert run(monkeypatch, path) == 0
    assert "leakage: none found" in capsys.readouterr().out
    text = (path / "audit" / "audit.json").read_text()
    assert to_json(json.loads(text)) == text
    files = {file.name for folder in (tmp_path / "out", path / "audit") for file in folder.iterdir()}
    assert files == {"audit.json", "audit.html"} if find_spec("matplotlib") else {"audit.json"}


def test_a_log_of_next_to_nothing(tmp_path: Path) -> None:
    """One request that shows nothing, and no feature at all: every number is there or null, and so is the page."""
    none = Ragged(np.zeros(0, np.int32), np.zeros(2, np.int64))
    scalars: dict[str, Column] = {
        "request_id": np.array([7]),
        "timestamp": np.array([5]),
        "group": np.array([0], np.int8),
    }
    lists: dict[str, Column] = {"candidates": none, "stages": none.with_values(none.values.astype(np.uint16))}
    lists["click"] = none.with_values(none.values.astype(np.float32))
    schema = Schema(
        name="nothing", items=2, features=(), histories=(), labels=("click",), stages=("exposed",), input_space={}
    )
    with DatasetWriter(tmp_path / "log") as writer:
        writer.items({"title": np.array(["a", "b"])})
        writer.add(Requests(scalars | lists), day="2024-01-01", split="test")
        writer.finish(schema)
    report = audit(Dataset(tmp_path / "log"))
    assert report["leaks"] == report["new"] == report["overlaps"] == []
    assert report["labels"][0]["mean"] is None
    assert report["long_tail"]["items_by_exposure"]["gini"] is None
    assert "label click: never observed" in summary(report)
    assert json.loads(to_json(report)) == report
    pytest.importorskip("matplotlib")
    from joint.auditing.page import page

    assert page(report).count("<img") == 4


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nowhere"], "nowhere/dataset.json: not found"),
        (["{path}", "--sample", 0], "--sample is 0; expected 1 or more"),
        (["{path}", "--out", "{path}/dataset.json"], "audit.json: cannot be written"),
    ],
)
def test_bad_input_is_exit_code_2(
    arguments: list[object],
    said: str,
    funnel_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(monkeypatch, *(str(one).format(path=funnel_path) for one in arguments)) == 2
    assert said in capsys.readouterr().err


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_whole(tmp_path / "audit.json", "old")

    def full(self: Path, text: str, encoding: str) -> int:
        self.touch()
        raise OSError("no space left")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(DataError, match="no space left"):
        write_whole(tmp_path / "audit.json", "new")
    assert (tmp_path / "audit.json").read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["audit.json"]


def test_the_page_holds_everything_itself(report: Report) -> None:
    pytest.importorskip("matplotlib")
    from joint.auditing.page import page as make

    page = make(report | {"dataset": report["dataset"] | {"name": "<b>&"}})
    assert "Audit of &lt;b&gt;&amp;" in page
    assert "<b>" not in page
    pictures = re.findall(r'<img alt="([^"]+)" src="data:image/png;base64,([^"]+)">', page)
    assert [title for title, _ in pictures] == [
        "Rows by stage and day",
        "Label rates",
        "Long tails",
        "New in evaluation",
        "Overlap of spaces",
        "Training and serving",
        "Missing values",
    ]
    assert all(base64.b64decode(data).startswith(b"\x89PNG") for _, data in pictures)
    text = re.sub(r"data:image/png;base64,[^\"]+", "", page)
    assert not re.search(r"http|<script|<link|url\(|@import", text)
    assert text.count("<img") == len(pictures)
    for leak in report["leaks"]:
        assert leak["line"] in text


def test_without_matplotlib_the_numbers_are_written(funnel_path: Path, tmp_path: Path) -> None:
    program = (
        "import sys; sys.modules['matplotlib'] = None; from joint.audit import main; "
        f"sys.argv[1:] = [{str(funnel_path)!r}, '--out', {str(tmp_path)!r}]; raise SystemExit(main())"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (1, "")
    said = f"{tmp_path}/audit.json is written; no page without matplotlib: pip install matplotlib (or .[report])"
    assert done.stdout.splitlines()[-1] == said
    assert [file.name for file in tmp_path.iterdir()] == ["audit.json"]


@pytest.mark.parametrize("change", [lambda r: None, lambda r: r["leaks"].extend(r["leaks"] * 9)], ids=["as is", "many"])
def test_the_summary_has_all_leaks_and_else_fits_a_screen(change: Callable[[Report], object], report: Report) -> None:
    some = json.loads(to_json(report))
    change(some)
    lines = summary(some).splitlines()
    leaks = [f"  LEAK {leak['line']}" for leak in some["leaks"]]
    assert lines[0].startswith(f"leakage: {len(leaks)} findings; ")
    assert lines[1 : len(leaks) + 1] == leaks
    assert len(lines) - len(leaks) < 34
