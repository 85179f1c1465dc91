"""What models say of a prompt, without decoding: logits, and what the drafter would propose.

Generators, for `Session.run`: each pauses after every chunk of the prompt, so that rows go on in between.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import cast

import mlx.core as mx

from ..models.drafter import Drafter
from ..models.target import Target
from .prefill import prefill_by_chunks
from .round import draft, first_state
from .sampling import Sampler, SamplingOptions


def logits_after(target: Target, prompt: Sequence[int]) -> Generator[None, None, mx.array]:
    """The target's logits float32 [len(prompt), vocab] after each token; errors as in `prefill`."""
    parts: list[mx.array] = []

    def keep(hidden: mx.array) -> None:
        parts.append(target.logits(hidden)[0].astype(mx.float32))
        mx.eval(parts[-1])

    yield from prefill_by_chunks(target, prompt, keep)
    logits = mx.concatenate(parts)
    mx.eval(logits)
    return logits


def proposal(
    target: Target, drafter: Drafter, prompt: Sequence[int], k: int, suppress_tokens: Sequence[int]
) -> Generator[None, None, list[int]]:
    """The target's own next token after a prompt, and k drafts after it, greedily; errors as in `prefill`."""
    kv, hidden = yield from prefill_by_chunks(target, prompt)
    sampler = Sampler([SamplingOptions()], None, suppress_tokens, target.config.vocab_size)
    state = first_state(target, sampler, hidden, mx.array([len(prompt)], dtype=mx.int32))
    drafts = draft(target, drafter, kv, sampler, state, k)
    return cast("list[int]", mx.concatenate([state.tokens, drafts[0]]).tolist())
