"""The models' outputs for a prompt, without decoding: the target's logits, and the drafter's proposal.

These are generators for `Session.run`: each yields after every chunk of the prompt, so that rows can decode in between.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import cast

import mlx.core as mx

from ..errors import PromptError
from ..models.drafter import Drafter
from ..models.target import Target
from .limits import is_int
from .prefill import prefill_by_chunks
from .round import draft, first_state
from .sampling import Sampler, SamplingOptions


def logits_after(target: Target, prompt: Sequence[int]) -> Generator[None, None, mx.array]:
    """The target's logits after each token of a prompt.

    Args:
        target: The target.
        prompt: Token ids.

    Yields:
        After every chunk of the prompt.

    Returns:
        float32 [len(prompt), vocab], evaluated.

    Raises:
        PromptError: See `check_prompt`.
    """
    _check_ids(prompt)
    parts: list[mx.array] = []

    def keep(hidden: mx.array) -> None:
        parts.append(target.logits(hidden)[0].astype(mx.float32))
        mx.eval(parts[-1])

    yield from prefill_by_chunks(target, prompt, keep)
    logits = mx.concatenate(parts)
    mx.eval(logits)
    return logits


def proposal(
    target: Target, drafter: Drafter | None, prompt: Sequence[int], k: int, suppress_tokens: Sequence[int]
) -> Generator[None, None, list[int]]:
    """The target's greedy next token after a prompt, and greedy drafts after that.

    Args:
        target: The target.
        drafter: Its drafter, or None.
        prompt: Token ids.
        k: Number of drafts, at least 1.
        suppress_tokens: Token ids that the target never chooses.

    Yields:
        After every chunk of the prompt.

    Returns:
        1 + k token ids.

    Raises:
        PromptError: No drafter, a prompt that isn't token ids, see `check_prompt`, or more drafts than fit.
    """
    if drafter is None:
        raise PromptError("there is no drafter to propose with: load one with drafter=")
    _check_ids(prompt)
    room = max(1, target.config.max_positions - len(prompt))
    if not is_int(k) or not 1 <= k <= room:
        raise PromptError(f"k must be a whole number from 1 to the {room:,} tokens that fit, not {k!r}")
    kv, hidden = yield from prefill_by_chunks(target, prompt)
    sampler = Sampler([SamplingOptions()], None, suppress_tokens, target.config.vocab_size)
    state = first_state(target, sampler, hidden, mx.array([len(prompt)], dtype=mx.int32))
    drafts = draft(target, drafter, kv, sampler, state, k)
    return cast("list[int]", mx.concatenate([state.tokens, drafts[0]]).tolist())


def _check_ids(tokens: Sequence[int]) -> None:
    if not isinstance(tokens, Sequence) or not all(is_int(token) for token in tokens):
        raise PromptError("expected a list of token ids (ints): lm.encode(prompt) gives them")
