"""Objectives: what they select, against masks and tensors picked by hand."""

from __future__ import annotations

import dataclasses
import itertools
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

import losses
from joint.errors import UserError
from joint.objectives import (
    AdaptiveContrastive,
    Binary,
    Distillation,
    ExpectedL0,
    Imitation,
    MultiClass,
    Pairwise,
    compute,
    head_spaces,
)
from joint.outputs import HeadOutput, Pool
from joint.schema import STAGES, Stage
from joint.spaces import priorities, space_mask
from joint.task import build_task
from towers.mixtures import set_step

TASKS = ("click", "like")
# Two requests: shown and liked, shown and ignored, shown but unknown, ranked only | random, pre-rank negative, shown.
STAGES_LOGGED = [
    Stage.EXPOSED | Stage.RANKED | Stage.RANK_POS,
    Stage.EXPOSED | Stage.RANKED,
    Stage.EXPOSED,
    Stage.RANKED | Stage.RANK_NEG,
    Stage.RANDOM,
    Stage.PRERANK_NEG,
    Stage.EXPOSED,
]
POSITIVE = [[1, 1], [0, 0], [0, 0], [0, 0], [0, 0], [0, 0], [1, 0]]
EXCLUDED = torch.tensor([[0, 4], [1, 0], [1, 1]])  # (request, column)
OBSERVED = [[1, 1], [1, 1], [0, 1], [1, 1], [1, 1], [1, 1], [1, 1]]


def batch_of() -> SimpleNamespace:
    """The fields of a batch that objectives read."""
    positive = torch.tensor(POSITIVE, dtype=torch.bool)
    return SimpleNamespace(
        stages=torch.tensor([int(s) for s in STAGES_LOGGED]),
        positive=positive,
        observed=torch.tensor(OBSERVED, dtype=torch.bool),
        labels=positive.float(),
        weight=torch.ones(7, 2),
        weighted=torch.zeros(2, dtype=torch.bool),
        offsets=torch.tensor([0, 4, 7]),
        row=torch.tensor([0, 0, 0, 0, 1, 1, 1]),
        item=torch.tensor([2, 0, 3, 1, 4, 3, 2]) + 10,
    )


def outputs_of(*, computed: Tensor | None = None) -> dict[str, HeadOutput]:
    """Random outputs of all heads, with gradients."""
    draw = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw).requires_grad_()

    everywhere = torch.ones(7, dtype=torch.bool)
    log_q = torch.tensor([0.0, 0, 0, 0, 0, torch.inf])  # the last is padding
    return {
        "retrieval": HeadOutput(
            normal(7, 2),
            everywhere,
            user=normal(2, 2, 3),
            pool=Pool(normal(6, 3), torch.tensor([2, 0, 3, 1, 4, 3, 2]), EXCLUDED, {"corpus": log_q}),
        ),
        "pre_ranking": HeadOutput(normal(7, 2), everywhere, features=normal(7, 4)),
        "ranking": HeadOutput(normal(7, 2), everywhere if computed is None else computed),
    }


def close(term: losses.LossTerm, expected: losses.LossTerm) -> None:
    torch.testing.assert_close(tuple(term), tuple(expected))


@pytest.mark.parametrize(
    ("token", "click", "like"),
    [
        ("exposed", [0, 1, 6], [0, 1, 2, 6]),
        ("positive", [0, 6], [0]),
        ("exposed_neg", [1], [1, 2, 6]),
        ("ranked", [3], [3]),  # a stage leaves the exposed out
        ("rank_pos", [], []),
        ("rank_neg", [3], [3]),
        ("random", [4], [4]),
        ("matching_ns", [4], [4]),
        ("pre_ranking_ns", [5], [5]),
        ("ranking_ns", [3], [3]),
    ],
)
def test_the_candidates_of_a_space(token, click, like):
    mask = space_mask([token], batch_of(), torch.tensor([0, 1]))
    assert [column.nonzero().flatten().tolist() for column in mask.T] == [click, like]
    assert torch.equal(space_mask([token], batch_of(), torch.tensor([1]))[:, 0], mask[:, 1])


