"""The weights that are logged are the weights that were used, averaged by where the negative comes from."""

import numpy as np
import torch

import losses
from joint.evaluating.negative_weights import negative_weights
from joint.objectives import task_indices
from joint.task import build_task
from towers.mixtures import set_step


def test_means_by_stage_task_and_user_group(configure, assemble, group):
    config = configure("objectives.negatives.tasks=[like, fine]", "objectives.negatives.delta=0.5")
    batch = assemble(config)
    task = build_task(assemble.plan(config), group).train()
    set_step(task, 0)
    outputs = task(batch)[1].outputs
    found = negative_weights(config, outputs, batch)
    objective = config.objectives["negatives"]
    arguments = objective.arguments(outputs, batch, task_indices(objective, batch, list(config.tasks)))
    _, pairs = losses.adaptive_contrastive(*(x.detach() for x in arguments), return_weights=True)
    random = (batch.stages == 1)[pairs.negative]
    users = batch.group[batch.row]
    for index, name in enumerate(("like", "fine")):
        for who in users[pairs.negative[pairs.task == index]].unique().tolist():
            own = random & (pairs.task == index) & (users[pairs.negative] == who)
            start = f"negative_weights/matching_ns/{name}/{who}"
            expected = {"": 0.5 * (pairs.similarity + pairs.confidence)[own].mean()}
            expected |= {"/similarity": pairs.similarity[own].mean(), "/confidence": pairs.confidence[own].mean()}
            # Each positive's softmax sums to 1 over the negatives that it shares it with.
            rivals = [((pairs.task == index) & (pairs.positive == i)).sum() for i in pairs.positive[own].tolist()]
            expected["/even"] = np.mean([1 / int(n) for n in rivals])
            for part, value in expected.items():
                np.testing.assert_allclose(found[start + part], value, rtol=1e-5)
            of_group = (users == who) & batch.observed[:, index]  # the head scores all of the batch
            rate = batch.positive[of_group, index].float().mean()
            np.testing.assert_allclose(found[f"negative_weights/base_rate/{name}/{who}"], rate, rtol=1e-5)
    assert not [name for name in found if "pre_ranking_ns" in name]  # this log has no stages
    assert torch.is_grad_enabled()


def test_fixed_weights_are_not_logged(configure, assemble, group):
    config = configure("objectives.negatives.adaptive=false")
    batch = assemble(config)
    outputs = build_task(assemble.plan(config), group).eval()(batch)[1].outputs
    assert negative_weights(config, outputs, batch) == {}
