"""Memory that macOS is asked to keep wired while models run.

On a Mac the pages of a model that takes much of the memory are given away between two command buffers, and fetched
again for the next, which can cost ten times a round, and a quarter of a second after every pause; MLX wires nothing
unless asked to (both from reports of others: mlx-examples 1061, llama.cpp 11427; no Mac was at hand). So what running
models need is wired while they have rows, and nothing while they are idle. Needs macOS 15; elsewhere this does nothing.
"""

from __future__ import annotations

import threading
from functools import cached_property

import mlx.core as mx

SPARE = 2 * 10**9
"""Bytes beside weights and KV: what rounds compute, and what MLX keeps for the next ones."""


class Wired:
    """What is wired by all models of the process together."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._held: dict[int, int] = {}
        self._limit = 0

    @cached_property
    def possible(self) -> bool:
        """Whether memory can be wired here."""
        return mx.metal.is_available() and self.most > 0

    @cached_property
    def most(self) -> int:
        """Bytes that Metal recommends to use at most; 0 where there is no Metal."""
        return int(mx.device_info().get("max_recommended_working_set_size", 0)) if mx.metal.is_available() else 0

    @property
    def bytes(self) -> int:
        """Bytes that may be wired now."""
        return self._limit

    def hold(self, owner: object, needed: int) -> None:
        """Wires what a model needs from now on: bytes of weights and KV."""
        if self.possible and self._held.get(id(owner)) != needed:
            with self._lock:
                self._held[id(owner)] = needed
                self._set()

    def release(self, owner: object) -> None:
        """A model needs nothing for now; to be called when none of its work is in flight."""
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
"""That of this process."""
