"""The shared embedding tables: one unpooled collection per width, each called once a step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torchrec.modules.embedding_configs import EmbeddingConfig
from torchrec.modules.embedding_modules import EmbeddingCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor


@dataclass(frozen=True, kw_only=True)
class TableShape:
    """One table: its rows, its width, and the keys (request, history, candidate, pool) that look it up."""

    name: str
    rows: int
    dim: int
    keys: tuple[str, ...]


class SharedEmbeddings(nn.Module):
    """Every key's rows, unpooled: `{key: [ids of the key, dim]}`, in the order of the key's ids.

    One `EmbeddingCollection` per width (TorchRec allows only equal widths in one), built on `device` ('meta' before
    sharding). A second call in a step would be a second optimizer step, so everything a step needs is in one call.
    """

    def __init__(self, tables: Sequence[TableShape], *, device: torch.device | str) -> None:
        super().__init__()
        widths = sorted({table.dim for table in tables})
        self.collections = nn.ModuleDict({width_name(width): _collection(tables, width, device) for width in widths})

    def forward(self, sparse: Mapping[str, KeyedJaggedTensor], segments: Mapping[str, Tensor]) -> dict[str, object]:
        """Per width a mapping of key to jagged rows; `rows_of` reads it (outside the traced forward).

        `segments` is for a look-up that averages by itself (`Averaged`).
        """
        return {name: collection(sparse[name]) for name, collection in self.collections.items()}


def width_name(dim: int) -> str:
    """The name of the collection of that width."""
    return f"dim{dim}"


@dataclass(frozen=True)
class Averaged:
    """Rows of a key, of which those that are read as means are means already."""

    rows: Tensor

    def values(self) -> Tensor:
        """The rows."""
        return self.rows


def rows_of(looked_up: Mapping[str, object], segments: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`{key: rows}` of what `SharedEmbeddings` returned, waiting for it where it is still on its way.

    `[ids, dim]`, or for a key of `segments` the means `[S, dim]` of as many consecutive ids as its lengths `[S]` say.
    """
    found: dict[str, Tensor] = {}
    for jagged_rows in looked_up.values():
        for key, jagged in jagged_rows.items():  # type: ignore[attr-defined]
            rows, averaged = jagged.values(), isinstance(jagged, Averaged) or key not in segments
            found[key] = rows if averaged else segment_mean(rows, segments[key])
    return found


def segment_mean(values: Tensor, lengths: Tensor) -> Tensor:
    """The mean of consecutive segments: `[ΣL, D]` and `lengths [S]` to `[S, D]`; zeros for an empty one."""
    segment = torch.repeat_interleave(torch.arange(lengths.numel(), device=lengths.device), lengths)
    total = values.new_zeros(lengths.numel(), values.shape[1]).index_add(0, segment, values)
    return total / lengths.clamp(min=1).unsqueeze(1)


def _collection(tables: Sequence[TableShape], width: int, device: torch.device | str) -> EmbeddingCollection:
    configs = [
        EmbeddingConfig(name=table.name, num_embeddings=table.rows, embedding_dim=width, feature_names=list(table.keys))
        for table in tables
        if table.dim == width
    ]
    return EmbeddingCollection(tables=configs, device=torch.device(device))
