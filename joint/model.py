"""Looked-up rows -> encoders -> heads -> `Outputs`: everything between the tables and the objectives."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from joint.batch import Batch
from joint.encoding import HistoryEncoder, Rows
from joint.experiment import heads_of
from joint.features import Plan
from joint.keys import HeadSide
from joint.outputs import HeadOutput, Outputs, Views
from joint.softmax_pool import StreamingFrequency, corpus_pool, item_views, sampled_pool, uniform_items
from towers.mixtures import expected_l0, routing
from towers.pre_ranking import PreRanking, build_pre_ranking
from towers.ranking import Ranking, RankingHead
from towers.retrieval import Retrieval, RetrievalHead
from towers.views import FieldViews


class JointModel(nn.Module):
    """All dense modules of a config: encoders, then the heads that read them."""

    def __init__(self, plan: Plan) -> None:
        super().__init__()
        config = plan.config
        self.plan = plan
        self.encoders = nn.ModuleDict({name: HistoryEncoder(reading, plan) for name, reading in plan.readings.items()})
        self.heads = nn.ModuleDict({name: self._build(name, head) for name, head in heads_of(config).items()})
        self.reads_only = frozenset(config.sharing.stop_gradient)
        self.gated = frozenset(name for name, head in self.heads.items() if routing(head))
        fields = self.plan.fields("retrieval", "candidate") if plan.item_views else {}
        self.views = FieldViews(fields, seed=config.run.seed) if plan.item_views else None
        self.frequency = StreamingFrequency(plan.schema.items) if plan.pool_spaces - {"corpus"} else None

    def _build(self, name: str, head: Retrieval | PreRanking | Ranking) -> nn.Module:
        tasks, seed = len(self.plan.config.tasks), self.plan.config.run.seed
        request, item = self.plan.fields(name, "request"), self.plan.fields(name, "candidate")
        match head:
            case Retrieval():
                return RetrievalHead(head, request_fields=request, item_fields=item, tasks=tasks, seed=seed)
            case PreRanking():
                return build_pre_ranking(head, request_fields=request, item_fields=item, tasks=tasks, seed=seed)
            case Ranking():
                return RankingHead(head, request_fields=request, candidate_fields=item, tasks=tasks, seed=seed)

    def forward(self, rows: Rows, batch: Batch) -> Outputs:
        """Every head's output on the candidates of its row set."""
        rows = rows | batch.floats
        fixed = {key: row.detach() for key, row in rows.items()} if self.reads_only else {}
        encoded: Rows = {}  # each reading once, for the first head that names it and all others
        return {
            name: self._head(name, fixed if name in self.reads_only else rows, rows, batch, encoded)
            for name in self.heads
        }

    def _head(self, name: str, own: Rows, rows: Rows, batch: Batch, encoded: Rows) -> HeadOutput:
        """`own` are the rows as this head may change them, `rows` as those may who share its encoders."""
        head = self.heads[name]
        output = self._scored(name, own, rows, batch, encoded, batch.head_rows[name])
        if name in batch.teaching_rows:
            with torch.no_grad():  # a student's loss gives its teacher no gradient
                taught = self._scored(name, own, rows, batch, encoded, batch.teaching_rows[name])
            output.logits, output.computed = output.logits + taught.logits, output.computed | taught.computed
        if isinstance(head, RetrievalHead):
            self._add_pool(name, head, output, own, batch)
        if self.training and name in self.gated:
            output.expected_l0 = expected_l0(head)
        return output

    def _scored(self, name: str, own: Rows, rows: Rows, batch: Batch, encoded: Rows, chosen: Tensor) -> HeadOutput:
        """The head's output on the `chosen` candidates."""
        head, row = self.heads[name], _chosen(batch.row, chosen)
        request = torch.cat([*self._plain(name, "request", own), *self._encoded(name, own, rows, batch, encoded)], 1)
        item = _chosen(torch.cat(self._plain(name, "candidate", own), dim=1), chosen)
        match head:
            case RetrievalHead():
                user = head.user_vectors(request).float()  # what is multiplied outside of the towers is float32
                output = self._scattered(head.logits(user, head.item_vectors(item).float(), row), chosen, batch)
                output.user = user
            case RankingHead():
                item = torch.cat([item, *self._attended(name, own, rows, batch, chosen)], dim=1)
                output = self._scattered(head(request, item, row), chosen, batch)
                if head.residual is not None:
                    corrected = head.residual(output.logits[chosen], request, item, row, batch.group)
                    output.corrected = _scatter(corrected, chosen, len(batch.item))
                    output.special = torch.isin(batch.group[batch.row], head.residual.groups)
                    if not self.training:
                        output.logits = output.corrected
            case _:
                logits, gated = head(request, item, row)
                output = self._scattered(logits, chosen, batch)
                output.features = _scatter(gated.float(), chosen, len(batch.item))
        return output

    def _add_pool(self, name: str, head: RetrievalHead, output: HeadOutput, own: Rows, batch: Batch) -> None:
        """What the softmax and the views of items are over."""
        items = torch.cat(self._plain(name, "pool", own), dim=1)
        vectors = head.item_vectors(items).float()
        if self.views is not None and self.training:
            output.views = self._views(self.views, head, items, batch)
        if batch.pool_sampled:
            assert self.frequency is not None
            output.pool = sampled_pool(vectors, batch, self.frequency, self.plan.config.data.shared_random)
        else:
            output.pool = corpus_pool(vectors, batch)

    def _views(self, views: FieldViews, head: RetrievalHead, items: Tensor, batch: Batch) -> Views:
        """Two views of some of the pool's items, each with half of the item side's fields."""
        objective, config = self.plan.item_views, self.plan.config
        assert objective is not None
        assert views.step is not None
        seed, step, catalogue = config.run.seed, views.step, self.plan.schema.items
        chosen = uniform_items(batch, objective.share, catalogue, seed=seed, step=step)
        first, second = views(items[chosen])
        return item_views(head.item_vectors(torch.stack([first, second])).float(), chosen, batch)

    def _plain(self, head: str, side: HeadSide, rows: Rows) -> list[Tensor]:
        return [rows[key.name] for key in self.plan.head_keys(head, side)]

    def _encoded(self, head: str, own: Rows, rows: Rows, batch: Batch, encoded: Rows) -> list[Tensor]:
        """The head's encoders that give one vector a request."""
        names = [self.plan.reading_name(head, e) for e in self.plan.head_encoders(head, per_candidate=False)]
        for name in names:
            if name not in encoded:
                encoded[name] = self.encoders[name](self._source(name, own, rows), batch)
        return [self._spared(head, name, encoded[name]) for name in names]

    def _attended(self, head: str, own: Rows, rows: Rows, batch: Batch, chosen: Tensor) -> list[Tensor]:
        """The head's encoders that give one vector a candidate."""
        names = [self.plan.reading_name(head, e) for e in self.plan.head_encoders(head, per_candidate=True)]
        vectors = [self.encoders[name](self._source(name, own, rows), batch, chosen) for name in names]
        return [self._spared(head, name, encoding) for name, encoding in zip(names, vectors, strict=True)]

    def _source(self, reading: str, own: Rows, rows: Rows) -> Rows:
        """What an encoder reads: a shared one learns for all its heads, a head's own one is that head's alone."""
        return rows if len(self.plan.readers[reading]) > 1 else own

    def _spared(self, head: str, reading: str, encoding: Tensor) -> Tensor:
        return encoding.detach() if len(self.plan.readers[reading]) > 1 and head in self.reads_only else encoding

    def _scattered(self, logits: Tensor, chosen: Tensor, batch: Batch) -> HeadOutput:
        computed = torch.zeros_like(batch.item, dtype=torch.bool)
        computed[chosen] = True
        return HeadOutput(logits=_scatter(logits.float(), chosen, len(batch.item)), computed=computed)


def _chosen(values: Tensor, chosen: Tensor) -> Tensor:
    """Those of the chosen candidates, which ascend: as many as there are is all of them."""
    return values if len(chosen) == len(values) else values.index_select(0, chosen)


def _scatter(values: Tensor, chosen: Tensor, count: int) -> Tensor:
    """Values of the chosen candidates in their places among all `count`; zeros elsewhere."""
    if len(chosen) == count:
        return values
    return values.new_zeros(count, values.shape[1]).index_copy(0, chosen, values)
