"""Queues through which callers receive the tokens of their rows.

The session's thread puts news in; the caller takes it out, in a thread (`Inbox.get`) or in an event loop
(`Inbox.aget`). Closing an inbox cancels its rows; an inbox that is dropped closes itself.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Generic, TypeVar

from ..decode.request import Row, Stats
from ..errors import MTPError

T = TypeVar("T")


@dataclass(frozen=True)
class News:
    """What happened to a row since its last news.

    Attributes:
        row: The row.
        tokens: Its new tokens.
        stats: A copy of its statistics.
        done: Whether this is its last news.
        cancelled: Whether the caller ended it early.
        error: The exception that ended it; None if it finished or was cancelled.
    """

    row: Row
    tokens: list[int]
    stats: Stats
    done: bool
    cancelled: bool
    error: BaseException | None


class Closed(Exception):  # noqa: N818 - like queue.Empty, it isn't a failure
    """The inbox was closed, so nothing more will arrive."""


class Inbox:
    """News of a call's rows, in order of arrival."""

    def __init__(self) -> None:
        self._arrived = threading.Condition()
        self._news: deque[News] = deque()
        self._unread: dict[int, int] = {}
        self._rows: list[Row] = []
        self._notify_session: Callable[[], None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._event: asyncio.Event | None = None
        self._closed = False

    def expect(self, row: Row, notify: Callable[[], None]) -> None:
        """Registers a row.

        Args:
            row: Cancelled when the inbox is closed.
            notify: Called after news of a paused row was read, and when the inbox is closed.
        """
        self._rows = [it for it in self._rows if not it.done] + [row]
        self._notify_session = notify

    def unread(self, row: Row) -> int:
        """Number of a row's tokens that weren't read yet."""
        return self._unread.get(row.number, 0)

    def put(self, news: News) -> None:
        """Adds news; called by the session's thread."""
        with self._arrived:
            if self._closed:
                return
            self._news.append(news)
            self._unread[news.row.number] = self.unread(news.row) + len(news.tokens)
            self._arrived.notify_all()
            loop, event = self._loop, self._event
        if loop and event:
            try:
                loop.call_soon_threadsafe(event.set)
            except RuntimeError:  # the event loop is closed, so the news will never be read
                self.close()

    def get(self) -> News:
        """Waits for the next news.

        Raises:
            Closed: The inbox was closed.
        """
        with self._arrived:
            while not self._news:
                if self._closed:
                    raise Closed
                self._arrived.wait()
            news = self._news.popleft()
        return self._taken(news)

    async def aget(self) -> News:
        """As `get`, for an event loop; the task may be cancelled."""
        with self._arrived:
            if self._event is None:
                self._loop, self._event = asyncio.get_running_loop(), asyncio.Event()
            event = self._event
        while True:
            event.clear()
            with self._arrived:
                if self._news:
                    news = self._news.popleft()
                    break
                if self._closed:
                    raise Closed
            await event.wait()
        return self._taken(news)

    def close(self) -> None:
        """Cancels the rows, drops unread news and wakes a waiting reader."""
        with self._arrived:
            if self._closed:
                return
            self._closed = True
            self._news.clear()
            self._arrived.notify_all()
        for row in self._rows:
            row.cancel()
        if self._notify_session:
            self._notify_session()

    def __del__(self) -> None:
        self.close()

    def _taken(self, news: News) -> News:
        with self._arrived:
            left = self._unread.pop(news.row.number, 0) - len(news.tokens)
            if left > 0:
                self._unread[news.row.number] = left
        if self._notify_session and news.row.paused:
            self._notify_session()
        return news


class Stream(Generic[T], Iterator[T]):
    """An iterator over generated items that can be closed from any thread; closing it ends the generation."""

    def __init__(self, items: Generator[T, None, None], end: Callable[[], None]) -> None:
        """Wraps a generator.

        Args:
            items: Yields the items.
            end: Ends the generation and wakes a thread that waits for it: `Inbox.close`.
        """
        self._items, self._end = items, end

    def __iter__(self) -> Stream[T]:
        return self

    def __next__(self) -> T:
        try:
            return next(self._items)
        except Closed:
            raise StopIteration from None

    def close(self) -> None:
        """Ends the generation; a thread that waits for the next item gets StopIteration."""
        self._end()
        with suppress(ValueError):  # another thread is inside the generator, and leaves it by itself
            self._items.close()

    def __enter__(self) -> Stream[T]:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()


def failure(error: BaseException) -> MTPError:
    """The error to raise for a row that an exception ended; a new object for each row.

    Args:
        error: Exception of the step. One that isn't an `MTPError` becomes the cause of one.
    """
    if isinstance(error, MTPError):
        same = type(error)(str(error))
        same.__cause__ = error.__cause__
        return same
    failed = MTPError(f"decoding failed, and ended this generation: {error!r}")
    failed.__cause__ = error
    return failed
