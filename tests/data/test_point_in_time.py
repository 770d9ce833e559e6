"""What was so on the day: items that had joined the pool, and labels that were known, from sampling to the funnel."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from joint.batch import Batch
from joint.config import load_config
from joint.data.assemble import Assembler
from joint.data.dataset import Dataset, DatasetWriter
from joint.data.loader import Loader, latest_known
from joint.data.order import Position
from joint.data.ragged import Ragged, offsets_of
from joint.data.requests import Requests
from joint.evaluating.baseline_metrics import baseline_metrics
from joint.evaluating.evaluator import Evaluator
from joint.features import Plan
from joint.fit import check_against
from joint.model import JointModel
from joint.objectives import compute
from joint.outputs import HeadOutput, Outputs, Pool
from joint.schema import NEVER, Feature, History, Schema, Stage, day_number

ITEMS, USERS, DAY = 30, 12, 86_400
FIRST = day_number("2024-05-01")
# Requests a split and day; on the third training day one virtual shard has nothing.
LOG = [("train", 0, 40), ("train", 1, 40), ("train", 2, 5), ("valid", 3, 8), ("test", 4, 20), ("test", 5, 20)]
# Of seven items one never joins the pool `open`, four join on days of the log, and two were there before.
FIRST_DAY = np.resize([NEVER, FIRST + 1, FIRST + 2, FIRST + 3, FIRST + 5, 0, 0], ITEMS)
CONFIG = """
run: {{name: days, seed: 1}}
data: {{path: {dataset}, shards: 2, requests_per_batch: 16, epochs: 3, pool: open, not_eligible: [seen],
       candidates: {{exposed: all, ranked: 1, random: 6}}}}
tasks: {{click: {{label: click}}, minutes: {{label: minutes, at_least: 2, kind: weighted}}}}
tables: {{user_id: {{dim: 4}}, item_id: {{dim: 4}}}}
encoders: {{seen: {{history: seen, features: [item_id], by: {{kind: mean}}}}}}
heads:
  retrieval: {{features: [user_id, seen, item_id], dim: 4, trunk: {{kind: shared_bottom, hidden: [4]}}}}
  ranking: {{features: [user_id, seen, item_id], trunk: {{kind: shared_bottom, hidden: [4]}}}}
objectives:
  teacher: {{head: ranking, loss: binary, space: [exposed, random]}}
  retrieve: {{head: retrieval, loss: multi_class, space: [corpus]}}
