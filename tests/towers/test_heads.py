"""The three heads: against their formulas, with every gate and interaction, degenerate batches, bfloat16, export."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from towers.gate import Gate
from towers.interactions import Bilinear, DcnV2, Interaction, Pnn
from towers.mixtures import Mmoe, SharedBottom, Snr, WideAndDeep, build_trunk, set_step
from towers.pre_ranking import MlpHead, PreRanking, TwoTowerHead, build_pre_ranking
from towers.ranking import Ranking, RankingHead
from towers.retrieval import Retrieval, RetrievalHead

REQUEST = {"user": 4, "age": 2, "liked": 3}
ITEM = {"item": 4, "genres": 3}
ROW = torch.tensor([0, 0, 2, 2, 2, 3])  # four requests; request 1 has no candidate
TRUNK = SharedBottom(hidden=(8, 5))
EVERYTHING: dict[str, Any] = {"features": (), "trunk": Mmoe(experts=2, hidden=(8, 5))}
PRIOR = Gate(prior=("user", "item"))
USER_PRIOR = Gate(prior=("user", "age"), reads_input=False)

RETRIEVAL = [
    Retrieval(**EVERYTHING, dim=4),
    Retrieval(**EVERYTHING, dim=4, similarity="cosine", temperature=0.1, item_hidden=(6,), task_hidden=(6, 3)),
    Retrieval(**EVERYTHING, dim=4, gate=USER_PRIOR, interaction=Pnn(dim=4), task_hidden=(6,)),
]
PRE_RANKING = [
    PreRanking(**EVERYTHING, dim=4),
    PreRanking(**EVERYTHING, dim=4, gate=None),
    PreRanking(**EVERYTHING, dim=4, gate=PRIOR, interaction=Bilinear(dim=4)),
    PreRanking(**EVERYTHING, dim=4, kind="interaction"),
    PreRanking(**EVERYTHING, dim=4, kind="interaction", gate=USER_PRIOR, interaction=Pnn(), cross_hidden=(8, 6)),
    PreRanking(**EVERYTHING, kind="mlp"),
    PreRanking(**EVERYTHING, kind="mlp", gate=PRIOR, interaction=DcnV2(rank=2)),
]
RANKING = [
    Ranking(**EVERYTHING),
    Ranking(**EVERYTHING, gate=PRIOR, task_hidden=(6,)),
    Ranking(**EVERYTHING, interaction=Pnn(dim=4)),
    Ranking(**EVERYTHING, interaction=DcnV2(), task_hidden=(6, 5), task_gate=USER_PRIOR),
    Ranking(**EVERYTHING, gate=Gate(), interaction=Bilinear(dim=4), task_hidden=(6,), task_gate=PRIOR),
    Ranking(features=(), trunk=WideAndDeep(hidden=(16, 8)), task_hidden=(6,), task_gate=Gate()),
]
Config = Retrieval | PreRanking | Ranking
HEADS: list[Config] = [*RETRIEVAL, *PRE_RANKING, *RANKING]


class Retrieved(nn.Module):
    """A retrieval head behind the call of the others."""

    def __init__(self, head: RetrievalHead) -> None:
        super().__init__()
        self.head = head

    def forward(self, request: Tensor, item: Tensor, row: Tensor) -> Tensor:
        return self.head.logits(self.head.user_vectors(request), self.head.item_vectors(item), row)


def make(config: Config, tasks: int = 3, request: dict[str, int] = REQUEST, item: dict[str, int] = ITEM) -> Any:
    torch.manual_seed(0)
    common: dict[str, Any] = {"request_fields": request, "tasks": tasks, "seed": 0}
    match config:
        case Retrieval():
            return Retrieved(RetrievalHead(config, **common, item_fields=item)).double()
        case PreRanking():
            return build_pre_ranking(config, **common, item_fields=item).double()
        case Ranking():
            return RankingHead(config, **common, candidate_fields=item).double()


def inputs() -> tuple[Any, Any]:
    torch.manual_seed(1)
    return tuple(torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((4, 9), (6, 7)))  # type: ignore[return-value]


def logits(head: Any, request: Tensor, item: Tensor, row: Tensor) -> Tensor:
    out = head(request, item, row)
    return out[0] if isinstance(out, tuple) else out


@pytest.mark.parametrize("tasks", [1, 3])
@pytest.mark.parametrize("config", HEADS)
def test_every_candidate_gets_a_logit_per_task_and_every_parameter_learns(config: Config, tasks: int) -> None:
    head, (request, item) = make(config, tasks), inputs()
    out = logits(head, request, item, ROW)
    assert out.shape == (6, tasks)
    (out * torch.randn_like(out)).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in head.parameters())
    assert (request.grad[[0, 2, 3]] != 0).all()
    assert (item.grad != 0).all()
    assert (request.grad[1] == 0).all()


@pytest.mark.parametrize("config", HEADS)
def test_candidates_and_requests_may_come_in_any_order(config: Config) -> None:
    head, (request, item) = make(config), inputs()
    out = logits(head, request, item, ROW)
    order = torch.tensor([4, 0, 5, 2, 1, 3])
    torch.testing.assert_close(logits(head, request, item[order], ROW[order]), out[order])
    requests = torch.tensor([2, 3, 1, 0])
    torch.testing.assert_close(logits(head, request[requests], item, requests.argsort()[ROW]), out)
    alone = logits(head, request[2:3], item[2:3], torch.zeros(1, dtype=torch.long))
    torch.testing.assert_close(alone, out[2:3])


@pytest.mark.parametrize("config", HEADS)
def test_no_candidates_stay_in_the_graph(config: Config) -> None:
    head, (request, item) = make(config), inputs()
    out = logits(head, request, item[:0], ROW[:0])
    assert out.shape == (0, 3)
    out.sum().backward()
    assert all(p.grad is not None and (p.grad == 0).all() for p in head.parameters())


@pytest.mark.parametrize("config", HEADS)
def test_bfloat16_autocast_of_heads(config: Config) -> None:
    head, (request, item) = make(config).float(), (x.detach().float() for x in inputs())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = logits(head, request, item, ROW)
    torch.testing.assert_close(low.float(), logits(head, request, item, ROW), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("config", HEADS)
def test_export_of_heads_with_dynamic_sizes(config: Config) -> None:
    head, (request, item) = make(config).eval(), (x.detach() for x in inputs())
    requests, count = torch.export.Dim("requests", min=1), torch.export.Dim("count", min=1)
    shapes = ({0: requests}, {0: count}, {0: count})
    program = torch.export.export(head, (request, item, ROW), dynamic_shapes=shapes).module()
    fewer = (request[:3], item[:2], torch.tensor([2, 0]))
    torch.testing.assert_close(program(*fewer), head(*fewer))


def test_fused_vectors_score_as_the_weighted_logits() -> None:
    head, (request, item) = make(RETRIEVAL[1]).head, inputs()
    user, items, weights = head.user_vectors(request), head.item_vectors(item), torch.tensor([0.7, 0.0, -2.0])
    fused = head.fused_vectors(user, weights)
    assert fused.shape == (4, 4)
    expected = head.logits(user, items, ROW) @ weights.double()
    torch.testing.assert_close((fused[ROW] * items).sum(1), expected)
    two = torch.tensor([[[1.0, 2.0], [10.0, 20.0]]])  # RRA Eq 8 with w = .25
    torch.testing.assert_close(head.fused_vectors(two, torch.tensor([0.25, 0.75])), torch.tensor([[7.75, 15.5]]))


def test_retrieval_is_gate_then_pnn_then_trunk_then_each_tasks_layers() -> None:
    config = Retrieval(features=(), trunk=TRUNK, dim=4, gate=Gate(), interaction=Pnn(dim=4), task_hidden=(6,))
    head, (request, _) = make(config).head, inputs()
    user = head.user
    x = user.first(user.interaction(user.gate(request)))
    hidden = user.trunk(x)
    first, end = user.last[0][0], user.last[1]
    for task in range(3):
        h = (hidden[:, task] @ first.weight[task] + first.bias[task]).relu()
        expected = h @ end.weight[task] + end.bias[task]
        torch.testing.assert_close(head.user_vectors(request)[:, task], expected)
    assert user.first.in_features == 9 + 3


def test_retrieval_without_towers_is_the_product_of_the_columns() -> None:
    config = Retrieval(features=(), trunk=None, dim=2, temperature=0.5)
    head = make(config, tasks=2, request={"state": 2}, item={"item": 2}).head
    user, item = torch.tensor([[1.0, 2.0], [3.0, -1.0]]), torch.tensor([[4.0, 5.0], [0.0, 1.0], [2.0, 0.0]])
    out = head.logits(head.user_vectors(user), head.item_vectors(item), torch.tensor([0, 0, 1]))
    assert out.tolist() == [[28.0, 28.0], [4.0, 4.0], [12.0, 12.0]]
    assert not list(head.parameters())


@pytest.mark.parametrize(
    "layers", [{"gate": Gate()}, {"interaction": Pnn()}, {"task_hidden": (4,)}, {"item_hidden": (4,)}]
)
def test_without_towers_there_are_no_layers(layers: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="trunk null leaves no towers for gate, interaction"):
        Retrieval(features=(), trunk=None, **layers)


@pytest.mark.parametrize("config", PRE_RANKING[:5])
def test_the_sides_of_pre_ranking_stand_alone(config: PreRanking) -> None:
    head, (request, item) = make(config), inputs()
    user, items = head.user_vectors(request), head.item_vectors(item)
    assert user.shape == (4, 3, 4)
    assert items.shape == (6, 3, 4)
    out, gated = head(request, item, ROW)
    torch.testing.assert_close(head.logits(user, items, ROW), out)
    torch.testing.assert_close(gated, head.item.gate(item))
    assert gated.shape == item.shape
    ungated = config.gate is None or config.gate == USER_PRIOR  # an item side without that prior has no gate
    assert torch.equal(gated, item) is ungated


def numpy_layers(layers: Any, task: int, x: np.ndarray) -> np.ndarray:
    """One task's hidden layers and linear end."""
    *hidden, last = ((m.weight[task].detach().numpy(), m.bias[task].detach().numpy()) for m in layers)
    for weight, bias in hidden:
        x = np.maximum(x @ weight + bias, 0)
    return x @ last[0] + last[1]


