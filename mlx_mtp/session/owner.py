"""Sessions: a thread for each model, the only one that uses MLX, and its exchange with callers.

    callers                                        the session's thread
    session.submit(request, inbox) ---------->     queues a row in the scheduler
    inbox.get()          <-- tokens of a row --    after each step
    session.call(work)   <-- result ----------     between two steps
    session.run(work)    <-- result ----------     a piece between each two steps

The thread steps the scheduler while there are rows. A row runs on until it is AHEAD tokens ahead of its reader; then it
is paused, and others may take its place until the reader has caught up. A row whose reader is gone ends with the
current step, which takes at most a round and a chunk of a prompt. Other rows are not affected. An error in a step ends
the rows that it concerns, see `Scheduler.step`; one between two steps ends all rows but those in the queue.

Any line may be the last one of a thread that is interrupted. So callers and the session's thread share no lock that is
taken in Python: they add to lists and queues, which is done at once, and ring.

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
from contextlib import contextmanager, suppress
from queue import Empty, SimpleQueue
from typing import Any, TypeVar, cast

import mlx.core as mx

from ..decode.capacity import Capacity
from ..decode.request import Request, Row
from ..errors import MTPError, detached
from ..models.drafter import Drafter
from ..models.target import Target
from ..system.wired import WIRED
from .inbox import Inbox
from .loading import Loaded
from .readers import Readers, send
from .threads import ModelThread
from .work import CLOSED, Loan, Work, WorkList

log = logging.getLogger(__name__)

T = TypeVar("T")

AHEAD = 1024
"""Tokens that a row may be ahead of its reader: some seconds of text, so that a short stall doesn't pause it."""

POLL_SECONDS = 0.1
"""Seconds between two checks of the rows' cancel events while the thread is idle: an Event can't notify it."""

ATTEMPTS = 3
"""Failures in a row, of the thread's own loop, after which the model is closed."""


_sessions: weakref.WeakSet[Session] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    """Ends all sessions: a thread that is inside MLX while the interpreter exits would crash the process."""
    sessions = [*_sessions]
    for session in sessions:
        session.close(wait=False)
    for session in sessions:
        session.close()
    ModelThread.rest()


