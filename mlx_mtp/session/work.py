"""Work for the thread of a model: functions that it calls between two steps, whole or piece by piece."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Any

from ..errors import MTPError, detached

CLOSED = "the model was closed"
"""The error of everything that hadn't ended by then."""


@dataclass(eq=False)
class Work:
    """A function to call.

    Attributes:
        run: The function; if it returns a generator, that advances once between two steps.
        cancel: If it is set before the work has ended, the work is called off.
        when_idle: Whether it waits until there is no other work, and no row.
        failed: Called with the error if the work fails, in the thread that calls `fail`; perhaps more than once.
    """

    run: Callable[[], Any]
    cancel: threading.Event | None = None
    when_idle: bool = False
    failed: Callable[[BaseException], object] | None = None
    _given_up: bool = False
    # A queue and not a Future, whose lock stays taken for ever if Ctrl-C strikes just after it was taken.
    _outcome: SimpleQueue[tuple[Any, BaseException | None]] = field(default_factory=SimpleQueue)
    _pieces: Iterator[Any] | None = None

    def wait(self) -> Any:
        """Waits for the result, in the thread of the caller; one that is interrupted gives the work up.

        Raises:
            MTPError: The work was called off, or the model was closed.
            BaseException: Any exception of `run`.
        """
        try:
            value, error = self._outcome.get()
        except BaseException:
            self.give_up()
            raise
        if error is not None:
            raise error
        return value

    def hand_over(self, value: Any) -> None:
        """Ends the wait for the result with a value, while `run` goes on."""
        self._outcome.put((value, None))

    def give_up(self) -> None:
        """Says that nobody waits for the result any more; if the work hasn't begun, it never will."""
        self._given_up = True

    def advance(self) -> bool:
        """Calls the function, or does its next piece; returns whether the work has ended."""
        try:
            if self._given_up or (self.cancel is not None and self.cancel.is_set()):
                self._pieces = None
                self.fail(MTPError("this was cancelled"))
                return True
            if self._pieces is None:
                value = self.run()
                if not isinstance(value, Generator):
                    self.hand_over(value)
                    return True
                self._pieces = value
            next(self._pieces)
            return False
        except StopIteration as stop:
            self.hand_over(stop.value)
        except BaseException as error:
            self.fail(error)
        return True

    def fail(self, error: BaseException) -> None:
        """Ends it with an error; one that would end the caller's program is made an `MTPError`."""
        detached(error)
        if not isinstance(error, Exception):
            stopped = MTPError(f"the model's thread was interrupted: {error!r}")
            stopped.__cause__, error = error, stopped
        self._outcome.put((None, error))
        if self.failed:
            self.failed(error)


class WorkList:
    """The work of a session: any thread adds to it, and the session's thread does it."""

    def __init__(self) -> None:
        """Makes an empty list."""
        self._items: list[Work] = []
        self._current: Work | None = None

    def __len__(self) -> int:
        return len(self._items)

    def add(self, item: Work) -> None:
        """Adds work. Thread-safe."""
        self._items.append(item)

    def may_advance(self, rows: bool) -> bool:
        """Whether there is work that needn't wait; `rows` says whether there are rows."""
        return any(not rows or not item.when_idle for item in self._items)

    def advance(self, rows: bool, before_each: Callable[[], object]) -> None:
        """Does a piece of all work that needn't wait.

        Args:
            rows: As for `may_advance`.
            before_each: Called before each piece.
        """
        work = [*self._items]
        idle = not rows and all(item.when_idle for item in work)
        for item in work:
            before_each()
            if idle or not item.when_idle:
                self._current = item
                if item.advance():
                    self._drop(item)
                self._current = None

    def recover(self, error: BaseException) -> None:
        """Fails the work that an exception has interrupted, if there is any."""
        if self._current:
            self._current.fail(error)
            self._drop(self._current)
            self._current = None

    def end(self) -> None:
        """Fails all work, since the model was closed; may run in several threads."""
        for item in [*self._items]:
            item.fail(MTPError(CLOSED))
            self._drop(item)

    def _drop(self, item: Work) -> None:
        """Takes work that has ended off the list."""
        with suppress(ValueError):  # it is off, see `end`
            self._items.remove(item)


@dataclass
class Loan:
    """A loan of the models to another thread; it ends when it is returned, or with the borrower's frame.

    Attributes:
        borrower: The thread.
        returned: Whether it was returned.
    """

    borrower: int
    returned: bool = False