evaluation: {{task: click, k: [2, 6], quotas: {{retrieval: 8, ranking: 3}}, whole_catalogue: [ranking]}}
"""
MakeAssembler = Callable[..., Assembler]
Change = Callable[[Requests], Requests]


def requests_of(rng: np.random.Generator, day: int, count: int) -> Requests:
    """Requests of the day number FIRST + `day`; each shows three items, pool or not, and has two more ranked."""
    candidates = Ragged(
        np.concatenate([rng.permutation(ITEMS)[:5] for _ in range(count)]).astype(np.int32), 5 * np.arange(count + 1)
    )
    lengths = rng.integers(0, 5, count)
    shown = np.tile([True, True, True, False, False], count)
    stages = np.where(shown, int(Stage.EXPOSED | Stage.RANKED), int(Stage.RANKED)).astype(np.uint16)
    click = np.where(shown, rng.integers(0, 3, 5 * count), np.nan).astype(np.float32)
    minutes = np.where(shown, rng.integers(0, 5, 5 * count), np.nan).astype(np.float32)
    return Requests(
        {
            "request_id": 1000 * day + np.arange(count),
            "timestamp": (FIRST + day) * DAY + np.arange(count) * DAY // count,
            "group": np.zeros(count, np.int8),
            "user_id": rng.integers(1, USERS, count),
            "seen": Ragged(rng.integers(0, ITEMS, lengths.sum()).astype(np.int32), offsets_of(lengths)),
            "candidates": candidates,
            "stages": candidates.with_values(stages),
            "click": candidates.with_values(click),
            "minutes": candidates.with_values(minutes),
        }
    )


def write(out: Path, change: Change = lambda requests: requests, **more: object) -> Path:
    """Write the log to OUT, its training requests changed."""
    rng = np.random.default_rng(2)
    with DatasetWriter(out) as writer:
        writer.items({"item_id": np.arange(ITEMS) + 1, "first_day.open": FIRST_DAY.astype(np.int32)})
        for split, day, count in LOG:
            requests = requests_of(rng, day, count)
            writer.add(change(requests) if split == "train" else requests, day=f"2024-05-0{day + 1}", split=split)
        writer.finish(
            Schema(
                name="days",
                items=ITEMS,
                features=(
                    Feature(name="user_id", level="request", kind="id", size=USERS),
                    Feature(name="item_id", level="item", kind="id", size=ITEMS + 1),
                ),
                histories=(History(name="seen"),),
                labels=("click", "minutes"),
                stages=("ranked", "exposed"),
                input_space={},
                pools=("open",),
                **more,  # type: ignore[arg-type]
            )
        )
    return out


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("days") / "dataset", matures_after={"minutes": 1.5, "click": 0.0})


@pytest.fixture
def make(path: Path, tmp_path: Path) -> MakeAssembler:
    """Overrides of the config -> an assembler of it over the log."""

    def made(*overrides: str, dataset: Path = path) -> Assembler:
        file = tmp_path / "days.yaml"
        file.write_text(CONFIG.format(dataset=dataset))
        config, tree = load_config(file, overrides)
        opened = Dataset(dataset)
        check_against(config, tree, opened.schema)
        return Assembler(Plan(config, opened.schema), opened)

    return made


def batches(made: Assembler, *, rank: int = 0, world_size: int = 1) -> Iterator[Batch]:
    return Loader(made, rank=rank, world_size=world_size)._batches(Position())


class Log:
    """The requests by their id, in plain Python."""

    def __init__(self, made: Assembler, *splits: str) -> None:
        self.row: dict[int, dict[str, Any]] = {}
        for split in splits:
            requests = made.dataset.read_split(split)
            lists = {name: requests.lists(name) for name in ("seen", "candidates", "stages", "click", "minutes")}
            for r, key in enumerate(requests.scalars("request_id").tolist()):
                row = {name: c.values[c.offsets[r] : c.offsets[r + 1]].tolist() for name, c in lists.items()}
                day, time = int(requests.scalars("day")[r]), int(requests.scalars("timestamp")[r])
                self.row[key] = row | {"day": day, "timestamp": time}

    def eligible(self, request: int) -> set[int]:
        row = self.row[request]
        return {item for item in range(ITEMS) if FIRST_DAY[item] <= row["day"]} - set(row["seen"])


def candidates_of(batch: Batch) -> Iterator[tuple[int, int, int, int]]:
    """(place, request id, item, flags) of every candidate."""
    requests = batch.request_id[batch.row].tolist()
    yield from zip(range(len(requests)), requests, batch.item.tolist(), batch.stages.tolist(), strict=True)


def test_a_random_negative_is_in_the_pool_by_its_day_and_was_not_seen(make: MakeAssembler) -> None:
    made = make()
    log = Log(made, "train")
    drawn: dict[int, set[int]] = {}
    for batch in batches(made):
        for _, request, item, flags in candidates_of(batch):
            if flags & Stage.RANDOM:
                assert item in log.eligible(request) - set(log.row[request]["candidates"])
                drawn.setdefault(log.row[request]["day"], set()).add(item)
    for day in (FIRST, FIRST + 1, FIRST + 2):
        assert drawn[day] == set(np.flatnonzero(day >= FIRST_DAY).tolist())
    whole = make("data.pool=")
    found = {i for batch in batches(whole) for _, _, i, flags in candidates_of(batch) if flags & Stage.RANDOM}
    assert found == set(range(ITEMS))


def run_model(made: Assembler, batch: Batch) -> tuple[Outputs, Tensor]:
    """The outputs of a model, and its pool's rows."""
    torch.manual_seed(0)
    rows: dict[str, Tensor] = {}
    for jagged in batch.sparse.values():
        found = {name: batch.inner.get(name, values.values()) for name, values in jagged.to_dict().items()}
        rows |= {name: torch.randn(len(values), 4) for name, values in found.items()}
    pool = rows["pool.item_id"].requires_grad_()
    return JointModel(made.plan).train()(rows, batch), pool