def test_a_space_is_the_union_of_its_tokens():
    everything = [name for name in STAGES if name != "exposed"]
    tasks = torch.tensor([0, 1])
    for first, second in itertools.pairwise(["exposed", *everything]):
        union = space_mask([first, second], batch_of(), tasks)
        parts = [space_mask([token], batch_of(), tasks) for token in (first, second)]
        assert torch.equal(union, parts[0] | parts[1])
    assert not space_mask([], batch_of(), tasks).any()


def test_binary_sees_its_space_and_tasks_and_only_computed_candidates():
    batch = batch_of()
    computed = torch.tensor([1, 1, 1, 0, 1, 1, 0], dtype=torch.bool)
    objective = Binary(head="ranking", space=("exposed", "ranked"), positive_weight=3.0)
    heads = outputs_of(computed=computed)
    rows = {"click": [0, 1], "like": [0, 1, 2]}
    for index, task in enumerate(TASKS):
        expected = losses.binary(
            heads["ranking"].logits[rows[task], index], batch.labels[rows[task], index], positive_weight=3.0
        )
        term = compute(objective, heads, batch, TASKS)
        close(losses.LossTerm(term.total[index], term.count[index]), expected)
        only = Binary(head="ranking", space=objective.space, positive_weight=3.0, tasks=(task,))
        close(compute(only, heads, batch, TASKS), losses.LossTerm(*(x.unsqueeze(0) for x in expected)))
    reversed_ = Binary(head="ranking", space=objective.space, positive_weight=3.0, tasks=("like", "click"))
    assert torch.equal(
        compute(reversed_, heads, batch, TASKS).total, compute(objective, heads, batch, TASKS).total.flip(0)
    )


def test_distillation_gives_the_teacher_no_gradient_and_needs_both_heads():
    computed = torch.tensor([1, 0, 1, 1, 1, 1, 1], dtype=torch.bool)
    heads = outputs_of(computed=computed)
    objective = Distillation(head="pre_ranking", space=("exposed",), temperature=2.0, tasks=("like",))
    term = compute(objective, heads, batch_of(), TASKS)
    student, teacher = heads["pre_ranking"].logits, heads["ranking"].logits
    expected = losses.distillation(student[[0, 2, 6], 1], teacher[[0, 2, 6], 1], temperature=2.0)
    close(term, losses.LossTerm(expected.total.unsqueeze(0), expected.count.unsqueeze(0)))
    term.total.sum().backward()
    assert teacher.grad is None
    assert student.grad[:, 0].count_nonzero() == 0
    assert student.grad[:, 1].nonzero().flatten().tolist() == [0, 2, 6]


def test_multi_class_is_a_softmax_over_the_eligible_items_of_each_impression():
    batch, heads = batch_of(), outputs_of()
    objective = MultiClass(head="retrieval", space=("corpus",), shown_weight=0.25)
    term = compute(objective, heads, batch, TASKS)
    user, corpus = heads["retrieval"].user, heads["retrieval"].pool.vectors
    excluded = {(0, 4), (1, 0), (1, 1)}
    for index, shown in enumerate([[0, 1, 6], [0, 1, 2, 6]]):
        total = torch.zeros(())
        for n in shown:
            request, item = int(batch.row[n]), int(heads["retrieval"].pool.target[n])
            columns = [c for c in range(5) if (request, c) not in excluded or c == item]  # 5 is padding
            scores = user[request, index] @ corpus[columns].T
            loss = scores.logsumexp(0) - scores[columns.index(item)]
            total = total + (1.0 if batch.positive[n, index] else 0.25) * loss
        torch.testing.assert_close(term.total[index], total)
        assert term.count[index] == len(shown)
    one = compute(MultiClass(head="retrieval", space=("corpus",), tasks=("like",)), heads, batch, TASKS)
    assert one.count.tolist() == [4]


def test_an_impression_outside_the_pool_is_no_unit_of_a_softmax():
    batch, heads = batch_of(), outputs_of()
    objective = MultiClass(head="retrieval", space=("corpus",))
    whole = compute(objective, heads, batch, TASKS)
    heads["retrieval"].pool.target[6] = -1
    without = compute(objective, heads, batch, TASKS)
    assert (whole.count - without.count).tolist() == [1, 1]


