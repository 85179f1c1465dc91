"""Threads for models, each with an MLX stream.

A thread whose model has ended waits for another model. Threads are reused because MLX has a thread of its own for every
stream ever made, and aborts the process at exit if that outlives the thread that made the stream.
"""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable
from typing import ClassVar

import mlx.core as mx


class ModelThread:
    """A daemon thread with an MLX stream; it runs tasks one after another and never ends."""

    idle: ClassVar[list[ModelThread]] = []

    def __init__(self) -> None:
        self._tasks: queue.SimpleQueue[Callable[[mx.Stream], None]] = queue.SimpleQueue()
        self.thread = threading.Thread(target=self._run, name="mlx_mtp", daemon=True)
        self.thread.start()

    @classmethod
    def start(cls, task: Callable[[mx.Stream], None]) -> threading.Thread:
        """Runs a task in an idle thread, or in a new one, and returns the thread."""
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


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=ModelThread.idle.clear)  # a forked child doesn't have these threads