def test_a_softmax_is_over_what_was_eligible_and_what_was_not_gets_no_gradient(make: MakeAssembler) -> None:
    made = make("tasks.minutes.matures_after=0")
    log, left_out = Log(made, "train"), 0
    objectives = made.plan.config.objectives
    for batch in list(batches(made))[:7]:
        outputs, pool = run_model(made, batch)
        term = compute(objectives["retrieve"], outputs, batch, ("click", "minutes"))
        head, items = outputs["retrieval"], batch.pool_item.tolist()
        assert head.user is not None
        assert head.pool.vectors is not None
        user, corpus = head.user.detach().double(), head.pool.vectors.detach().double()
        total, units = torch.zeros(2, dtype=torch.float64), 0
        for place, request, item, flags in candidates_of(batch):
            if not flags & Stage.EXPOSED:
                continue
            if FIRST_DAY[item] > log.row[request]["day"]:
                left_out += 1
                continue
            units += 1
            columns = [c for c, i in enumerate(items) if i in log.eligible(request) | {item}]
            at = log.row[request]["candidates"].index(item)
            click, minutes = (log.row[request][label][at] for label in ("click", "minutes"))
            for task, weight in enumerate([1.0 if click >= 1 else 0.5, minutes if minutes >= 2 else 0.0]):
                logits = corpus[columns] @ user[batch.row[place], task]
                nll = logits.logsumexp(0) - logits[[items[c] for c in columns].index(item)]
                total[task] += weight * nll
        torch.testing.assert_close(term.total.double(), total, rtol=1e-4, atol=1e-4)
        assert term.count.tolist() == [units, units]
        term.total.sum().backward()
        day = log.row[int(batch.request_id[0])]["day"]
        closed = torch.tensor([FIRST_DAY[item] > day for item in items])
        assert pool.grad is not None
        assert not pool.grad[closed].any()
        assert pool.grad[~closed].any(1).all()
    assert left_out > 10


def test_an_exposure_outside_of_the_pool_still_trains_binary_losses(make: MakeAssembler) -> None:
    made = make("tasks.minutes.matures_after=0")
    batch = next(batches(made))
    outputs, _ = run_model(made, batch)
    exposed = (batch.stages & int(Stage.EXPOSED)) != 0
    outside = exposed & (batch.column < 0)
    assert outside.any()
    assert outputs["ranking"].computed[outside].all()
    objective = made.plan.config.objectives["teacher"]
    count = compute(objective, outputs, batch, ("click", "minutes")).count
    drawn = (batch.stages & int(Stage.RANDOM)) != 0
    assert count.tolist() == [int((exposed | drawn).sum())] * 2


