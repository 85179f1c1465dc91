"""KV of texts that were run before, for prompts that begin like them.

An entry is the buffers that a row left behind. Their full layers serve every beginning of the row's text; the rings of
sliding layers only remember the newest positions, so an entry can be taken up near its end, and at ring states that
were kept. Rows keep one at the end of their prompt; and where a new prompt branches off from what is here, the
scheduler makes one while prefilling it, so that what several prompts begin with is found from the third one on.

The least recently used entries go when all together are larger than the limit. A hit changes nothing but the time to
the first token: the KV is what a prefill would write, to the bit on a CPU where all of it was prefilled, in whatever
chunks, and else up to rounding, since decoding adds up a full window in another order.

Arrays are shared, not copied: whoever writes to a shared one gets a copy then (see kv/buffers.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..kv import KVBuffers, RingState

MIN_REUSE = 8
"""Fewer tokens than this are prefilled again: most prompts share their first few."""


@dataclass(frozen=True)
class Entry:
    """What a row left behind.

    Attributes:
        tokens: Whose KV the buffers hold.
        kv: The buffers, of one row.
        ring_states: What its sliding layers can be taken back to, see `KVBuffers.ring_state`.
        prompt: How many of the tokens were the prompt.
        pinned: Loaded from a file: it stays after a hit, which gets a copy.
    """

    tokens: list[int]
    kv: KVBuffers
    ring_states: tuple[RingState, ...]
    prompt: int
    pinned: bool = False

    @property
    def nbytes(self) -> int:
        """Size of all arrays, in bytes."""
        return self.kv.nbytes + sum(state.nbytes for state in self.ring_states)

    def start(self, shared: int) -> tuple[int, RingState | None]:
        """How much of the first `shared` tokens can be used, and the ring state to go back to for it."""
        if self.kv.can_rewind(shared):
            return shared, None
        usable = [state for state in self.ring_states if state.length <= shared + 1]
        best = max(usable, key=lambda it: it.length, default=None)
        return (min(best.length, shared), best) if best else (0, None)


@dataclass(frozen=True)
class Hit:
    """Where a prompt can start.

    Attributes:
        kv: Buffers to go on with, of one row.
        start: Tokens of the prompt that they hold.
        ring_states: Those within these tokens.
    """

    kv: KVBuffers
    start: int
    ring_states: tuple[RingState, ...]


class PromptCache:
    """Entries in the order of their use.

    Attributes:
        limit: Most bytes that all entries together may take.
    """

    def __init__(self, limit: int):
        self.limit = limit
        self._entries: list[Entry] = []

    @property
    def nbytes(self) -> int:
        """Bytes taken."""
        return sum(entry.nbytes for entry in self._entries)

    def put(self, entry: Entry, reserved_bytes: int = 0) -> None:
        """Adds an entry, in place of those that it continues (or, if it stays, equals); lets go of others if it must.

        Args:
            entry: What to add; too large a one isn't.
            reserved_bytes: Bytes that running rows hold of what may be kept.
        """
        if entry.nbytes + reserved_bytes > self.limit:
            return
        again = entry.tokens if entry.pinned else None
        self._entries = [
            e for e in self._entries
            if (e.tokens != again if e.pinned else entry.tokens[: len(e.tokens)] != e.tokens)
        ]  # fmt: skip
        self._entries.append(entry)
        self.make_room(reserved_bytes)

    def make_room(self, reserved_bytes: int) -> None:
        """Lets go of entries until all of them, and so many bytes beside them, are within the limit."""
        while self._entries and self.nbytes + reserved_bytes > self.limit:
            del self._entries[0]

    def find(self, prompt: Sequence[int]) -> Hit | None:
        """The best start for a prompt; its last token is never part of it, since its hidden state is needed.

        An entry whose whole prompt is reused leaves the cache: what comes back for it in the end holds as much.
        """
        best, found, where = MIN_REUSE - 1, None, None
        for entry in self._entries:
            start, state = entry.start(min(common_prefix(entry.tokens, prompt), len(prompt) - 1))
            if start > best or (start and start == len(prompt) - 1 and not found):
                best, found, where = start, entry, state
        if not found:
            return None
        self._entries.remove(found)
        if found.pinned or best < found.prompt - 1:
            self._entries.append(found)
        # What lies above a ring state isn't wanted, and would be copied, and attended to, in vain.
        kv = found.kv.row(0, where.written if where else found.kv.written)
        if where:
            kv.rewind(where)
        return Hit(kv, best, tuple(c for c in found.ring_states if c.length <= best))

    def branch_point(self, prompt: Sequence[int]) -> int:
        """Length of the longest beginning that the prompt has in common with an entry."""
        return max((common_prefix(entry.tokens, prompt) for entry in self._entries), default=0)

    def clear(self) -> None:
        """Forgets all entries."""
        self._entries.clear()


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of what two texts begin with in common."""
    same, differs = 0, min(len(a), len(b)) + 1
    # Slices are compared at C's speed: texts have up to 100,000 tokens, and running rows wait for this.
    while same + 1 < differs:
        middle = (same + differs) // 2
        if list(a[same:middle]) == list(b[same:middle]):
            same = middle
        else:
            differs = middle
    return same
