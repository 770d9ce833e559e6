"""Lists and pairs of candidates in padded blocks of bounded size, and what a loss books on them."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from losses.segments import by_task, from_task
from losses.term import LossTerm, attach, in_full, like


class PairBlock(NamedTuple):
    """All pairs of some lists of about equal shape: flat candidates [B, rows] against [B, columns].

    A padded place holds n, one past the last candidate: tensors indexed with it have n + 1 values.
    `real` [B, rows, columns] is True where both places hold a candidate.
    """

    first: Tensor
    second: Tensor
    real: Tensor


class Members(NamedTuple):
    """The chosen candidates [m]; for each list, the place of its first one among them and how many it has."""

    position: Tensor
    start: Tensor
    size: Tensor

    @classmethod
    def of(cls, chosen: Tensor, offsets: Tensor) -> "Members":
        """From `chosen` (bool [n]) and the `offsets` of the lists."""
        bounds = pad(chosen.cumsum(0), (1, 0))[offsets]
        return cls(chosen.nonzero().squeeze(1), bounds[:-1], bounds.diff())

    def table(self, lists: Tensor, length: int, padding: int) -> tuple[Tensor, Tensor]:
        """The candidates of `lists [B]` in a padded table [B, length], and where it is not padding."""
        step = torch.arange(length, device=lists.device)
        real = step < self.size[lists].unsqueeze(1)
        place = (self.start[lists].unsqueeze(1) + step).clamp(max=len(self.position) - 1)
        return self.position[place].where(real, padding), real


def block_cells(device: torch.device) -> int:
    """How many numbers a block should hold: what stays in a core's cache, or what keeps a GPU busy."""
    return 2**18 if device.type == "cpu" else 2**24


def list_blocks(chosen: Tensor, offsets: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Every list's `chosen` (bool [n]) candidates in padded tables [B, length], and where those are real."""
    members = Members.of(chosen, offsets)
    lengths = members.size.cpu()
    for lists in _alike(lengths, torch.ones_like(lengths), 0, block_cells(chosen.device)):
        yield members.table(lists.to(chosen.device), int(lengths[lists].max()), len(chosen))


def pair_blocks(first: Tensor, second: Tensor, offsets: Tensor, *, width: int = 0) -> Iterator[PairBlock]:
    """Every pair (i, j) of one list with `first[i]` and `second[j]` (bool [n]), each in exactly one block.

    A block holds about `block_cells` numbers (or one list, if that is larger), counting `width` further ones
    per candidate. Padding at most doubles a side.
    """
    rows, columns = Members.of(first, offsets), Members.of(second, offsets)
    shapes = torch.stack([rows.size, columns.size]).cpu()  # the only wait for the device
    for lists in _alike(shapes[0], shapes[1], width, block_cells(first.device)):
        height, length = shapes[:, lists].amax(1).tolist()
        lists = lists.to(first.device)
        i, i_real = rows.table(lists, height, len(first))
        j, j_real = columns.table(lists, length, len(first))
        yield PairBlock(i, j, i_real.unsqueeze(2) & j_real.unsqueeze(1))


def _alike(rows: Tensor, columns: Tensor, width: int, cells: int) -> tuple[Tensor, ...]:
    """The lists that have pairs, dealt into blocks: sides equal up to a factor of 2, about `cells` in all."""
    lists = (rows * columns).nonzero().squeeze(1)
    height, length = torch.frexp(torch.stack([rows, columns]).double()).exponent.long()  # in powers of two
    lists = lists[((height[lists] << 32) + columns[lists]).argsort(stable=True)]
    size = (rows * columns + width * (rows + columns))[lists]
    block = torch.stack([height[lists], length[lists], (size.cumsum(0) - size) // cells])
    return lists.split(torch.unique_consecutive(block, dim=1, return_counts=True)[1].tolist())


def padded(x: Tensor, logits: Tensor, name: str) -> Tensor:
    """`x` ([N] or [N, T] as `logits`) by task, with a last value 0 for padded places: [n + 1]."""
    return pad(by_task(like(x, logits, name)), (0, 1))


class Ledger(NamedTuple):
    """What a loss books per flat candidate while it walks over blocks, [n + 1] each: its share of the total
    and of the count, and the gradient of the total by its logit. The last place takes what padding books."""

    value: Tensor
    units: Tensor
    gradient: Tensor

    @classmethod
    def empty(cls, logits: Tensor) -> "Ledger":
        """Nothing booked yet, for `logits` ([N] or [N, T])."""
        zeros = in_full(logits.detach()).new_zeros
        return cls(*(zeros(logits.numel() + 1) for _ in cls._fields))

    def term(self, logits: Tensor) -> LossTerm:
        """The sums, [] or [T], tied to `logits` by the booked gradient."""
        value, units, gradient = (from_task(x[:-1], logits) for x in self)
        return LossTerm(attach(value.sum(0), (logits, gradient)), units.sum(0))
