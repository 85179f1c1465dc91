"""Threads for models, each with an MLX stream.

A thread whose model has ended waits for another model. Threads are reused because MLX has a thread of its own for every
stream ever made, and aborts the process at exit if that outlives the thread that made the stream.
"""

from __future__ import annotations

import logging
import os
import select
import threading
from collections import deque
from collections.abc import Callable
from queue import SimpleQueue
from typing import ClassVar

import mlx.core as mx

log = logging.getLogger(__name__)

REST_SECONDS = 5.0
"""How long the end of a program waits at most for each thread: one may be in a task that can't be ended."""

MORE_THAN_A_PIPE = 1 << 21
"""More bytes than a pipe takes on any system by default."""


class ModelThread:
    """A daemon thread with an MLX stream; it runs tasks one after another and never ends.

    A task that raises is called again: whatever strikes the thread, a task ends only by returning.

    Attributes:
        thread: Python's object for it.
    """

    idle: ClassVar[list[ModelThread]] = []
    _all: ClassVar[list[ModelThread]] = []

    def __init__(self) -> None:
        self._tasks: deque[Callable[[mx.Stream], None]] = deque()
        self._wake: SimpleQueue[None] = SimpleQueue()
        self._stream: mx.Stream | None = None
        self.thread = threading.Thread(target=self._run, name="mlx_mtp", daemon=True)
        self._all.append(self)
        self.thread.start()

    @classmethod
    def start(cls, task: Callable[[mx.Stream], None]) -> None:
        """Runs a task in an idle thread, or in a new one."""
        try:
            free = cls.idle.pop()
        except IndexError:
            free = cls()
        free._post(task)

    @classmethod
    def rest(cls) -> None:
        """Has all threads whose models have ended wait outside of Python, before the interpreter exits.

        Before 3.14, Python ends a thread that runs Python code then, and MLX aborts the process.
        """
        for it in cls._all:
            reader, writer = os.pipe()
            it._post(lambda _, writer=writer: _wait_in(writer))  # type: ignore[misc]
            select.select([reader], [], [], REST_SECONDS)

    def _post(self, task: Callable[[mx.Stream], None]) -> None:
        self._tasks.append(task)
        self._wake.put(None)

    def _run(self) -> None:
        while True:
            try:
                self._run_tasks()
            except BaseException:
                log.exception("the thread of a model was interrupted, and goes on")

    def _run_tasks(self) -> None:
        self._stream = self._stream or mx.new_thread_unsafe_stream(mx.default_device())
        with mx.stream(self._stream):
            while True:
                while self._tasks:
                    self._tasks[0](self._stream)
                    self._tasks.popleft()
                    self.idle.append(self)
                self._wake.get()


def _wait_in(pipe: int) -> None:
    """Waits for ever in a system call. The first bytes come out of the pipe once the thread has left Python for it."""
    while True:
        os.write(pipe, bytes(MORE_THAN_A_PIPE))


def _forget() -> None:
    ModelThread.idle.clear()
    ModelThread._all.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)  # a forked child doesn't have these threads
