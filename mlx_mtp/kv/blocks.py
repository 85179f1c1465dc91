"""Where a block of tokens is written in the KV buffers, and what its queries see there.

A forward pass has one `BlockKV` for each kind of layer (sliding or full). A layer with its own KV writes the block's
keys and values to it. Every layer asks it for `View`s, and attention runs once for each view.

    ShortBlock   a plain step or a verify block: written to the buffers first, then read from them
    LongBlock    a chunk of a prompt, of any length: sliding layers read it together with the ring's former contents,
                 and write only what later queries can still see
    GroupedBlock the block of a batch whose rows lie in several groups of buffers
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import mlx.core as mx

from ..system.fusing import counting, fused

QUERIES = 256
"""Most queries of a long block in one view: their scores, [heads, queries, keys], take memory."""

ALIGN = 32
"""Views of long blocks begin at multiples of this position, so that the order of sums over keys doesn't depend on how a
prompt was cut into chunks."""

ALL = slice(None)
"""All rows, or all tokens, of a block."""


@dataclass(frozen=True)
class View:
    """Keys and values that some of a block's queries attend to.

    Attributes:
        rows: Which rows of the block, b of them.
        tokens: Which of its tokens, l of them.
        keys: [b, kv_heads, slots, head_dim].
        values: [b, kv_heads, slots, head_dim].
        visible: bool [b or 1, 1, l, slots], whether a query sees a slot.
    """

    rows: slice
    tokens: slice
    keys: mx.array
    values: mx.array
    visible: mx.array


class Buffers(Protocol):
    """The part of `buffers.KVBuffers` that blocks use; see there."""

    keys: dict[int, mx.array]
    values: dict[int, mx.array]
    window: int

    def slots(self, sliding: bool) -> int:
        """Number of used slots of a kind of layer."""

    def read(self, layer: int) -> tuple[mx.array, mx.array]:
        """Keys and values of a layer, [B, kv_heads, used slots, head_dim]."""

    def plain(self, array: mx.array) -> mx.array:
        """Undoes `stored`."""


class BlockKV(Protocol):
    """A block's keys and values in one kind of layer."""

    def write(self, layer: int, keys: mx.array, values: mx.array) -> None:
        """Writes the block's keys and values of one layer.

        Args:
            layer: Index of a layer with its own KV.
            keys: [B, kv_heads, L, head_dim], as `stored` has them.
            values: [B, kv_heads, L, head_dim], as `stored` has them.
        """

    def views(self, layer: int) -> Sequence[View]:
        """What the block's queries attend to.

        Args:
            layer: Index of the layer whose KV is read.

        Returns:
            Views that cover all queries once, either by rows or by tokens, in order.
        """


def stored(array: mx.array) -> mx.array:
    """Keys or values [..., head_dim] as buffers store them: pairs of 16-bit numbers are one of 32 bits.

    Metal's scatter kernel writes 16-bit numbers in a slow loop of compare-and-swap, but not 32-bit ones.
    """
    return array.view(mx.uint32) if array.dtype.size == 2 else array


def visible(newest: mx.array, queries: mx.array, slots: int, window: int | None) -> mx.array:
    """Applies the visibility rule of kv/__init__.py.

    Args:
        newest: int32 [B], newest position of each row; a slot is taken to hold the latest position <= newest that maps
            to it.
        queries: int32 [B, L], positions of the queries.
        slots: Number of slots.
        window: Number of positions that a query sees, its own included; None for all.

    Returns:
        bool [B, 1, L, slots].
    """
    return _seen(newest[:, None, None], queries[:, :, None], counting(slots), mx.array(slots), _window(window))[:, None]


@fused
def _seen(newest: mx.array, queries: mx.array, slot: mx.array, slots: mx.array, window: mx.array) -> mx.array:
    held = newest - (newest - slot) % slots
    return (held >= 0) & (held <= queries) & (held > queries - window)


@fused
def _seen_in_order(queries: mx.array, first: mx.array, key: mx.array, window: mx.array) -> mx.array:
    """The same for slots that hold the positions from `first` on, in order."""
    held = first + key
    return (held <= queries) & (held > queries - window)


def _window(window: int | None) -> mx.array:
    # No context is as long as 2**30.
    return mx.array(2**30 if window is None else window, mx.int32)


