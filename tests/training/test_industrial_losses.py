"""What the industrial methods are made of: a mixed label, and what was shown but not clicked, in any role."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import joint
import losses
from joint.configuring import settings
from joint.experiment import Config
from joint.objectives import AdaptiveContrastive, Binary, Distillation, MultiClass, Objective, Pairwise, compute
from joint.outputs import HeadOutput, Pool
from joint.schema import Stage

CLICKED, IGNORED, RANKED, RANDOM = range(4)  # the candidates of one request
STAGES_LOGGED = [Stage.EXPOSED, Stage.EXPOSED, Stage.RANKED, Stage.RANDOM]


def batch_of(*, watched: float = 1.0) -> SimpleNamespace:
    positive = torch.tensor([True, False, False, False])[:, None]
    return SimpleNamespace(
        stages=torch.tensor([int(stage) for stage in STAGES_LOGGED]),
        positive=positive,
        observed=torch.ones(4, 1, dtype=torch.bool),
        labels=positive.float(),
        weight=torch.where(positive, watched, 1.0),
        weighted=torch.tensor([watched != 1]),
        offsets=torch.tensor([0, 4]),
        row=torch.zeros(4, dtype=torch.long),
        item=torch.arange(4),
    )


def outputs_of(logits: torch.Tensor) -> dict[str, HeadOutput]:
    """Every head gives the same logits; the columns of retrieval's pool are the candidates, and their logits those."""
    everywhere = torch.ones(4, dtype=torch.bool)
    pools = {"random": [RANDOM], "mixed": [CLICKED, IGNORED, RANDOM], "corpus": range(4)}
    held = {space: torch.full((4,), torch.inf).index_fill(0, torch.tensor([*at]), 0.0) for space, at in pools.items()}
    no_pair = torch.zeros(0, 2, dtype=torch.long)
    retrieval = HeadOutput(logits, everywhere, user=torch.ones(1, 1, 1))
    retrieval.pool = Pool(logits, torch.arange(4), no_pair, held)
    teacher = HeadOutput(torch.tensor([[0.3], [-1.0], [2.0], [0.0]]), everywhere)
    return {
        "retrieval": retrieval,
        "pre_ranking": HeadOutput(logits, everywhere, features=torch.eye(4)),
        "ranking": teacher,
    }


def logits_of(*values: float) -> torch.Tensor:
    return torch.tensor(values)[:, None].requires_grad_()


def mixed_as_shipped() -> dict[str, Objective]:
    """What the student learns in configs/ablations/mixed_label.yaml's variant `mixed`."""
    tree = settings.read(Path(joint.__file__).parents[1] / "configs" / "ablations" / "mixed_label.yaml")
    tree = settings.merge(tree, tree.value["variants"].value["mixed"])
    own = {key: child for key, child in tree.value.items() if key in Config.__dataclass_fields__}
    objectives = settings.decode(replace(tree, value=own), Config).objectives
    return {name: objective for name, objective in objectives.items() if objective.head == "pre_ranking"}


def test_half_of_the_label_and_half_of_the_teacher_are_the_mixed_label():
    batch, logits = batch_of(), logits_of(0.7, -0.2, 1.5, -2.0)
    heads, objectives = outputs_of(logits), mixed_as_shipped()
    assert set(objectives) == {"student", "distill"}
    terms = {name: compute(objective, heads, batch, ["click"]) for name, objective in objectives.items()}
    assert all(term.count == 3 for term in terms.values())
    total = sum(objectives[name].weight * term.total for name, term in terms.items())
    by_hand, inside = logits.detach().clone().requires_grad_(), torch.tensor([CLICKED, IGNORED, RANDOM])
    mixed = losses.binary(by_hand[inside], (batch.labels + heads["ranking"].logits.sigmoid())[inside] / 2)
    torch.testing.assert_close(total, mixed.total)
    total.sum().backward()
    mixed.total.sum().backward()
    torch.testing.assert_close(logits.grad, by_hand.grad)


def test_of_a_weighted_task_the_two_halves_weigh_the_label_alone():
    batch, logits = batch_of(watched=8.0), logits_of(0.7, -0.2, 1.5, -2.0)
    heads, s = outputs_of(logits), torch.tensor([0.7, -0.2])
    halves = [
        compute(objective(head="pre_ranking", space=("exposed",)), heads, batch, ["dwm"]).total / 2
        for objective in (Binary, Distillation)
    ]
    p = heads["ranking"].logits[:2, 0].sigmoid()
    y = torch.tensor([1.0, 0.0])
    expected = -((8 * y + p) / 2 * s.sigmoid().log() + (1 - y + 1 - p) / 2 * (-s).sigmoid().log()).sum()
    torch.testing.assert_close(sum(halves).squeeze(), expected)


IN_THE_SOFTMAX = {
    "positive": {"space": ("random",), "shown_weight": 1.0},
    "ignored": {"space": ("random",), "shown_weight": 0.0},
    "negative": {"space": ("in_batch", "random"), "shown_weight": 0.0},
}
IN_PAIRS = {
    "positive": {"space": ("random",), "winners": ("exposed",)},
    "ignored": {"space": ("random",), "winners": ("positive",)},
    "negative": {"space": ("random", "exposed_neg"), "winners": ("positive",)},
}
ROLES = [
    *((MultiClass, "retrieval", role, settings) for role, settings in IN_THE_SOFTMAX.items()),
    *((Pairwise, "retrieval", role, settings) for role, settings in IN_PAIRS.items()),
    *((AdaptiveContrastive, "pre_ranking", role, settings) for role, settings in IN_PAIRS.items()),
]


@pytest.mark.parametrize(("loss", "head", "role", "settings"), ROLES)
def test_what_was_shown_but_not_clicked_is_pushed_as_its_role_says(
    loss: type[Objective], head: str, role: str, settings: dict[str, object]
):
    logits = logits_of(0.7, -0.2, 1.5, -2.0)
    compute(loss(head=head, **settings), outputs_of(logits), batch_of(), ["click"]).total.sum().backward()
    push = -logits.grad[:, 0].sign()
    assert push[IGNORED] == {"positive": 1, "ignored": 0, "negative": -1}[role]
    assert (push[CLICKED], push[RANDOM], push[RANKED]) == (1, -1, 0)
