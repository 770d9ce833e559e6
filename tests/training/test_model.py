"""Heads against their formulas, recomputed in float64 from the tables' rows and the modules' weights."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from torch import Tensor

from joint.batch import Batch
from joint.data.order import Position
from joint.data.softmax_pool import PoolItems
from joint.task import StepOutput, build_task
from towers.mixtures import set_step

PLAIN = (
    "encoders.rated_attention=",
    "heads.ranking.features=[user_id, gender, liked_mean, item_id, genres]",
    "heads.ranking.trunk={kind: shared_bottom, hidden: [12], subnetworks: }",
    "heads.retrieval.features=[user_id, liked_mean, item_id, genres]",
    "heads.retrieval.trunk.dropout=0",
    "heads.pre_ranking.trunk={kind: shared_bottom, hidden: [10], experts: }",
)


@pytest.fixture
def run(configure, group, assemble):
    """`run(*overrides)`: a built task in evaluation mode, a batch of five requests and what the task makes of it."""

    def build(*overrides: str, all_rows: bool = True) -> tuple[torch.nn.Module, Batch, StepOutput]:
        config = configure(*overrides)
        batch = assemble(config, all_rows=all_rows)
        task = build_task(assemble.plan(config), group).eval()
        with torch.no_grad():
            return task, batch, task(batch)[1]

    return build


class Rows:
    """The tables as arrays, and the ids of a batch key by key."""

    def __init__(self, task: torch.nn.Module, batch: Batch) -> None:
        self.tables = {}
        for name, value in task.state_dict().items():
            if name.startswith("embeddings."):
                table = name.split(".")[-2]
                self.tables[table] = value.local_shards()[0].tensor.double()
        self.weights = {n: v.double() for n, v in task.state_dict().items() if isinstance(v, Tensor) and "dense" in n}
        self.ids = {key: jagged for sparse in batch.sparse.values() for key, jagged in sparse.to_dict().items()}
        self.batch = batch

    def rows(self, key: str, table: str) -> Tensor:
        """One row per value; the mean of an item's rows for genres."""
        found = self.tables[table][self.ids[key].values()]
        if key not in self.batch.inner:
            return found
        parts = found.split(self.batch.inner[key].tolist())
        return torch.stack([p.mean(0) if len(p) else found.new_zeros(found.shape[1]) for p in parts])

    def item(self, side: str, *tables: str) -> Tensor:
        return torch.cat([self.rows(f"{side}.{table}", table) for table in tables], 1)

    def mean_of_liked(self) -> Tensor:
        events = self.item("liked", "item_id", "genres").split(self.batch.lengths["liked"].tolist())
        return torch.stack([e[-6:].mean(0) if len(e) else e.new_zeros(16) for e in events])

    def linear(self, name: str, x: Tensor) -> Tensor:
        prefix = f"dense.model.heads.{name}"
        return x @ self.weights[f"{prefix}.weight"].T + self.weights[f"{prefix}.bias"]

    def per_task(self, name: str, x: Tensor) -> Tensor:
        prefix = f"dense.model.heads.{name}"
        return torch.einsum("mti,tio->mto", x, self.weights[f"{prefix}.weight"]) + self.weights[f"{prefix}.bias"]


def twice(x: Tensor) -> Tensor:
    """A shared bottom's representation, for two tasks."""
    return x.relu().unsqueeze(1).expand(-1, 2, -1)


def test_ranking_logits(run):
    task, batch, output = run(*PLAIN)
    r = Rows(task, batch)
    request = torch.cat([r.rows("user_id", "user_id"), r.rows("gender", "gender"), r.mean_of_liked()], 1)
    x = torch.cat([request[batch.row], r.item("candidate", "item_id", "genres")], 1)
    hidden = r.per_task("ranking.last.0.0", twice(r.linear("ranking.first.joint", x))).relu()
    expected = r.per_task("ranking.last.1", hidden).squeeze(2)
    torch.testing.assert_close(output.outputs["ranking"].logits.double(), expected, atol=1e-5, rtol=1e-4)
    assert output.outputs["ranking"].computed.all()


