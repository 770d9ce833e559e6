"""Whether two heads agree on every task and yet not on the whole; and on which candidates they agree."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from joint.evaluating.alignment import fusion_inconsistency, to_the_teacher
from joint.evaluating.logged_metrics import against_negatives
from joint.metrics import kendall_by_request
from joint.outputs import HeadOutput
from joint.schema import Stage

# SDCL Table 2: click, interaction, watch time of three items, fused by their sum.
PRE_RANKING = torch.tensor([[0.4, 0.01, 6.2], [0.5, 0.02, 5.8], [0.6, 0.03, 5.5]])
RANKING = torch.tensor([[0.2, 0.01, 7.7], [0.5, 0.02, 7.5], [0.8, 0.03, 7.3]])


def test_the_three_items_of_the_paper_agree_on_every_task_and_on_no_pair_when_fused() -> None:
    fused = PRE_RANKING.sum(1), RANKING.sum(1)
    torch.testing.assert_close(fused[0], torch.tensor([6.61, 6.32, 6.13]))
    torch.testing.assert_close(fused[1], torch.tensor([7.91, 8.02, 8.13]))
    found = fusion_inconsistency(PRE_RANKING, RANKING, *fused, torch.tensor([0, 3]))
    assert (found.total.tolist(), found.count.tolist()) == ([1.0], [1.0])
    assert all(kendall_by_request(PRE_RANKING[:, t], RANKING[:, t], torch.tensor([0, 3])).value == 0 for t in range(3))


def by_hand(a: np.ndarray, b: np.ndarray, x: np.ndarray, y: np.ndarray) -> float:
    found = 0.0
    pairs = list(itertools.combinations(range(len(x)), 2))
    for i, j in pairs:
        if (np.sign(a[i] - a[j]) == np.sign(b[i] - b[j])).all():
            found += abs(np.sign(x[i] - x[j]) - np.sign(y[i] - y[j])) / 2
    return found / len(pairs)


@pytest.mark.parametrize("grid", [3, 1000])  # many ties, and hardly any
def test_pairs_one_by_one(grid: int) -> None:
    rng = np.random.default_rng(0)
    lengths = [0, 1, 2, 7, 40, 0, 3, 90, 1]
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    a = rng.integers(0, grid, (offsets[-1], 2)).astype(float)
    b = a + rng.integers(0, max(grid // 2, 2), a.shape)
    x, y = a @ [1.0, 1.0], b @ [1.0, 0.2]
    found = fusion_inconsistency(*map(torch.from_numpy, (a, b, x, y, offsets)))
    spans = list(itertools.pairwise(offsets.tolist()))
    expected = [by_hand(a[i:j], b[i:j], x[i:j], y[i:j]) if j - i > 1 else 0.0 for i, j in spans]
    np.testing.assert_allclose(found.total, expected)
    assert found.count.tolist() == [float(j - i > 1) for i, j in spans]
    assert sum(expected) > 0
    reverse = kendall_by_request(*map(torch.from_numpy, (x, y, offsets)))
    assert (found.total <= reverse.total + 1e-12).all()  # it is a part of the fused reverse rate
    # Only orders count, and no order of the candidates.
    curved = fusion_inconsistency(*map(torch.from_numpy, (np.exp(a / grid), b**3, x - 7, 2 * y, offsets)))
    np.testing.assert_allclose(curved.total, expected)
    mixed = np.concatenate([rng.permutation(np.arange(i, j)) for i, j in spans])
    other = fusion_inconsistency(*map(torch.from_numpy, (a[mixed], b[mixed], x[mixed], y[mixed], offsets)))
    np.testing.assert_allclose(other.total, expected)


def test_one_head_with_itself_is_consistent() -> None:
    offsets = torch.tensor([0, 3])
    assert fusion_inconsistency(RANKING, RANKING, *[RANKING.sum(1)] * 2, offsets).value == 0


STAGES = torch.tensor([int(Stage.EXPOSED)] * 3 + [int(Stage.RANKED)] * 2 + [int(Stage.COARSE_NEG)] * 2)
STUDENT = torch.tensor([7.0, 6, 5, 4, 3, 2, 1])
TEACHER = torch.tensor([7.0, 6, 5, 1, 2, 3, 4])


def log_of(stages: Tensor, positive: list[int]) -> Any:
    """One request of a task."""
    chosen = torch.zeros(len(stages), 1, dtype=torch.bool)
    chosen[positive] = True
    return SimpleNamespace(stages=stages, offsets=torch.tensor([0, len(stages)]), positive=chosen)


def output_of(scores: Tensor) -> HeadOutput:
    return HeadOutput(scores[:, None], torch.ones(len(scores), dtype=torch.bool))


def test_overlap_among_exposures_and_among_the_others() -> None:
    outputs = {"pre_ranking": output_of(STUDENT), "ranking": output_of(TEACHER)}
    scores = {"pre_ranking": STUDENT, "ranking": TEACHER}
    config: Any = SimpleNamespace(tasks={"view": None}, evaluation=SimpleNamespace(k=(2, 3)))
    schema: Any = SimpleNamespace(stages=("exposed", "ranked", "coarse_neg"), input_space={"ranking": ("ranked",)})
    found = dict(to_the_teacher(config, schema, log_of(STAGES, [0]), outputs, scores))
    name = "alignment/teacher/overlap@{}/pre_ranking"
    assert found[name.format(2)].value == 1
    assert found[name.format(2) + "/exposed"].value == 1
    assert found[name.format(2) + "/unexposed"].value == 0  # 4, 3 against 3, 4 of the last four
    assert found[name.format(3) + "/unexposed"].value == pytest.approx(2 / 3)
    assert found[name.format(3) + "/exposed"].count.tolist() == [0]  # three of three would say nothing
    # Of the ten pairs of what entered ranking the two of stage `ranked` are the only ones that the heads order apart.
    assert found["alignment/reverse_rate/fused/entered_ranking"].value == pytest.approx(1 / 10)
    assert found["alignment/reverse_rate/fused"].value == pytest.approx(6 / 21)
    schema.stages, schema.input_space = ("exposed",), {}
    assert not [n for n in dict(to_the_teacher(config, schema, log_of(STAGES, [0]), outputs, scores)) if "exposed" in n]


def test_positives_against_every_kind_of_negatives() -> None:
    batch, config = log_of(STAGES, [1]), SimpleNamespace(tasks={"view": None})
    outputs = {"ranking": output_of(torch.tensor([9.0, 3, 9, 3, 1, 4, 5]))}
    found = {name: state.value for name, state in against_negatives(config, batch, outputs, batch, outputs)}  # type: ignore[arg-type]
    assert found == {"ranking/auc/view/ranking_ns": 0.75, "ranking/auc/view/pre_ranking_ns": 0.0}
    drawn = log_of(torch.full((4,), int(Stage.RANDOM)), [])
    others = {"ranking": output_of(torch.tensor([1.0, 2, 2.5, 4]))}
    found = {name: state.value for name, state in against_negatives(config, batch, outputs, drawn, others)}  # type: ignore[arg-type]
    assert found == {"ranking/auc/view/matching_ns": 0.75}
