"""Wired memory: memory that macOS must keep resident while models run.

If a model takes much of a Mac's memory, macOS may release its pages between two command buffers and bring them back for
the next. That can cost ten times a round, and a quarter of a second after every pause; MLX wires nothing by default
(both as reported in mlx-examples 1061 and llama.cpp 11427; no Mac was at hand). So a model's memory is wired while it
has rows, and released while it is idle. Needs macOS 15; does nothing elsewhere.
"""

from __future__ import annotations

import threading
from functools import cached_property

import mlx.core as mx

SPARE = 2 * 10**9
"""Bytes to wire in addition to weights and KV: for temporary arrays, and MLX's pool of freed memory."""


class Wired:
    """The wired memory of all models of a process."""

    def __init__(self) -> None:
        """Begins with nothing wired."""
        self._lock = threading.Lock()
        self._held: dict[int, int] = {}
        self._limit = 0

    @cached_property
    def possible(self) -> bool:
        """Whether memory can be wired on this machine."""
        return mx.metal.is_available() and self.most > 0

    @cached_property
    def most(self) -> int:
        """Most bytes that Metal recommends to use; 0 without Metal."""
        return int(mx.device_info().get("max_recommended_working_set_size", 0)) if mx.metal.is_available() else 0

    @property
    def bytes(self) -> int:
        """Bytes that may be wired now."""
        return self._limit

    def hold(self, owner: object, needed: int) -> None:
        """Wires memory for a model, in place of what it had wired before.

        Args:
            owner: Identifies the model.
            needed: Bytes of its weights and KV.
        """
        if self.possible and self._held.get(id(owner)) != needed:
            with self._lock:
                self._held[id(owner)] = needed
                self._set()

    def release(self, owner: object) -> None:
        """Releases a model's wired memory; none of its work may be in flight.

        Args:
            owner: As for `hold`.
        """
        if id(owner) in self._held:
            with self._lock:
                self._held.pop(id(owner), None)
                self._set()

    def _set(self) -> None:
        limit = min(self.most, sum(self._held.values()) + SPARE) if self._held else 0
        if limit != self._limit:
            mx.set_wired_limit(limit)
            self._limit = limit


WIRED = Wired()
"""The wired memory of this process."""