def test_a_weighted_task_weighs_its_positives_by_their_value():
    batch, heads = batch_of(), outputs_of()
    batch.weighted[1] = True
    batch.weight[0, 1] = 7.5
    term = compute(Binary(head="ranking", space=("exposed",), positive_weight=2.0), heads, batch, TASKS)
    s = heads["ranking"].logits[:, 1]
    expected = -15 * s[0].sigmoid().log() - sum((-s[n]).sigmoid().log() for n in (1, 2, 6))
    torch.testing.assert_close(term.total[1], expected)
    like = compute(MultiClass(head="retrieval", space=("corpus",), tasks=("like",)), heads, batch, TASKS)
    user, corpus = heads["retrieval"].user[0, 1], heads["retrieval"].pool.vectors[[0, 1, 2, 3]]  # 4 is not eligible
    torch.testing.assert_close(like.total[0], -7.5 * (corpus @ user).log_softmax(0)[2])  # what was merely shown: 0
    assert like.count.tolist() == [4]


def test_the_penalty_of_open_gates():
    heads = outputs_of()
    heads["ranking"].expected_l0 = torch.tensor(3.25, requires_grad=True)
    term = compute(ExpectedL0(head="ranking"), heads, batch_of(), TASKS)
    assert (term.total.tolist(), term.count.tolist()) == ([3.25], [1.0])
    term.total.sum().backward()
    assert heads["ranking"].expected_l0.grad == 1


def test_adaptive_contrastive_sets_winners_against_the_space():
    batch, heads = batch_of(), outputs_of()
    settings = {"temperature": 0.5, "delta": 2.0, "adaptive": False}
    objective = AdaptiveContrastive(head="pre_ranking", space=("exposed_neg", "ranked", "pre_ranking_ns"), **settings)
    term = compute(objective, heads, batch, TASKS)
    against = {("click", 0): [1, 3], ("like", 0): [1, 2, 3], ("click", 6): [5]}
    totals, s = {"click": torch.zeros(()), "like": torch.zeros(())}, heads["pre_ranking"].logits / 0.5
    for (task, winner), losers in against.items():
        column = TASKS.index(task)
        hardest = s[losers, column].exp().sum() * 2.0
        totals[task] = totals[task] - (s[winner, column].exp() / (s[winner, column].exp() + hardest)).log()
    torch.testing.assert_close(term.total, torch.stack([totals["click"], totals["like"]]))
    assert term.count.tolist() == [2, 1]
    adaptive = compute(AdaptiveContrastive(head="pre_ranking", space=("random",)), heads, batch, TASKS)
    weighted = losses.adaptive_contrastive(
        heads["pre_ranking"].logits,
        batch.positive,
        torch.tensor([0, 0, 0, 0, 1, 0, 0], dtype=torch.bool)[:, None].expand(-1, 2),
        heads["pre_ranking"].features,
        batch.offsets,
    )
    close(adaptive, weighted)


def pairs_by_hand(s, priority, winners, losers, weight=None):
    """Total and count over the pairs of one request."""
    pairs = [(i, j) for i in winners for j in losers if priority[i] > priority[j]]
    return sum((weight or {}).get(i, 1.0) * torch.nn.functional.softplus(s[j] - s[i]) for i, j in pairs), len(pairs)


def test_pairs_follow_the_priorities_of_fs_ltr():
    batch, heads = batch_of(), outputs_of()
    s = heads["pre_ranking"].logits
    assert priorities(batch, torch.tensor([0, 1])).T.tolist() == [[6, 5, 5, 3, 0, 1, 6], [6, 5, 5, 3, 0, 1, 5]]
    objective = Pairwise(head="pre_ranking", space=("exposed", "ranked", "random", "prerank_neg"))
    term = compute(objective, heads, batch, TASKS)
    first, second = {"click": [0, 1, 3], "like": [0, 1, 2, 3]}, [4, 5, 6]  # a click on 2 is not known
    for index, task in enumerate(TASKS):
        p = priorities(batch, torch.tensor([index]))[:, 0].tolist()
        by_hand = [pairs_by_hand(s[:, index], p, own, own) for own in (first[task], second)]
        torch.testing.assert_close(term.total[index], sum(total for total, _ in by_hand))
        assert term.count[index] == sum(count for _, count in by_hand)