def test_two_ranks_see_the_columns_of_one(make: MakeAssembler) -> None:
    """The slices of the ranks side by side are the corpus, open by the day of the batch, even of one that ran out."""
    made = make()
    corpus, idle = np.flatnonzero(FIRST_DAY < NEVER), 0
    for one, *two in zip(batches(made), *(batches(made, rank=r, world_size=2) for r in (0, 1)), strict=True):
        assert one.pool_item.tolist() == corpus.tolist()
        assert torch.cat([b.pool_item for b in two]).tolist() == [*corpus.tolist(), -1]  # as long for both
        columns = {(r, i): one.column[place] for place, r, i, _ in candidates_of(one)}
        halves = [{(r, i): b.column[place] for place, r, i, _ in candidates_of(b)} for b in two]
        assert halves[0] | halves[1] == columns
        pairs = {(int(one.request_id[r]), c) for r, c in one.excluded.tolist()}
        assert {(int(b.request_id[r]), c) for b in two for r, c in b.excluded.tolist()} == pairs
        day = FIRST + int(one.request_id[0]) // 1000
        assert one.pool_open.tolist() == (FIRST_DAY[corpus] <= day).tolist()
        idle += sum(b.requests == 0 for b in two)
        assert torch.cat([b.pool_open for b in two]).tolist() == [*one.pool_open.tolist(), False]
    assert idle


