"""What encoders and heads are given: events joined in, competitors in their place, every kind of feature."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from joint.batch import Batch
from joint.config import load_config
from joint.data.assemble import Assembler, logged
from joint.data.order import Position
from joint.data.ragged import Ragged, offsets_of
from joint.data.requests import Requests
from joint.data.softmax_pool import PoolItems
from joint.encoding import HistoryEncoder
from joint.errors import ConfigError
from joint.experiment import HEADS
from joint.features import Plan
from joint.fit import check_against
from joint.model import JointModel
from joint.schema import Feature, History, Part, Schema, Stage
from towers.embeddings import segment_mean
from towers.sequence import Competing

ITEMS, K = 9, 2
SCHEMA = Schema(
    name="small",
    items=ITEMS,
    features=(
        Feature(name="user_id", level="request", kind="id", size=4),
        Feature(name="tastes", level="request", kind="ids", space="tags", size=6),
        Feature(name="hour", level="request", kind="float"),
        Feature(name="profile", level="request", kind="vector", size=3),
        Feature(name="item_id", level="item", kind="id", size=ITEMS + 1),
        Feature(name="tags", level="item", kind="ids", size=6),
        Feature(name="price", level="item", kind="float"),
        Feature(name="picture", level="item", kind="vector", size=2),
        Feature(name="place", level="event", kind="id", size=4),
        Feature(name="share", level="event", kind="float"),
    ),
    histories=(History(name="seen", events=("place", "share"), competitors=K), History(name="saved")),
    labels=("click",),
    stages=("exposed",),
    input_space={},
    parts=tuple(Part(path="", day="", split=s, groups=(3,), begin=0, end=2, hash="") for s in ("train", "test")),
)
CONFIG = """
run: {name: small}
data: {path: '', requests_per_batch: 8, candidates: {exposed: all}}
tasks: {click: {label: click}}
tables: {user_id: {dim: 4}, item_id: {dim: 4}, tags: {dim: 3}, place: {dim: 2}}
cross: {times: {history: seen, feature: item_id}}
encoders:
  seen: {history: seen, features: [item_id, picture, price, tags], length: 3, by: {kind: mean}}
  attended: {history: seen, features: [item_id, picture], events: [place], length: 2,
             by: {kind: target_attention, hidden: [3]}}
heads:
  retrieval: {features: [user_id, tastes, profile, hour, seen, item_id, picture, tags, price], dim: 4,
              trunk: {kind: shared_bottom, hidden: [4]}}
  pre_ranking: {features: [profile, item_id], dim: 4, trunk: {kind: shared_bottom, hidden: [4]}}
  ranking: {features: [times, attended, picture, seen, hour, price, tastes, item_id],
            trunk: {kind: shared_bottom, hidden: [4]}}
objectives:
  teacher: {head: ranking, loss: binary, space: [exposed]}
  retrieve: {head: retrieval, loss: multi_class, space: [corpus]}
