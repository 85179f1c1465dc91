"""Runs a prompt through the target, chunk by chunk, into buffers of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import mlx.core as mx

from ..kv import KVBuffers, longest_block
from ..models.target import Target
from .request import check_prompt


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
    check_prompt(prompt, target.config)
    chunk = longest_block(target.config)
    kv = KVBuffers(target.config, 1, target.dtype, chunk, len(prompt))
    for start in range(0, len(prompt), chunk):
        hidden = prefill_block(target, kv, [list(prompt[start : start + chunk])], start)
        if keep:
            keep(hidden)
    return kv, hidden[:, -1]


def prefill_block(target: Target, kv: KVBuffers, block: list[list[int]], start: int, room: int = 0) -> mx.array:
    """Runs the same positions of several prompts.

    Args:
        target: The target.
        kv: Buffers with a row for each prompt.
        block: Token ids, [B][L].
        start: Position of the block's first tokens.
        room: See `KVBuffers.reserve`.

    Returns:
        Hidden states [B, L, hidden], evaluated, as the buffers are.
    """
    kv.reserve(start + len(block[0]), room)
    hidden = target(mx.array(block, dtype=mx.int32), mx.full((len(block),), start, dtype=mx.int32), kv)
    mx.eval(kv.arrays(), hidden)
    kv.bound_pool()
    return hidden