@pytest.mark.parametrize("kind", ["vector_product", "interaction"])
def test_pre_ranking_is_a_product_and_an_mlp_across_the_vectors(kind: Any) -> None:
    config = PreRanking(features=(), kind=kind, trunk=TRUNK, dim=4, cross_hidden=(6, 5))
    head, (request, item) = make(config), inputs()
    assert isinstance(head, TwoTowerHead)
    with torch.no_grad():
        head.bias.copy_(torch.tensor([1.0, -2.0, 0.5]))
    user, items = (v.detach().numpy() for v in (head.user_vectors(request)[ROW], head.item_vectors(item)))
    out, _ = head(request, item, ROW)
    for task in range(3):
        u, v = user[:, task], items[:, task]
        expected = (u * v).sum(1) + head.bias[task].item()
        if head.cross is not None:
            cross: Any = head.cross
            x = np.concatenate([u, v, u * v], axis=1)
            expected += numpy_layers([cross.first, cross.rest[0][0], cross.rest[1]], task, x)[:, 0]
        np.testing.assert_allclose(out[:, task].detach().numpy(), expected, rtol=1e-9)
    assert (head.cross is not None) is (kind == "interaction")


def test_mlp_pre_ranking_is_one_tower_over_both_sides() -> None:
    head, (request, item) = make(PRE_RANKING[6]), inputs()
    assert isinstance(head, MlpHead)
    both = torch.cat([request[ROW], item], dim=1)
    out, gated = head(request, item, ROW)
    torch.testing.assert_close(out, head.both(both).squeeze(2))
    torch.testing.assert_close(gated, head.both.gate(both)[:, 9:])


