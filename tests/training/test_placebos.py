"""Placebos keep what a method costs and the numbers it uses, and take away what they are about."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy import stats

import losses
from joint.data.eligibility import Eligibility
from joint.data.ragged import Ragged, draw, offsets_of
from joint.data.requests import Requests
from joint.data.sampling import Candidates, shuffle_stages
from joint.experiment import Data
from joint.objectives import AdaptiveContrastive, Distillation, Imitation, ResidualLoss, compute
from joint.outputs import HeadOutput
from joint.schema import Stage

REQUESTS, EACH, TASKS = 6, 9, ("click", "like")
ROW = torch.arange(REQUESTS).repeat_interleave(EACH)
OFFSETS = torch.arange(REQUESTS + 1) * EACH


def batch_of() -> SimpleNamespace:
    """Per request one positive exposure, two other exposures and six ranked candidates."""
    exposed = torch.arange(EACH) < 3
    flags = torch.where(exposed, int(Stage.EXPOSED), int(Stage.RANKED)).repeat(REQUESTS)
    positive = (torch.arange(EACH) < 1).repeat(REQUESTS)[:, None].expand(-1, 2)
    return SimpleNamespace(
        stages=flags,
        positive=positive,
        observed=torch.ones(REQUESTS * EACH, 2, dtype=torch.bool),
        labels=positive.float(),
        weight=torch.ones(REQUESTS * EACH, 2),
        offsets=OFFSETS,
        row=ROW,
        item=torch.arange(REQUESTS * EACH),
    )


def outputs_of() -> dict[str, HeadOutput]:
    generator = torch.Generator().manual_seed(0)
    everywhere = torch.ones(len(ROW), dtype=torch.bool)
    student = HeadOutput(torch.randn(len(ROW), 2, generator=generator).requires_grad_(), everywhere)
    student.features = torch.randn(len(ROW), 5, generator=generator)
    return {"pre_ranking": student, "ranking": HeadOutput(torch.randn(len(ROW), 2, generator=generator), everywhere)}


@pytest.mark.parametrize("kind", ["distillation", "soft_pairwise"])
def test_a_shuffled_teacher_says_the_same_numbers_of_other_candidates(kind, monkeypatch):
    seen = []
    original = getattr(losses, kind)

    def spy(student, teacher, *arguments, **settings):
        seen.append(teacher)
        return original(student, teacher, *arguments, **settings)

    monkeypatch.setattr(losses, kind, spy)
    batch, heads = batch_of(), outputs_of()
    for shuffle in (False, True, True):
        settings = {"head": "pre_ranking", "space": ("ranked",), "shuffle": shuffle}
        objective = Distillation(**settings) if kind == "distillation" else Imitation(loss=kind, **settings)
        compute(objective, heads, batch, TASKS)
    inside = (batch.stages & int(Stage.RANKED)) != 0
    plain, first, second = (t if len(t) < len(ROW) else t[inside] for t in seen)
    assert not torch.equal(first, plain)
    assert not torch.equal(first, second)
    for request in range(REQUESTS):
        own = slice(request * 6, (request + 1) * 6)
        assert sorted(map(tuple, first[own].tolist())) == sorted(map(tuple, plain[own].tolist()))


def test_a_shuffled_residual_has_the_same_labels_of_other_candidates(monkeypatch):
    seen = []
    original = losses.binary

    def spy(logits, labels, *, positive_weight, mask):
        seen.append((labels, positive_weight, mask))
        return original(logits, labels, positive_weight=positive_weight, mask=mask)

    monkeypatch.setattr(losses, "binary", spy)
    batch, heads = batch_of(), outputs_of()
    batch.weight = torch.where(batch.positive, 2.0 + batch.item[:, None], 1.0)
    heads["ranking"].corrected, heads["ranking"].special = heads["ranking"].logits, batch.row != 1
    for shuffle in (False, True, True):
        compute(ResidualLoss(head="ranking", space=("exposed", "ranked"), shuffle=shuffle), heads, batch, TASKS)
    (labels, weight, mask), *dealt = seen
    assert labels.equal(batch.labels)
    assert not dealt[0][0].equal(dealt[1][0])
    for found, weighed, same in dealt:
        assert same.equal(mask)
        assert not found.equal(labels)
        assert found[9:18].equal(labels[9:18])  # another user's stay as they are
        assert torch.equal(weighed > 1, found > 0)  # a label keeps its weight
        assert weighed.unflatten(0, (REQUESTS, EACH)).sum(1).equal(weight.unflatten(0, (REQUESTS, EACH)).sum(1))


def test_shuffled_weights_are_the_same_weights():
    batch, heads = batch_of(), outputs_of()
    objective = AdaptiveContrastive(head="pre_ranking", space=("ranked",), shuffle=True)
    torch.manual_seed(0)
    term = compute(objective, heads, batch, TASKS)
    plain = compute(AdaptiveContrastive(head="pre_ranking", space=("ranked",)), heads, batch, TASKS)
    assert not torch.allclose(term.total, plain.total)
    assert torch.equal(term.count, plain.count)
    student = heads["pre_ranking"]
    negative = ((batch.stages & int(Stage.RANKED)) != 0)[:, None].expand(-1, 2)
    alias = torch.arange(len(ROW))
    alias[3:9] = torch.tensor([8, 7, 6, 5, 4, 3])  # the first request's negatives, backwards
    arguments = (student.logits, batch.positive, negative, student.features, OFFSETS)
    found, weights = losses.adaptive_contrastive(*arguments, weigh_as=alias, return_weights=True)
    _, before = losses.adaptive_contrastive(*arguments, return_weights=True)
    first = weights.positive == 0
    assert torch.equal(weights.similarity[first], before.similarity[first].unflatten(0, (2, 6)).flip(1).flatten())
    assert torch.equal(weights.confidence[first], before.confidence[first].unflatten(0, (2, 6)).flip(1).flatten())
    assert torch.equal(weights.similarity[~first], before.similarity[~first])
    s = student.logits[:EACH, 1].double()
    w = (before.similarity + before.confidence)[first][6:].flip(0).double()
    expected = -torch.log(s[0].exp() / (s[0].exp() + (w * s[3:9].exp()).sum()))
    rest, kept = losses.adaptive_contrastive(*(x[EACH:] for x in arguments[:4]), OFFSETS[:-1], return_weights=True)
    assert len(kept.task) == 2 * 6 * (REQUESTS - 1)
    torch.testing.assert_close((found.total - rest.total)[1].double(), expected, rtol=1e-4, atol=1e-4)


def log_of(count: int) -> Candidates:
    """`count` requests of eight candidates; the first two exposed."""
    flags = np.tile(np.array([512, 512, 8, 8, 4, 4, 2, 2], np.uint16), count)
    items = Ragged(np.arange(8 * count), offsets_of(np.full(count, 8)))
    return Candidates(items, flags, {"click": np.arange(8 * count, dtype=np.float32)})


def test_shuffled_stages_stay_in_their_request_and_off_exposures():
    log, keys = log_of(2000), draw(0, 0, np.arange(2000))
    found = shuffle_stages(log, keys)
    stages = found.stages.reshape(-1, 8)
    assert (stages[:, :2] == 512).all()
    assert (np.sort(stages[:, 2:], axis=1) == [2, 2, 4, 4, 8, 8]).all()
    counts = np.stack([(stages[:, 2:] == flag).sum(axis=0) for flag in (8, 4, 2)])
    assert stats.chi2_contingency(counts).pvalue > 1e-3  # every place gets every stage alike
    assert found.items is log.items
    assert found.labels is log.labels
    alone = shuffle_stages(Candidates(log.items.take(np.array([7])), log.stages[56:64], {}), keys[7:8])
    np.testing.assert_array_equal(alone.stages, stages[7])


class Log:
    """A dataset whose training log holds item i as a ranked candidate i times; item 4 joins late."""

    def __init__(self) -> None:
        self.schema = SimpleNamespace(items=5)
        self.first_day = {"": np.array([0, 0, 0, 0, 9], np.int32)}

    def parts(self, splits):
        assert splits == ("train",)
        return {"2024-01-01": ["one"]}

    def read(self, part) -> Requests:
        items = Ragged(np.repeat(np.arange(5), np.arange(5)), np.array([0, 10]))
        return Requests({"candidates": items, "stages": items.with_values(np.full(10, 8, np.uint16))})


def test_popular_random_items_are_as_frequent_as_in_the_log():
    eligibility = Eligibility(Log(), Data(path="", candidates={}, random_by="popularity"))  # type: ignore[arg-type]
    requests = Requests({"day": np.zeros(3000, np.int32)})
    nothing = Ragged(np.zeros(0, np.int64), np.zeros(3001, np.int64))
    drawn = eligibility.random(requests, 4, draw(0, 0, np.arange(3000)), but=nothing)
    counts = np.bincount(drawn.values, minlength=5)
    assert counts[[0, 4]].tolist() == [0, 0]
    assert stats.chisquare(counts[1:4], counts.sum() * np.array([1, 2, 3]) / 6).pvalue > 1e-3


def test_a_run_of_placebos_trains(configure, assemble, group):
    config = configure("data.shuffle_stages=true", "data.random_by=popularity", "objectives.distill.shuffle=true")
    batch = assemble(config)
    assert (batch.stages == int(Stage.RANDOM)).sum() > 10
    with pytest.raises(Exception, match="deals the weights of all tasks alike"):
        configure("objectives.negatives.shuffle=true")
