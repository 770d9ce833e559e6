"""Fields: named features and encodings side by side in one tensor, `[..., sum of the widths]` in their order."""

from collections.abc import Iterable, Mapping
from itertools import accumulate

Fields = Mapping[str, int]  # name -> width


def width_of(fields: Fields) -> int:
    """The width of the tensor."""
    return sum(fields.values())


def side_by_side(first: Fields, second: Fields) -> dict[str, int]:
    """The fields of two sides as one input; ValueError where a name is on both."""
    if both := sorted(first.keys() & second.keys()):
        raise ValueError(f"fields on both sides: {', '.join(both)}")
    return {**first, **second}


def columns(fields: Fields, names: Iterable[str]) -> list[slice]:
    """Where those of `names` that are among the fields lie, in the order of `names`."""
    ends = dict(zip(fields, accumulate(fields.values()), strict=True))
    return [slice(ends[name] - fields[name], ends[name]) for name in names if name in fields]
