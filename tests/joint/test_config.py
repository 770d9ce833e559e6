"""What a config may not say: each mistake is one line, all of them at once, before anything is started."""

from dataclasses import replace
from pathlib import Path

import pytest

from joint.config import load_config
from joint.configuring.settings import decode, differences, dump, read
from joint.errors import ConfigError
from joint.fit import check_against
from joint.run import _decisive

REPOSITORY = Path(__file__).parents[2]


def check(config: Path, schema, *overrides: str) -> None:
    loaded, tree = load_config(config, overrides)
    check_against(loaded, tree, schema)


def message(config: Path, schema, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        check(config, schema, *overrides)
    return str(caught.value)


def test_the_config_of_the_readme_is_read_and_written_back(tmp_path):
    config, _ = load_config(REPOSITORY / "configs" / "sdcl.yaml")
    (tmp_path / "again.yaml").write_text(dump(config))
    again = decode(read(tmp_path / "again.yaml"), type(config))
    assert again == config


@pytest.mark.parametrize(
    ("override", "place", "what"),
    [
        ("heads.retrieval.temprature=2", "heads.retrieval.temprature", "did you mean temperature?"),
        ("objectives.student.space=[exposd]", "objectives.student.space", "did you mean exposed?"),
        ("objectives.student.tasks=[likes]", "objectives.student.tasks", "did you mean like?"),
        ("objectives.student.tasks=[like,like]", "objectives.student.tasks", "names a task twice"),
        ("objectives.student.space=[corpus]", "objectives.student.space", "corpus is not among them"),
        (
            "encoders.keys={history: liked, features: [item_id], by: {kind: mean}}",
            "encoders",
            "'keys' cannot be a name",
        ),
        ("objectives.retrieve.head=ranking", "objectives.retrieve", "trains the retrieval head over space [corpus]"),
        ("objectives.distill.teacher=pre_ranking", "objectives.distill.teacher", "cannot teach itself"),
        ("objectives.student.space=[coarse_neg]", "objectives.student.space", "data.candidates draws no coarse_neg"),
        ("data.candidates.random=0", "objectives.teacher.space", "random holds nothing"),
        ("data.candidates.random=all", "data.candidates.random", "expected a number of draws"),
        ("data.candidates.random=-1", "data", "must be 'all' or at least 0, found -1"),
        ("data.candidates.expsed=3", "data.candidates", "did you mean exposed?"),
        ("data.shards=0", "data.shards", "must be at least 1"),
        ("data.shards=5", "data", "not a multiple of shards 5"),
        ("data.epochs=0", "data.epochs", "must be at least 1"),
        ("train.log_every=0", "train.log_every", "must be at least 1"),
        ("tables.item_id.dim=0", "tables.item_id.dim", "must be at least 1"),
        ("encoders.liked.length=0", "encoders.liked.length", "must be at least 1"),
        ("evaluation.k=[]", "evaluation.k", "is empty"),
        ("evaluation.task=lik", "evaluation.task", "did you mean like?"),
        ("evaluation.valid=train", "train.evaluate_every_epochs", "validates nothing"),
        ("evaluation.quotas.ranking=50", "evaluation.quotas", "cannot keep more than the one before"),
        ("data.train=[train,test]", "data.train", "evaluation.test measures on"),
        ("data.train=[train,train]", "data.train", "a part twice"),
        ("objectives.negatives.head=retrieval", "objectives.negatives.head", "no other head has one"),
        ("objectives.retrieve.shown_weight=-3", "objectives.retrieve.shown_weight", "is -3"),
        ("objectives.student.positive_weight=-2", "objectives.student.positive_weight", "is -2"),
        ("heads.ranking.fusion.watch=nan", "heads.ranking", "must be finite"),
        ("heads.pre_ranking.dim=0", "heads.pre_ranking.dim", "must be at least 1"),
        ("run.name=../elsewhere", "run", "one plain folder name"),
        ("optimizer.dense.lr=-1", "optimizer.dense.lr", "must be at least 0"),
        ("heads.ranking=null", "objectives.teacher.head", "no head 'ranking'"),
    ],
)
def test_a_mistake_is_named_with_its_place(config_path, dataset, override, place, what):
    text = message(config_path, dataset.schema, override)
    lines = [line for line in text.splitlines() if place in line]
    assert any(what in line for line in lines), text


@pytest.mark.parametrize(
    ("override", "place", "what"),
    [
        ("heads.ranking.features=[user_id,item_id,titel]", "heads.ranking.features", "'titel'"),
        ("heads.ranking.features=[user_id,liked]", "heads.ranking.features", "nothing of the item"),
        ("heads.ranking.features=[rated,item_id]", "heads.ranking.features", "nothing of the request"),
        (
            "heads.pre_ranking.features=[user_id,rated,item_id]",
            "heads.pre_ranking.features",
            "only the ranking head reads",
        ),
        ("tasks.like.label=ratng", "tasks.like.label", "did you mean rating?"),
        ("encoders.liked.history=likes", "encoders.liked.history", "did you mean liked?"),
        ("encoders.liked.events=[rating]", "encoders.liked.events", "no event of liked 'rating'"),
        ("encoders.liked.features=[user_id]", "encoders.liked.features", "no item feature 'user_id'"),
        ("encoders.liked.by={kind: self_attention, heads: 3}", "encoders.liked.by.heads", "do not divide"),
        ("tables.age=null", "tables", "no table 'age'"),
        ("tables.ages={dim: 4}", "tables.ages", "did you mean age?"),
        ("data.not_eligible=[seen]", "data.not_eligible", "no history 'seen'"),
        ("data.candidates.coarse_neg=3", "data.candidates", "no logged stage 'coarse_neg'"),
    ],
)
def test_what_the_dataset_lacks_is_named(config_path, dataset, override, place, what):
    text = message(config_path, dataset.schema, override)
    assert any(place in line and what in line for line in text.splitlines()), text


def test_all_mistakes_come_at_once(config_path, dataset):
    text = message(config_path, dataset.schema, "heads.ranking.features=[user_id,titel]", "tasks.like.label=ratng")
    assert len(text.splitlines()) == 2  # not what follows from them: that ranking names nothing of the item


def test_the_funnel_begins_with_retrieval(config_path, dataset):
    text = message(config_path, dataset.schema, "evaluation.quotas.retrieval=null")
    assert "expected in the funnel's order, from retrieval on; found pre_ranking, ranking" in text
    without = ["heads.retrieval=null", "objectives.retrieve=null"]
    check(config_path, dataset.schema, *without, "evaluation.quotas.retrieval=null")  # over the logged candidates


def test_a_moved_run_or_dataset_is_the_same_config(config_path):
    config, _ = load_config(config_path)
    moved = replace(config, run=replace(config.run, name="b", dir="c"), data=replace(config.data, path="d"))
    assert not differences(_decisive(config), _decisive(moved))
    other = replace(moved, run=replace(moved.run, seed=1))
    assert differences(_decisive(config), _decisive(other)) == ["run.seed: 0 != 1"]
