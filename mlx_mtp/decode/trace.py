"""Records what host and device do while rows are decoded, as a Chrome trace (chrome://tracing, ui.perfetto.dev).

A thread waits for the results of the submitted work, one after the other. A span of the device ends when its result is
there; it begins when the work was submitted or the work before it ended, whichever is later. The decoding threads don't
wait for the trace. The one difference is that drafts and verify pass are submitted separately.
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
"""Tracks of the timeline."""


class Trace:
    """A recording; `close` writes it to its file."""

    def __init__(self, path: str | Path) -> None:
        """Starts recording.

        Args:
            path: The JSON file to write.

        Raises:
            OSError: The file can't be written, or the path isn't a file's.
        """
        self._path = writable(expanded(path))
        self._path.touch()
        self._begun = time.perf_counter()
        self._events: list[dict[str, Any]] = [
            {"name": "thread_name", "ph": "M", "pid": 1, "tid": track, "args": {"name": name}}
            for track, name in ((HOST, "host"), (DEVICE, "device"))
        ]
        self._work: queue.SimpleQueue[tuple[str, mx.array, float, dict[str, Any]] | None] = queue.SimpleQueue()
        self._watcher = threading.Thread(target=self._watch, daemon=True)
        self._watcher.start()

    @contextmanager
    def host(self, name: str, **facts: Any) -> Iterator[None]:
        """Records a span of host time: the body of the `with` statement.

        Args:
            name: The span's label.
            facts: Values to show with it; must be JSON's.
        """
        begun = time.perf_counter()
        try:
            yield
        finally:
            self._add(HOST, name, begun, time.perf_counter(), facts)

    @contextmanager
    def device(self, name: str, result: mx.array, **facts: Any) -> Iterator[None]:
        """Records a span of device time: the work that the body of the `with` statement submits.

        Args:
            name: The span's label.
            result: An array of that work; the span ends when it is evaluated.
            facts: Values to show with it; must be JSON's.
        """
        begun = time.perf_counter()
        with self.host("submit", what=name):
            yield
        self._work.put((name, result, begun, facts))

    def close(self) -> None:
        """Waits for the device and writes the file.

        Raises:
            OSError: The file can't be written.
        """
        self._work.put(None)
        self._watcher.join()
        with replacing(self._path) as aside:
            aside.write_text(json.dumps({"traceEvents": self._events, "displayTimeUnit": "ms"}), "utf-8")

    def _watch(self) -> None:
        free = self._begun
        while work := self._work.get():
            name, result, submitted, facts = work
            mx.eval(result)
            done = time.perf_counter()
            self._add(DEVICE, name, max(free, submitted), done, facts)
            free = done

    def _add(self, track: int, name: str, begun: float, ended: float, facts: dict[str, Any]) -> None:
        event = {"name": name, "ph": "X", "pid": 1, "tid": track, "ts": 1e6 * (begun - self._begun)}
        self._events.append(event | {"dur": 1e6 * (ended - begun), "args": facts})
