"""Several streams read as one."""

from __future__ import annotations

import threading
from collections.abc import Generator, Sequence
from queue import SimpleQueue
from typing import TypeVar

from .inbox import Stream

T = TypeVar("T")


def merged(streams: Sequence[Stream[T]]) -> Stream[tuple[int, T]]:
    """Reads streams side by side.

    Each has a thread that waits for it, so that all of them run as soon as the first item is asked for.

    Returns:
        Pairs: the index of a stream, and its next item, in the order in which they come. An error of one stream ends
        all. Closing the merged stream, from any thread, closes them.
    """

    def close() -> None:
        for stream in streams:
            stream.close()

    return Stream(_items(streams), close)


def _items(streams: Sequence[Stream[T]]) -> Generator[tuple[int, T], None, None]:
    # An item, an error, or None for the end of a stream.
    arrived: SimpleQueue[tuple[int, T] | BaseException | None] = SimpleQueue()

    def read(i: int) -> None:
        try:
            for item in streams[i]:
                arrived.put((i, item))
            arrived.put(None)
        except BaseException as error:  # for the thread that reads the merged stream
            arrived.put(error)

    try:
        for i in range(len(streams)):
            threading.Thread(target=read, args=(i,), daemon=True).start()
        running = len(streams)
        while running:
            came = arrived.get()
            if isinstance(came, BaseException):
                raise came
            if came is None:
                running -= 1
            else:
                yield came
    finally:
        for stream in streams:
            stream.close()
