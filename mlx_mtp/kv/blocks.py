"""Where a block of tokens goes in the KV buffers, and what its queries see there.

Each kind of layer (sliding or full) has a `BlockKV` for the time of one forward pass: a layer that owns KV writes the
block's keys and values to it, and any layer that reads them asks it for `View`s, which attention goes through one by
one.

    ShortBlock   a plain step or a verify block: written first, then read together with all that was there before
    LongBlock    a chunk of a prompt, of any length: read together with what sliding layers held before; only what
                 later queries can still see is written
    GroupedBlock rows in several groups of buffers, each with a block of its own
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import mlx.core as mx

from ..system.fusing import counting, fused

QUERIES = 256
"""Most queries of a long block that attend at once: their scores are [heads, queries, keys], which takes memory."""

ALIGN = 32
"""Where views of long blocks begin, in positions: so that sums over keys don't depend on how a prompt was cut."""

ALL = slice(None)


@dataclass(frozen=True)
class View:
    """Keys and values that some of a block's queries attend to.

    Attributes:
        rows: Which rows of the block, b of them.
        tokens: Which of its tokens, l of them.
        keys, values: [b, kv_heads, slots, head_dim].
        visible: bool [b or 1, 1, l, slots], whether a query sees a slot.
    """

    rows: slice
    tokens: slice
    keys: mx.array
    values: mx.array
    visible: mx.array


class Buffers(Protocol):
    """What blocks ask of the buffers that they are written to (`buffers.KVBuffers` says what each is)."""

    keys: dict[int, mx.array]
    values: dict[int, mx.array]
    window: int

    def slots(self, sliding: bool) -> int:
        """Slots of a kind of layer that are in use."""

    def read(self, layer: int) -> tuple[mx.array, mx.array]:
        """Keys and values of an owning layer, [B, kv_heads, slots, head_dim], without the slots that aren't used."""

    def plain(self, array: mx.array) -> mx.array:
        """What `stored` made, as it was."""


class BlockKV(Protocol):
    """A block's keys and values in one kind of layer."""

    def write(self, layer: int, keys: mx.array, values: mx.array) -> None:
        """Takes the block's keys and values [B, kv_heads, L, head_dim], as `stored`, of a layer that owns some."""

    def views(self, layer: int) -> Sequence[View]:
        """What the block's queries attend to in the KV of an owning layer, in the order of rows or of tokens."""


def stored(array: mx.array) -> mx.array:
    """Keys or values [..., head_dim] as buffers have them: pairs of 16-bit numbers are one of 32 bits.

    Metal's kernel for writing to places given by indices is a loop of compare-and-swap for 16-bit numbers.
    """
    return array.view(mx.uint32) if array.dtype.size == 2 else array


def visible(newest: mx.array, queries: mx.array, slots: int, window: int | None) -> mx.array:
    """Applies the visibility rule.

    Args:
        newest: int32 [B], newest position that counts as written; slots with later ones are seen as older positions.
        queries: int32 [B, L], positions of the queries.
        slots: Number of slots.
        window: Positions a query sees, its own included; None for all.

    Returns:
        bool [B, 1, L, slots].
    """
    return _seen(newest[:, None, None], queries[:, :, None], counting(slots), mx.array(slots), _window(window))[:, None]


@fused
def _seen(newest: mx.array, queries: mx.array, slot: mx.array, slots: mx.array, window: mx.array) -> mx.array:
    held = newest - (newest - slot) % slots
    return (held >= 0) & (held <= queries) & (held > queries - window)


@fused
def _in_order(queries: mx.array, first: mx.array, key: mx.array, window: mx.array) -> mx.array:
    held = first + key
    return (held <= queries) & (held > queries - window)


def _window(window: int | None) -> mx.array:
    # All positions lie within a window of 2**30.
    return mx.array(2**30 if window is None else window, mx.int32)


