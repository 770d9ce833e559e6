"""What heads cost, by hand."""

import pytest

from joint.cost import cost_numbers, head_costs
from joint.model import JointModel

PLAIN = (
    "encoders={liked_mean: {history: liked, features: [item_id, genres], length: 6, by: {kind: mean}}, "
    "rated_sequence: , rated_attention: {history: rated, features: [item_id], length: 6, "
    "by: {kind: target_attention, hidden: [8]}}}",
    "heads.retrieval.features=[user_id, liked_mean, item_id, genres]",
    "heads.ranking.trunk={kind: shared_bottom, hidden: [12], subnetworks: }",
    "heads.pre_ranking.trunk={kind: shared_bottom, hidden: [10], experts: }",
)
USER, LIKED, ITEM, GENRES, GENDER, TASKS = 8, 16, 8, 8, 4, 2


@pytest.fixture
def costs(configure, assemble):
    """Overrides -> the costs of the heads."""
    return lambda *overrides: head_costs(JointModel(assemble.plan(configure(*PLAIN, *overrides))))


def test_retrieval_pays_once_a_request_once_an_item_and_a_product_a_candidate(costs):
    found = costs()["retrieval"]
    request = USER + LIKED
    assert found.request == request * 16 + TASKS * 16 * 8
    assert found.item == (ITEM + GENRES) * 12 + 12 * 8
    assert found.candidate == TASKS * 8
    assert found.parameters == (request + 1) * 16 + TASKS * 17 * 8 + 17 * 12 + 13 * 8


def test_a_two_tower_student_gates_each_side(costs):
    found = costs()["pre_ranking"]
    request = USER + GENDER + LIKED

    def side(width: int) -> int:  # two layers of the gate, the gating, the trunk and a vector a task
        return 2 * width * width + 2 * width + width * 10 + TASKS * 10 * 8

    assert found.request == side(request)
    assert found.item == side(ITEM)
    assert found.candidate == TASKS * 8


def test_a_joint_student_pays_everything_for_each_candidate(costs):
    found = costs("heads.pre_ranking.kind=mlp")["pre_ranking"]
    width = USER + GENDER + LIKED + ITEM
    assert found.item == 0
    assert found.candidate == 2 * width * width + 2 * width + width * 10 + TASKS * 10
    assert found.request == 0


def test_the_teachers_first_layer_is_factored_and_attention_is_for_each_candidate(costs):
    without = costs("heads.ranking.features=[user_id, gender, liked_mean, item_id, genres]")["ranking"]
    assert without.request == (USER + GENDER + LIKED) * 12
    assert without.candidate == (ITEM + GENRES) * 12 + TASKS * (12 * 6 + 6)
    attending = costs()["ranking"]
    events = 6
    # Each event's own layer on the candidate, the layer after it, and the weighted sum.
    assert attending.candidate - without.candidate - ITEM * 12 == events * (ITEM * 8 + 8 + ITEM)
    assert attending.parameters - without.parameters == ITEM * 12 + (4 * ITEM + 1) * 8 + 8 + 1


def test_numbers_for_the_log(costs):
    found = costs()
    numbers = cost_numbers(found)
    assert numbers["cost/ranking/candidate"] == found["ranking"].candidate
    assert len(numbers) == 3 * 4