class Session:
    """Runs a model in a thread of its own. All public methods may be called from any thread."""

    def __init__(self, load: Callable[[], Loaded], idle_unload: float | None = None) -> None:
        """Prepares a session; `start` starts it.

        Args:
            load: Loads the model; called in the thread, and again when the model is used after `unload`.
            idle_unload: Seconds without work after which the model is unloaded; None for never.
        """
        self._load = load
        self._idle_unload = threading.TIMEOUT_MAX if idle_unload is None else min(idle_unload, threading.TIMEOUT_MAX)
        self._process = os.getpid()
        self._bell: SimpleQueue[object] = SimpleQueue()  # wakes the thread
        self._work = WorkList()
        self._readers = Readers()
        self._closing = self._ended = False
        self._failure: BaseException | None = None
        self._loan: weakref.ref[Loan] | None = None
        self._owned: Loaded | None = None
        self._capacity: Capacity  # of the latest load
        self._alive = threading.Lock()  # held by the thread until it has ended
        self._thread: threading.Thread | None = None
        _sessions.add(self)

    def start(self) -> None:
        """Starts the thread, and waits until it has loaded the model.

        Raises:
            BaseException: Any exception of `load`.
        """
        ModelThread.start(self._main)
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
        # Weak, so that dropping an inbox ends its rows; and rings then.
        reader = weakref.ref(inbox, self._bell.put)

        def enqueue() -> None:
            self._use().scheduler.enqueue(row)
            self._readers.add(row, reader)

        def failed(error: BaseException) -> None:  # the model couldn't be loaded, or was closed meanwhile
            row.error, row.done = error, True
            send(reader, row, [], True)

        self._post(Work(enqueue, failed=failed))
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
        try:
            self._post(work)
            return work.wait()
        except BaseException:
            work.give_up()
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
        loan = Loan(threading.get_ident())
        # Weak, so that the loan ends with this frame if that is interrupted before it can give it back.
        reference = weakref.ref(loan, self._bell.put)

        def lend() -> None:
            owned, self._loan = self._use(), reference
            work.hand_over(owned)
            self._wait_while_lent()

        work = Work(lend)
        try:
            owned = self._wait_for(work)
            yield owned.target, owned.drafter
        finally:
            loan.returned = True
            self.wake()

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
        self._closing = True
        self.wake()
        if wait and threading.current_thread() is not self._thread:
            with self._alive:
                pass

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
        self._work.add(work)
        self.wake()
        if self._ended:  # perhaps before that, so that nobody else ends it
            self._work.end()

    def wake(self) -> None:
        """Wakes the thread: there is work, or a reader has caught up, or is gone."""
        self._bell.put(None)

    # In the session's thread

    def _main(self, stream: mx.Stream) -> None:
        """Runs the session until it closes; `ModelThread` calls it again if it is interrupted."""
        self._stream, self._thread = stream, threading.current_thread()
        with self._alive:
            failures = 0
            while failures < ATTEMPTS:
                try:
                    if self._failure:
                        self._recover(self._failure)
                    while self._serve():
                        failures = 0
                    break
                except BaseException as error:
                    self._failure, failures = error, failures + 1
            else:
                log.error("the thread of a model failed: the model is closed", exc_info=self._failure)
            self._end()

    def _serve(self) -> bool:
        """Waits for something to do, and does it; returns False once the session closes."""
        self._wait_while_lent()
        if not self._wait():
            return False
        self._work.advance(bool(self._readers), before_each=self._disturb)
        self._step()
        return True

    def _recover(self, error: BaseException) -> None:
        """Ends what may be half done after an exception: rows that have begun, and the work at hand."""
        log.debug("the thread of a model was interrupted", exc_info=error)
        detached(error)
        self._work.recover(error)
        if self._owned:
            self._owned.scheduler.abandon(error)
        self._readers.recover(error)
        self._failure = None

    def _wait(self) -> bool:
        """Waits until there is something to do; returns False once the session closes."""
        idle_until = time.monotonic() + self._idle_unload
        while not self._closing and not self._work.may_advance(bool(self._readers)) and not self._may_step():
            WIRED.release(self)
            if self._readers:  # paused rows
                self._sleep(POLL_SECONDS if self._readers.have_events else None)
            elif not self._owned:
                self._sleep(None)
            elif (left := idle_until - time.monotonic()) > 0:
                self._sleep(left)
            else:
                self._work.add(Work(self._unload, when_idle=True))
        return not self._closing

    @property
    def _lent_to(self) -> int | None:
        """The thread that has borrowed the models."""
        loan = self._loan() if self._loan else None
        return loan.borrower if loan and not loan.returned else None

    def _wait_while_lent(self) -> None:
        while self._lent_to is not None:
            self._sleep(None)

    def _sleep(self, seconds: float | None) -> None:
        """Sleeps until somebody rings, at most so long."""
        with suppress(Empty):
            self._bell.get(timeout=seconds)
            while True:
                self._bell.get_nowait()

    def _may_step(self) -> bool:
        """Whether the scheduler has anything to do: a row that isn't paused, or one that was cancelled."""
        self._readers.check(AHEAD)
        return self._owned is not None and self._owned.scheduler.busy

    def _use(self) -> Loaded:
        """What the session owns; loads it if it isn't loaded.

        Raises:
            BaseException: Any exception of loading.
        """
        if self._owned is None:
            owned = self._load()
            self._capacity, self._owned = owned.scheduler.capacity, owned
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

    def _disturb(self) -> None:
        if self._owned:
            self._owned.scheduler.engine.disturb()

    def _step(self) -> None:
        owned = self._owned
        if owned is None or not self._may_step():
            return
        if WIRED.possible:
            WIRED.hold(self, owned.weights + owned.scheduler.kv_bytes)
        owned.scheduler.step()
        self._readers.deliver()

    def _end(self) -> None:
        """Ends all rows and all work, and frees everything."""
        self._closing = self._ended = True
        self._work.end()
        if self._owned:
            self._owned.scheduler.close()
        self._readers.end(MTPError(CLOSED))
        self._failure = None  # whose frames hold what is freed now
        self._free()
