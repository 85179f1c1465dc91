"""The KV cache: keys and values of the committed tokens, read by target and drafter.

The caller's `lengths`, an int32 array [B] on the device, says how many tokens of each row are committed. Nothing is
ever trimmed, moved or cleared: a rejected draft is a slot at or above `lengths`, and the rule below hides it until the
next block overwrites it.

    position p is written to slot p mod slots
    if a row's newest position is n, a slot holds position n - ((n - slot) mod slots)
    a query at q sees that position iff it is >= 0, <= q and, in sliding layers, > q - window

    buffers.py  the arrays of rows of about the same length: growth, ring states, single rows
    blocks.py   where a block of tokens is written and what it sees: a verify block, a chunk of a prompt
    batch.py    the rows of a running batch, in groups of about the same length

Not here: tokens, models, drafting.
"""

from .batch import BatchKV, batch_bytes
from .blocks import BlockKV, View
from .buffers import CAPACITY_STEP, LONGEST_VERIFY, KVBuffers, RingState, kv_bytes

KVCache = KVBuffers | BatchKV
"""What a round reads and writes: the buffers of one row, or of a batch."""

__all__ = [
    "CAPACITY_STEP",
    "LONGEST_VERIFY",
    "BatchKV",
    "BlockKV",
    "KVBuffers",
    "KVCache",
    "RingState",
    "View",
    "batch_bytes",
    "kv_bytes",
]
