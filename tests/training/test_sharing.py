"""What heads share, and which of them only read it: exact statements about tables, encoders and their gradients."""

from __future__ import annotations

import itertools
import sys
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist

import joint.training
from joint import checkpoint
from joint.batch import Batch
from joint.errors import ConfigError
from joint.evaluate import main as evaluate
from joint.features import Plan
from joint.outputs import Outputs
from joint.task import Dense, build_task
from joint.train import main
from towers.mixtures import set_step

HEADS = ("retrieval", "pre_ranking", "ranking")
# All heads name one encoder, which has weights and reads events.
ONE_ENCODER = (
    "encoders.liked_mean={history: rated, features: [item_id, genres], events: [rating],"
    " by: {kind: self_attention, heads: 2, positions: 6}}",
    "encoders.rated_sequence=",
    "encoders.rated_attention=",
    "heads.retrieval.features=[user_id, liked_mean, item_id, genres]",
    "heads.ranking.features=[user_id, gender, liked_mean, item_id, genres]",
)
OBJECTIVES = {"retrieval": ["retrieve"], "pre_ranking": ["student", "distill", "negatives"], "ranking": ["teacher"]}
SHARED = {"user_id", "item_id", "gender", "genres", "rating"}
Gradients = dict[str, Tensor]


def muted(*heads: str) -> list[str]:
    """Overrides: the objectives of these heads weigh nothing."""
    return [f"objectives.{name}.weight=0" for head in heads for name in OBJECTIVES[head]]


def others(head: str) -> list[str]:
    return [name for name in HEADS if name != head]


@dataclass
class Step:
    """One forward and backward pass over tables of our own."""

    outputs: Outputs
    gradients: Gradients  # of tables as `item_id`, of parameters as `encoders.…` and `heads.…`; None counts as 0

    def of(self, *starts: str) -> Gradients:
        """The gradients of what is named like this; of tables if nothing is said."""
        if not starts:
            return {n: g for n, g in self.gradients.items() if not n.startswith(("encoders.", "heads."))}
        return {n: g for n, g in self.gradients.items() if n.startswith(starts)}


@pytest.fixture
def step(configure, assemble):
    """`step(*overrides)`: the same weights, rows and noise for every config of equal shapes."""

    def run(*overrides: str) -> Step:
        config = configure(*ONE_ENCODER, *overrides)
        plan, batch = assemble.plan(config), assemble(config)
        torch.manual_seed(0)
        dense = Dense(plan).train()
        set_step(dense, 0)
        tables = {shape.name: own_table(shape.name, shape.rows, shape.dim) for shape in plan.tables}
        torch.manual_seed(1)  # of dropout
        loss, output = dense(looked_up(plan, batch, tables), batch)
        loss.backward()
        named = tables | {name.removeprefix("model."): p for name, p in dense.named_parameters()}
        return Step(output.outputs, {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in named.items()})

    return run