class Scores:
    """A model that knows request ids and items: scores of no ties, and what it was asked."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.user = torch.randn(5100, 2, 3, generator=generator)
        self.items = {head: torch.randn(ITEMS, 3, generator=generator) for head in ("retrieval", "ranking")}
        self.asked: list[Batch] = []

    def __call__(self, batch: Batch) -> Outputs:
        self.asked.append(batch)
        user = self.user[batch.request_id]
        found = {}
        for head, items in self.items.items():
            logits = torch.einsum("ntd,nd->nt", user[batch.row], items[batch.item])
            found[head] = HeadOutput(logits=logits, computed=torch.ones(len(batch.item), dtype=torch.bool))
        found["retrieval"].user = user
        found["retrieval"].pool = Pool(self.items["retrieval"][batch.pool_item], batch.column, batch.excluded, {})
        return found

    def best(self, head: str, request: int, items: set[int], k: int) -> set[int]:
        fused = (self.items[head] @ self.user[request].sum(0)).tolist()
        return set(sorted(items, key=lambda item: -fused[item])[:k])


def test_evaluation_and_the_funnel_recommend_what_is_eligible_and_miss_the_rest(make: MakeAssembler) -> None:
    made, scores = make(), Scores()
    found = Evaluator(scores, made, torch.device("cpu"))("test", whole_catalogue=True).numbers
    log = Log(made, "test")
    hits: dict[str, int] = {}
    total = missed = 0
    for request, row in log.row.items():
        relevant = {i for i, click in zip(row["candidates"], row["click"], strict=True) if click >= 1}
        eligible = log.eligible(request)
        total, missed = total + len(relevant), missed + len(relevant - eligible)
        kept = scores.best("retrieval", request, eligible, 8)
        lists = {f"{h}/recall@{k}": scores.best(h, request, eligible, k) for h in scores.items for k in (2, 6)}
        lists |= {
            "funnel/retrieval/recall@8": kept,
            "funnel/ranking/recall@3": scores.best("ranking", request, kept, 3),
        }
        for name, items in lists.items():
            hits[name] = hits.get(name, 0) + len(items & relevant)
    assert missed > 10
    for name, count in hits.items():
        assert found[name] == pytest.approx(count / total), name
        assert 0 < count < total - missed
    served = {(int(b.request_id[r]), i) for b in scores.asked[1:] for r, i in zip(b.row, b.item.tolist(), strict=True)}
    logged = {(request, item) for request, row in log.row.items() for item in row["candidates"]}
    assert all(item in log.eligible(request) for request, item in served - logged)
    assert {r // 1000 for r, item in served - logged if FIRST_DAY[item] == FIRST + 5} == {5}


def late(made: Assembler, days: float, *, before: str = "valid") -> set[int]:
    """The training requests whose label takes so many days and was not known when the held-out part began."""
    begin = min(row["timestamp"] for row in Log(made, before).row.values())
    return {key for key, row in Log(made, "train").row.items() if row["timestamp"] + days * DAY > begin}


@pytest.mark.parametrize(
    ("overrides", "click", "minutes"),
    [
        ((), 0, 1.5),
        (("tasks.minutes.matures_after=0",), 0, 0),
        (("tasks.minutes.matures_after=2.25", "tasks.click.matures_after=1"), 1, 2.25),
        (("tasks.minutes.matures_after=9",), 0, 9),
    ],
)
def test_labels_that_were_not_known_in_time_are_not_observed(
    make: MakeAssembler, overrides: tuple[str, ...], click: float, minutes: float
) -> None:
    made = make(*overrides)
    whole = make("tasks.minutes.matures_after=0")
    unknown = [late(made, click) if click else set(), late(made, minutes) if minutes else set()]
    for batch, free in zip(batches(made), batches(whole), strict=True):
        assert torch.equal(batch.item, free.item)
        hidden = torch.tensor([[int(r) in late_ for late_ in unknown] for r in batch.request_id[batch.row]])
        exposed = ((batch.stages & int(Stage.EXPOSED)) != 0)[:, None]
        assert free.observed.all()
        assert torch.equal(batch.observed & exposed, exposed & ~hidden)
        assert torch.equal(batch.positive, free.positive & ~hidden)
        assert torch.equal(batch.labels, free.labels.where(~hidden, 0.0))
        assert torch.equal(batch.weight, free.weight.where(~hidden, 1.0))
    assert len(unknown[1]) == sum(
        day * DAY + second * DAY // count > (3 - minutes) * DAY
        for split, day, count in LOG
        for second in range(count)
        if split == "train" and minutes
    )


def test_the_first_request_of_what_is_held_out_sets_the_time(make: MakeAssembler) -> None:
    def latest(*overrides: str) -> dict[str, float]:
        made = make(*overrides)
        return latest_known(made.plan.config, made.dataset.schema)

    assert latest() == {"minutes": (FIRST + 1.5) * DAY}
    assert late(make(), 2) == late(make(), 1.999)  # known at that very second is known
    assert latest("tasks.minutes.matures_after=0") == {}
    only_test = ("data.train=[train, valid]", "train.evaluate_every_epochs=0")
    assert latest(*only_test) == {"minutes": (FIRST + 2.5) * DAY}
    assert latest("tasks.click.matures_after=2")["click"] == (FIRST + 1) * DAY


def test_evaluation_sees_every_label(make: MakeAssembler) -> None:
    made, scores = make("tasks.minutes.matures_after=9"), Scores()
    for split in ("train", "test"):
        scores.asked.clear()
        Evaluator(scores, made, torch.device("cpu"))(split, whole_catalogue=False)
        batch = scores.asked[0]
        known = [m for r in batch.request_id.tolist() for m in Log(made, split).row[r]["minutes"]]
        assert batch.observed.all()
        assert batch.positive[:, 1].tolist() == [minutes >= 2 for minutes in known]


def test_the_baselines_do_not_know_what_the_heads_do_not(make: MakeAssembler, tmp_path: Path) -> None:
    """Labels that were not mature change nothing, whoever is fitted."""

    def forget(requests: Requests) -> Requests:
        known = (requests.scalars("timestamp") <= (FIRST + 1.5) * DAY)[requests.lists("minutes").rows]
        minutes = requests.lists("minutes")
        lied = np.where(np.isnan(minutes.values), np.nan, 4 - minutes.values).astype(np.float32)
        changed = minutes.with_values(np.where(known, minutes.values, lied))
        return Requests({**requests.columns, "minutes": changed})

    other = write(tmp_path / "other", forget, matures_after={"minutes": 1.5})
    overrides = ("evaluation.task=minutes",)
    found = []
    for made in (make(*overrides), make(*overrides, dataset=other)):
        found.append(baseline_metrics(made.plan.config, made.dataset, "test"))
        batch_labels = [batch.labels for batch in batches(made)]
        found.append({"labels": float(torch.cat(batch_labels)[:, 1].sum())})
    assert found[1] == found[3]
    assert found[0] == found[2]
