"""Explicit interactions of the fields of one input: `[M, in_dim] -> [M, out_dim]`."""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from towers.checks import check_choice, check_counts
from towers.fields import Fields, width_of


@dataclass(frozen=True, kw_only=True)
class Pnn:
    """The inner products of all pairs of fields (IPNN: Qu et al., ICDM'16), beside the raw input (RRA 4.2.4).

    They are taken in width `dim`: a field of that width enters as it is, any other through a linear map of its own.
    """

    kind: Literal["pnn"] = "pnn"
    dim: int = 16

    def __post_init__(self) -> None:
        check_counts(dim=self.dim)


@dataclass(frozen=True, kw_only=True)
class DcnV2:
    """Cross layers (DCN-V2: Wang et al., WWW'21): full matrices, or of low `rank`."""

    kind: Literal["dcn_v2"] = "dcn_v2"
    layers: int = 2  # how often fields are crossed
    rank: int | None = None

    def __post_init__(self) -> None:
        check_counts(layers=self.layers)
        if self.rank is not None:
            check_counts(rank=self.rank)


@dataclass(frozen=True, kw_only=True)
class Bilinear:
    """Bilinear products of all pairs of fields (FiBiNET: Huang et al., RecSys'19), beside the raw input.

    Of FiBiNET's forms it is field-each, a matrix for every left field. `product` of a pair: `hadamard`, `dim` numbers
    as in FiBiNET, or `inner`, one (FiBiNet++: Zhang et al., CIKM'23), which leaves the first layer behind it narrow:
    20 fields have 190 pairs. Widths as in `Pnn`.
    """

    kind: Literal["bilinear"] = "bilinear"
    product: Literal["hadamard", "inner"] = "hadamard"
    dim: int = 16

    def __post_init__(self) -> None:
        check_choice("product", self.product, "hadamard", "inner")
        check_counts(dim=self.dim)


Interaction = Pnn | DcnV2 | Bilinear


class _Vectors(nn.Module):
    """The fields as vectors of one width: `[M, in_dim] -> [M, F, dim]`; a field of width `dim` stays as it is."""

    def __init__(self, *, fields: Fields, dim: int) -> None:
        super().__init__()
        self.widths = list(fields.values())
        self.maps = nn.ModuleList(
            nn.Identity() if width == dim else nn.Linear(width, dim, bias=False) for width in self.widths
        )

    def forward(self, x: Tensor) -> Tensor:
        parts = x.split(self.widths, dim=1)
        return torch.stack([to_dim(part) for to_dim, part in zip(self.maps, parts, strict=True)], dim=1)


def _pairs(fields: int) -> Tensor:
    """`[pairs]`: where i < j lie in a flattened matrix of the fields, in the order (0, 1), (0, 2), ..., (1, 2), ..."""
    left, right = torch.triu_indices(fields, fields, offset=1)
    return left * fields + right


def _inner_products(left: Tensor, right: Tensor, pairs: Tensor) -> Tensor:
    """`[M, pairs]`: `<left_i, right_j>` of `[M, ·, dim]` and `[M, F, dim]`."""
    return torch.bmm(left, right.mT).flatten(1).index_select(1, pairs)


class PnnInteraction(nn.Module):
    """`[x; <f_i, f_j> for all i < j]`; one field has no pair, and x comes back alone."""

    pairs: Tensor

    def __init__(self, config: Pnn, *, fields: Fields) -> None:
        super().__init__()
        self.vectors = _Vectors(fields=fields, dim=config.dim)
        self.register_buffer("pairs", _pairs(len(fields)), persistent=False)
        self.out_dim = width_of(fields) + len(self.pairs)

    def forward(self, x: Tensor) -> Tensor:
        """`[M, out_dim]` of `x [M, in_dim]`."""
        vectors = self.vectors(x)
        return torch.cat([x, _inner_products(vectors, vectors, self.pairs)], dim=1)


class BilinearInteraction(nn.Module):
    """`[x; (f_i W_i) ⊙ f_j for all i < j]`, or `<f_i W_i, f_j>`; one field has no pair, and x comes back alone."""

    pairs: Tensor

    def __init__(self, config: Bilinear, *, fields: Fields) -> None:
        super().__init__()
        count, dim = len(fields), config.dim
        self.inner = config.product == "inner"
        self.vectors = _Vectors(fields=fields, dim=dim)
        bound = 1.0 / math.sqrt(dim)  # as `nn.Linear` starts
        self.weight = nn.Parameter(torch.empty(count - 1, dim, dim).uniform_(-bound, bound))
        self.register_buffer("pairs", _pairs(count), persistent=False)
        self.out_dim = width_of(fields) + len(self.pairs) * (1 if self.inner else dim)

    def forward(self, x: Tensor) -> Tensor:
        """`[M, out_dim]` of `x [M, in_dim]`."""
        vectors = self.vectors(x)
        turned = torch.einsum("mfd,fde->mfe", vectors[:, :-1], self.weight)
        if self.inner:
            return torch.cat([x, _inner_products(turned, vectors, self.pairs)], dim=1)
        # Field by field: backward of an index over all pairs is slower than all the rest.
        products = [(left * vectors[:, i + 1 :]).flatten(1) for i, left in enumerate(turned.split(1, dim=1))]
        return torch.cat([x, *products], dim=1)


class CrossNetwork(nn.Module):
    """`x_{l+1} = x_0 ⊙ (W_l x_l + b_l) + x_l`, with `W_l = U_l V_l^T` where a rank is given."""

    def __init__(self, config: DcnV2, *, fields: Fields) -> None:
        super().__init__()
        self.out_dim = width_of(fields)
        self.layers = nn.ModuleList(self._layer(self.out_dim, config.rank) for _ in range(config.layers))

    @staticmethod
    def _layer(dim: int, rank: int | None) -> nn.Module:
        if rank is None:
            return nn.Linear(dim, dim)
        return nn.Sequential(nn.Linear(dim, rank, bias=False), nn.Linear(rank, dim))

    def forward(self, x: Tensor) -> Tensor:
        """`[M, out_dim]` of `x [M, in_dim]`; the widths are equal."""
        crossed = x
        for layer in self.layers:
            crossed = x * layer(crossed) + crossed
        return crossed


def build_interaction(config: Interaction, *, fields: Fields) -> PnnInteraction | CrossNetwork | BilinearInteraction:
    """The module of a config: `forward(x [M, in_dim]) -> [M, out_dim]`, x being the fields in their order.

    ValueError without a field.
    """
    if not fields:
        raise ValueError("interaction: there is no field to interact")
    match config:
        case Pnn():
            return PnnInteraction(config, fields=fields)
        case DcnV2():
            return CrossNetwork(config, fields=fields)
        case Bilinear():
            return BilinearInteraction(config, fields=fields)
