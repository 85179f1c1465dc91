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

The thread also loads the model: at the beginning, and when it is used after `unload`. It frees it on `unload`, after
some idle time, on `close`, when the model is dropped, or when the interpreter exits.
"""

from __future__ import annotations

import atexit
import logging
import os
import threading
import time
import weakref
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import CancelledError, Future
from contextlib import contextmanager, suppress
from typing import Any, TypeVar, cast

import mlx.core as mx

from ..decode.capacity import Capacity
from ..decode.request import Request, Row
from ..errors import MTPError
from ..models.drafter import Drafter
from ..models.target import Target
from ..system.wired import WIRED
from .inbox import Inbox, News
from .loading import Loaded
from .threads import ModelThread
from .work import Work

log = logging.getLogger(__name__)

T = TypeVar("T")

AHEAD = 1024
"""Tokens that a row may be ahead of its reader: some seconds of text, so that a short stall doesn't pause it."""

POLL_SECONDS = 0.1
"""Seconds between two checks of the rows' cancel events while the thread is idle: an Event can't notify it."""


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

    def __init__(self, load: Callable[[], Loaded], idle_unload: float | None = None) -> None:
        """Starts the thread, and waits until it has loaded the model.

        Args:
            load: Loads the model; called in the thread, and again when the model is used after `unload`.
            idle_unload: Seconds without work after which the model is unloaded; None for never.

        Raises:
            BaseException: Any exception of `load`.
        """
        self._load = load
        self._idle_unload = threading.TIMEOUT_MAX if idle_unload is None else min(idle_unload, threading.TIMEOUT_MAX)
        self._process = os.getpid()
        self._changed = threading.Condition()
        self._work: list[Work] = []
        self._readers: list[tuple[Row, weakref.ref[Inbox]]] = []
        self._closing = False
        self._lent_to: int | None = None
        self._owned: Loaded | None = None
        self._capacity: Capacity  # of the latest load
        self._ended = threading.Event()
        self._thread = ModelThread.start(self._main)
        _sessions.add(self)
        try:
            self.call(lambda _: None)
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
            PromptError, MemoryBudgetError: See `Capacity.check`.
            MTPError: The model is closed, or belongs to another process.
        """
        row = self.capacity.row(request, width)
        row.cancel_event = cancel
        inbox.expect(row, self._wake)
        # Weak, so that dropping an inbox ends its rows.
        reader = weakref.ref(inbox)

        def enqueue() -> None:
            self._use().scheduler.enqueue(row)
            self._readers.append((row, reader))

        def queued(done: Future[None]) -> None:
            if (error := done.exception()) is not None:  # the model couldn't be loaded, or was closed meanwhile
                row.error, row.done = error, True
                self._send(reader, row, [], True)

        work = Work(enqueue)
        work.result.add_done_callback(queued)
        self._post(work)
        return row

    def call(self, work: Callable[[Loaded], T], cancel: threading.Event | None = None) -> T:
        """Calls a function in the session's thread, between two steps, and returns its result.

        Args:
            work: The function.
            cancel: If it is set before the call has begun, the call doesn't take place.

        Raises:
            MTPError: The model is closed or belongs to another process, or the call was cancelled.
            BaseException: Any exception of `work`, or of loading the model.
        """
        return cast(T, self._wait_for(Work(lambda: work(self._use()), cancel)))

    def run(self, work: Callable[[Loaded], Generator[Any, None, T]], cancel: threading.Event | None = None) -> T:
        """As `call`, for long work: `work` returns a generator, which advances once between two steps."""
        return cast(T, self._wait_for(Work(lambda: work(self._use()), cancel)))

    def unload(self) -> None:
        """Frees the model and its KV as soon as no call runs or waits; the next call loads it again.

        Raises:
            MTPError: The model is closed, or belongs to another process.
        """
        self._wait_for(Work(self._unload, when_idle=True))

    @property
    def loaded(self) -> bool:
        """Whether the model is in memory."""
        return self._owned is not None

    def _wait_for(self, work: Work) -> Any:
        self._post(work)
        try:
            return work.result.result()
        except CancelledError:
            raise MTPError("this was cancelled") from None
        except BaseException:
            work.result.cancel()  # this thread was interrupted
            raise

    @contextmanager
    def lend(self) -> Iterator[tuple[Target, Drafter | None]]:
        """Lends the models to the calling thread for the block; the session's thread waits meanwhile.

        Raises:
            MTPError: The model is closed, or belongs to another process.
        """
        if self._lent_to == threading.get_ident():
            assert self._owned
            yield self._owned.target, self._owned.drafter
            return
        lent, ended = Future[Loaded](), threading.Event()

        def lend() -> None:
            lent.set_result(self._use())
            ended.wait()

        def failed(done: Future[None]) -> None:
            if (error := done.exception()) is not None:
                lent.set_exception(error)

        work = Work(lend)
        work.result.add_done_callback(failed)
        self._post(work)
        try:
            owned = lent.result()
            self._lent_to = threading.get_ident()
            yield owned.target, owned.drafter
        finally:
            self._lent_to = None
            ended.set()

    @property
    def capacity(self) -> Capacity:
        """What the model has room for, whether it is loaded or not.

        Raises:
            MTPError: The model is closed, or belongs to another process.
        """
        self.check_open()
        return self._capacity

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
        self.check_open()
        if threading.current_thread() is self._thread:
            raise MTPError("a callback can't use the model, whose thread waits for it: hand the work to another thread")
        if self._lent_to == threading.get_ident():
            raise MTPError("this thread has borrowed the models: leave `with lm.models()` before using them otherwise")

    def check_open(self) -> None:
        """Checks that the model can be used.

        Raises:
            MTPError: It is closed, or belongs to another process.
        """
        if os.getpid() != self._process:
            raise MTPError(
                "this model was loaded before the process was forked, and its thread doesn't exist here: load it in "
                "the child, or have multiprocessing start children with 'spawn'"
            )
        if self._closing:
            raise MTPError("the model is closed: load it again")

    def _post(self, work: Work) -> None:
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

    def _main(self, stream: mx.Stream) -> None:
        self._stream = stream
        try:
            while self._wait():
                self._do_work()
                self._step()
        except BaseException:
            log.exception("the thread of a model failed: the model is closed")
        finally:
            self._end()
            self._ended.set()

    def _wait(self) -> bool:
        """Waits until there is something to do; returns False once the session closes."""
        idle_until = time.monotonic() + self._idle_unload
        with self._changed:
            while not self._closing and not self._may_work() and not self._may_step():
                WIRED.release(self)
                if self._readers:  # paused rows
                    self._changed.wait(POLL_SECONDS if any(row.cancel_event for row, _ in self._readers) else None)
                elif not self._owned:
                    self._changed.wait()
                elif (left := idle_until - time.monotonic()) > 0:
                    self._changed.wait(left)
                else:
                    self._work.append(Work(self._unload, when_idle=True))
            return not self._closing

    def _may_work(self) -> bool:
        """Whether there is work that needn't wait for rows."""
        return any(not self._readers or not item.when_idle for item in self._work)

    def _may_step(self) -> bool:
        """Whether the scheduler has anything to do: a row that isn't paused, or one that was cancelled."""
        self._check_readers()
        return self._owned is not None and self._owned.scheduler.busy

    def _use(self) -> Loaded:
        """What the session owns; loads it if it isn't loaded.

        Raises:
            BaseException: Any exception of loading.
        """
        if self._owned is None:
            self._owned = self._load()
            self._capacity = self._owned.scheduler.capacity
        return self._owned

    def _unload(self) -> None:
        if self._owned:
            name = self._owned.name
            self._free()
            log.info("unloaded %s; its next use loads it again", name)

    def _free(self) -> None:
        """Frees what the session owns."""
        if self._owned:
            self._owned.scheduler.close()
            self._owned = None
        WIRED.release(self)
        with suppress(Exception):
            mx.synchronize(self._stream)
        mx.clear_cache()

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
        idle = not self._readers and all(item.when_idle for item in work)
        left: list[Work] = []
        for item in work:
            if self._owned:
                self._owned.scheduler.engine.disturb()
            if (item.when_idle and not idle) or not item.advance():
                left.append(item)
        with self._changed:
            self._work = left + self._work

    def _step(self) -> None:
        owned = self._owned
        if owned is None or not self._may_step():
            return
        if WIRED.possible:
            WIRED.hold(self, owned.weights + owned.scheduler.kv_bytes)
        try:
            owned.scheduler.step()
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

    def _end(self) -> None:
        with self._changed:
            self._closing = True
            work, self._work = self._work, []
        for item in work:
            item.fail(MTPError("the model was closed"))
        if self._owned:
            self._owned.scheduler.close()
        for row, reader in self._readers:
            row.error = row.error or MTPError("the model was closed")
            self._send(reader, row, row.pop_unread(), True)
        self._readers = []
        self._free()
