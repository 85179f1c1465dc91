"""Work for the thread of a model: functions that it calls between two steps, whole or piece by piece."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Work:
    """A function to call.

    Attributes:
        run: The function; if it returns a generator, that advances once between two steps.
        cancel: If it is set before the work has ended, the work is called off.
        when_idle: Whether it waits until there is no other work, and no row.
        result: What `run` returned or raised. Cancelling it calls the work off.
    """

    run: Callable[[], Any]
    cancel: threading.Event | None = None
    when_idle: bool = False
    result: Future[Any] = field(default_factory=Future)
    _pieces: Iterator[Any] | None = None

    @property
    def called_off(self) -> bool:
        """Whether it needn't be done any more."""
        return self.result.cancelled() or (self.cancel is not None and self.cancel.is_set())

    def advance(self) -> bool:
        """Calls the function, or does its next piece; returns whether the work has ended."""
        if self.called_off:
            self.result.cancel()
            self._pieces = None
            return True
        try:
            if self._pieces is None:
                value = self.run()
                if not isinstance(value, Generator):
                    self._resolve(value)
                    return True
                self._pieces = value
            next(self._pieces)
            return False
        except StopIteration as stop:
            self._resolve(stop.value)
        except BaseException as error:
            self.fail(error)
        return True

    def fail(self, error: BaseException) -> None:
        """Ends it with an error."""
        with suppress(Exception):  # the caller was interrupted, which cancelled the result
            self.result.set_exception(error)

    def _resolve(self, value: Any) -> None:
        with suppress(Exception):  # as in `fail`
            self.result.set_result(value)
