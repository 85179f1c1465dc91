"""A lock for threads that take turns: whoever has waited longest is next.

Python's own locks let the thread that has just released one take it again at once, so that a loop of short turns keeps
all others out.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Turns:
    """Turns in the order in which they are asked for; a thread may ask again during its own."""

    def __init__(self) -> None:
        """Nobody's turn."""
        self._lock = threading.Condition(threading.RLock())
        self._queue: list[object] = []
        self._owner: int | None = None

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Waits for this thread's turn, which ends with the context."""
        me = object()
        if self._owner == threading.get_ident():
            yield
            return
        try:
            self._queue.append(me)
            with self._lock:
                while self._queue[0] is not me:
                    self._lock.wait()
                try:
                    self._owner = threading.get_ident()
                    yield
                finally:
                    self._owner = None
                    self._queue.remove(me)
                    self._lock.notify_all()
        finally:
            if me in self._queue:  # interrupted while it waited
                self._queue.remove(me)
                with self._lock:
                    self._lock.notify_all()
