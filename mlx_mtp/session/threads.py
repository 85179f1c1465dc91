"""Threads for models, each with an MLX stream.

A thread whose model has ended waits for another model. Threads are reused because MLX has a thread of its own for every
stream ever made, and aborts the process at exit if that outlives the thread that made the stream.
"""

from __future__ import annotations

import logging
import os
import threading
from collections import deque
from collections.abc import Callable
from queue import SimpleQueue
from typing import ClassVar

import mlx.core as mx

log = logging.getLogger(__name__)


class ModelThread:
    """A daemon thread with an MLX stream; it runs tasks one after another and never ends.

    A task that raises is called again: whatever strikes the thread, a task ends only by returning.
    """

    idle: ClassVar[list[ModelThread]] = []

    def __init__(self) -> None:
        self._tasks: deque[Callable[[mx.Stream], None]] = deque()
        self._wake: SimpleQueue[None] = SimpleQueue()
        self._stream: mx.Stream | None = None
        threading.Thread(target=self._run, name="mlx_mtp", daemon=True).start()

    @classmethod
    def start(cls, task: Callable[[mx.Stream], None]) -> None:
        """Runs a task in an idle thread, or in a new one."""
        try:
            free = cls.idle.pop()
        except IndexError:
            free = cls()
        free._tasks.append(task)
        free._wake.put(None)

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


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=ModelThread.idle.clear)  # a forked child doesn't have these threads
