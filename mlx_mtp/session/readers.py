"""The rows of a session and those who read them."""

from __future__ import annotations

import weakref

from ..decode.request import Row
from .inbox import Inbox, News


class Readers:
    """Rows that haven't ended for their readers, each with the inbox of its reader."""

    def __init__(self) -> None:
        """Begins without rows."""
        self._rows: list[tuple[Row, weakref.ref[Inbox]]] = []

    def __bool__(self) -> bool:
        return bool(self._rows)

    @property
    def have_events(self) -> bool:
        """Whether one of them may be cancelled by an event."""
        return any(row.cancel_event for row, _ in self._rows)

    def add(self, row: Row, reader: weakref.ref[Inbox]) -> None:
        """Adds a row."""
        self._rows.append((row, reader))

    def check(self, ahead: int) -> None:
        """Cancels rows whose reader is gone, and pauses those that are `ahead` tokens or more ahead of their reader."""
        for row, reader in self._rows:
            inbox = reader()
            if inbox is None or inbox.closed or (row.cancel_event is not None and row.cancel_event.is_set()):
                row.cancel()
            row.paused = inbox is not None and len(row.tokens) - row.read >= ahead

    def deliver(self) -> None:
        """Gives everybody the new tokens, and drops the rows that are done."""
        left = []
        for row, reader in self._rows:
            done = row.done  # read before the tokens, because another thread may cancel the row at any time
            send(reader, row, row.pop_unread(), done)
            if not done:
                left.append((row, reader))
        self._rows = left

    def recover(self, error: BaseException) -> None:
        """Delivers after an exception that may have struck while news was on its way: what has ended, ends with it."""
        for row, _ in self._rows:
            if row.done:
                row.error = row.error or error
        self.deliver()

    def end(self, error: BaseException) -> None:
        """Ends all rows with an error."""
        for row, _ in self._rows:
            row.error, row.done = row.error or error, True
        self.deliver()


def send(reader: weakref.ref[Inbox], row: Row, tokens: list[int], done: bool) -> None:
    """Puts news of a row into the inbox of its reader, if there is any news, and a reader."""
    inbox = reader()
    if inbox is not None and (tokens or done):
        inbox.put(News(row, tokens, row.stats.snapshot(), done, row.cancelled, row.error))
