"""Weights tried on scores computed once: what the evaluator says under each of them, and for each user group."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from joint.config import load_config
from joint.cost import head_costs
from joint.errors import ConfigError
from joint.evaluating.choosing import best_by_group, try_fusions
from joint.evaluating.evaluator import evaluator_of
from joint.fit import check_groups
from joint.funnels.measure import Thirds, funnel_numbers, popularity_thirds, sweep_quotas
from joint.task import build_task

WIDE = [f"tables.{name}.init=0.7" for name in ("user_id", "item_id", "gender", "genres", "rating")]


@pytest.fixture
def evaluator(configure, assemble, group):
    """`evaluator(*overrides)`: of an untrained model, and that model."""

    def build(*overrides: str):
        assembler = assemble.assembler(configure(*WIDE, *overrides))
        model = build_task(assembler.plan, group)
        return evaluator_of(model, assembler, group), model

    return build


@pytest.mark.parametrize(
    ("head", "overrides", "goal"),
    [
        ("retrieval", [], "retrieval/recall@3"),
        ("ranking", [], "ranking/recall@3"),
        ("pre_ranking", ["evaluation.whole_catalogue=[]"], "funnel/pre_ranking/recall@8"),
    ],
)
def test_every_trial_is_what_the_evaluator_says_under_these_weights(evaluator, head, overrides, goal):
    one, _ = evaluator(*overrides)
    found, trials, groups = try_fusions(one, head, "valid")
    assert found == goal
    assert len(trials) == 11
    assert len({trial.found.value for trial in trials}) > 2
    settings = one.heads[head]
    for trial in trials[::5]:
        one.heads[head] = replace(settings, fusion=trial.fusion)
        measured = one("valid", whole_catalogue=True)
        assert trial.found.value == measured.numbers[goal]
        assert trial.found.total.tolist() == measured.requests[f"{goal}.total"].tolist()
    assert groups.tolist() == measured.requests["group"].tolist()


def test_weights_by_group_give_each_group_what_its_own_trial_gave(evaluator):
    one, _ = evaluator()
    goal, trials, groups = try_fusions(one, "retrieval", "valid")
    chosen = best_by_group(trials, groups)
    assert chosen
    by_group = {str(group): own.fusion for group, (own, _) in chosen.items()}
    one.heads["retrieval"] = replace(one.heads["retrieval"], fusion_by_group=by_group)
    measured = one("valid", whole_catalogue=False).numbers
    for group, (own, _) in chosen.items():
        assert measured[f"group/{group}/{goal}"] == own.found.value


def test_equal_weights_of_all_groups_change_no_metric(evaluator):
    one, _ = evaluator("heads.ranking.fusion={like: 1, fine: 0.3}")
    before = one("test", whole_catalogue=True)
    for head in one.heads:
        fusion = one.heads[head].fusion or {"like": 1.0, "fine": 1.0}
        one.heads[head] = replace(one.heads[head], fusion_by_group={str(group): fusion for group in range(9)})
    after = one("test", whole_catalogue=True)
    assert after.numbers == pytest.approx(before.numbers, rel=0, abs=0, nan_ok=True)
    assert all(np.array_equal(after.requests[name], before.requests[name]) for name in before.requests)


def test_a_head_without_a_goal(evaluator):
    one, _ = evaluator("evaluation.whole_catalogue=[]", "evaluation.quotas.ranking=null")
    with pytest.raises(ConfigError, match=r"name it in evaluation.whole_catalogue or evaluation.quotas"):
        try_fusions(one, "ranking", "valid")


def test_mistakes_in_weights_by_group(tiny_file, assemble, configure):
    dataset = assemble.assembler(configure()).dataset
    last = dataset.largest_group()
    assert last == max(int(dataset.read_split(part).scalars("group").max()) for part in ("train", "valid", "test"))
    config, tree = load_config(tiny_file, [f"heads.ranking.fusion_by_group={{{last}: {{like: 2}}}}"])
    check_groups(config, tree, dataset)
    config, tree = load_config(tiny_file, [f"heads.ranking.fusion_by_group={{{last + 1}: {{like: 2}}}}"])
    with pytest.raises(ConfigError, match=rf"{last + 1}: the dataset's user groups go from 0 to {last}"):
        check_groups(config, tree, dataset)
    for said, text in [
        ("no task 'liek'; did you mean like", "{0: {liek: 1}}"),
        ("number of a user", "{x: {like: 1}}"),
    ]:
        with pytest.raises(ConfigError, match=said):
            load_config(tiny_file, [f"heads.ranking.fusion_by_group={text}"])


def test_a_sweep_is_as_many_runs_with_those_quotas(evaluator):
    one, model = evaluator()
    grid = [
        {"retrieval": 30, "pre_ranking": 8, "ranking": 3},
        {"retrieval": 30, "pre_ranking": 15, "ranking": 2},
        {"retrieval": 12, "pre_ranking": 8, "ranking": 5},
        {"retrieval": 90, "pre_ranking": 70, "ranking": 60},  # more than are eligible
    ]
    points = sweep_quotas(one, "test", grid, head_costs(model.module.dense.model), scored=61)
    assert [point.cost for point in points] == sorted(point.cost for point in points)
    config = one.config
    for point in points:
        one.config = replace(config, evaluation=replace(config.evaluation, quotas=point.quotas))
        numbers = one("test", whole_catalogue=False).numbers
        quota = point.quotas["ranking"]
        assert point.values["positives"] == numbers[f"funnel/ranking/recall@{quota}"]
        if point.quotas["retrieval"] == 90:
            assert point.values["teacher_favourites"] == numbers["funnel/ranking/teacher_favourites"] == 1
    assert len({point.values["positives"] for point in points}) == len(points)


def test_the_parts_of_the_items_make_up_the_whole(evaluator):
    one, _ = evaluator()
    thirds = popularity_thirds(one.config, one.assembler.dataset, one.eligibility.corpus)
    assert np.bincount(thirds.third, minlength=3).min() > 5
    numbers = funnel_numbers(one, "test", thirds)
    usual = one("test", whole_catalogue=False).numbers
    shared = [name for name in numbers if name in usual]
    assert {"funnel/lost/outside", "funnel/lost/ranking", "group/0/funnel/lost/retrieval"} <= {*shared}
    assert {name: numbers[name] for name in shared} == pytest.approx(
        {name: usual[name] for name in shared}, nan_ok=True
    )
    for prefix in ("", "group/0/", "popularity/rare/", "popularity/popular/"):
        lost = [numbers[f"{prefix}funnel/lost/{stage}"] for stage in ("outside", *one.heads)]
        assert sum(lost) + numbers[f"{prefix}funnel/ranking/recall@3"] == pytest.approx(1)
    everything = Thirds(np.full(61, 2), (0, 0))
    alike = funnel_numbers(one, "test", everything)
    assert alike["popularity/popular/funnel/lost/ranking"] == numbers["funnel/lost/ranking"]
    assert np.isnan(alike["popularity/rare/funnel/lost/ranking"])


def test_scores_of_one_head_alone_reach_the_funnel_from_their_own_matrix(evaluator):
    one, _ = evaluator()
    for entrants in one.entrants("test", 10):
        assert (entrants.offsets.diff() <= 10).all()
        row = torch.arange(len(entrants.requests)).repeat_interleave(entrants.offsets.diff())
        fused = one.fused("retrieval", entrants.logits["retrieval"], entrants.group[row])
        torch.testing.assert_close(entrants.scores["retrieval"], fused)
