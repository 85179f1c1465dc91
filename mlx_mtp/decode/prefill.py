"""Runs a prompt through the target, chunk by chunk, into buffers of its own."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from typing import cast

import mlx.core as mx

from ..kv import KVBuffers
from ..models.target import Target
from .request import check_prompt

CHUNK = 2048
"""Most prompt tokens in one forward pass: what large matrix products, and experts above all, need to be efficient."""

CHUNK_BESIDE = 512
"""The same while other rows decode, which wait for it."""


def prefill(
    target: Target, prompt: Sequence[int], keep: Callable[[mx.array], None] | None = None
) -> tuple[KVBuffers, mx.array]:
    """Prefills a prompt.

    Args:
        target: The target.
        prompt: Token ids.
        keep: Called with every chunk's hidden states [1, L, hidden].

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
    """As `prefill`, with a pause after every chunk, so that others may run in between."""
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
    """Runs the same positions of several prompts.

    Args:
        target: The target.
        kv: Buffers with a row for each prompt.
        block: Token ids, [B][L].
        start: Position of the block's first tokens.
        ends: See `Target.prefill`.
        room: See `KVBuffers.reserve`.

    Returns:
        Hidden states [B, hidden], or [B, L, hidden] without `ends`, evaluated, as the buffers are.
    """
    kv.reserve(start + len(block[0]), room)
    hidden = target.prefill(mx.array(block, dtype=mx.int32), start, kv, ends)
    mx.eval(kv.arrays(), hidden)
    kv.bound_pool()
    return hidden