def test_winners_losers_and_the_weights_of_winners():
    batch, heads = batch_of(), outputs_of()
    s, p = heads["ranking"].logits[:, 1], [6, 5, 5, 3, 0, 1, 5]
    rank = Pairwise(head="ranking", space=("ranked", "prerank_neg"), winners=("positive",), tasks=("like",))
    term = compute(rank, heads, batch, TASKS)
    torch.testing.assert_close(term.total[0], pairs_by_hand(s, p, [0], [3])[0])
    assert term.count.tolist() == [1]
    weights = {"exposed": 0.5, "positive": 2.0}
    term = compute(dataclasses.replace(rank, winners=("exposed",), winner_weights=weights), heads, batch, TASKS)
    expected = [
        pairs_by_hand(s, p, w, lost, {0: 2.0, 1: 0.5, 2: 0.5, 6: 0.5}) for w, lost in (([0, 1, 2], [3]), ([6], [5]))
    ]
    torch.testing.assert_close(term.total[0], sum(total for total, _ in expected))
    assert term.count.tolist() == [4]


@pytest.mark.parametrize("loss", ["list_net", "list_mle", "soft_pairwise"])
def test_imitation_orders_the_space_as_the_teacher_does(loss):
    batch = batch_of()
    heads = outputs_of(computed=torch.tensor([1, 1, 0, 1, 1, 1, 1], dtype=torch.bool))
    objective = Imitation(loss=loss, head="pre_ranking", space=("exposed", "prerank_neg"), tasks=("like",))
    term = compute(objective, heads, batch, TASKS)
    inside, offsets = [0, 1, 5, 6], torch.tensor([0, 2, 4])  # the teacher has not scored 2
    student, teacher = heads["pre_ranking"].logits[inside, 1], heads["ranking"].logits[inside, 1]
    expected = getattr(losses, loss)(student, teacher, offsets)
    close(term, losses.LossTerm(expected.total.unsqueeze(0), expected.count.unsqueeze(0)))
    term.total.sum().backward()
    assert heads["ranking"].logits.grad is None


def test_which_head_has_to_score_what():
    objectives = [
        Binary(head="ranking", space=("exposed",)),
        Distillation(head="pre_ranking", space=("random",), teacher="ranking"),
        AdaptiveContrastive(head="pre_ranking", space=("ranked",), winners=("positive",)),
        MultiClass(head="retrieval", space=("corpus",)),
    ]
    assert head_spaces(objectives, ["retrieval", "pre_ranking", "ranking"]) == {
        "retrieval": frozenset(),
        "pre_ranking": {"random", "ranked", "positive"},
        "ranking": {"exposed", "random"},
    }
    assert head_spaces(objectives, ["pre_ranking", "ranking"], learning=True) == {
        "pre_ranking": {"random", "ranked", "positive"},
        "ranking": {"exposed"},  # random ones it scores for its student
    }


def test_the_loss_is_the_weighted_sum_of_the_means_over_units(configure, group, assemble):
    weights = ("objectives.teacher.weight=3", "objectives.negatives.weight=0")
    dropless = ("heads.retrieval.trunk.dropout=0", "heads.ranking.trunk={kind: shared_bottom, subnetworks: }")
    config = configure(*weights, *dropless, "encoders.rated_sequence.by.dropout=0")
    task, batch = build_task(assemble.plan(config), group), assemble(config)
    loss, output = task.train()(batch)
    values = output.losses
    expected = {"teacher": 3.0, "student": 1.0, "distill": 0.5, "negatives": 0.0, "retrieve": 1.0}
    for name, objective in config.objectives.items():
        term = compute(objective, output.outputs, batch, list(config.tasks))
        torch.testing.assert_close(values[name], (term.total / term.count.clamp(min=1)).sum().detach())
        assert objective.weight == expected[name]
    total = sum(weight * values[name] for name, weight in expected.items())
    torch.testing.assert_close(loss.detach(), total)
    torch.testing.assert_close(values["total"], total)
    assert values["negatives"] > 0  # said though switched off
    assert all(not value.requires_grad for value in values.values())


