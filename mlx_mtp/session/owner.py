"""The owner of a model: one thread that alone touches MLX, and what it exchanges with those who call.

    callers                                        the owner's thread
    session.submit(request, inbox) ---------->     into the scheduler's queue
    inbox.get()          <-- tokens of a row --    after each of its steps
    session.call(work)   <-- result ----------     between two steps, or piece by piece between several

The owner steps the scheduler while there are rows, whoever reads their tokens and however slowly: a row goes on until
it is AHEAD tokens ahead of its reader, then it makes room for others until that one has caught up. A row whose reader
has gone, for whatever reason, ends with the step that is running, which is a round and a chunk of a prompt at most.
Nobody else's row is touched by that. An error in a step ends all rows that were under way, each with an error of its
own; those that wait in the queue don't notice.

The owner loads the model, too, and lets go of it with `close`, when the model is dropped, or when the interpreter
exits. Then its thread waits for the next model: MLX keeps a thread of its own for every stream that was ever made, and
aborts the process at exit if that outlives the thread it was made in.
"""

from __future__ import annotations

import atexit
import logging
import os
import queue
import threading
import weakref
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import CancelledError, Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar, cast

import mlx.core as mx

from ..decode.request import Request, Row
from ..decode.scheduler import Scheduler
from ..errors import MTPError
from ..models.drafter import Drafter
from ..models.target import Target
from ..system.wired import WIRED
from .inbox import Inbox, News
from .loading import Loaded

log = logging.getLogger(__name__)

T = TypeVar("T")

AHEAD = 1024
"""Tokens that a row may be ahead of its reader: some seconds of text, so that a window that redraws costs no round."""

GLANCE = 0.1
"""Seconds between two looks at the events that end rows, while nothing is done otherwise."""


@dataclass
class _Work:
    """Something to be done between steps: a function's one call, or a generator's pieces."""

    run: Callable[[], Any]
    result: Future[Any]
    cancel: threading.Event | None
    pieces: Iterator[Any] | None = None


class _Thread:
    """A thread with a stream, which does one thing after another; daemons, since they never end."""

    idle: ClassVar[list[_Thread]] = []

    def __init__(self) -> None:
        self._tasks: queue.SimpleQueue[Callable[[mx.Stream], None]] = queue.SimpleQueue()
        self.thread = threading.Thread(target=self._run, name="mlx_mtp", daemon=True)
        self.thread.start()

    @classmethod
    def start(cls, task: Callable[[mx.Stream], None]) -> threading.Thread:
        """Has something done in a thread that has nothing to do, or a new one."""
        try:
            free = cls.idle.pop()
        except IndexError:
            free = cls()
        free._tasks.put(task)
        return free.thread

    def _run(self) -> None:
        stream = mx.new_thread_unsafe_stream(mx.default_device())
        with mx.stream(stream):
            while True:
                self._tasks.get()(stream)
                self.idle.append(self)


_sessions: weakref.WeakSet[Session] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    """Ends all sessions: a thread that is in the midst of MLX when the interpreter goes takes the process with it."""
    sessions = [*_sessions]
    for session in sessions:
        session.close(wait=False)
    for session in sessions:
        session.close()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_Thread.idle.clear)  # there they don't exist


