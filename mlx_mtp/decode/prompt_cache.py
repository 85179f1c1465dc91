"""The prompt cache: KV of earlier texts, for prompts that begin with the same tokens.

An entry holds the buffers of a row that has ended. Its full layers can be reused for any prefix of the row's text. The
rings of its sliding layers hold only the newest positions, so an entry can be reused near its end, and at recorded ring
states. Each row records one at the end of its prompt. When a new prompt branches off a cached text, the scheduler
records one there while prefilling it, so a prefix shared by several prompts is reused from the third prompt on.

If all entries together exceed the limit, the least recently used ones are dropped. A hit changes only the time to the
first token. On a CPU, KV that was prefilled is equal to the bit in any chunks; KV that was decoded, or made on a GPU,
may differ by rounding, because sums are taken in another order.

Arrays are shared, not copied; a write to a shared array copies it first (see kv/buffers.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..kv import KVBuffers, RingState

MIN_REUSE = 8
"""Least number of tokens worth reusing: most prompts share their first few, and to prefill those costs little."""


@dataclass(frozen=True)
class Entry:
    """The KV of one text.

    Attributes:
        tokens: The tokens whose KV the buffers hold.
        kv: The buffers, of one row.
        ring_states: States to which its sliding layers can be rewound, see `KVBuffers.ring_state`.
        prompt: How many of the tokens were the prompt.
        pinned: Loaded from a file: it stays in the cache after a hit, which gets a copy.
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
        """How much of the entry can be reused for a prompt.

        Args:
            shared: Length of the prefix that entry and prompt have in common.

        Returns:
            The number of tokens that can be reused, and the ring state to rewind to, or None if that isn't needed.
        """
        if self.kv.can_rewind(shared):
            return shared, None
        usable = [state for state in self.ring_states if state.length <= shared + 1]
        best = max(usable, key=lambda it: it.length, default=None)
        return (min(best.length, shared), best) if best else (0, None)


@dataclass(frozen=True)
class Hit:
    """Cached KV for the beginning of a prompt.

    Attributes:
        kv: Buffers of one row, to continue with.
        start: Number of the prompt's tokens that they hold.
        ring_states: The entry's ring states within these tokens.
    """

    kv: KVBuffers
    start: int
    ring_states: tuple[RingState, ...]


class PromptCache:
    """Entries, least recently used first.

    Attributes:
        limit: Most bytes that all entries together may take.
    """

    def __init__(self, limit: int) -> None:
        """Makes an empty cache of at most `limit` bytes."""
        self.limit = limit
        self._entries: list[Entry] = []

    @property
    def nbytes(self) -> int:
        """Size of all entries, in bytes."""
        return sum(entry.nbytes for entry in self._entries)

    def put(self, entry: Entry, reserved_bytes: int = 0) -> None:
        """Adds an entry, and drops the least recently used ones if there is no room for all.

        Entries whose text is a prefix of the new one's are replaced by it; pinned ones only by a pinned entry with the
        same text.

        Args:
            entry: The entry; ignored if it is too large.
            reserved_bytes: Bytes of the limit that active rows take for their ring states.
        """
        if entry.nbytes + reserved_bytes > self.limit:
            return
        same = entry.tokens if entry.pinned else None
        self._entries = [
            e for e in self._entries
            if (e.tokens != same if e.pinned else entry.tokens[: len(e.tokens)] != e.tokens)
        ]  # fmt: skip
        self._entries.append(entry)
        self.make_room(reserved_bytes)

    def make_room(self, reserved_bytes: int) -> None:
        """Drops entries, least recently used first, until they and `reserved_bytes` are within the limit."""
        while self._entries and self.nbytes + reserved_bytes > self.limit:
            del self._entries[0]

    def find(self, prompt: Sequence[int]) -> Hit | None:
        """Finds the entry that saves the most tokens of a prompt's prefill.

        The prompt's last token is never reused, because decoding starts from its hidden state. An entry that isn't
        pinned, and whose whole prompt is reused, leaves the cache: the row that takes it will put back a longer one.

        Args:
            prompt: Token ids.

        Returns:
            The KV to start from; None if no entry has enough tokens in common with the prompt.
        """
        best, found, rewind_to = MIN_REUSE - 1, None, None
        for entry in self._entries:
            start, state = entry.start(min(common_prefix(entry.tokens, prompt), len(prompt) - 1))
            if start > best or (start and start == len(prompt) - 1 and not found):
                best, found, rewind_to = start, entry, state
        if not found:
            return None
        self._entries.remove(found)
        if found.pinned or best < found.prompt - 1:
            self._entries.append(found)
        # Positions after the ring state aren't needed: to copy them and attend to them would be a waste.
        kv = found.kv.row(0, rewind_to.written if rewind_to else found.kv.written)
        if rewind_to:
            kv.rewind(rewind_to)
        return Hit(kv, best, tuple(state for state in found.ring_states if state.length <= best))

    def branch_point(self, prompt: Sequence[int]) -> int:
        """Length of the longest prefix that the prompt has in common with an entry."""
        return max((common_prefix(entry.tokens, prompt) for entry in self._entries), default=0)

    def clear(self) -> None:
        """Drops all entries."""
        self._entries.clear()


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the longest common prefix of two texts."""
    same, differs = 0, min(len(a), len(b)) + 1
    # A bisection on slices, which are compared in C: texts have up to 100,000 tokens, and running rows wait for this.
    while same + 1 < differs:
        middle = (same + differs) // 2
        if list(a[same:middle]) == list(b[same:middle]):
            same = middle
        else:
            differs = middle
    return same
