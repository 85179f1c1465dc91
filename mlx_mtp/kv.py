"""The KV buffers: where target and drafter find the keys and values of the committed tokens.

One truth (`lengths`, an int32 array [B] that the caller holds on the device) says how many tokens of each row are
committed. Nothing here is ever trimmed, moved or cleared: a rejected draft is a slot that lies at or above `lengths`,
and the rule below hides it until the next block overwrites it.

    position p lives in slot p mod slots
    a slot holds, for a row whose newest position is n, position n - ((n - slot) mod slots)
    that position is visible to a query at q iff it is >= 0, <= q and, in sliding layers, > q - window

Full layers have one slot per position (`capacity`, with room to grow into). So have sliding layers at first; at
window + slack slots they stop growing and are rings from then on, which moves nothing: until then p mod slots is p. The
slack is at least the longest block ever written, so what a block overwrites, drafts included, has already left the
window of every query that is still to come. Only slots that may have been written are read (`used`, in steps), as a
view.

Buffers are [B, kv_heads, slots, head_dim], row-contiguous: the layout that attention kernels read without a copy.

Writes happen in place if nothing else holds the array when the write is scheduled. Work still in flight that reads
the array counts as a holder, so a block handed over while the one before it is running costs a copy of the buffers;
`nbytes` lets the caller decide when that is cheap enough.

Knows nothing of tokens, models or drafting.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx

from .config import TextConfig
from .models.elementwise import counting, fused

CAPACITY_STEP = 128
"""Buffers have, and are read in, multiples of this many slots."""


Snapshot = tuple[dict[int, mx.array], dict[int, mx.array]]
"""Keys and values as they were, by layer."""


@dataclass(frozen=True)
class Checkpoint:
    """A row's sliding layers when exactly `length` tokens were committed; full layers need nothing to go back.

    Attributes:
        length: Committed tokens.
        rings: The sliding layers' keys and values.
        written: `KVBuffers.written` then.
    """

    length: int
    rings: Snapshot
    written: int

    @property
    def nbytes(self) -> int:
        """Size of the arrays, in bytes."""
        return sum(a.nbytes for arrays in self.rings for a in arrays.values())


PREFILL_CHUNK = 256
"""Most prompt tokens in one forward pass."""

LONGEST_VERIFY = 16
"""Most tokens in a verify block: the newest one and the longest draft."""


@dataclass(frozen=True)
class Addresses:
    """Where a block of L tokens goes in one kind of layer, and what it sees there.

    Attributes:
        slots: int32 [B, 1, L, 1], the slot of each token of the block.
        visible: bool [B, 1, L, slots], whether a token of the block sees a slot.
    """

    slots: mx.array
    visible: mx.array


def longest_block(config: TextConfig) -> int:
    """Tokens of the longest block that is ever written: a prefill chunk, or a verify block.

    A chunk is at most half a window: the rings of sliding layers carry as much slack, which every later step reads.
    """
    return max(min(PREFILL_CHUNK, config.sliding_window // 2), LONGEST_VERIFY)


def ring_slots(window: int, longest_block: int) -> int:
    """Slots of a sliding layer's ring for blocks of up to `longest_block` tokens."""
    # One more than the window: transformers lets its drafter see window + 1 rows (see Drafter.borrow).
    return -(-(window + 1 + longest_block) // 32) * 32


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
    # All positions lie within a window of 2**30.
    reach = mx.array(2**30 if window is None else window, mx.int32)
    return _seen(newest[:, None, None], queries[:, :, None], counting(slots), mx.array(slots, mx.int32), reach)[:, None]


@fused
def _seen(newest: mx.array, queries: mx.array, slot: mx.array, slots: mx.array, window: mx.array) -> mx.array:
    held = newest - (newest - slot) % slots
    return (held >= 0) & (held <= queries) & (held > queries - window)


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

    def __init__(self, config: TextConfig, batch: int, dtype: mx.Dtype, longest_block: int, positions: int = 0):
        """Makes empty buffers; they take no memory before they are written to.

        Args:
            config: The target's.
            batch: Number of rows.
            dtype: Type of keys and values.
            longest_block: Longest block that will ever be written, in tokens.
            positions: Positions a row that there is room for at once.
        """
        self.window = config.sliding_window
        self.ring = ring_slots(self.window, longest_block)
        self.capacity = self.used = _capacity(positions)
        self.written = 0
        self._sliding = {i: layer.sliding for i, layer in enumerate(config.layers) if layer.kv_owner == i}
        self.lenders = {sliding: config.lender(sliding) for sliding in set(self._sliding.values())}
        shapes = {
            i: (batch, config.layers[i].kv_heads, self._slots(sliding), config.layers[i].head_dim)
            for i, sliding in self._sliding.items()
        }
        self.keys = {i: mx.zeros(shape, dtype) for i, shape in shapes.items()}
        self.values = {i: mx.zeros(shape, dtype) for i, shape in shapes.items()}

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
        self.used = _capacity(positions)
        if self.used <= self.capacity:
            return
        capacity = _capacity(max(positions, room))
        for buffers in (self.keys, self.values):
            for i, sliding in self._sliding.items():
                slots = self._slots(sliding, capacity)
                # By its own size, so that a growth that was interrupted can be taken up again.
                if buffers[i].shape[2] < slots:
                    buffers[i] = _with_slots(buffers[i], slots)
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

    def snapshot(self) -> Snapshot:
        """The buffers as they are, for `restore`; while a snapshot is alive, writes copy."""
        return dict(self.keys), dict(self.values)

    def restore(self, snapshot: Snapshot) -> None:
        """Forgets writes made since a snapshot that haven't been evaluated yet."""
        self.keys, self.values = snapshot

    def checkpoint(self, length: int) -> Checkpoint:
        """Remembers the sliding layers at `length` committed tokens; the next write to each of them copies it."""
        keys, values = ({i: buffers[i] for i in buffers if self._sliding[i]} for buffers in (self.keys, self.values))
        return Checkpoint(length, (keys, values), self.written)

    def rewind(self, checkpoint: Checkpoint) -> None:
        """Takes the sliding layers back to a checkpoint of the same text."""
        for buffers, rings in zip((self.keys, self.values), checkpoint.rings, strict=True):
            buffers |= {i: _with_slots(ring, self._slots(True, self.capacity)) for i, ring in rings.items()}
        self.written = checkpoint.written

    def row(self, index: int, positions: int) -> KVBuffers:
        """One row as buffers of their own: a copy, or the very arrays if there is only this row.

        Args:
            index: Of the row.
            positions: Upper bound of the positions that were written in it; room for more isn't kept.
        """
        single = copy.copy(self)
        single.capacity = single.used = min(_capacity(positions), self.capacity)
        single.written = positions
        for name in ("keys", "values"):
            arrays = {}
            for i, a in getattr(self, name).items():
                slots = single._slots(self._sliding[i], single.capacity)
                whole = a.shape[0] == 1 and a.shape[2] == slots
                arrays[i] = a if whole else mx.contiguous(a[index : index + 1, :, :slots])
            setattr(single, name, arrays)
        mx.eval(single.arrays())
        return single

    def regroup(self, rows: Sequence[int], joining: Sequence[KVBuffers], positions: int) -> None:
        """Keeps some rows, in the order given, and puts the rows of other buffers after them.

        Every array is replaced in one go, one after the other, so that no more than one of them is held twice. The
        buffers that join are left as they are.

        Args:
            rows: Indices of the rows to keep.
            joining: Buffers of the same kind.
            positions: Positions a row that there must be room for; full layers shrink or grow to it.
        """
        self.capacity = self.used = _capacity(positions)
        for name in ("keys", "values"):
            buffers = getattr(self, name)
            for i, sliding in self._sliding.items():
                slots = self._slots(sliding, self.capacity)
                parts = [buffers[i][mx.array(list(rows), dtype=mx.int32)]] if rows else []
                parts += [getattr(other, name)[i] for other in joining]
                joined = mx.concatenate([_with_slots(part, slots) for part in parts])
                del parts
                mx.eval(joined)
                buffers[i] = joined
        self.written = max([self.written if rows else 0, *(other.written for other in joining)])
        self.bound_pool()

    def can_rewind(self, length: int) -> bool:
        """Whether everything a row of `length` committed tokens must see is still in the buffers."""
        # The oldest position that is still there is written - ring.
        return length == 0 or max(0, length - self.window - 1) + self.ring >= self.written

    def addresses(self, lengths: mx.array, width: int) -> dict[bool, Addresses]:
        """Where a block of `width` tokens after the committed ones goes, by kind of layer (sliding or not).

        Args:
            lengths: int32 [B], committed tokens.
            width: L, tokens of the block.
        """
        positions = lengths[:, None] + counting(width)
        newest = positions[:, -1]
        return {
            sliding: Addresses(
                slots=(positions % self._slots(sliding))[:, None, :, None],
                visible=visible(newest, positions, self._slots(sliding), self.window if sliding else None),
            )
            for sliding in self.lenders
        }

    def write(self, layer: int, keys: mx.array, values: mx.array, slots: mx.array) -> None:
        """Puts a block's keys and values, [B, kv_heads, L, head_dim], into slots [B, 1, L, 1] of an owning layer."""
        self.keys[layer] = mx.put_along_axis(self.keys[layer], slots, keys, axis=2)
        self.values[layer] = mx.put_along_axis(self.values[layer], slots, values, axis=2)

    def read(self, layer: int) -> tuple[mx.array, mx.array]:
        """Keys and values of an owning layer, [B, kv_heads, slots, head_dim], without the slots that aren't used."""
        slots = self._slots(self._sliding[layer])
        keys, values = self.keys[layer], self.values[layer]
        return (keys, values) if keys.shape[2] == slots else (keys[:, :, :slots], values[:, :, :slots])

    def lend(self, sliding: bool) -> tuple[mx.array, mx.array]:
        """The very keys and values of the last owning layer of a kind, for the drafter to read."""
        return self.read(self.lenders[sliding])

    def lent_visible(self, lengths: mx.array, window: int) -> dict[bool, mx.array]:
        """What the drafter sees: committed rows only, in sliding layers the newest `window` of them.

        Returns:
            By kind of layer, bool [B, 1, 1, slots].
        """
        newest = lengths - 1
        return {
            sliding: visible(newest, newest[:, None], self._slots(sliding), window if sliding else None)
            for sliding in self.lenders
        }

    def _slots(self, sliding: bool, capacity: int | None = None) -> int:
        """Slots of a kind of layer in buffers of this capacity; None for those that are used."""
        capacity = self.used if capacity is None else capacity
        return min(self.ring, capacity) if sliding else capacity


def _capacity(positions: int) -> int:
    return max(1, -(-positions // CAPACITY_STEP)) * CAPACITY_STEP


def _with_slots(array: mx.array, slots: int) -> mx.array:
    """[B, kv_heads, slots, head_dim] with more slots, or fewer."""
    b, h, have, d = array.shape
    if have >= slots:
        return array[:, :, :slots]
    return mx.concatenate([array, mx.zeros((b, h, slots - have, d), array.dtype)], axis=2)
