"""Looked-up rows -> encoders -> heads -> `Outputs`: everything between the tables and the objectives."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from joint.batch import Batch
from joint.config import Encoder, heads_of
from joint.distributed import gather_rows
from joint.features import Key, Plan
from joint.outputs import HeadOutput, Outputs
from towers.embeddings import segment_mean
from towers.pre_ranking import PreRanking, build_pre_ranking
from towers.ranking import Ranking, RankingHead
from towers.retrieval import Retrieval, RetrievalHead
from towers.sequence import TargetAttention, build_encoder, to_padded

Rows = dict[str, Tensor]  # key name -> its rows: [R, D], [N, D], [P, D] or [events, D]


class HistoryEncoder(nn.Module):
    """One named encoder: a history's item features side by side, its events projected and added, then encoded."""

    def __init__(self, config: Encoder, plan: Plan) -> None:
        super().__init__()
        self.config = config
        features = [plan.schema.feature(feature) for feature in config.features]
        events = [plan.schema.feature(event) for event in config.events]
        self.item_keys = [Key("history", feature, config.history).name for feature in features]
        self.event_keys = [Key("history", event, config.history).name for event in events]
        self.target_keys = [Key("candidate", feature).name for feature in features]
        dim = sum(plan.dim(feature) for feature in features)
        self.event = nn.Linear(sum(map(plan.dim, events)), dim, bias=False) if events else None
        self.encoder = build_encoder(config.by, dim=dim)
        self.out_dim = self.encoder.out_dim
        self.per_candidate = isinstance(config.by, TargetAttention)

    def history(self, rows: Rows, batch: Batch) -> tuple[Tensor, Tensor]:
        """`[R, L, D]` and lengths `[R]`."""
        past = torch.cat([rows[key] for key in self.item_keys], dim=1)
        if self.event is not None:
            past = past + self.event(torch.cat([rows[key] for key in self.event_keys], dim=1))
        lengths = batch.lengths[self.config.history]
        return to_padded(past, lengths, self.config.length), lengths

    def forward(self, rows: Rows, batch: Batch, chosen: Tensor | None = None) -> Tensor:
        """One vector a request `[R, D]`, or one for each of the `chosen` candidates."""
        history, lengths = self.history(rows, batch)
        if not self.per_candidate:
            return self.encoder(history, lengths)
        assert chosen is not None
        target = torch.cat([rows[key] for key in self.target_keys], dim=1)
        return self.encoder(history, lengths, target[chosen], batch.row[chosen])


class JointModel(nn.Module):
    """All dense modules of a config: encoders, then the heads that read them."""

    def __init__(self, plan: Plan) -> None:
        super().__init__()
        config = plan.config
        self.plan = plan
        self.encoders = nn.ModuleDict({name: HistoryEncoder(e, plan) for name, e in plan.encoders.items()})
        self.heads = nn.ModuleDict({name: self._build(name, head) for name, head in heads_of(config).items()})

    def _build(self, name: str, head: Retrieval | PreRanking | Ranking) -> nn.Module:
        plan, seed = self.plan, self.plan.config.run.seed
        tasks = len(plan.config.tasks)
        request_dim = self._width(name, "request")
        item_dim = self._width(name, "item")
        match head:
            case Retrieval():
                return RetrievalHead(head, request_dim=request_dim, item_dim=item_dim, tasks=tasks, seed=seed)
            case PreRanking():
                return build_pre_ranking(head, request_dim=request_dim, item_dim=item_dim, tasks=tasks, seed=seed)
            case Ranking():
                return RankingHead(head, request_dim=request_dim, candidate_dim=item_dim, tasks=tasks, seed=seed)

    def _width(self, head: str, level: str) -> int:
        plan = self.plan
        encoders = plan.head_encoders(head, per_candidate=level == "item")
        features = plan.head_features(head, level)  # type: ignore[arg-type]
        return sum(map(plan.dim, features)) + sum(self.encoders[name].out_dim for name in encoders)  # type: ignore[misc]

    def forward(self, rows: Rows, batch: Batch) -> Outputs:
        """Every head's output on the candidates of its row set."""
        rows = self._pooled(rows, batch)
        encoded = {name: e(rows, batch) for name, e in self.encoders.items() if not e.per_candidate}
        return {name: self._head(name, rows, batch, encoded) for name in self.heads}

    def _pooled(self, rows: Rows, batch: Batch) -> Rows:
        """Multi-valued features as the mean of their rows; floats beside the embeddings."""
        means = {key: segment_mean(rows[key], lengths) for key, lengths in batch.inner.items()}
        return rows | means | batch.floats

    def _head(self, name: str, rows: Rows, batch: Batch, encoded: Rows) -> HeadOutput:
        head, chosen = self.heads[name], batch.head_rows[name]
        row = batch.row[chosen]
        request = self._request_side(name, rows, encoded)
        item = self._item_side(name, "candidate", rows)[chosen]
        match head:
            case RetrievalHead():
                user = head.user_vectors(request)
                output = self._scattered(head.logits(user, head.item_vectors(item), row), chosen, batch)
                corpus = gather_rows(head.item_vectors(self._item_side(name, "pool", rows)))
                items = gather_rows(batch.pool_item)
                output.user, output.corpus = user, corpus
                output.corpus_log_q = torch.where(items < 0, torch.inf, 0.0)
                return output
            case RankingHead():
                attended = self.plan.head_encoders(name, per_candidate=True)
                per_candidate = [self.encoders[encoder](rows, batch, chosen) for encoder in attended]
                return self._scattered(head(request, torch.cat([item, *per_candidate], dim=1), row), chosen, batch)
            case _:
                logits, gated = head(request, item, row)
                output = self._scattered(logits, chosen, batch)
                output.features = _scatter(gated, chosen, len(batch.item))
                return output

    def _request_side(self, head: str, rows: Rows, encoded: Rows) -> Tensor:
        plain = [rows[Key("request", feature).name] for feature in self.plan.head_features(head, "request")]
        encoders = self.plan.head_encoders(head, per_candidate=False)
        return torch.cat([*plain, *(encoded[name] for name in encoders)], dim=1)

    def _item_side(self, head: str, side: str, rows: Rows) -> Tensor:
        features = self.plan.head_features(head, "item")
        return torch.cat([rows[Key(side, feature).name] for feature in features], dim=1)  # type: ignore[arg-type]

    def _scattered(self, logits: Tensor, chosen: Tensor, batch: Batch) -> HeadOutput:
        computed = torch.zeros_like(batch.item, dtype=torch.bool)
        computed[chosen] = True
        return HeadOutput(logits=_scatter(logits.float(), chosen, len(batch.item)), computed=computed)


def _scatter(values: Tensor, chosen: Tensor, count: int) -> Tensor:
    """Values of the chosen candidates in their places among all `count`; zeros elsewhere."""
    if len(chosen) == count:
        return values
    return values.new_zeros(count, values.shape[1]).index_copy(0, chosen, values)
