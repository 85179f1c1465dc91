"""Records a trace of a model's engine while a caller runs something."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..decode.trace import Trace
from ..errors import MTPError
from .loading import Loaded
from .owner import Session


@contextmanager
def tracing(session: Session, path: str | Path) -> Iterator[None]:
    """Records until the block ends, or the model is unloaded; see `decode.trace`.

    Raises:
        MTPError: Another trace is being recorded, or the model is closed.
        OSError: The file can't be written.
    """
    begun: list[Trace] = []

    def begin(owned: Loaded) -> None:
        engine = owned.scheduler.engine
        if engine.trace:
            raise MTPError("a trace is being recorded already, and there can be only one at a time")
        begun.append(Trace(path))
        engine.trace = begun[0]

    def end(owned: Loaded) -> None:
        for trace in begun:
            trace.settle()
            owned.scheduler.engine.trace = None

    try:
        session.call(begin)
        yield
    finally:
        if session.loaded:  # else the engine that was recorded is gone
            with suppress(MTPError):  # the model was closed meanwhile
                session.call(end)  # also if `begin` was interrupted: it comes after it, if that still runs
        for trace in begun:
            trace.close()
