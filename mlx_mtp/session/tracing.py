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

    def begin(owned: Loaded) -> Trace:
        engine = owned.scheduler.engine
        if engine.trace:
            raise MTPError("a trace is being recorded already, and there can be only one at a time")
        engine.trace = Trace(path)
        return engine.trace

    def end(owned: Loaded) -> None:
        trace.settle()
        owned.scheduler.engine.trace = None

    trace = session.call(begin)
    try:
        yield
    finally:
        if session.loaded:  # else the engine that was recorded is gone
            with suppress(MTPError):  # the model was closed meanwhile
                session.call(end)
        trace.close()
