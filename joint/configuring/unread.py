"""What stands in a decoded config for a value that is wrong, so that everything else can still be checked."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import Any, NoReturn, TypeVar

T = TypeVar("T")


class UnreadError(Exception):
    """A check has asked for a value that could not be read."""


class _Unread:
    """To ask anything of it, even whether it is true or of some class, is an `UnreadError`: nothing follows from it."""

    def _asked(self, *_: object) -> NoReturn:
        raise UnreadError

    __getattribute__ = __bool__ = __len__ = __iter__ = __contains__ = __getitem__ = __hash__ = _asked
    __eq__ = __lt__ = __le__ = __gt__ = __ge__ = __add__ = __radd__ = __sub__ = __rsub__ = __neg__ = _asked
    __mul__ = __rmul__ = __truediv__ = __rtruediv__ = __floordiv__ = __rfloordiv__ = __mod__ = __rmod__ = _asked
    __str__ = __repr__ = __format__ = __fspath__ = __int__ = __float__ = __index__ = _asked


UNREAD: Any = _Unread()


def as_far_as_read(found: Iterable[T]) -> Iterator[T]:
    """What a check finds, up to where it asks for a value that could not be read."""
    with suppress(UnreadError):
        yield from found
