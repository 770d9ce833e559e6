"""Channels: one model, several pools of items, each with its own list and its own places."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import joint
from joint.config import load_config
from joint.data.dataset import Dataset
from joint.data.planted.simulate import parameters_of, simulate
from joint.errors import ConfigError
from joint.evaluating.item_pools import members, recall_by_pool, with_reserved
from joint.experiment import ItemPool
from joint.fit import check_against
from joint.schema import NEVER
from joint.train import main

JOINT = Path(joint.__file__).parents[1] / "configs" / "joint.yaml"
NO = -torch.inf


# On which days items join the pools of a dataset.
DAYS = SimpleNamespace(first_day={"": np.array([0, 7, 9, 10, 12]), "good": np.array([0, NEVER, 10, NEVER, 12])})


def test_who_is_in_a_pool_on_a_day() -> None:
    pools = {"good": ItemPool(pool="good"), "new": ItemPool(joined_within=2), "today": ItemPool(joined_within=0)}
    found = members(pools, DAYS, np.array([0, 1, 2, 3, 4]), np.array([9, 10], np.int32))
    assert found["good"].int().tolist() == [[1, 0, 0, 0, 0], [1, 0, 1, 0, 0]]
    assert found["new"].int().tolist() == [[0, 1, 1, 0, 0], [0, 0, 1, 1, 0]]
    assert found["today"].int().tolist() == [[0, 0, 1, 0, 0], [0, 0, 0, 1, 0]]
    assert members({"new": pools["new"]}, DAYS, np.array([2, 4]), np.array([12]))["new"].tolist() == [[False, True]]


def test_recall_in_a_pool_is_among_its_own_items() -> None:
    scores = torch.tensor([[5.0, 4, 3, 2, 1], [1, 2, 3, NO, 5]])
    pools = {"even": torch.tensor([[True, False, True, False, True]] * 2), "none": torch.zeros(2, 5, dtype=torch.bool)}
    row, column = torch.tensor([0, 0, 1, 1, 1]), torch.tensor([2, 1, 0, 3, -1])
    found = dict(recall_by_pool(scores, pools, row, column, (1, 2, 3)))
    # Request 0 seeks item 2, second of 0, 2, 4; request 1 item 0, third of 4, 2, 0. All else is not in the pool.
    assert [found[f"retrieval/even/recall@{k}"].value for k in (1, 2, 3)] == [0, 0.5, 1]
    assert found["retrieval/even/recall@1"].count.tolist() == [1, 1]
    assert found["retrieval/none/recall@1"].count.tolist() == [0, 0]


def test_reserved_places_go_to_a_pool_s_best_and_the_rest_to_the_best_left() -> None:
    scores = torch.tensor([[6.0, 5, 4, 3, 2, 1], [6, 5, 4, 3, NO, NO]])
    pools = {
        "late": torch.tensor([[0, 0, 0, 1, 1, 1]] * 2).bool(),
        "odd": torch.tensor([[0, 1, 0, 1, 0, 1]] * 2).bool(),
    }
    chosen = with_reserved(scores, pools, {"late": 2, "odd": 2})
    # late has 3 and 4 (in the second request 3 alone); odd, without 3, has 1 and 5 (1 alone).
    assert [(row == torch.inf).nonzero().flatten().tolist() for row in chosen] == [[1, 3, 4, 5], [1, 3]]
    kept = [sorted(row.topk(k).indices.tolist()) for row, k in zip(chosen, (5, 4), strict=True)]
    assert kept == [[0, 1, 3, 4, 5], [0, 1, 2, 3]]
    assert torch.equal(chosen[chosen < torch.inf], scores[chosen < torch.inf])
    assert torch.equal(with_reserved(scores, {}, {}), scores)
    assert torch.equal(with_reserved(scores, pools, {"late": 0, "odd": 0}), scores)


def test_a_run_with_a_channel_of_new_items(tmp_path: Path) -> None:
    world = tmp_path / "biased"
    simulate(world, parameters_of("biased", "small", ["requests=300", "users=60"]), seed=0, world="biased")
    found = {}
    for quota in (0, 30):
        more = [f"evaluation.pools={{fresh: {{joined_within: 3, quota: {quota}}}, all: {{}}}}", f"run.name=q{quota}"]
        quotas = "evaluation.quotas={retrieval: 40, pre_ranking: 20, ranking: 10}"
        assert main([str(JOINT), f"data.path={world}", f"run.dir={tmp_path}", "data.epochs=1", quotas, *more]) == 0
        found[quota] = json.loads((tmp_path / f"q{quota}" / "eval.json").read_text())
    same = [name for name in found[0] if name.startswith("retrieval/") and "true_reward" not in name]
    assert {name: found[0][name] for name in same} == {name: found[30][name] for name in same}
    assert found[0]["retrieval/all/recall@10"] == found[0]["retrieval/recall@10"]
    assert "retrieval/fresh/recall@50" in found[0]
    assert found[0]["funnel/retrieval/recall@40"] > found[30]["funnel/retrieval/recall@40"]


def test_pools_that_make_no_sense(tiny_file: Path, tiny_data: Path) -> None:
    with pytest.raises(ConfigError, match="reserves 21 places; evaluation"):
        load_config(tiny_file, ["evaluation.pools={a: {quota: 20}, b: {quota: 1}}"])
    with pytest.raises(ConfigError, match="quota: must be at least 0, found -1"):
        load_config(tiny_file, ["evaluation.pools={a: {quota: -1}}"])
    config, tree = load_config(tiny_file, ["evaluation.pools={a: {pool: gold}}"])
    with pytest.raises(ConfigError, match=r"evaluation.pools.a.pool: no pool 'gold'"):
        check_against(config, tree, Dataset(tiny_data).schema)
