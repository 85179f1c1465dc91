"""The KV buffers of rows of about the same length.

Full layers have one slot per position (`capacity`, with room to grow). So do sliding layers at first; at window + slack
slots they stop growing and become rings. Nothing moves then, since until that point p mod slots is p. The slack is at
least the longest verify block, so the positions that a block overwrites, rejected drafts included, have left the window
of every later query. Only slots that may have been written are read (`used`, in steps of CAPACITY_STEP), as a view.

Buffers are [B, kv_heads, slots, head_dim], row-contiguous: the layout that attention kernels read without a copy. Pairs
of 16-bit numbers are stored as one of 32 bits, see `blocks.stored`.

A write happens in place if nothing else holds the array when the write is scheduled. Submitted work that still reads
the array counts as a holder, so submitting a block while the one before it runs costs a copy of the buffers; `nbytes`
lets the caller decide whether that is cheap enough.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx

from ..config import TextConfig
from .blocks import ALL, BlockKV, LongBlock, ShortBlock, View, stored, visible

CAPACITY_STEP = 128
"""Buffers have a multiple of this many slots, and a multiple of it is read."""

BufferState = tuple[dict[int, mx.array], dict[int, mx.array]]
"""The keys and the values of a moment, by layer."""


@dataclass(frozen=True)
class RingState:
    """The sliding layers of a row when it had `length` committed tokens; full layers can be rewound without.

    Attributes:
        length: Number of committed tokens.
        rings: The sliding layers' keys and values.
        written: `KVBuffers.written` at that time.
    """

    length: int
    rings: BufferState
    written: int

    @property
    def nbytes(self) -> int:
        """Size of the arrays, in bytes."""
        return sum(a.nbytes for arrays in self.rings for a in arrays.values())


LONGEST_VERIFY = 16
"""Most tokens in a verify block: the newest one and MAX_DRAFT_LENGTH drafts."""


def ring_slots(window: int, longest_block: int = LONGEST_VERIFY) -> int:
    """Slots of a sliding layer's ring.

    Args:
        window: Positions that the layer sees.
        longest_block: Most tokens that are written in one block, but for chunks of prompts.
    """
    # One more than the window: transformers lets its drafter see window + 1 positions (see Drafter.shared_kv).
    return -(-(window + 1 + longest_block) // 32) * 32


def kv_bytes(config: TextConfig, tokens: int, dtype_bytes: int, sliding: bool | None = None) -> int:
    """Bytes of one row's KV buffers.

    Args:
        config: The target's.
        tokens: Length of the row.
        dtype_bytes: Bytes of a key's or value's number.
        sliding: Count only the sliding layers, or only the full ones; None for both.
    """
    full, ring = capacity_for(tokens), ring_slots(config.sliding_window)
    return sum(
        2 * (min(ring, full) if layer.sliding else full) * layer.kv_heads * layer.head_dim * dtype_bytes
        for i, layer in enumerate(config.layers)
        if layer.kv_owner == i and sliding in (None, layer.sliding)
    )


class KVBuffers:
    """Keys and values of all layers that have their own.

    Attributes:
        keys: By layer index, [B, kv_heads, slots, head_dim], see `blocks.stored`.
        values: As `keys`.
        dtype: Type of keys and values, as the models see them.
        source_layers: By kind of layer (sliding or not), the layer whose KV the drafter reads.
        capacity: Slots of the full layers, and of the sliding ones until they become rings.
        used: How many of these slots are read.
        ring: Most slots of the sliding layers.
        window: Positions that a sliding layer sees.
        written: Upper bound of the positions ever written, as a count; see `can_rewind`.
    """

    def __init__(
        self,
        config: TextConfig,
        batch: int,
        dtype: mx.Dtype,
        longest_block: int = LONGEST_VERIFY,
        positions: int = 0,
    ) -> None:
        """Makes empty buffers; they take no memory before they are evaluated.

        Args:
            config: The target's.
            batch: Number of rows.
            dtype: Type of keys and values.
            longest_block: Most tokens that will be written in one block, but for chunks of prompts.
            positions: Positions that each row has room for at first.
        """
        self.dtype = dtype
        self.window = config.sliding_window
        self.ring = ring_slots(self.window, longest_block)
        self.capacity = self.used = capacity_for(positions)
        self.written = 0
        self._sliding = {i: layer.sliding for i, layer in enumerate(config.layers) if layer.kv_owner == i}
        self.source_layers = {sliding: config.kv_source_layer(sliding) for sliding in set(self._sliding.values())}
        shapes = {
            i: (batch, config.layers[i].kv_heads, self.slots(sliding), config.layers[i].head_dim)
            for i, sliding in self._sliding.items()
        }
        self.keys = {i: stored(mx.zeros(shape, dtype)) for i, shape in shapes.items()}
        self.values = {i: stored(mx.zeros(shape, dtype)) for i, shape in shapes.items()}

    @property
    def batch(self) -> int:
        """Number of rows."""
        return next(iter(self.keys.values())).shape[0]

    @property
    def nbytes(self) -> int:
        """Size of all buffers, in bytes."""
        return sum(a.nbytes for a in self.arrays())

    def arrays(self) -> list[mx.array]:
        """All buffers, for evaluation."""
        return [*self.keys.values(), *self.values.values()]

    def reserve(self, positions: int, room: int = 0) -> None:
        """Makes room in every row; must be called before a block is written.

        Args:
            positions: Length that the rows may reach with the next block.
            room: Length that they are expected to reach later. Buffers that must grow get this size at once.
        """
        self.written = max(self.written, positions)
        self.used = capacity_for(positions)
        if self.used <= self.capacity:
            return
        capacity = capacity_for(max(positions, room))
        for buffers in (self.keys, self.values):
            for i, sliding in self._sliding.items():
                slots = self.slots(sliding, capacity)
                # Each array's own size is checked, so that a growth that failed halfway can be repeated.
                if buffers[i].shape[2] < slots:
                    buffers[i] = with_slots(buffers[i], slots)
                    # One array at a time, so that at most one exists in both sizes.
                    mx.eval(buffers[i])
        self.capacity = capacity
        self.bound_pool()

    def bound_pool(self) -> None:
        """Empties MLX's pool of freed memory if it is larger than the buffers.

        MLX reuses freed memory only for arrays of about the same size. Attention over a growing number of slots, and
        buffers that grow or are rearranged, always free new sizes, and by default the pool may take nearly all memory.
        """
        if mx.get_cache_memory() > self.nbytes:
            mx.clear_cache()

    def snapshot(self) -> BufferState:
        """The buffers' present contents, for `restore`; while a snapshot exists, writes copy the arrays."""
        return dict(self.keys), dict(self.values)

    def restore(self, snapshot: BufferState) -> None:
        """Undoes the writes since a snapshot; they must not have been evaluated."""
        self.keys, self.values = snapshot

    def ring_state(self, length: int) -> RingState:
        """Records the sliding layers, of buffers with one row; the next write to each of them copies it.

        Args:
            length: Number of committed tokens now.
        """
        keys, values = ({i: buffers[i] for i in buffers if self._sliding[i]} for buffers in (self.keys, self.values))
        return RingState(length, (keys, values), self.written)

    def rewind(self, state: RingState) -> None:
        """Sets the sliding layers back to a recorded state of the same text."""
        for buffers, rings in zip((self.keys, self.values), state.rings, strict=True):
            buffers |= {i: with_slots(ring, self.slots(True, self.capacity)) for i, ring in rings.items()}
        self.written = state.written

    def row(self, index: int, positions: int) -> KVBuffers:
        """One row as separate buffers: a copy, or the same arrays if these buffers have only this row.

        Args:
            index: Index of the row.
            positions: Upper bound of the positions written in it; the new buffers have no room for more.
        """
        single = copy.copy(self)
        single.capacity = single.used = min(capacity_for(positions), self.capacity)
        single.written = positions
        for name in ("keys", "values"):
            arrays = {}
            for i, a in getattr(self, name).items():
                slots = single.slots(self._sliding[i], single.capacity)
                whole = a.shape[0] == 1 and a.shape[2] == slots
                arrays[i] = a if whole else mx.contiguous(a[index : index + 1, :, :slots])
            setattr(single, name, arrays)
        mx.eval(single.arrays())
        return single

    def empty(self, positions: int) -> KVBuffers:
        """Buffers of the same kind without arrays; the caller adds arrays with room for `positions` positions."""
        other = copy.copy(self)
        other.capacity = other.used = capacity_for(positions)
        other.written, other.keys, other.values = 0, {}, {}
        return other

    def rows_of(self, name: str, layer: int, rows: Sequence[int], capacity: int) -> mx.array:
        """Some rows of one array, resized.

        Args:
            name: "keys" or "values".
            layer: Index of a layer that has its own.
            rows: Indices of the rows, in the wanted order.
            capacity: Capacity of the buffers that get them.

        Returns:
            [len(rows), kv_heads, slots, head_dim].
        """
        array: mx.array = getattr(self, name)[layer]
        if list(rows) != list(range(array.shape[0])):
            array = array[mx.array(list(rows), dtype=mx.int32)]
        return with_slots(array, self.slots(self._sliding[layer], capacity))

    def can_rewind(self, length: int) -> bool:
        """Whether the buffers still hold all positions that a row of `length` committed tokens sees."""
        # The oldest position in a ring is written - ring.
        return length == 0 or max(0, length - self.window - 1) + self.ring >= self.written

    def block(self, lengths: mx.array, width: int) -> dict[bool, BlockKV]:
        """Prepares a verify block or plain step, which follows the committed tokens.

        Args:
            lengths: int32 [B], committed tokens.
            width: L, the block's number of tokens; at most `longest_block`.

        Returns:
            By kind of layer (sliding or not), where the block is written and what it sees.
        """
        return {sliding: ShortBlock(self, lengths, width, sliding) for sliding in self.source_layers}

    def chunk(self, start: int, width: int) -> dict[bool, BlockKV]:
        """Prepares a chunk of prompts.

        Args:
            start: Position of its first token, the same in all rows.
            width: L, the chunk's number of tokens; any number.

        Returns:
            As `block`.
        """
        return {sliding: LongBlock(self, start, width, sliding) for sliding in self.source_layers}

    def read(self, layer: int) -> tuple[mx.array, mx.array]:
        """Keys and values of a layer, [B, kv_heads, used slots, head_dim]."""
        slots = self.slots(self._sliding[layer])
        keys, values = self.plain(self.keys[layer]), self.plain(self.values[layer])
        return (keys, values) if keys.shape[2] == slots else (keys[:, :, :slots], values[:, :, :slots])

    def plain(self, array: mx.array) -> mx.array:
        """Undoes `blocks.stored`."""
        return array if array.dtype == self.dtype else array.view(self.dtype)

    def shared(self, lengths: mx.array, window: int) -> dict[bool, list[View]]:
        """The KV that the drafter shares: of the last layer of each kind that has its own, committed positions only.

        Args:
            lengths: int32 [B], committed tokens.
            window: How many of the newest positions the drafter sees in sliding layers.

        Returns:
            By kind of layer (sliding or not), views of the target's keys and values, without a copy.
        """
        newest = lengths - 1
        return {
            sliding: [
                View(
                    ALL,
                    ALL,
                    *self.read(layer),
                    visible(newest, newest[:, None], self.slots(sliding), window if sliding else None),
                )
            ]
            for sliding, layer in self.source_layers.items()
        }

    def slots(self, sliding: bool, capacity: int | None = None) -> int:
        """Number of slots of a kind of layer.

        Args:
            sliding: The kind.
            capacity: The buffers' capacity; None for the used slots of these buffers.
        """
        capacity = self.used if capacity is None else capacity
        return min(self.ring, capacity) if sliding else capacity


def capacity_for(positions: int) -> int:
    """Slots of buffers with room for `positions` positions."""
    return max(1, -(-positions // CAPACITY_STEP)) * CAPACITY_STEP


def with_slots(array: mx.array, slots: int) -> mx.array:
    """An array [B, kv_heads, any, head_dim] cut or padded with zeros to `slots` slots."""
    b, h, have, d = array.shape
    if have >= slots:
        return array[:, :, :slots]
    return mx.concatenate([array, mx.zeros((b, h, slots - have, d), array.dtype)], axis=2)
