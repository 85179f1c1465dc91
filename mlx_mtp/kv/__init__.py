"""The KV cache: where target and drafter find the keys and values of the committed tokens.

One truth (`lengths`, an int32 array [B] that the caller holds on the device) says how many tokens of each row are
committed. Nothing here is ever trimmed, moved or cleared: a rejected draft is a slot that lies at or above `lengths`,
and the rule below hides it until the next block overwrites it.

    position p lives in slot p mod slots
    a slot holds, for a row whose newest position is n, position n - ((n - slot) mod slots)
    that position is visible to a query at q iff it is >= 0, <= q and, in sliding layers, > q - window

    buffers.py  the arrays of rows of about the same length: growth, ring states, one row of them
    blocks.py   where a block of tokens is written and what it sees: a verify block, a chunk of a prompt
    batch.py    the rows of a running batch, in groups of about the same length

Knows nothing of tokens, models or drafting.
"""

from .batch import BatchKV, batch_bytes
from .blocks import BlockKV, View
from .buffers import CAPACITY_STEP, LONGEST_VERIFY, KVBuffers, RingState, kv_bytes

KVCache = KVBuffers | BatchKV
"""What rounds read and write: the buffers of one row, or of a batch."""

__all__ = [
    "CAPACITY_STEP",
    "LONGEST_VERIFY",
    "BatchKV",
    "BlockKV",
    "RingState",
    "KVBuffers",
    "KVCache",
    "View",
    "batch_bytes",
    "kv_bytes",
]