train: {evaluate_every_epochs: 0}
evaluation: {task: click}
"""
MakePlan = Callable[..., Plan]


@pytest.fixture
def plan(tmp_path: Path) -> MakePlan:
    """Overrides of the config -> its plan over SCHEMA; no dataset is checked."""
    path = tmp_path / "small.yaml"
    path.write_text(CONFIG)
    return lambda *overrides: Plan(load_config(path, overrides)[0], SCHEMA)


def lists(rows: list[list], dtype: type = np.int64) -> Ragged:
    return Ragged(np.array([x for row in rows for x in row], dtype), offsets_of(np.array([len(r) for r in rows])))


TASTES = [[1, 2, 5], [], [4]]
SEEN = [[0, 3, 3, 8], [], [5]]
CANDIDATES = [[2, 3], [1], [5, 0, 8]]
WON_AGAINST = [[1, -1, -1, -1, 4, 7, 2, -1], [], [-1, 6]]
PROFILE = np.arange(9.0).reshape(3, 3)


def log() -> Requests:
    """Three requests: one with a rich past, one with none and one in between."""
    seen, candidates = lists(SEEN), lists(CANDIDATES)
    shown = np.full(6, Stage.EXPOSED, np.uint16)
    return Requests(
        {
            "request_id": np.arange(3),
            "timestamp": np.arange(3),
            "group": np.zeros(3, np.int8),
            "day": np.zeros(3, np.int32),
            "user_id": np.array([3, 1, 2]),
            "tastes": lists(TASTES),
            "hour": np.array([0.5, 0.25, 1.0]),
            "profile": lists(PROFILE.tolist(), np.float32),
            "seen": seen,
            "seen.place": seen.with_values(np.array([1, 2, 3, 1, 0])),
            "seen.share": seen.with_values(np.array([0.1, 0.2, 0.3, 0.4, 0.5], np.float32)),
            "seen.competitors": lists(WON_AGAINST),
            "saved": lists([[], [1], []]),
            "candidates": candidates,
            "stages": candidates.with_values(shown),
            "click": candidates.with_values(np.ones(6, np.float32)),
        }
    )


@dataclass
class Memory:
    """As much of an open dataset as an assembler reads."""

    catalogue: dict[str, np.ndarray | Ragged]
    schema: Schema = SCHEMA

    @property
    def first_day(self) -> dict[str, np.ndarray]:
        return {"": np.zeros(ITEMS, np.int32)}

    def read(self, part: Part, groups: list[int]) -> Requests:
        return log()


def memory() -> Memory:
    rng = np.random.default_rng(0)
    lengths = np.array([2, 0, 1, 3, 1, 0, 2, 1, 1])
    return Memory(
        {
            "item_id": rng.permutation(ITEMS) + 1,
            "price": rng.random(ITEMS),
            "tags": Ragged(rng.integers(1, 6, lengths.sum()), offsets_of(lengths)),
            "picture": Ragged(rng.random(2 * ITEMS).astype(np.float32), 2 * np.arange(ITEMS + 1)),
        }
    )


class Truth:
    """Features as plain Python, from tables, a catalogue and the lists above."""

    def __init__(self, tables: dict[str, Tensor], catalogue: dict[str, np.ndarray | Ragged]) -> None:
        self.tables, self.catalogue = tables, catalogue

    def mean(self, table: str, ids: list[int]) -> list[float]:
        rows = [self.tables[table][i].tolist() for i in ids]
        return [sum(x) / len(rows) for x in zip(*rows, strict=True)] if rows else [0.0] * self.tables[table].shape[1]

    def item(self, item: int, *names: str) -> list[float]:
        found: list[float] = []
        for name in names:
            column = self.catalogue[name]
            if isinstance(column, Ragged):
                values = column.values[column.offsets[item] : column.offsets[item + 1]].tolist()
                found += self.mean(name, values) if name == "tags" else values
            else:
                found += [column[item]] if name == "price" else self.mean(name, [column[item]])
        return found


@dataclass
class Seen:
    """A model of the config in evaluation, the truth beside it, and what its heads were given."""

    model: JointModel
    batch: Batch
    truth: Truth
    rows: dict[str, Tensor]
    given: dict[str, tuple[Tensor, ...]]


@pytest.fixture
def watch(plan: MakePlan) -> Callable[..., Seen]:
    """Run a config over the log, and keep the inputs of its heads."""

    def run(*overrides: str, requests: Requests | None = None) -> Seen:
        made, dataset = plan(*overrides), memory()
        torch.manual_seed(0)
        requests = requests or log()
        assembler = Assembler(made, dataset)  # type: ignore[arg-type]
        candidates = logged(requests, dataset)  # type: ignore[arg-type]
        batch = assembler(
            requests, candidates, PoolItems.corpus(np.array([4, 7, -1])), position=Position(), scoring=HEADS
        )
        tables = {shape.name: torch.randn(shape.rows, shape.dim) for shape in made.tables}
        rows = look_up(made, batch, tables)
        model = JointModel(made).eval()
        given: dict[str, tuple[Tensor, ...]] = {}
        for name in ("pre_ranking", "ranking"):
            model.heads[name].register_forward_pre_hook(lambda _, inputs, name=name: given.update({name: inputs}))
        retrieval = model.heads["retrieval"]
        calls: list[tuple[Tensor, ...]] = []
        for part in (retrieval.user, retrieval.item):
            part.register_forward_pre_hook(lambda _, inputs: calls.append(inputs))
        with torch.no_grad():
            model(rows, batch)
        given["user"], given["item"], given["pool"] = calls
        return Seen(model, batch, Truth(tables, dataset.catalogue), rows, given)

    return run


def look_up(plan: Plan, batch: Batch, tables: dict[str, Tensor]) -> dict[str, Tensor]:
    ids = {key: jagged.values() for sparse in batch.sparse.values() for key, jagged in sparse.to_dict().items()}
    rows = {key.name: tables[key.table][ids[key.name]] for key in plan.keys if key.embedded}
    return rows | {key: segment_mean(rows[key], lengths) for key, lengths in batch.inner.items()}


def close(found: Tensor, expected: list[list[float]]) -> None:
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float32), rtol=1e-5, atol=1e-6)


def mean_of_events(events: list[list[float]], width: int) -> list[float]:
    return [sum(x) / len(events) for x in zip(*events, strict=True)] if events else [0.0] * width


PAST = ("item_id", "picture", "price", "tags")  # of the encoder `seen`, ten columns


def test_the_two_sides_of_retrieval_hold_every_kind_of_feature_in_the_order_of_the_config(watch):
    seen = watch()
    truth, user = seen.truth, log().scalars("user_id")
    past = [mean_of_events([truth.item(i, *PAST) for i in items[-3:]], 10) for items in SEEN]
    hour = log().scalars("hour")
    request = [
        truth.mean("user_id", [user[r]]) + truth.mean("tags", TASTES[r]) + PROFILE[r].tolist() + [hour[r]] + past[r]
        for r in range(3)
    ]
    close(seen.given["user"][0], request)
    assert not seen.given["user"][0][1, 4:7].any()  # an empty list of tastes
    names = ("item_id", "picture", "tags", "price")
    close(seen.given["item"][0], [truth.item(i, *names) for row in CANDIDATES for i in row])
    padding = [truth.tables["item_id"][0].tolist() + [0.0] * 6]
    close(seen.given["pool"][0], [truth.item(4, *names), truth.item(7, *names), *padding])


def test_what_ranking_sees_of_a_candidate_and_cross_features_come_after_plain_ones(watch):
    seen = watch()
    request, candidate, row = seen.given["ranking"]
    assert row.tolist() == [0, 0, 1, 2, 2, 2]
    assert request.shape == (3, 10 + 1 + 3)
    close(request[:, :4], [[h, *seen.truth.mean("tags", t)] for h, t in zip([0.5, 0.25, 1.0], TASTES, strict=True)])
    flat = [(r, i) for r, items in enumerate(CANDIDATES) for i in items]
    times = [np.log1p(SEEN[r].count(i)) for r, i in flat]
    plain = [[*seen.truth.item(i, "picture", "price", "item_id"), t] for (_, i), t in zip(flat, times, strict=True)]
    close(candidate[:, :8], plain)
    assert times[1] == pytest.approx(np.log(3))
    with torch.no_grad():
        attended = seen.model.encoders["attended"](seen.rows | seen.batch.floats, seen.batch, torch.arange(6))
    torch.testing.assert_close(candidate[:, 8:], attended)


@pytest.mark.parametrize("mode", ["none", "tables", "tables_and_encoders"])
def test_every_sharing_mode_gives_the_heads_inputs_of_one_form(watch, mode):
    seen, whole = watch(f"sharing.mode={mode}"), watch()
    for name, inputs in seen.given.items():
        assert [x.shape for x in inputs] == [x.shape for x in whole.given[name]]
    torch.testing.assert_close(seen.given["pre_ranking"][0], torch.tensor(PROFILE, dtype=torch.float32))


@pytest.mark.parametrize("combine", ["add", "multiply"])
def test_events_are_added_or_multiplied(plan, watch, combine):
    by = "encoders.seen={features: [item_id, price], events: [place, share], combine: " + combine + "}"
    seen = watch(by)
    encoder = seen.model.encoders["seen"]
    assert (encoder.event.bias is not None) == (combine == "multiply")
    with torch.no_grad():
        encoder.event.weight.copy_(torch.arange(15.0).view(5, 3) / 10)
        padded, lengths = encoder.history(seen.rows | seen.batch.floats, seen.batch)
    place, share = ([c.values[a:b].tolist() for a, b in ((0, 4), (4, 4), (4, 5))] for c in event_columns())
    assert lengths.tolist() == [4, 0, 1]  # as many as the cross feature reads; the encoder reads the newest 3
    for r, items in enumerate(SEEN):
        for position, (i, p, s) in enumerate(list(zip(items, place[r], share[r], strict=True))[-3:]):
            item = seen.truth.item(i, "item_id", "price")
            x = [*seen.truth.mean("place", [p]), s]
            event = [sum((3 * column + k) / 10 * x[k] for k in range(3)) for column in range(5)]
            joined = [a * (1 + b) if combine == "multiply" else a + b for a, b in zip(item, event, strict=True)]
            close(padded[r, position], joined)
        assert not padded[r, len(items[-3:]) :].any()


def event_columns() -> tuple[Ragged, Ragged]:
    return log().lists("seen.place"), log().lists("seen.share")


def test_multiplied_events_change_their_items_little_at_first(plan):
    made = plan("encoders.seen.events=[share]", "encoders.seen.combine=multiply")
    encoder = HistoryEncoder(made.readings["seen"], made)
    assert encoder.event.bias.tolist() == [1.0] * 10


COMPETING = "encoders.seen={features: [item_id, picture], competing: {hidden: [5]}}"


def test_competitors_stand_beside_their_event_and_the_mean_divides_by_events(watch):
    seen = watch(COMPETING)
    encoder = seen.model.encoders["seen"]
    with torch.no_grad():
        padded, _ = encoder.history(seen.rows | seen.batch.floats, seen.batch)
    first, last = encoder.competing.first, encoder.competing.rest[-1]
    names = ("item_id", "picture")
    expected = np.zeros((3, 3, 6))
    for r, items in enumerate(SEEN):
        others = [WON_AGAINST[r][K * j : K * j + K] for j in range(len(items))]
        for position, (item, against) in enumerate(list(zip(items, others, strict=True))[-3:]):
            vectors = [torch.tensor(seen.truth.item(i, *names)) for i in against if i >= 0]
            if vectors:
                won = torch.tensor(seen.truth.item(item, *names))
                with torch.no_grad():
                    scores = [last((first.request_part(won) + first.candidate_part(v)).relu()) for v in vectors]
                share = torch.cat(scores).double().softmax(0).numpy()
                expected[r, position] = sum(s * v.numpy() for s, v in zip(share, vectors, strict=True))
    np.testing.assert_allclose(padded.numpy(), expected, rtol=1e-4, atol=1e-6)
    assert not expected[0, 0].any()  # the second of four events won against nothing
    assert expected[0, 1].any()
    user = seen.given["user"][0][:, -6:]
    np.testing.assert_allclose(user.numpy(), expected.sum(1) / [[3], [1], [1]], rtol=1e-4, atol=1e-6)


def test_reversed_competitors_are_those_of_the_event_at_the_other_end(watch):
    seen = watch(COMPETING)
    encoder = seen.model.encoders["seen"]
    rows = seen.rows | seen.batch.floats
    by_hand = [3, 2, 1, 0, 4]  # of a request with four events, of one with none, and of one with one
    others = {key: values for key, values in rows.items() if ".competitors." in key}
    assert len(others) == 2  # item_id and picture
    swapped = rows | {key: values.unflatten(0, (5, K))[by_hand].flatten(0, 1) for key, values in others.items()}
    valid = {"seen": seen.batch.competitors["seen"][by_hand]}
    with torch.no_grad():
        plain, _ = encoder.history(rows, seen.batch)
        expected, _ = encoder.history(swapped, dataclasses.replace(seen.batch, competitors=valid))
        encoder.config = dataclasses.replace(encoder.config, competing=Competing(hidden=(5,), reverse=True))
        found, _ = encoder.history(rows, seen.batch)
    assert torch.equal(found, expected)
    assert not torch.equal(found, plain)


def test_the_rows_behind_absent_competitors_never_matter(watch):
    seen = watch(COMPETING, "encoders.attended.competing={hidden: [3]}")
    valid = seen.batch.competitors["seen"]
    assert valid.tolist() == [[True, False], [False, False], [True, True], [True, False], [False, True]]
    keys = [name for name in seen.rows if ".competitors." in name]
    assert keys == ["seen.competitors.item_id"]
    poisoned = {name: rows.clone() for name, rows in seen.rows.items()}
    for key in keys:
        poisoned[key].view(5, K, -1)[~valid] = torch.nan
    with torch.no_grad():
        before, after = seen.model(seen.rows, seen.batch), seen.model(poisoned, seen.batch)
    for head in HEADS:
        assert torch.equal(before[head].logits, after[head].logits)
        assert before[head].logits.isfinite().all()


EVERYTHING = (COMPETING, "encoders.attended.events=[place, share]", "encoders.attended.combine=multiply")


@pytest.mark.parametrize("mode", ["none", "tables", "tables_and_encoders"])
def test_a_rank_that_has_run_out_of_requests_still_runs_every_kind_of_feature(plan, mode):
    made, dataset = plan(*EVERYTHING, f"sharing.mode={mode}"), memory()
    batch = Assembler(made, dataset).empty(PoolItems.corpus(np.array([4, 7, -1])), position=Position())  # type: ignore[arg-type]
    model = JointModel(made)
    tables = {shape.name: torch.randn(shape.rows, shape.dim) for shape in made.tables}
    outputs = model(look_up(made, batch, tables), batch)
    assert {name: output.logits.shape for name, output in outputs.items()} == dict.fromkeys(HEADS, (0, 1))
    assert outputs["retrieval"].pool.vectors.shape == (3, 4)
    assert batch.floats["profile"].shape == (1, 3)


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["encoders.seen.by={kind: self_attention, heads: 2}"], None),  # 4 + 2 + 1 + 3 columns
        (["encoders.seen.by={kind: self_attention, heads: 3}"], "3 heads do not divide the history's width 10"),
        (["encoders.seen.history=saved", "encoders.seen.competing={hidden: [2]}"], "logs no competitors of the ev"),
        (["encoders.seen.events=[device]"], "encoders.seen.events: no event of seen 'device'"),
        (["cross.times.feature=tags"], "cross.times.feature: no item feature of one id 'tags'"),
        (["cross.price={history: seen, feature: item_id}"], "price is a feature or an encoder already"),
        (["heads.pre_ranking.features=[profile, item_id, times]"], "times is of a user and a candidate together"),
        (["heads.retrieval={trunk: null, features: [user_id, item_id]}"], None),
        (["heads.retrieval={trunk: null, features: [user_id, item_id], dim: 5}"], "is 5; without a trunk it is the w"),
        (["heads.retrieval={trunk: null, features: [seen, item_id]}"], "user and item, which are 10 and 4"),
        (["heads.retrieval={trunk: null, features: [profile, tags], dim: 3}"], None),
    ],
)
def test_what_does_not_fit_the_dataset(plan, tmp_path, overrides, says):
    made = plan()
    config, tree = load_config(tmp_path / "small.yaml", overrides)
    if says is None:
        check_against(config, tree, made.schema)
        return
    with pytest.raises(ConfigError) as error:
        check_against(config, tree, made.schema)
    assert says in str(error.value)
