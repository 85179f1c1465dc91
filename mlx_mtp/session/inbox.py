"""Where a caller waits for the tokens of its rows.

The owner of the model puts news in, whoever asked for the rows takes it out, in a thread (`Inbox.get`) or in an event
loop (`Inbox.aget`). Closing an inbox ends its rows; one that is dropped closes itself.
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
    """What has become of a row since the last news.

    Attributes:
        row: The row.
        tokens: Its new tokens.
        stats: What it has taken so far.
        done: Whether there will be no more.
        cancelled: Whether it was ended before it was finished, as it was asked for.
        error: What ended it, if that was none of its own doing.
    """

    row: Row
    tokens: list[int]
    stats: Stats
    done: bool
    cancelled: bool
    error: BaseException | None


class Closed(Exception):
    """The inbox was closed while somebody waited."""


class Inbox:
    """News of some rows, in the order in which it came."""

    def __init__(self) -> None:
        self._arrived = threading.Condition()
        self._news: deque[News] = deque()
        self._unread: dict[int, int] = {}
        self._rows: list[Row] = []
        self._tell: Callable[[], None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._event: asyncio.Event | None = None
        self._closed = False

    def expect(self, row: Row, tell: Callable[[], None]) -> None:
        """Has news of a row come in; `tell` is called when some of it was read."""
        self._rows = [it for it in self._rows if not it.done] + [row]
        self._tell = tell

    def unread(self, row: Row) -> int:
        """Tokens of a row that nobody has taken yet."""
        return self._unread.get(row.number, 0)

    def put(self, news: News) -> None:
        """Takes news; for the owner of the model."""
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
            except RuntimeError:  # the loop is closed: nobody will ever read
                self.close()

    def get(self) -> News:
        """Waits for news.

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
        """Ends the rows; nothing more comes in."""
        with self._arrived:
            if self._closed:
                return
            self._closed = True
            self._news.clear()
            self._arrived.notify_all()
        for row in self._rows:
            row.cancel()
        if self._tell:
            self._tell()

    def __del__(self) -> None:
        self.close()

    def _taken(self, news: News) -> News:
        with self._arrived:
            left = self._unread.pop(news.row.number, 0) - len(news.tokens)
            if left > 0:
                self._unread[news.row.number] = left
        if self._tell and news.row.paused:
            self._tell()
        return news


class Stream(Generic[T], Iterator[T]):
    """An iterator over what is generated, which can be closed from any thread; closing it ends the generation."""

    def __init__(self, items: Generator[T, None, None], end: Callable[[], None]):
        """Takes the items, and what ends the generation behind them and whoever waits for it (`Inbox.close`)."""
        self._items, self._end = items, end

    def __iter__(self) -> Stream[T]:
        return self

    def __next__(self) -> T:
        try:
            return next(self._items)
        except Closed:
            raise StopIteration from None

    def close(self) -> None:
        """Ends what is still being generated; whoever waits for the next item gets no more."""
        self._end()
        with suppress(ValueError):  # another thread waits in it, and comes out by itself
            self._items.close()

    def __enter__(self) -> Stream[T]:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()


def failure(error: BaseException) -> MTPError:
    """The error of a row that was ended by something that isn't its own doing."""
    if isinstance(error, MTPError):
        return type(error)(str(error))
    failed = MTPError(f"decoding failed, and ended this generation: {error!r}")
    failed.__cause__ = error
    return failed