def own_table(name: str, rows: int, dim: int) -> Tensor:
    """A table by its feature's name: the copies of several heads start equal."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.partition("@")[0].encode()))
    return torch.randn(rows, dim, generator=generator).requires_grad_()


def looked_up(plan: Plan, batch: Batch, tables: dict[str, Tensor]) -> dict[str, object]:
    ids = {key: jagged.values() for sparse in batch.sparse.values() for key, jagged in sparse.to_dict().items()}
    rows = {key.name: tables[key.table][ids[key.name]] for key in plan.keys if key.embedded}
    return {"all": {name: SimpleNamespace(values=lambda r=r: r) for name, r in rows.items()}}


def representations(outputs: Outputs) -> Iterator[Tensor]:
    for output in outputs.values():
        yield output.logits
        yield from (x for x in (output.features, output.user, output.pool and output.pool.vectors) if x is not None)


def assert_same(a: Outputs, b: Outputs) -> None:
    for x, y in zip(representations(a), representations(b), strict=True):
        assert torch.equal(x, y)


def nonzero(gradients: Gradients) -> set[str]:
    return {name for name, gradient in gradients.items() if gradient.any()}


def assert_equal(a: Gradients, b: Gradients) -> None:
    assert a.keys() == b.keys()
    assert not [name for name in a if not torch.equal(a[name], b[name])]


@pytest.mark.parametrize("mode", ["tables", "tables_and_encoders"])
@pytest.mark.parametrize("head", HEADS)
def test_a_stopped_head_trains_its_tower_and_nothing_that_is_shared(step, mode, head):
    stop = (f"sharing.mode={mode}", f"sharing.stop_gradient=[{head}]")
    alone = step(*stop, *muted(*others(head)))
    assert not nonzero(alone.of())
    own_encoder = f"encoders.liked_mean@{head}."
    trained = nonzero(alone.of("encoders."))
    assert trained == (nonzero(alone.of(own_encoder)) if mode == "tables" else set())
    assert bool(trained) == (mode == "tables")
    assert nonzero(alone.of("heads.")) == nonzero(alone.of(f"heads.{head}.")) != set()
    freely = step(stop[0], *muted(*others(head)))
    assert nonzero(freely.of()) - {"gender"} == SHARED - {"gender"}
    assert nonzero(freely.of("encoders."))
    assert_equal(alone.of("heads."), freely.of("heads."))
    assert_same(alone.outputs, freely.outputs)


@pytest.mark.parametrize("mode", ["tables", "tables_and_encoders"])
@pytest.mark.parametrize("head", HEADS)
def test_the_others_learn_as_if_a_stopped_head_had_no_objective(step, mode, head):
    mode_override = f"sharing.mode={mode}"
    stopped = step(mode_override, f"sharing.stop_gradient=[{head}]")
    without = step(mode_override, *muted(head))
    shared = stopped.of() | (stopped.of("encoders.") if mode == "tables_and_encoders" else {})
    assert_equal(shared, {name: without.gradients[name] for name in shared})
    for other in others(head):
        own = (f"heads.{other}.", f"encoders.liked_mean@{other}.")
        assert_equal(stopped.of(*own), without.of(*own))
    freely = step(mode_override)
    own = (f"heads.{head}.", f"encoders.liked_mean@{head}.")
    assert_equal(stopped.of(*own), freely.of(*own))
    assert not torch.equal(stopped.gradients["item_id"], freely.gradients["item_id"])
    assert_same(stopped.outputs, freely.outputs)


def test_two_stopped_heads_leave_the_third_the_tables(step):
    stopped = step("sharing.stop_gradient=[retrieval, ranking]")
    only = step(*muted("retrieval", "ranking"))
    assert_equal(stopped.of() | stopped.of("encoders."), only.of() | only.of("encoders."))


def test_tables_of_one_s_own_with_equal_rows_are_the_shared_ones(step):
    """What a head computes is the same; what the shared table learns is the sum of what the copies learn."""
    own, shared, whole = (step(f"sharing.mode={mode}") for mode in ("none", "tables", "tables_and_encoders"))
    assert_same(own.outputs, shared.outputs)
    assert set(own.of()) == {f"{t}@{h}" for h in HEADS for t in SHARED} - {"gender@retrieval"}
    assert set(shared.of()) == set(whole.of()) == SHARED
    assert_equal(own.of("encoders.", "heads."), shared.of("encoders.", "heads."))
    assert {name.split(".")[1] for name in shared.of("encoders.")} == {f"liked_mean@{head}" for head in HEADS}
    assert {name.split(".")[1] for name in whole.of("encoders.")} == {"liked_mean"}
    for table, gradient in shared.of().items():
        copies = [g for name, g in own.of().items() if name.startswith(f"{table}@")]
        torch.testing.assert_close(torch.stack(copies).sum(0), gradient)
        assert all(g.any() for g in copies)


@pytest.mark.parametrize(("mode", "follow"), [("tables", {"ranking"}), ("tables_and_encoders", set(HEADS))])
def test_who_follows_when_an_encoder_or_a_table_changes(configure, assemble, group, mode, follow):
    config = configure(*ONE_ENCODER, f"sharing.mode={mode}")
    task, batch = build_task(assemble.plan(config), group).eval(), assemble(config, all_rows=True)

    def changed_by(change: Tensor) -> set[str]:
        with torch.no_grad():
            before = task(batch)[1].outputs
            change.add_(0.1)
            after = task(batch)[1].outputs
        return {head for head in HEADS if not torch.equal(before[head].logits, after[head].logits)}

    encoder = task.module.dense.model.encoders["liked_mean@ranking" if mode == "tables" else "liked_mean"]
    assert changed_by(encoder.event.weight) == follow
    assert changed_by(tables(task, clone=False)["genres"]) == set(HEADS)


def tables(task: torch.nn.Module, *, clone: bool = True) -> dict[str, Tensor]:
    found = {n.split(".")[-2]: v for n, v in task.state_dict().items() if n.startswith("embeddings.")}
    local = {name: value.local_shards()[0].tensor for name, value in found.items()}
    return {name: value.clone() for name, value in local.items()} if clone else local


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("kind", ["rowwise_adagrad", "sgd"])
def test_a_step_of_one_head_leaves_the_tables_of_the_others_as_they_are(configure, assemble, group, head, kind):
    config = configure("sharing.mode=none", f"optimizer.tables.kind={kind}", *muted(*others(head)))
    task, batch = build_task(assemble.plan(config), group).train(), assemble(config)
    set_step(task, 0)
    before = tables(task)
    task(batch)[0].backward()
    moved = {name for name, rows in tables(task).items() if not torch.equal(rows, before[name])}
    assert moved == {name for name in before if name.endswith(f"@{head}")}
    item = [before[f"item_id@{name}"] for name in HEADS]
    assert {rows.shape for rows in item} == {(63, 8)}
    assert not any(torch.equal(a, b) for a, b in itertools.pairwise(item))


def test_a_step_of_a_stopped_head_moves_no_row(configure, assemble, group):
    config = configure("sharing.stop_gradient=[pre_ranking]", *muted("retrieval", "ranking"))
    task, batch = build_task(assemble.plan(config), group).train(), assemble(config)
    set_step(task, 0)
    before = tables(task)
    loss = task(batch)[0]
    loss.backward()
    assert loss > 0
    assert not [name for name, rows in tables(task).items() if not torch.equal(rows, before[name])]


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["sharing.stop_gradient=[retrieval, pre_ranking, ranking]"], "names every head; nothing would train the"),
        (
            ["sharing.stop_gradient=[retrieval, pre_ranking]", "heads.ranking.features=[user_id, item_id]"],
            "only pre_ranking and retrieval read encoder liked_mean; nothing would train it",
        ),
        (["sharing.mode=none", "sharing.stop_gradient=[ranking]"], "with mode none nothing is shared"),
        (["sharing.stop_gradient=[rankings]"], "did you mean ranking?"),
        (["heads.ranking=", "sharing.stop_gradient=[ranking]"], "sharing.stop_gradient: no head 'ranking'"),
        (["sharing.mode=all"], "'all' is not one of none, tables, tables_and_encoders"),
    ],
)
def test_mistakes(configure, overrides, says):
    with pytest.raises(ConfigError) as error:
        configure(*overrides)
    assert any("sharing" in line and says in line for line in str(error.value).splitlines()), str(error.value)


def test_with_encoders_of_their_own_any_heads_but_all_may_be_stopped(configure):
    assert configure("sharing.mode=tables", "sharing.stop_gradient=[retrieval, ranking]").sharing.mode == "tables"
    assert configure("sharing.stop_gradient=[pre_ranking]").sharing.stop_gradient == ("pre_ranking",)


QUICK = ["data.epochs=1", "data.requests_per_batch=64", "evaluation.baselines=false", "evaluation.whole_catalogue=[]"]


@pytest.mark.parametrize(
    "sharing",
    ["{mode: none}", "{mode: tables, stop_gradient: [retrieval, ranking]}", "{stop_gradient: [pre_ranking]}"],
)
def test_two_steps_then_the_checkpoint_gives_the_same_evaluation(
    tiny_file, tmp_path, flat, capsys, monkeypatch, sharing
):
    arguments = [str(tiny_file), f"sharing={sharing}", *QUICK]
    assert main(arguments) == 0
    run = tmp_path / "runs" / "tiny"
    assert "2 steps of 64" in capsys.readouterr().out
    written = (run / "eval.json").read_bytes()
    (run / "eval.json").unlink()
    monkeypatch.setattr(sys, "argv", ["joint.evaluate", str(run)])
    assert evaluate() == 0
    assert (run / "eval.json").read_bytes() == written
    assert len(checkpoint.steps(run / "checkpoints")) == 1
    saved = flat(run / "checkpoints")
    copies = {name for name in saved if "item_id" in name and name.endswith(".weight")}
    assert len(copies) == (3 if "none" in sharing else 1), copies


def test_a_pipeline_finds_the_tables_of_every_head(tiny_file, tmp_path, flat, monkeypatch):
    """TorchRec traces the task by the names of its tables and keys, which hold the head's."""
    arguments = [str(tiny_file), "sharing.mode=none", "train.fast_lookup=false", *QUICK]
    assert main(arguments) == 0
    monkeypatch.setattr(joint.training, "build_pipeline", TrainPipelineSparseDist)
    assert main([*arguments, "run.name=piped"]) == 0
    plain, piped = (flat(tmp_path / "runs" / name / "checkpoints") for name in ("tiny", "piped"))
    assert plain.keys() == piped.keys()
    assert [name for name in plain if not torch.equal(piped[name], plain[name])] == []
