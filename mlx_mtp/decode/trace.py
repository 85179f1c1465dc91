"""Records what host and device do while rows are decoded, as a Chrome trace (chrome://tracing, ui.perfetto.dev).

A span of the device ends when its result is there; it begins when the work was submitted or the work before it ended,
whichever is later. The thread that decodes waits for results one after the other, where it would wait for the last of
them anyway (`settle`); no other thread touches MLX. The one difference that a trace makes is that drafts and verify
pass are submitted separately.
"""

from __future__ import annotations

import json
import time
from collections import deque
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
        self._work: deque[tuple[str, mx.array, float, dict[str, Any]]] = deque()
        self._free = self._begun

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
        self._work.append((name, result, begun, facts))

    def settle(self, result: mx.array | None = None) -> None:
        """Waits for submitted work, on the thread that submitted it.

        Args:
            result: The result of the last work to wait for; None for all work.
        """
        last = len(self._work) if result is None else 0
        count = next((i for i, work in enumerate(self._work, 1) if work[1] is result), last)
        for name, own, submitted, facts in [self._work.popleft() for _ in range(count)]:
            mx.eval(own)
            done = time.perf_counter()
            self._add(DEVICE, name, max(self._free, submitted), done, facts)
            self._free = done

    def close(self) -> None:
        """Writes the file, without the work that wasn't waited for.

        Raises:
            OSError: The file can't be written.
        """
        with replacing(self._path) as aside:
            aside.write_text(json.dumps({"traceEvents": self._events, "displayTimeUnit": "ms"}), "utf-8")

    def _add(self, track: int, name: str, begun: float, ended: float, facts: dict[str, Any]) -> None:
        event = {"name": name, "ph": "X", "pid": 1, "tid": track, "ts": 1e6 * (begun - self._begun)}
        self._events.append(event | {"dur": 1e6 * (ended - begun), "args": facts})
