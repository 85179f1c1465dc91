"""Queues through which callers receive the tokens of their rows.

The session's thread puts news in; the caller takes it out, in a thread (`Inbox.get`) or in an event loop
(`Inbox.aget`). The rows of an inbox that is closed, or dropped, are cancelled.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Generator, Iterator
from contextlib import suppress
from dataclasses import dataclass
from queue import Empty, SimpleQueue
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
    """News of a call's rows, in order of arrival.

    Nothing here takes a lock in Python: an interrupt between taking and holding one would leave it taken for ever, and
    the session's thread would wait for it.

    Attributes:
        closed: Whether nobody reads it any more. The session then cancels its rows.
    """

    def __init__(self, notify: Callable[[], object]) -> None:
        """Makes an empty inbox.

        Args:
            notify: Called after news of a paused row was read, and when the inbox is closed.
        """
        self.closed = False
        self._notify_session = notify
        self._news: SimpleQueue[News | None] = SimpleQueue()  # None wakes a reader of a closed inbox
        self._loop: asyncio.AbstractEventLoop | None = None
        self._event: asyncio.Event | None = None

    def put(self, news: News) -> None:
        """Adds news; called by the session's thread."""
        if not self.closed:
            self._put(news)

    def get(self) -> News:
        """Waits for the next news.

        Raises:
            Closed: The inbox was closed.
        """
        # Whoever closed it may have been interrupted before it could wake a reader.
        return self._taken(None if self.closed else self._news.get())

    async def aget(self) -> News:
        """As `get`, for an event loop; the task may be cancelled."""
        if self._event is None:
            self._loop, self._event = asyncio.get_running_loop(), asyncio.Event()
        while True:
            self._event.clear()
            try:
                return self._taken(self._news.get_nowait())
            except Empty:
                await self._event.wait()

    def close(self) -> None:
        """Drops unread news, wakes a waiting reader, and has the rows cancelled. May be called again."""
        self.closed = True
        self._put(None)
        self._notify_session()

    def _put(self, news: News | None) -> None:
        self._news.put(news)
        loop, event = self._loop, self._event
        if loop and event:
            try:
                loop.call_soon_threadsafe(event.set)
            except RuntimeError:  # the event loop is closed, so the news will never be read
                self.closed = True

    def _taken(self, news: News | None) -> News:
        if self.closed or news is None:
            self._news.put(None)  # for another reader
            raise Closed
        news.row.read += len(news.tokens)
        if news.row.paused:
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