def test_each_sides_gate_reads_its_own_part_of_the_prior() -> None:
    head = make(PreRanking(features=(), trunk=TRUNK, gate=USER_PRIOR))
    assert head.user.gate.weights[0].in_features == 6  # user and age
    assert isinstance(head.item.gate, nn.Identity)  # it reads the prior alone, and that is the user's
    beside = make(PreRanking(features=(), trunk=TRUNK, gate=Gate(prior=("user", "age"))))
    assert beside.item.gate.weights[0].in_features == 7  # SDCL's gate on its own input
    both = make(PreRanking(features=(), trunk=TRUNK, gate=PRIOR))
    assert both.user.gate.weights[0].in_features == 4 + 9
    assert both.item.gate.weights[0].in_features == 4 + 7


@pytest.mark.parametrize("interaction", [None, Pnn(dim=4), Bilinear(dim=4), DcnV2()])
@pytest.mark.parametrize("gate", [None, PRIOR])
def test_the_first_layer_of_ranking_is_factored_where_it_can_be(
    gate: Gate | None, interaction: Interaction | None
) -> None:
    head, (request, item) = make(Ranking(features=(), trunk=TRUNK, gate=gate, interaction=interaction)), inputs()
    x = head.joint(torch.cat([request[ROW], item], dim=1))
    pre = x @ head.first.joint.weight.T + head.first.joint.bias
    torch.testing.assert_close(head(request, item, ROW), head.last(head.trunk(pre)).squeeze(2))
    per_candidate = gate is not None or isinstance(interaction, DcnV2)
    assert head.first.request_dim == (0 if per_candidate else 9)


