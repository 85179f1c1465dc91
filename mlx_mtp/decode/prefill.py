"""Prefill: runs prompts through the target, chunk by chunk, into KV buffers of their own."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import cast

import mlx.core as mx

from ..kv import KVBuffers, RingState
from ..models.target import Target
from .request import Row, check_prompt

CHUNK = 2048
"""Most prompt tokens in one forward pass: large matrix products, and experts above all, need many to be efficient."""

CHUNK_BESIDE = 512
"""The same while other rows decode: they wait for the chunk, so it must be short."""


@dataclass
class PrefillJob:
    """A prefill in progress: of one prompt in chunks, or of several short ones in one padded block.

    Attributes:
        kv: Buffers with a row for each prompt.
        rows: For each prompt, the rows that wait for it.
        start: Number of tokens whose KV is in the buffers already.
        branch_point: Number of tokens after which to record a ring state, for later prompts with the same beginning; 0
            for none.
        ring_states: The ring states recorded or reused so far.
    """

    kv: KVBuffers
    rows: list[list[Row]]
    start: int = 0
    branch_point: int = 0
    ring_states: tuple[RingState, ...] = ()

    @property
    def prompts(self) -> list[Sequence[int]]:
        """The token ids of each prompt."""
        return [rows[0].request.prompt for rows in self.rows]

    @property
    def all_rows(self) -> list[Row]:
        """The rows of all prompts."""
        return [row for rows in self.rows for row in rows]

    @property
    def finished(self) -> bool:
        """Whether the KV of all prompts is in the buffers."""
        return self.start >= max(map(len, self.prompts))

    def report(self) -> None:
        """Tells the rows how much of their prompts is prefilled."""
        for row in self.all_rows:
            row.report_prefill(self.start)

    def next_end(self, chunk: int) -> int:
        """Position after the next chunk of at most `chunk` tokens; several prompts are one chunk of any length."""
        longest = max(map(len, self.prompts))
        end = longest if len(self.rows) > 1 else min(self.start + chunk, longest)
        return self.branch_point if self.start < self.branch_point < end else end

    def advance(self, target: Target, end: int) -> mx.array:
        """Runs the positions from `start` to `end`.

        Args:
            target: The target.
            end: See `next_end`.

        Returns:
            Hidden states [B, hidden] at the newest position of each prompt.
        """
        start, prompts = self.start, self.prompts
        block = [[*prompt[start:end], *[0] * (end - max(len(prompt), start))] for prompt in prompts]
        ends = [min(len(prompt), end) - start - 1 for prompt in prompts]
        hidden = prefill_block(target, self.kv, block, start, ends, max(rows[0].room for rows in self.rows))
        self.start = end
        if end == self.branch_point:
            self.ring_states += (self.kv.ring_state(end),)
        self.report()
        return hidden


def prefill(
    target: Target, prompt: Sequence[int], keep: Callable[[mx.array], None] | None = None
) -> tuple[KVBuffers, mx.array]:
    """Prefills a prompt.

    Args:
        target: The target.
        prompt: Token ids.
        keep: Called with every chunk's hidden states [1, L, hidden]; None if only the last one is needed.

    Returns:
        The buffers, and the hidden state [1, hidden] at the last position.

    Raises:
        PromptError: See `check_prompt`.
    """
    work = prefill_by_chunks(target, prompt, keep)
    while True:
        try:
            next(work)
        except StopIteration as done:
            return cast("tuple[KVBuffers, mx.array]", done.value)


def prefill_by_chunks(
    target: Target, prompt: Sequence[int], keep: Callable[[mx.array], None] | None = None
) -> Generator[None, None, tuple[KVBuffers, mx.array]]:
    """As `prefill`; yields after every chunk, so that other work can run in between."""
    check_prompt(prompt, target.config)
    kv = KVBuffers(target.config, 1, target.dtype, positions=len(prompt))
    for start in range(0, len(prompt), CHUNK):
        block = [list(prompt[start : start + CHUNK])]
        hidden = prefill_block(target, kv, block, start, None if keep else [len(block[0]) - 1])
        if keep:
            keep(hidden)
        yield
    return kv, hidden[:, -1] if keep else hidden


def prefill_block(
    target: Target, kv: KVBuffers, block: list[list[int]], start: int, ends: Sequence[int] | None, room: int = 0
) -> mx.array:
    """Runs the same positions of several prompts, and waits until they are done.

    Args:
        target: The target.
        kv: Buffers with a row for each prompt.
        block: Token ids, [B][L].
        start: Position of the block's first tokens.
        ends: See `Target.prefill`.
        room: See `KVBuffers.reserve`.

    Returns:
        Hidden states [B, hidden], or [B, L, hidden] if `ends` is None. They and the buffers are evaluated.
    """
    kv.reserve(start + len(block[0]), room)
    hidden = target.prefill(mx.array(block, dtype=mx.int32), start, kv, ends)
    mx.eval(kv.arrays(), hidden)
    kv.bound_pool()
    return hidden
