"""Records what host and device do while rows are decoded, as a Chrome trace (chrome://tracing, ui.perfetto.dev).

The device's side is seen by a thread that waits for one array after the other: when a piece of work is done it is the
end of its bar, which begins when the piece was handed over or the one before it ended. Nothing waits that wouldn't
wait without a trace; only drafts and verify pass are handed over one by one instead of together.
"""

from __future__ import annotations

import json
import queue
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..files import expanded, replacing, writable

HOST, DEVICE = 1, 2
"""Rows of the picture."""


class Trace:
    """A recording; `close` writes it."""

    def __init__(self, path: str | Path):
        """Starts recording.

        Raises:
            OSError: The file can't be written, or something else is there.
        """
        self._path = writable(expanded(path))
        self._path.touch()
        self._begun = time.perf_counter()
        self._events: list[dict[str, Any]] = [
            {"name": "thread_name", "ph": "M", "pid": 1, "tid": row, "args": {"name": name}}
            for row, name in ((HOST, "host"), (DEVICE, "device"))
        ]
        self._work: queue.SimpleQueue[tuple[str, mx.array, float, dict[str, Any]] | None] = queue.SimpleQueue()
        self._watcher = threading.Thread(target=self._watch, daemon=True)
        self._watcher.start()

    @contextmanager
    def host(self, name: str, **facts: Any) -> Iterator[None]:
        """A bar for something that the host does."""
        begun = time.perf_counter()
        try:
            yield
        finally:
            self._add(HOST, name, begun, time.perf_counter(), facts)

    @contextmanager
    def device(self, name: str, result: mx.array, **facts: Any) -> Iterator[None]:
        """A bar for work that is handed over meanwhile, which ends when its result is there."""
        begun = time.perf_counter()
        with self.host("hand over", what=name):
            yield
        self._work.put((name, result, begun, facts))

    def close(self) -> None:
        """Waits for the device, and writes the file."""
        self._work.put(None)
        self._watcher.join()
        with replacing(self._path) as aside:
            aside.write_text(json.dumps({"traceEvents": self._events, "displayTimeUnit": "ms"}), "utf-8")

    def _watch(self) -> None:
        free = self._begun
        while work := self._work.get():
            name, result, handed_over, facts = work
            mx.eval(result)
            done = time.perf_counter()
            self._add(DEVICE, name, max(free, handed_over), done, facts)
            free = done

    def _add(self, row: int, name: str, begun: float, ended: float, facts: dict[str, Any]) -> None:
        event = {"name": name, "ph": "X", "pid": 1, "tid": row, "ts": 1e6 * (begun - self._begun)}
        self._events.append(event | {"dur": 1e6 * (ended - begun), "args": facts})