@pytest.mark.parametrize(
    ("objective", "wrong"),
    [
        (Binary, {"weight": -1.0}),
        (Distillation, {"temperature": 0.0}),
        (AdaptiveContrastive, {"temperature": -1.0}),
        (AdaptiveContrastive, {"delta": 0.0}),
        (AdaptiveContrastive, {"weight": float("nan")}),
    ],
)
def test_settings_that_make_no_sense_are_refused_by_name(objective, wrong):
    with pytest.raises(ValueError, match=f"^{next(iter(wrong))} "):
        objective(head="pre_ranking", space=("random",), **wrong)


def test_a_loss_that_is_not_finite_is_named_before_the_backward_pass(configure, group, assemble):
    config = configure()
    task, batch = build_task(assemble.plan(config), group).train(), assemble(config)
    set_step(task, 0)
    for name, parameter in task.named_parameters():
        if "heads.retrieval.item" in name:
            parameter.data.fill_(torch.inf)
    with pytest.raises(UserError, match=r"^loss of retrieve is not finite"):
        task(batch)


# --- a logged teacher -----------------------------------------------------------------------------------------------


def scored_batch(*missing: tuple[int, int]) -> SimpleNamespace:
    batch = batch_of()
    batch.scores = torch.randn(7, 2, generator=torch.Generator().manual_seed(1))
    for place in missing:
        batch.scores[place] = torch.nan
    return batch


def test_a_logged_teacher_teaches_what_it_has_scored():
    batch, outputs = scored_batch((1, 0), (4, 0), (4, 1)), outputs_of()
    objective = Distillation(head="pre_ranking", space=("exposed", "random"), teacher="logged")
    assert set(head_spaces([objective], ("pre_ranking", "ranking"))["ranking"]) == set()  # no head has to be run for it
    term = compute(objective, outputs, batch, TASKS)
    logits = outputs["pre_ranking"].logits
    for task, chosen in enumerate(([0, 6], [0, 1, 2, 6])):  # of task 0 candidate 1 has no score, and 2 is not observed
        p = batch.scores[chosen, task].sigmoid()
        expected = torch.nn.functional.binary_cross_entropy_with_logits(logits[chosen, task], p, reduction="sum")
        assert term.count[task] == len(chosen)
        torch.testing.assert_close(term.total[task], expected)
    term.total.sum().backward()
    assert logits.grad.isfinite().all()
    assert not logits.grad[4].any()


@pytest.mark.parametrize("loss", ["list_net", "list_mle", "soft_pairwise"])
def test_an_imitation_leaves_out_what_the_logged_teacher_has_not_scored(loss):
    objective = Imitation(head="pre_ranking", loss=loss, space=("exposed", "ranked"), teacher="logged")
    outputs = outputs_of()
    found = compute(objective, outputs, scored_batch((1, 1)), TASKS)
    rest = [0, 2, 3, 6]  # candidate 1 lacks the score of a task, 4 and 5 are outside of the space
    batch, logits = scored_batch(), outputs["pre_ranking"].logits
    expected = getattr(losses, loss)(logits[rest], batch.scores[rest], torch.tensor([0, 3, 4]))
    close(found, expected)


def test_a_logged_teacher_without_any_score_teaches_nothing():
    batch = scored_batch(*itertools.product(range(7), range(2)))
    objective = Distillation(head="pre_ranking", space=("exposed",), teacher="logged")
    term = compute(objective, outputs_of(), batch, TASKS)
    assert term.total.tolist() == term.count.tolist() == [0, 0]


def test_a_shuffled_logged_teacher_says_the_same_numbers_of_other_candidates(monkeypatch):
    seen = []
    monkeypatch.setattr(losses, "distillation", lambda student, teacher, **_: seen.append(teacher))
    batch = scored_batch((1, 0))
    settings = {"head": "pre_ranking", "space": ("exposed", "ranked"), "teacher": "logged", "shuffle": True}
    for seed in range(8):
        torch.manual_seed(seed)
        compute(Distillation(**settings), outputs_of(), batch, TASKS)
    plain = batch.scores.nan_to_num()
    for dealt in seen:  # among 0, 2 and 3, which it has scored for all tasks; 6 is alone in its request
        assert sorted(map(tuple, dealt[[0, 2, 3]].tolist())) == sorted(map(tuple, plain[[0, 2, 3]].tolist()))
        assert torch.equal(dealt[[1, 4, 5, 6]], plain[[1, 4, 5, 6]])
    assert len({tuple(dealt[:, 0].tolist()) for dealt in seen}) > 1
