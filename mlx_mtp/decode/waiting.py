"""The queue of requests: who may join the batch next.

First come, first served, while there is a free row and the KV of all rows at full length fits the budget. If the first
request must wait for an empty batch or for memory, a limited number of later ones that fit may pass it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence

from .capacity import Capacity
from .request import Row

MOST_PASSED = 8
"""Most requests that may be admitted before one that came earlier, so that none waits forever."""


class Waiting:
    """Rows that wait, in the order in which they came."""

    def __init__(self, capacity: Capacity, max_rows: int) -> None:
        """Makes an empty queue for a batch of at most `max_rows`, unless the `width` of a row allows more."""
        self._capacity, self._max_rows = capacity, max_rows
        self._rows: deque[Row] = deque()

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[Row]:
        return iter(self._rows)

    def append(self, row: Row) -> None:
        """Adds a row."""
        self._rows.append(row)

    def clear(self) -> None:
        """Drops all rows."""
        self._rows.clear()

    def take(self, row: Row) -> None:
        """Takes a row out of the queue, and counts it for the rows that it passes."""
        for other in self._rows:
            if other is row:
                break
            other.passed += 1
        self._rows.remove(row)

    def next(self, running: Sequence[Row], rows: Sequence[Row]) -> Row | None:
        """The next row that may join: the first in the queue, or a later one that fits while the first doesn't.

        Args:
            running: The rows that have a place in the batch.
            rows: The rows that hold KV: the running ones and the parked ones.
        """
        while self._rows and self._rows[0].done:
            self._rows.popleft()
        for row in self._rows:
            if not row.done and self._may_join(row, running, rows):
                return row
            if not row.done and row.passed >= MOST_PASSED:
                break
        return None

    def width(self, rows: Iterable[Row]) -> int:
        """Most rows of a batch that has these rows."""
        return max([self._max_rows, *(row.width for row in rows)])

    def _may_join(self, row: Row, running: Sequence[Row], rows: Sequence[Row]) -> bool:
        if running and {it.request.exactness for it in (row, *running)} != {"fast"}:
            return False
        if len(running) >= self.width([*running, row]):
            return False
        # Alone it fitted when it was checked; the budget may have shrunk since.
        return not rows or self._capacity.fits([it.request for it in (*rows, row)])
