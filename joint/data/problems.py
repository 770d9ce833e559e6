"""Bad rows of a log: the first one ends the command, or with `--on-error skip` all are counted and reported."""

from __future__ import annotations

from collections import Counter

from joint.errors import DataError


class Problems:
    """What was wrong with a log, by kind."""

    def __init__(self, *, skip: bool) -> None:
        self.skip = skip
        self.counts: Counter[str] = Counter()

    def found(self, where: str, kind: str, rows: int = 1) -> None:
        """`rows` rows are wrong in the same way; the caller leaves them out.

        Args:
            where: file, column and row of the first of them.
            kind: what was found and what was expected, without numbers, so that rows of a kind add up.

        Raises:
            DataError: unless rows are to be skipped.
        """
        if not rows:
            return
        if not self.skip:
            more = f" (and {rows - 1:,} more such rows)" if rows > 1 else ""
            raise DataError(f"{where}: {kind}{more}; --on-error skip leaves such rows out")
        self.counts[kind] += rows

    def lines(self) -> list[str]:
        """A line for every kind that was skipped."""
        return [f"skipped {rows:,} rows: {kind}" for kind, rows in sorted(self.counts.items())]
