"""The KV buffers of rows of about the same length.

Full layers have one slot per position (`capacity`, with room to grow into). So have sliding layers at first; at
window + slack slots they stop growing and are rings from then on, which moves nothing: until then p mod slots is p. The
slack is at least the longest verify block, so what a block overwrites, drafts included, has already left the window of
every query that is still to come. Only slots that may have been written are read (`used`, in steps), as a view.

Buffers are [B, kv_heads, slots, head_dim], row-contiguous: the layout that attention kernels read without a copy. Of
16-bit types they hold pairs as one number of 32 bits, see `blocks.stored`.

Writes happen in place if nothing else holds the array when the write is scheduled. Work still in flight that reads
the array counts as a holder, so a block handed over while the one before it is running costs a copy of the buffers;
`nbytes` lets the caller decide when that is cheap enough.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx

from ..config import TextConfig
from .blocks import ALL, BlockKV, LongBlock, ShortBlock, View, stored, visible

CAPACITY_STEP = 128
"""Buffers have, and are read in, multiples of this many slots."""


BufferState = tuple[dict[int, mx.array], dict[int, mx.array]]
"""Keys and values as they were, by layer."""


@dataclass(frozen=True)
class RingState:
    """A row's sliding layers when exactly `length` tokens were committed; full layers need nothing to go back.

    Attributes:
        length: Committed tokens.
        rings: The sliding layers' keys and values.
        written: `KVBuffers.written` then.
    """

    length: int
    rings: BufferState
    written: int

    @property
    def nbytes(self) -> int:
        """Size of the arrays, in bytes."""
        return sum(a.nbytes for arrays in self.rings for a in arrays.values())


LONGEST_VERIFY = 16
"""Most tokens in a verify block: the newest one and the longest draft."""


def ring_slots(window: int, longest_block: int = LONGEST_VERIFY) -> int:
    """Slots of a sliding layer's ring for blocks of up to `longest_block` tokens."""
    # One more than the window: transformers lets its drafter see window + 1 rows (see Drafter.shared_kv).
    return -(-(window + 1 + longest_block) // 32) * 32


def kv_bytes(config: TextConfig, tokens: int, dtype_bytes: int, sliding: bool | None = None) -> int:
    """Bytes of the KV buffers of one row of `tokens` tokens, in one kind of layer or in all."""
    full, ring = capacity_for(tokens), ring_slots(config.sliding_window)
    return sum(
        2 * (min(ring, full) if layer.sliding else full) * layer.kv_heads * layer.head_dim * dtype_bytes
        for i, layer in enumerate(config.layers)
        if layer.kv_owner == i and sliding in (None, layer.sliding)
    )


class KVBuffers:
    """Keys and values of every layer that owns some.

    Attributes:
        keys, values: By owning layer's index, [B, kv_heads, slots, head_dim].
        capacity: Slots of the full layers, and of the sliding ones while they are no rings yet.
        used: How many of these are read.
        ring: Most slots of the sliding layers.
        window: Positions that a sliding layer sees.
        written: Upper bound of the positions ever written, plus one; see `can_rewind`.
    """

    def __init__(
        self,
        config: TextConfig,
        batch: int,
        dtype: mx.Dtype,
        longest_block: int = LONGEST_VERIFY,
        positions: int = 0,
    ):
        """Makes empty buffers; they take no memory before they are written to.

        Args:
            config: The target's.
            batch: Number of rows.
            dtype: Type of keys and values.
            longest_block: Most tokens that will be written at once, but for chunks of prompts.
            positions: Positions a row that there is room for at once.
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
        """Makes room for `positions` positions a row; call before a block that may reach that far is written.

        Args:
            positions: Positions that may be written from now on.
            room: Positions that there will be, as far as is known. Buffers that must grow grow to that.
        """
        self.written = max(self.written, positions)
        self.used = capacity_for(positions)
        if self.used <= self.capacity:
            return
        capacity = capacity_for(max(positions, room))
        for buffers in (self.keys, self.values):
            for i, sliding in self._sliding.items():
                slots = self.slots(sliding, capacity)
                # By its own size, so that a growth that was interrupted can be taken up again.
                if buffers[i].shape[2] < slots:
                    buffers[i] = with_slots(buffers[i], slots)
                    # One layer at a time, so that no more than one old buffer is alive beside its successor.
                    mx.eval(buffers[i])
        self.capacity = capacity
        self.bound_pool()

    def bound_pool(self) -> None:
        """Gives memory back to the system that MLX keeps for later, if that is more than the buffers have.

        What was freed is used again for arrays of about its size only. Products with a growing number of slots and
        buffers that grow or are regrouped leave ever other sizes behind, and MLX's own limit is nearly all memory.
        """
        if mx.get_cache_memory() > self.nbytes:
            mx.clear_cache()

    def snapshot(self) -> BufferState:
        """The buffers as they are, for `restore`; while a snapshot is alive, writes copy."""
        return dict(self.keys), dict(self.values)

    def restore(self, snapshot: BufferState) -> None:
        """Forgets writes made since a snapshot that haven't been evaluated yet."""
        self.keys, self.values = snapshot

    def ring_state(self, length: int) -> RingState:
        """Remembers the sliding layers at `length` committed tokens; the next write to each of them copies it."""
        keys, values = ({i: buffers[i] for i in buffers if self._sliding[i]} for buffers in (self.keys, self.values))
        return RingState(length, (keys, values), self.written)

    def rewind(self, state: RingState) -> None:
        """Takes the sliding layers back to a state of the same text."""
        for buffers, rings in zip((self.keys, self.values), state.rings, strict=True):
            buffers |= {i: with_slots(ring, self.slots(True, self.capacity)) for i, ring in rings.items()}
        self.written = state.written

    def row(self, index: int, positions: int) -> KVBuffers:
        """One row as buffers of their own: a copy, or the very arrays if there is only this row.

        Args:
            index: Of the row.
            positions: Upper bound of the positions that were written in it; room for more isn't kept.
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
        """Buffers of the same kind without arrays yet, with room for `positions` positions a row."""
        other = copy.copy(self)
        other.capacity = other.used = capacity_for(positions)
        other.written, other.keys, other.values = 0, {}, {}
        return other

    def rows_of(self, name: str, layer: int, rows: Sequence[int], capacity: int) -> mx.array:
        """Some rows of "keys" or "values", with the slots that buffers of this capacity have."""
        array: mx.array = getattr(self, name)[layer]
        if list(rows) != list(range(array.shape[0])):
            array = array[mx.array(list(rows), dtype=mx.int32)]
        return with_slots(array, self.slots(self._sliding[layer], capacity))

    def can_rewind(self, length: int) -> bool:
        """Whether everything a row of `length` committed tokens must see is still in the buffers."""
        # The oldest position that is still there is written - ring.
        return length == 0 or max(0, length - self.window - 1) + self.ring >= self.written

    def block(self, lengths: mx.array, width: int) -> dict[bool, BlockKV]:
        """The place of a block of `width` tokens after the committed ones, by kind of layer (sliding or not).

        Args:
            lengths: int32 [B], committed tokens.
            width: L, tokens of the block; `longest_block` at most.
        """
        return {sliding: ShortBlock(self, lengths, width, sliding) for sliding in self.source_layers}

    def chunk(self, start: int, width: int) -> dict[bool, BlockKV]:
        """The place of a chunk of prompts, of any width, that begins at position `start` in all rows."""
        return {sliding: LongBlock(self, start, width, sliding) for sliding in self.source_layers}

    def read(self, layer: int) -> tuple[mx.array, mx.array]:
        """Keys and values of an owning layer, [B, kv_heads, slots, head_dim], without the slots that aren't used."""
        slots = self.slots(self._sliding[layer])
        keys, values = self.plain(self.keys[layer]), self.plain(self.values[layer])
        return (keys, values) if keys.shape[2] == slots else (keys[:, :, :slots], values[:, :, :slots])

    def plain(self, array: mx.array) -> mx.array:
        """What `stored` made, as it was."""
        return array if array.dtype == self.dtype else array.view(self.dtype)

    def shared(self, lengths: mx.array, window: int) -> dict[bool, list[View]]:
        """What the drafter sees: the last owning layer of each kind, committed rows only.

        Args:
            lengths: int32 [B], committed tokens.
            window: How many of the newest rows it sees in sliding layers.

        Returns:
            By kind of layer, the very keys and values of the target.
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
        """Slots of a kind of layer in buffers of this capacity; None for those that are used."""
        capacity = self.used if capacity is None else capacity
        return min(self.ring, capacity) if sliding else capacity


def capacity_for(positions: int) -> int:
    """Slots that buffers have for so many positions."""
    return max(1, -(-positions // CAPACITY_STEP)) * CAPACITY_STEP


def with_slots(array: mx.array, slots: int) -> mx.array:
    """[B, kv_heads, slots, head_dim] with more slots, or fewer."""
    b, h, have, d = array.shape
    if have >= slots:
        return array[:, :, :slots]
    return mx.concatenate([array, mx.zeros((b, h, slots - have, d), array.dtype)], axis=2)