class ShortBlock:
    """A plain step or a verify block; it may begin at a different position in every row."""

    def __init__(self, kv: Buffers, lengths: mx.array, width: int, sliding: bool) -> None:
        """Prepares a block that follows the committed tokens.

        Args:
            kv: The buffers.
            lengths: int32 [B], committed tokens.
            width: L, the block's number of tokens.
            sliding: The kind of layer.
        """
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

    In sliding layers its queries attend to the ring's contents, in the order of positions, followed by the chunk. Then
    the chunk's last tokens are written to the ring. So a chunk may be longer than the ring.
    """

    def __init__(self, kv: Buffers, start: int, width: int, sliding: bool) -> None:
        """Prepares a chunk.

        Args:
            kv: The buffers.
            start: Position of its first token.
            width: L, the chunk's number of tokens.
            sliding: The kind of layer.
        """
        self._kv, self._start, self._sliding = kv, start, sliding
        window = kv.window if sliding else None
        self._first = self._aligned(start)
        slots, end = kv.slots(sliding), start + width
        written = min(width, slots)
        self._slots = ((mx.array(end - written, mx.int32) + counting(written)) % slots)[None, None, :, None]
        # Of sliding layers: keys and values by layer, of ring and chunk in the order of positions.
        self._in_order: dict[int, tuple[mx.array, mx.array]] = {}
        # For each view: tokens of the chunk, slots, and which slots the tokens see.
        self._parts: list[tuple[slice, slice, mx.array]] = []
        for a in range(0, width, QUERIES):
            b = min(a + QUERIES, width)
            first = self._aligned(start + a)
            end = start + b if sliding else min(slots, -(-(start + b) // ALIGN) * ALIGN)
            queries = mx.array(start + a, mx.int32) + counting(b - a)[:, None]
            seen = _seen_in_order(queries, mx.array(first, mx.int32), counting(end - first), _window(window))
            self._parts.append((slice(a, b), slice(first - self._first, end - self._first), seen[None, None]))

    def write(self, layer: int, keys: mx.array, values: mx.array) -> None:
        """See `BlockKV`."""
        kv = self._kv
        if self._sliding:
            ordered = (self._unroll(kv.keys[layer], keys), self._unroll(kv.values[layer], values))
            self._in_order[layer] = (kv.plain(ordered[0]), kv.plain(ordered[1]))
        written = self._slots.size
        kv.keys[layer] = mx.put_along_axis(kv.keys[layer], self._slots, keys[:, :, -written:], axis=2)
        kv.values[layer] = mx.put_along_axis(kv.values[layer], self._slots, values[:, :, -written:], axis=2)

    def views(self, layer: int) -> Sequence[View]:
        """See `BlockKV`."""
        keys, values = self._in_order[layer] if self._sliding else self._kv.read(layer)
        return [View(ALL, tokens, keys[:, :, slots], values[:, :, slots], seen) for tokens, slots, seen in self._parts]

    def _aligned(self, query: int) -> int:
        """First position of the view of a query: at most the first that it sees, and a multiple of ALIGN."""
        return max(0, query - self._kv.window + 1) // ALIGN * ALIGN if self._sliding else 0

    def _unroll(self, ring: mx.array, block: mx.array) -> mx.array:
        """A ring's slots in the order of positions, from the first position of the views on, and then the block.

        Because of the alignment this may include slots whose position has been overwritten; no query sees them.
        """
        slots, parts, position = self._kv.slots(True), [], self._first
        while position < self._start:
            slot = position % slots
            count = min(slots - slot, self._start - position)
            parts.append(ring[:, :, slot : slot + count])
            position += count
        return mx.concatenate([*parts, block], axis=2) if parts else block


class GroupedBlock:
    """The block of a batch whose rows lie in several groups of buffers."""

    def __init__(self, groups: Sequence[tuple[slice, BlockKV]]) -> None:
        """Joins blocks.

        Args:
            groups: For each group its rows' indices in the batch, and its block.
        """
        self._groups = groups

    def write(self, layer: int, keys: mx.array, values: mx.array) -> None:
        """See `BlockKV`."""
        for rows, block in self._groups:
            block.write(layer, keys[rows], values[rows])

    def views(self, layer: int) -> Sequence[View]:
        """See `BlockKV`."""
        return in_batch((rows, view) for rows, block in self._groups for view in block.views(layer))


def in_batch(views: Iterable[tuple[slice, View]]) -> list[View]:
    """Turns views of groups into views of the batch; each comes with its group's row indices in the batch."""
    return [replace(view, rows=rows) for rows, view in views]