def test_task_gates_weigh_the_hidden_layers_of_ranking() -> None:
    config = Ranking(features=(), trunk=TRUNK, task_hidden=(6, 5), task_gate=PRIOR)
    head, (request, item) = make(config), inputs()
    weights = [w.detach().numpy() for w in head.task_gates(request, item, ROW)]
    x = head.trunk(head.first(request, item, ROW)).detach().numpy()
    body, end = head.last
    for task in range(3):
        h = x[:, task]
        for layer, weight in zip((body[0], body[3]), weights, strict=True):
            h = np.maximum(h @ layer.weight[task].detach().numpy() + layer.bias[task].detach().numpy(), 0)
            h = h * weight[:, task]
        expected = h @ end.weight[task].detach().numpy() + end.bias[task].detach().numpy()
        np.testing.assert_allclose(head(request, item, ROW)[:, task].detach().numpy(), expected[:, 0], rtol=1e-9)


@pytest.mark.parametrize(
    "config",
    [
        Retrieval(features=(), gate=Gate(prior=("user", "city"))),
        Retrieval(features=(), gate=Gate(prior=("item",))),  # the gate is on the user's side
        PreRanking(features=(), gate=Gate(prior=("user", "city"))),
        PreRanking(features=(), kind="mlp", gate=Gate(prior=("city",))),
        Ranking(features=(), gate=Gate(prior=("item", "city"))),
        Ranking(features=(), task_hidden=(4,), task_gate=Gate(prior=("city",))),
    ],
)
def test_a_heads_prior_must_be_its_field(config: Config) -> None:
    gate = "task_gate" if isinstance(config, Ranking) and config.task_gate else "gate"
    with pytest.raises(ValueError, match=rf"^{gate}: prior (city|item) is none of the fields user"):
        make(config)


@pytest.mark.parametrize("config", [PreRanking(features=()), PreRanking(features=(), kind="mlp"), Ranking(features=())])
def test_a_field_is_on_one_side_only(config: Config) -> None:
    with pytest.raises(ValueError, match="both sides: user"):
        make(config, item={"user": 3})


@pytest.mark.parametrize(
    ("kind", "wrong"),
    [
        (Retrieval, {"task_hidden": (0,)}),
        (Retrieval, {"item_hidden": (4, -1)}),
        (Retrieval, {"dim": 0}),
        (Retrieval, {"similarity": "euclid"}),
        (Retrieval, {"temperature": 0.0}),
        (Retrieval, {"temperature": float("nan")}),
        (Retrieval, {"fusion": {"click": float("inf")}}),
        (PreRanking, {"kind": "cold"}),
        (PreRanking, {"dim": 0}),
        (PreRanking, {"cross_hidden": ()}),
        (PreRanking, {"fusion": {"click": float("nan")}}),
        (Ranking, {"task_hidden": (0,)}),
        (Ranking, {"task_gate": Gate()}),
        (Ranking, {"fusion": {"click": float("nan")}}),
    ],
)
def test_head_configs_refuse(kind: type, wrong: dict) -> None:
    with pytest.raises(ValueError, match=f"^{next(iter(wrong))}"):
        kind(features=(), **wrong)


@pytest.mark.parametrize("gate", [None, Gate()])
def test_the_first_layer_of_a_joint_student_is_factored_where_no_gate_precedes_it(gate: Gate | None) -> None:
    head, (request, item) = make(PreRanking(features=(), trunk=TRUNK, kind="mlp", gate=gate)), inputs()
    x = head.both.gate(torch.cat([request[ROW], item], dim=1))
    expected = head.both.last(head.both.trunk(head.both.first(x))).squeeze(2)
    out, gated = head(request, item, ROW)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(gated, x[:, 9:])


def test_a_retrieval_bias_is_of_training_only() -> None:
    config = Retrieval(features=(), trunk=TRUNK, dim=4, bias=True)
    head = RetrievalHead(config, request_fields=REQUEST, item_fields=ITEM, tasks=3, seed=0).double()
    request, item = inputs()
    nn.init.constant_(head.bias, 1.5)
    user, items = head.user_vectors(request), head.item_vectors(item)
    served = head.eval().logits(user, items, ROW)
    torch.testing.assert_close(head.train().logits(user, items, ROW), served + 1.5)


@pytest.mark.parametrize("mode", ["trans", "aver"])
def test_snr_trains_in_bfloat16(mode: Any) -> None:
    trunk = build_trunk(Snr(mode=mode, subnetworks=2, hidden=(8, 8)), tasks=2).bfloat16()
    set_step(trunk, 0)
    assert trunk(torch.randn(3, trunk.width).bfloat16()).dtype == torch.bfloat16
