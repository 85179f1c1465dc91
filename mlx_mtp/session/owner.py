"""Sessions: a thread for each model, the only one that uses MLX, and its exchange with callers.

    callers                                        the session's thread
    session.submit(request, inbox) ---------->     queues a row in the scheduler
    inbox.get()          <-- tokens of a row --    after each step
    session.call(work)   <-- result ----------     between two steps
    session.run(work)    <-- result ----------     a piece between each two steps

The thread steps the scheduler while there are rows. A row runs on until it is AHEAD tokens ahead of its reader; then it
is paused, and others may take its place until the reader has caught up. A row whose reader is gone ends with the
current step, which takes at most a round and a chunk of a prompt. Other rows are not affected. An error in a step ends
all rows of the batch, each with an error of its own; rows in the queue are not affected.

The thread also loads the model. It frees it on `close`, when the model is dropped, or when the interpreter exits.
"""

from __future__ import annotations

import atexit
import logging
import os
import threading
import weakref
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import CancelledError, Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import mlx.core as mx

from ..decode.request import Request, Row
from ..decode.scheduler import Scheduler
from ..errors import MTPError
from ..models.drafter import Drafter
from ..models.target import Target
from ..system.wired import WIRED
from .inbox import Inbox, News
from .loading import Loaded
from .threads import ModelThread

log = logging.getLogger(__name__)

T = TypeVar("T")

AHEAD = 1024
"""Tokens that a row may be ahead of its reader: some seconds of text, so that a short stall doesn't pause it."""

POLL_SECONDS = 0.1
"""Seconds between two checks of the rows' cancel events while the thread is idle: an Event can't notify it."""


@dataclass
class _Work:
    """Work to do between steps; if `run` returns a generator, a piece of it is done each time."""

    run: Callable[[], Any]
    result: Future[Any]
    cancel: threading.Event | None
    pieces: Iterator[Any] | None = None


_sessions: weakref.WeakSet[Session] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    """Ends all sessions: a thread that is inside MLX while the interpreter exits would crash the process."""
    sessions = [*_sessions]
    for session in sessions:
        session.close(wait=False)
    for session in sessions:
        session.close()