def test_retrieval_logits_and_corpus(run):
    overrides = ("heads.retrieval.similarity=cosine", "heads.retrieval.temperature=0.1")
    task, batch, output = run(*PLAIN, *overrides)
    r, head = Rows(task, batch), output.outputs["retrieval"]
    request = torch.cat([r.rows("user_id", "user_id"), r.mean_of_liked()], 1)
    user = r.per_task("retrieval.user.last.1", twice(r.linear("retrieval.user.first", request)))
    user = user / user.norm(dim=2, keepdim=True) / 0.1

    def vectors(x: Tensor) -> Tensor:
        v = r.linear("retrieval.item.1", r.linear("retrieval.item.0.0", x).relu())
        return v / v.norm(dim=1, keepdim=True)

    expected = torch.einsum("ntd,nd->nt", user[batch.row], vectors(r.item("candidate", "item_id", "genres")))
    torch.testing.assert_close(head.logits.double(), expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(head.user.double(), user, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(
        head.pool.vectors.double(), vectors(r.item("pool", "item_id", "genres")), atol=1e-4, rtol=1e-4
    )
    assert batch.pool_item.tolist() == list(range(61))
    assert not head.pool.log_q["corpus"].any()


@pytest.mark.parametrize("kind", ["vector_product", "mlp"])
def test_pre_ranking_logits(run, kind):
    task, batch, output = run(*PLAIN, f"heads.pre_ranking.kind={kind}")
    r, head = Rows(task, batch), output.outputs["pre_ranking"]
    request = torch.cat([r.rows("user_id", "user_id"), r.rows("gender", "gender"), r.mean_of_liked()], 1)
    item = r.item("candidate", "item_id")

    def gated(side: str, x: Tensor) -> Tensor:
        prefix = f"pre_ranking.{side}.gate.weights"
        return x * 2 * r.linear(f"{prefix}.2", r.linear(f"{prefix}.0", x).relu()).sigmoid()

    def vectors(side: str, x: Tensor) -> Tensor:
        return r.per_task(f"pre_ranking.{side}.last.1", twice(r.linear(f"pre_ranking.{side}.first", x)))

    if kind == "vector_product":
        features = gated("item", item)
        user = vectors("user", gated("user", request))[batch.row]
        expected = (user * vectors("item", features)).sum(2) + r.weights["dense.model.heads.pre_ranking.bias"]
    else:
        both = gated("both", torch.cat([request[batch.row], item], 1))
        features, expected = both[:, request.shape[1] :], vectors("both", both).squeeze(2)
    torch.testing.assert_close(head.logits.double(), expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(head.features.double(), features, atol=1e-6, rtol=1e-4)


def test_events_are_projected_and_added_and_target_attention_sees_its_own_request(run):
    task, batch, _ = run("heads.retrieval.trunk.dropout=0")
    r = Rows(task, batch)
    encoders = task.module.dense.model.encoders
    events = r.item("rated", "item_id", "genres")
    events = events + r.rows("rated.rating", "rating") @ encoders["rated_sequence"].event.weight.double().T
    keys = ("rated.item_id", "rated.genres", "rated.rating", "candidate.item_id")
    rows = {key: r.rows(key, key.split(".")[1]).float() for key in keys}
    padded, lengths = encoders["rated_sequence"].history(rows, batch)
    assert lengths.max() == 6
    for request, past in enumerate(events.split(lengths.tolist())):
        torch.testing.assert_close(padded[request, : len(past)].double(), past, atol=1e-6, rtol=1e-5)
        assert not padded[request, len(past) :].any()
    attention = encoders["rated_attention"]
    chosen = torch.tensor([0, 7, len(batch.item) - 1])
    got = attention(rows, batch, chosen)
    history, lengths = attention.history(rows, batch)
    for place, n in enumerate(chosen.tolist()):
        own = int(batch.row[n])
        alone = attention.encoder(
            history[own : own + 1], lengths[own : own + 1], rows["candidate.item_id"][n : n + 1], torch.zeros(1).long()
        )
        torch.testing.assert_close(got[place], alone[0])


def test_a_head_that_scores_some_rows_scores_them_as_it_scores_all(run):
    task, batch, output = run()
    some = {"retrieval": torch.tensor([0, 3, 20]), "pre_ranking": torch.tensor([], dtype=torch.long)}
    some["ranking"] = torch.tensor([5, 6, 19])
    with torch.no_grad():
        part = task(dataclasses.replace(batch, head_rows=some))[1].outputs
    for head, rows in some.items():
        full, got = output.outputs[head], part[head]
        torch.testing.assert_close(got.logits[rows], full.logits[rows])
        outside = torch.ones(len(batch.item), dtype=torch.bool).index_fill(0, rows, False)
        assert got.computed.tolist() == (~outside).tolist()
        assert not got.logits[outside].any()


def test_heads_score_the_rows_of_their_spaces_in_training(run):
    _, batch, output = run(all_rows=False)
    exposed = (batch.stages & 512) != 0
    assert torch.equal(output.outputs["ranking"].computed, exposed)  # binary and distillation, both on exposed
    assert output.outputs["pre_ranking"].computed.all()  # exposed and random
    assert not output.outputs["retrieval"].computed.any()  # its impressions are scored as corpus items
    assert 0 < exposed.sum() < len(exposed)


def test_what_a_teacher_scores_for_its_student_alone_costs_no_gradient(run):
    task, batch, _ = run(*PLAIN, "objectives.distill.space=[exposed, random]", all_rows=False)
    exposed = (batch.stages & 512) != 0
    assert torch.equal(batch.head_rows["ranking"], exposed.nonzero().flatten())
    assert torch.equal(batch.teaching_rows["ranking"], (~exposed).nonzero().flatten())
    assert [*batch.teaching_rows] == ["ranking"]
    whole = dataclasses.replace(batch, head_rows=batch.head_rows | {"ranking": torch.arange(len(exposed))})
    weights = [*task.module.dense.model.heads["ranking"].parameters()]
    set_step(task.train(), 0)
    (loss, split), (same, together) = task(batch), task(dataclasses.replace(whole, teaching_rows={}))
    logits = split.outputs["ranking"].logits
    assert split.outputs["ranking"].computed.all()
    torch.testing.assert_close(logits, together.outputs["ranking"].logits)
    assert not any(g.any() for g in torch.autograd.grad(logits[~exposed].sum(), weights, retain_graph=True))
    for got, expected in zip(torch.autograd.grad(loss, weights), torch.autograd.grad(same, weights), strict=True):
        torch.testing.assert_close(got, expected)


def test_heads_that_name_one_encoder_share_it_and_heads_that_name_two_do_not(run):
    features = "heads.pre_ranking.features=[user_id, gender, {}, item_id]"
    liked = (
        "{history: liked, features: [item_id, genres], length: 6, by: {kind: self_attention, heads: 2, positions: 6}}"
    )
    for own, follows in (("liked_mean", True), ("its_own", False)):
        extra = (f"encoders.liked_mean={liked}", f"encoders.its_own={liked}")
        task, batch, before = run(*extra, features.format(own))
        encoder = task.module.dense.model.encoders["liked_mean"]
        with torch.no_grad():
            for parameter in encoder.parameters():
                parameter.add_(0.1)
            after = task(batch)[1].outputs
        changed = {head: not torch.equal(before.outputs[head].logits, after[head].logits) for head in after}
        assert changed == {"retrieval": True, "pre_ranking": follows, "ranking": True}


def test_a_head_may_be_absent(run, configure, assemble):
    without = ("heads.ranking=", "objectives.teacher=", "objectives.distill=", "evaluation.whole_catalogue=[]")
    overrides = (*without, "evaluation.quotas={retrieval: 20, pre_ranking: 8, ranking: }", "encoders.rated_attention=")
    task, _, output = run(*overrides)
    assert list(output.outputs) == ["retrieval", "pre_ranking"]
    assert not [name for name in task.state_dict() if "ranking." in name and "pre_ranking." not in name]
    assert "pool.item_id" in {key.name for key in assemble.plan(configure(*overrides)).keys}


def test_a_batch_without_requests_costs_nothing_and_keeps_the_graph(configure, group, assemble):
    config = configure()
    task = build_task(assemble.plan(config), group).train()
    set_step(task, 0)
    reached = []
    for batch in (
        assemble(config),
        assemble.assembler(config).empty(PoolItems.corpus(np.arange(61)), position=Position()),
    ):
        task.zero_grad()
        loss, output = task(batch)
        before = {n: p.detach().clone() for n, p in task.named_parameters() if "embeddings" in n}
        loss.backward()
        gradients = {n: p.grad for n, p in task.named_parameters() if "embeddings" not in n}
        reached.append({name for name, gradient in gradients.items() if gradient is not None})
    assert batch.requests == 0
    assert loss == 0
    assert not any(output.losses.values())
    assert all(not g.any() for g in gradients.values() if g is not None)  # zeros, and no NaN
    for name, parameter in task.named_parameters():
        if "embeddings" in name:
            torch.testing.assert_close(parameter.detach(), before[name], atol=0, rtol=0)
    assert reached[0] == reached[1]
