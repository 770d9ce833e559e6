"""The residual of special users: whose logits it corrects, and what it teaches whom."""

from __future__ import annotations

import pytest
import torch

import losses
from joint.config import load_config
from joint.errors import ConfigError
from joint.objectives import ResidualLoss, compute
from joint.task import build_task
from towers.mixtures import set_step
from towers.residual import Residual, ResidualNet

RESIDUAL = "heads.ranking.residual={groups: [0, 2], features: [user_id, rated_attention], hidden: [6]}"
LOSS = "objectives.rest={head: ranking, loss: residual, space: [exposed, random], tasks: [like]}"
GROUPS = torch.tensor([0, 1, 2, 1, 0])  # of the five requests


@pytest.fixture
def built(configure, assemble, group):
    """Overrides -> config, task (its residual no longer 0) and batch."""

    def build(*overrides: str):
        config = configure(*overrides)
        task, batch = build_task(assemble.plan(config), group), assemble(config, all_rows=True)
        batch.group = GROUPS.clone()
        set_step(task, 0)
        residual = task.module.dense.model.heads["ranking"].residual
        if residual is not None:
            torch.manual_seed(1)
            torch.nn.init.normal_(residual.last.weight)
        return config, task, batch

    return build


def test_the_net_reads_its_fields_of_its_groups_alone() -> None:
    fields = {"age": 2, "id": 3, "price": 1}
    net = ResidualNet(Residual(groups=(2,), features=("price", "age"), hidden=(4,)), fields=fields, tasks=2)
    request, candidate = torch.randn(3, 2), torch.randn(6, 4)
    row, group, logits = torch.tensor([0, 0, 1, 1, 2, 2]), torch.tensor([2, 1, 2]), torch.randn(6, 2)
    assert torch.equal(net(logits, request, candidate, row, group), logits)  # 0 at first
    torch.nn.init.normal_(net.last.weight)
    after = net(logits, request, candidate, row, group)
    x = torch.cat([candidate[:, 3:], request[row]], dim=1)
    expected = logits + net.last(net.body(x))
    own = torch.tensor([0, 1, 4, 5])
    torch.testing.assert_close(after[own], expected[own])
    assert torch.equal(after[2:4], logits[2:4])
    none = net(logits, request, candidate, row, torch.tensor([0, 0, 0]))
    assert torch.equal(none, logits)
    with pytest.raises(ValueError, match="no field colour"):
        ResidualNet(Residual(groups=(1,), features=("colour",)), fields=fields, tasks=2)


def test_other_groups_are_served_the_same_bit_for_bit(built) -> None:
    _, task, batch = built(RESIDUAL, LOSS)
    _, plain, _ = built()
    plain.load_state_dict({k: v for k, v in task.state_dict().items() if ".residual." not in k})
    with torch.no_grad():
        served, as_ever = (model.eval()(batch)[1].outputs["ranking"].logits for model in (task, plain))
    special = torch.isin(GROUPS, torch.tensor([0, 2]))[batch.row]
    assert torch.equal(served[~special], as_ever[~special])
    assert (served[special] != as_ever[special]).all()
    set_step(task, 0)
    training = task.train()(batch)[1].outputs["ranking"]
    assert not torch.equal(training.logits[special], training.corrected[special])  # teaches as it is for all


def test_its_loss_teaches_the_residual_and_nothing_else(built) -> None:
    alone = [f"objectives.{name}=null" for name in ("teacher", "student", "distill", "negatives", "retrieve")]
    config, task, batch = built(RESIDUAL, LOSS, *alone)
    loss, output = task.train()(batch)
    loss.backward()
    learned = {name for name, p in task.named_parameters() if p.grad is not None and p.grad.count_nonzero()}
    dense = {name for name in learned if "embeddings" not in name}
    assert dense
    assert all(".ranking.residual." in name for name in dense)
    head = output.outputs["ranking"]
    special = torch.isin(GROUPS, torch.tensor([0, 2]))[batch.row]
    term = compute(config.objectives["rest"], output.outputs, batch, list(config.tasks))
    mask = special & batch.observed[:, 0]
    expected = losses.binary(head.corrected[:, 0], batch.labels[:, 0], mask=mask)
    torch.testing.assert_close((term.total[0], term.count[0]), tuple(expected))


def test_the_tables_are_left_alone(built) -> None:
    alone = [f"objectives.{name}=null" for name in ("teacher", "student", "distill", "negatives", "retrieve")]
    _, task, batch = built(RESIDUAL, LOSS, *alone)

    def tables() -> list[torch.Tensor]:
        values = [value for name, value in task.state_dict().items() if "embeddings" in name]
        return [value.local_shards()[0].tensor.clone() for value in values]

    before = tables()
    loss, _ = task.train()(batch)
    loss.backward()  # the tables' optimizer steps in backward
    assert all(torch.equal(a, b) for a, b in zip(before, tables(), strict=True))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([RESIDUAL], "heads.ranking.residual: no objective trains it; expected one of loss residual"),
        ([LOSS], "trains the residual of the ranking head; heads.ranking.residual is not there"),
        ([LOSS, RESIDUAL.replace("user_id", "gander")], "no feature of this head 'gander'"),
        ([LOSS, RESIDUAL.replace("[0, 2]", "[]")], "expected one user group or more, each once"),
        ([LOSS, RESIDUAL, "objectives.rest.head=pre_ranking"], "trains the residual of the ranking head"),
    ],
)
def test_what_makes_no_sense(tiny_file, overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(tiny_file, overrides)
    assert ResidualLoss(head="ranking", space=("exposed",)).weight == 1
