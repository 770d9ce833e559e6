"""Two views of items: which items, which features, what learns."""

from __future__ import annotations

import pytest
import torch

import losses
from joint.config import load_config
from joint.data.loader import Loader
from joint.data.order import Position
from joint.errors import ConfigError
from joint.fit import check_against
from joint.objectives import ItemViews, compute
from joint.schema import read_schema
from joint.task import build_task
from towers.mixtures import set_step
from towers.views import FieldViews

VIEWS = "objectives.views={{loss: item_views, space: [{}], share: {}}}"
SAMPLED = ("data.shared_random=40", "objectives.retrieve.space=[random]")


def test_every_field_is_in_one_view_and_the_deal_is_of_the_step() -> None:
    fields = {"id": 2, "author": 3, "category": 1, "kind": 2, "length": 1}
    views = FieldViews(fields, seed=0)
    x, deals = torch.ones(4, 9), set()
    for step in range(30):
        views.step = step
        first, second = views(x)
        assert torch.equal(first + second, x)
        per_field = torch.stack([part[:, 0] for part in first.split(list(fields.values()), dim=1)])
        assert all((part == part[0, 0]).all() for part in first.split(list(fields.values()), dim=1))
        assert (per_field.sum(0) == 3).all()
        assert torch.equal(views(x)[0], first)
        deals.add(tuple(per_field[:, 0].tolist()))
    assert len(deals) > 5
    with pytest.raises(ValueError, match="two views need two fields or more, found id"):
        FieldViews({"id": 2}, seed=0)


@pytest.fixture
def step(configure, assemble, group):
    """Overrides -> the task after a training step's forward, its batch, outputs and losses."""

    def run(*overrides: str, number: int = 0):
        config = configure(*overrides)
        loader = Loader(assemble.assembler(config), rank=0, world_size=1)
        batch = next(iter(loader._batches(Position())))
        task = build_task(loader.assembler.plan, group).train()
        set_step(task, number)
        loss, output = task(batch)
        return config, task, batch, output, loss

    return run


@pytest.mark.parametrize("more", [("corpus", ()), ("random", SAMPLED)])
def test_the_loss_is_between_views_of_the_pool_s_items(step, more) -> None:
    space, overrides = more
    config, task, batch, output, _ = step(VIEWS.format(space, 1.0), *overrides)
    found = output.outputs["retrieval"].views
    uniform = batch.pool_open & ~batch.pool_in_batch
    assert found.item.equal(batch.pool_item[uniform])
    assert found.target.equal(torch.arange(len(found.item)))
    assert len(found.item) == (61 if space == "corpus" else 40)
    expected = losses.info_nce(found.first, found.second, found.target, item_ids=found.item)
    term = compute(config.objectives["views"], output.outputs, batch, list(config.tasks))
    torch.testing.assert_close(term.total[0], expected.total)
    torch.testing.assert_close(output.losses["views"], (expected.total / expected.count).detach())
    task.eval()
    assert task(batch)[1].outputs["retrieval"].views is None


def test_a_share_of_the_items_is_drawn_anew_for_each_step(step) -> None:
    drawn = [step(VIEWS.format("corpus", 0.3), number=n)[3].outputs["retrieval"].views.item.tolist() for n in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert 5 < len(drawn[0]) < 35


def test_only_the_item_side_of_retrieval_learns(step) -> None:
    alone = [f"objectives.{name}=null" for name in ("teacher", "student", "distill", "negatives", "retrieve")]
    _, task, _, _, loss = step(VIEWS.format("corpus", 1.0), *alone)
    loss.backward()
    learned = {name for name, p in task.named_parameters() if p.grad is not None and p.grad.count_nonzero()}
    dense = {name for name in learned if "embeddings" not in name}
    assert dense
    assert all(".heads.retrieval.item." in name for name in dense)


def test_a_placebo_has_the_views_of_other_items(step) -> None:
    config, _, batch, output, _ = step(VIEWS.format("corpus", 1.0))
    found = output.outputs["retrieval"].views
    torch.manual_seed(0)
    found.first = found.second = torch.randn(61, 90)  # an item's views are alike, those of two items are not
    plain, shuffled = (
        compute(ItemViews(space=("corpus",), shuffle=shuffle), output.outputs, batch, list(config.tasks))
        for shuffle in (False, True)
    )
    assert plain.count.equal(shuffled.count)
    assert shuffled.total > 2 * plain.total


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (
            "{loss: item_views, space: [in_batch]}",
            "draws items uniformly; expected .corpus. or .random., found .'in_batch'",
        ),
        ("{loss: item_views, space: [random]}", "random holds nothing: data.shared_random is 0"),
        ("{loss: item_views, space: [corpus], head: ranking}", "views are of the retrieval head's item tower"),
        ("{loss: item_views, space: [corpus], share: 0}", "share: is 0"),
    ],
)
def test_what_makes_no_sense(tiny_file, wrong: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(tiny_file, [f"objectives.views={wrong}"])


def test_views_need_features_to_deal(tiny_file, tiny_data) -> None:
    one = ["heads.retrieval.features=[user_id, item_id]", VIEWS.format("corpus", 1.0)]
    config, tree = load_config(tiny_file, one)
    with pytest.raises(ConfigError, match="deals the item's features to two views"):
        check_against(config, tree, read_schema(tiny_data))
    both = ["objectives.v={loss: item_views, space: [corpus]}", "objectives.w={loss: item_views, space: [corpus]}"]
    with pytest.raises(ConfigError, match="names item_views twice"):
        load_config(tiny_file, both)