class Session:
    """Runs a model in a thread of its own. All public methods may be called from any thread."""

    def __init__(self, load: Callable[[], Loaded]) -> None:
        """Starts the thread, and waits until it has loaded the model.

        Args:
            load: Loads the model; called in the thread.

        Raises:
            BaseException: Any exception of `load`.
        """
        self._load = load
        self._process = os.getpid()
        self._changed = threading.Condition()
        self._work: list[_Work] = []
        self._readers: list[tuple[Row, weakref.ref[Inbox]]] = []
        self._closing = False
        self._lent_to: int | None = None
        self._owned: Loaded | None = None
        loaded: Future[None] = Future()
        self._ended = threading.Event()
        self._thread = ModelThread.start(lambda stream: self._main(stream, loaded))
        _sessions.add(self)
        try:
            loaded.result()
        except Exception:
            self.close()
            raise
        except BaseException:
            self.close(wait=False)  # interrupted: loading goes on to its end
            raise

    # For callers

    def submit(self, request: Request, inbox: Inbox, width: int = 0, cancel: threading.Event | None = None) -> Row:
        """Queues a request; the inbox receives its tokens.

        Args:
            request: What to generate.
            inbox: Receives the row's news; closing it cancels the row.
            width: Most rows of the batch while this row runs, if more than usual.
            cancel: Ends the row when it is set.

        Raises:
            PromptError, MemoryBudgetError: See `Scheduler.check`.
            MTPError: The model is closed, or belongs to another process.
        """
        row = self.owned().scheduler.row(request, width)
        row.cancel_event = cancel
        inbox.expect(row, self._wake)
        # Weak, so that dropping an inbox ends its rows.
        reader = weakref.ref(inbox)

        def enqueue() -> None:
            self._scheduler.enqueue(row)
            self._readers.append((row, reader))

        self._post(_Work(enqueue, Future(), None))
        return row

    def call(self, work: Callable[[Loaded], T], cancel: threading.Event | None = None) -> T:
        """Calls a function in the session's thread, between two steps, and returns its result.

        Args:
            work: The function.
            cancel: If it is set before the call has begun, the call doesn't take place.

        Raises:
            MTPError: The model is closed or belongs to another process, or the call was cancelled.
            BaseException: Any exception of `work`.
        """
        return cast(T, self._wait_for(lambda: work(self.owned()), cancel))

    def run(self, work: Callable[[Loaded], Generator[Any, None, T]], cancel: threading.Event | None = None) -> T:
        """As `call`, for long work: `work` returns a generator, which advances once between two steps."""
        return cast(T, self._wait_for(lambda: work(self.owned()), cancel))

    def _wait_for(self, work: Callable[[], Any], cancel: threading.Event | None) -> Any:
        done: Future[Any] = Future()
        self._post(_Work(work, done, cancel))
        try:
            return done.result()
        except CancelledError:
            raise MTPError("this was cancelled") from None
        except BaseException:
            done.cancel()  # this thread was interrupted
            raise

    @contextmanager
    def lend(self) -> Iterator[tuple[Target, Drafter | None]]:
        """Lends the models to the calling thread for the block; the session's thread waits meanwhile.

        Raises:
            MTPError: The model is closed, or belongs to another process.
        """
        if self._lent_to == threading.get_ident():
            yield self.owned().target, self.owned().drafter
            return
        begun, ended, work = threading.Event(), threading.Event(), Future[Any]()

        def wait() -> None:
            begun.set()
            ended.wait()

        work.add_done_callback(lambda _: begun.set())  # if the model is closed before it begins
        self._post(_Work(wait, work, None))
        try:
            begun.wait()
            owned = self.owned()
            self._lent_to = threading.get_ident()
            yield owned.target, owned.drafter
        finally:
            self._lent_to = None
            ended.set()

    def owned(self) -> Loaded:
        """What the session owns. Only the session's thread, or within `lend`, may change it.

        Raises:
            MTPError: The model is closed, or belongs to another process.
        """
        owned = self._owned
        self._check_process()
        if owned is None or self._closing:
            raise MTPError("the model is closed: load it again")
        return owned

    def close(self, wait: bool = True) -> None:
        """Ends all rows and frees all memory. May be called more than once, and in any thread.

        Args:
            wait: Whether to wait until that is done.
        """
        if os.getpid() != self._process:
            return  # a forked child doesn't have the thread
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        if wait and threading.current_thread() is not self._thread:
            self._ended.wait()

    def _check_usable(self) -> None:
        self.owned()
        if threading.current_thread() is self._thread:
            raise MTPError("a callback can't use the model, whose thread waits for it: hand the work to another thread")
        if self._lent_to == threading.get_ident():
            raise MTPError("this thread has borrowed the models: leave `with lm.models()` before using them otherwise")

    def _check_process(self) -> None:
        if os.getpid() != self._process:
            raise MTPError(
                "this model was loaded before the process was forked, and its thread doesn't exist here: load it in "
                "the child, or have multiprocessing start children with 'spawn'"
            )

    def _post(self, work: _Work) -> None:
        self._check_usable()
        with self._changed:
            if self._closing:
                raise MTPError("the model is closed: load it again")
            self._work.append(work)
            self._changed.notify_all()

    def _wake(self) -> None:
        """Wakes the thread: a reader has caught up, or is gone."""
        with self._changed:
            self._changed.notify_all()

    # In the session's thread

    def _main(self, stream: mx.Stream, loaded: Future[None]) -> None:
        try:
            try:
                self._owned = self._load()
            except BaseException as error:
                loaded.set_exception(error)
                return
            finally:
                del self._load
            loaded.set_result(None)
            while self._wait():
                self._do_work()
                self._step()
        except BaseException:
            log.exception("the thread of a model failed: the model is closed")
        finally:
            self._end(stream)
            self._ended.set()

    def _wait(self) -> bool:
        """Waits until there is something to do; returns False once the session closes."""
        with self._changed:
            while not self._closing and not self._work and not self._may_step():
                WIRED.release(self)
                self._changed.wait(POLL_SECONDS if any(row.cancel_event for row, _ in self._readers) else None)
            return not self._closing

    def _may_step(self) -> bool:
        """Whether the scheduler has anything to do: a row that isn't paused, or one that was cancelled."""
        self._check_readers()
        return self._scheduler.busy

    @property
    def _scheduler(self) -> Scheduler:
        assert self._owned
        return self._owned.scheduler

    def _check_readers(self) -> None:
        """Cancels rows whose reader is gone, and pauses those that are far ahead of their reader."""
        for row, reader in self._readers:
            inbox = reader()
            if inbox is None or (row.cancel_event is not None and row.cancel_event.is_set()):
                row.cancel()
            row.paused = inbox is not None and inbox.unread(row) >= AHEAD

    def _do_work(self) -> None:
        with self._changed:
            work, self._work = self._work, []
        left = []
        for item in work:
            self._scheduler.engine.disturb()
            try:
                if item.result.cancelled() or (item.cancel is not None and item.cancel.is_set()):
                    item.result.cancel()
                    item.pieces = None
                    continue
                result = item.run() if item.pieces is None else None
                if item.pieces is None and isinstance(result, Generator):
                    item.pieces = result
                if item.pieces is None:
                    _resolve(item.result, result)
                else:
                    next(item.pieces)
                    left.append(item)
            except StopIteration as stop:
                _resolve(item.result, stop.value)
            except BaseException as error:
                with suppress(Exception):
                    item.result.set_exception(error)
        with self._changed:
            self._work = left + self._work

    def _step(self) -> None:
        if not self._may_step():
            return
        if WIRED.possible:
            WIRED.hold(self, cast(Loaded, self._owned).weights + self._scheduler.kv_bytes)
        try:
            self._scheduler.step()
        except BaseException as error:
            # The scheduler has ended every row of the batch with this error, which `_deliver` passes on.
            log.debug("a step has failed", exc_info=error)
            mx.clear_cache()
        self._deliver()

    def _deliver(self) -> None:
        left = []
        for row, reader in self._readers:
            done = row.done  # read before the tokens, because another thread may cancel the row at any time
            self._send(reader, row, row.pop_unread(), done)
            if not done:
                left.append((row, reader))
        self._readers = left

    def _send(self, reader: weakref.ref[Inbox], row: Row, tokens: list[int], done: bool) -> None:
        inbox = reader()
        if inbox is not None and (tokens or done):
            inbox.put(News(row, tokens, row.stats.snapshot(), done, row.cancelled, row.error))

    def _end(self, stream: mx.Stream) -> None:
        with self._changed:
            self._closing = True
            work, self._work = self._work, []
        for item in work:
            with suppress(Exception):
                item.result.set_exception(MTPError("the model was closed"))
        if self._owned:
            self._owned.scheduler.close()
        for row, reader in self._readers:
            row.error = row.error or MTPError("the model was closed")
            self._send(reader, row, row.pop_unread(), True)
        self._readers = []
        self._owned = None
        WIRED.release(self)
        with suppress(Exception):
            mx.synchronize(stream)
        mx.clear_cache()


def _resolve(result: Future[Any], value: Any) -> None:
    with suppress(Exception):  # the caller was interrupted, which cancelled the future
        result.set_result(value)