class Session:
    """Runs a model in a thread of its own; all methods may be called from any thread."""

    def __init__(self, load: Callable[[], Loaded]):
        """Loads a model in its thread, and waits for it.

        Args:
            load: Makes what the thread is to own.

        Raises:
            BaseException: What `load` raises.
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
        self._thread = _Thread.start(lambda stream: self._main(stream, loaded))
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
        """Hands in a request; its tokens come into the inbox.

        Args:
            request: What to generate.
            inbox: Where its news goes; whoever closes it ends the row.
            width: Rows that the batch may have while this one is under way, if more than usual.
            cancel: Ends the row when it is set.

        Raises:
            PromptError, MemoryBudgetError: See `Scheduler.check`.
            MTPError: The model is closed, or belongs to another process.
        """
        row = self.owned().scheduler.row(request, width)
        row.cancel_event = cancel
        inbox.expect(row, self._wake)
        # Weak, so that an inbox that is dropped ends its rows.
        reader = weakref.ref(inbox)

        def enqueue() -> None:
            self._scheduler.enqueue(row)
            self._readers.append((row, reader))

        self._post(_Work(enqueue, Future(), None))
        return row

    def call(self, work: Callable[[Loaded], T], cancel: threading.Event | None = None) -> T:
        """Has something done in the owner's thread, between two steps, and waits for it.

        Args:
            work: What to do.
            cancel: Gives it up, if it hasn't begun, when it is set.

        Raises:
            MTPError: The model is closed, belongs to another process, or it was given up.
            BaseException: What `work` raises.
        """
        return cast(T, self._wait_for(lambda: work(self.owned()), cancel))

    def run(self, work: Callable[[Loaded], Generator[Any, None, T]], cancel: threading.Event | None = None) -> T:
        """As `call`, for long work: a generator, of which a piece is done between two steps."""
        return cast(T, self._wait_for(lambda: work(self.owned()), cancel))

    def _wait_for(self, work: Callable[[], Any], cancel: threading.Event | None) -> Any:
        done: Future[Any] = Future()
        self._post(_Work(work, done, cancel))
        try:
            return done.result()
        except CancelledError:
            raise MTPError("this was cancelled") from None
        except BaseException:
            done.cancel()  # interrupted while it waited
            raise

    @contextmanager
    def lend(self) -> Iterator[tuple[Target, Drafter | None]]:
        """Lends the models to the calling thread, while the owner waits."""
        if self._lent_to == threading.get_ident():
            yield self.owned().target, self.owned().drafter
            return
        begun, ended, work = threading.Event(), threading.Event(), Future[Any]()

        def wait() -> None:
            begun.set()
            ended.wait()

        work.add_done_callback(lambda _: begun.set())  # it never began: the model was closed
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
        """What the session owns; for looking at only.

        Raises:
            MTPError: The model is closed, or belongs to another process.
        """
        owned = self._owned
        self._check_process()
        if owned is None or self._closing:
            raise MTPError("the model is closed: load it again")
        return owned

    def close(self, wait: bool = True) -> None:
        """Ends all rows and gives back all memory; may be called more than once, and anywhere.

        Args:
            wait: Whether to wait until that is done.
        """
        if os.getpid() != self._process:
            return  # a forked child: there is no such thread
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        if wait and threading.current_thread() is not self._thread:
            self._ended.wait()

    def _check_usable(self) -> None:
        self.owned()
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
        """Somebody has read tokens, or gone."""
        with self._changed:
            self._changed.notify_all()

    # In the owner's thread

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
            log.exception("the owner of a model has met an error of its own: the model is closed")
        finally:
            self._end(stream)
            self._ended.set()

    def _wait(self) -> bool:
        """Waits until there is something to do; False if that is to end."""
        with self._changed:
            while not self._closing and not self._work and not self._may_step():
                WIRED.release(self)
                # Nobody says that an event was set.
                self._changed.wait(GLANCE if any(row.cancel_event for row, _ in self._readers) else None)
            return not self._closing

    def _may_step(self) -> bool:
        """Whether a row is under way that its reader keeps up with, or one that is to leave."""
        self._notice_readers()
        return self._scheduler.busy

    @property
    def _scheduler(self) -> Scheduler:
        assert self._owned
        return self._owned.scheduler

    def _notice_readers(self) -> None:
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
            # Every row under way has ended with it, and says so to its reader.
            log.debug("a step has failed", exc_info=error)
            mx.clear_cache()
        self._deliver()

    def _deliver(self) -> None:
        left = []
        for row, reader in self._readers:
            done = row.done  # before its tokens are looked at: it may be cancelled just now
            self._tell(reader, row, row.pop_unread(), done)
            if not done:
                left.append((row, reader))
        self._readers = left

    def _tell(self, reader: weakref.ref[Inbox], row: Row, tokens: list[int], done: bool) -> None:
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
            self._tell(reader, row, row.pop_unread(), True)
        self._readers = []
        self._owned = None
        WIRED.release(self)
        with suppress(Exception):
            mx.synchronize(stream)
        mx.clear_cache()


def _resolve(result: Future[Any], value: Any) -> None:
    with suppress(Exception):  # whoever waited was interrupted
        result.set_result(value)