class ShortBlock:
    """A block of at most `KVBuffers.longest_block` tokens, which begins at another position in every row."""

    def __init__(self, kv: Buffers, lengths: mx.array, width: int, sliding: bool):
        """Takes its place after the committed tokens, int32 [B]; `width` is L."""
        positions = lengths[:, None] + counting(width)
        slots = kv.slots(sliding)
        self._kv = kv
        self.slots = (positions % slots)[:, None, :, None]
        """int32 [B, 1, L, 1], the slot of each token."""
        self.visible = visible(positions[:, -1], positions, slots, kv.window if sliding else None)
        """bool [B, 1, L, slots]."""

    def write(self, layer: int, keys: mx.array, values: mx.array) -> None:
        """See `BlockKV`."""
        self._kv.keys[layer] = mx.put_along_axis(self._kv.keys[layer], self.slots, keys, axis=2)
        self._kv.values[layer] = mx.put_along_axis(self._kv.values[layer], self.slots, values, axis=2)

    def views(self, layer: int) -> Sequence[View]:
        """See `BlockKV`."""
        return [View(ALL, ALL, *self._kv.read(layer), self.visible)]


class LongBlock:
    """A chunk of prompts, which begins at the same position in all rows.

    In sliding layers its queries attend to what the ring holds, in the order of positions, and to the chunk after it;
    then the ring takes the chunk's last tokens. So a ring needn't have room for a chunk, however long that is.
    """

    def __init__(self, kv: Buffers, start: int, width: int, sliding: bool):
        """Takes its place at positions `start` to `start + width`."""
        self._kv, self._start, self._sliding = kv, start, sliding
        window = kv.window if sliding else None
        self._first = self._aligned(start)
        slots, end = kv.slots(sliding), start + width
        kept = min(width, slots)
        self._slots = ((mx.array(end - kept, mx.int32) + counting(kept)) % slots)[None, None, :, None]
        self._lines: dict[int, tuple[mx.array, mx.array]] = {}
        self._parts: list[tuple[slice, slice, mx.array]] = []
        for a in range(0, width, QUERIES):
            b = min(a + QUERIES, width)
            first = self._aligned(start + a)
            end = start + b if sliding else min(slots, -(-(start + b) // ALIGN) * ALIGN)
            queries = mx.array(start + a, mx.int32) + counting(b - a)[:, None]
            seen = _in_order(queries, mx.array(first, mx.int32), counting(end - first), _window(window))
            self._parts.append((slice(a, b), slice(first - self._first, end - self._first), seen[None, None]))

    def write(self, layer: int, keys: mx.array, values: mx.array) -> None:
        """See `BlockKV`."""
        kv = self._kv
        if self._sliding:
            lines = (self._line(kv.keys[layer], keys), self._line(kv.values[layer], values))
            self._lines[layer] = (kv.plain(lines[0]), kv.plain(lines[1]))
        kept = self._slots.size
        kv.keys[layer] = mx.put_along_axis(kv.keys[layer], self._slots, keys[:, :, -kept:], axis=2)
        kv.values[layer] = mx.put_along_axis(kv.values[layer], self._slots, values[:, :, -kept:], axis=2)

    def views(self, layer: int) -> Sequence[View]:
        """See `BlockKV`."""
        keys, values = self._lines[layer] if self._sliding else self._kv.read(layer)
        return [
            View(ALL, tokens, keys[:, :, places], values[:, :, places], seen) for tokens, places, seen in self._parts
        ]

    def _aligned(self, query: int) -> int:
        """Position from which on the keys that a query sees are laid out."""
        return max(0, query - self._kv.window + 1) // ALIGN * ALIGN if self._sliding else 0

    def _line(self, ring: mx.array, block: mx.array) -> mx.array:
        """What a ring holds from the first position in sight on, and the block after it.

        Positions that the ring has no more are out of sight; others stand in their places.
        """
        slots, parts, position = self._kv.slots(True), [], self._first
        while position < self._start:
            slot = position % slots
            count = min(slots - slot, self._start - position)
            parts.append(ring[:, :, slot : slot + count])
            position += count
        return mx.concatenate([*parts, block], axis=2) if parts else block


class GroupedBlock:
    """A block of rows that lie in several groups of buffers, one after the other."""

    def __init__(self, groups: Sequence[tuple[slice, BlockKV]]):
        """Takes the rows of each group, and their block."""
        self._groups = groups

    def write(self, layer: int, keys: mx.array, values: mx.array) -> None:
        """See `BlockKV`."""
        for rows, block in self._groups:
            block.write(layer, keys[rows], values[rows])

    def views(self, layer: int) -> Sequence[View]:
        """See `BlockKV`."""
        return in_batch((rows, view) for rows, block in self._groups for view in block.views(layer))


def in_batch(views: Iterable[tuple[slice, View]]) -> list[View]:
    """Views of groups of rows as views of the batch; each comes with its group's place in the batch."""
    return [replace(view, rows=rows) for rows, view in views]
