"""One round: draft, verify, accept. Pure functions on a small state; no host read, no loop over tokens of text.

    draft    K steps of the drafter from the last token and the target's last hidden state
    verify   one forward pass of the target over [last token, K drafts], or in each row only the first few of them
    accept   the drafts up to the first one that the target didn't choose itself, plus the target's choice there

All of it is one lazily built graph. The tokens kept are the target's own choices in the verify pass, whoever drafted
and whatever; `lengths` advances by what was kept, and nothing else marks a draft as rejected.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx

from ..kv import KVCache
from ..models.drafter import Drafter
from ..models.ragged import RaggedBlock
from ..models.target import Target
from .sampling import Sampler


@dataclass(frozen=True)
class RoundState:
    """Where each row stands between rounds.

    Attributes:
        lengths: int32 [B], committed tokens.
        tokens: int32 [B], the newest token of each row, chosen but not committed yet (the bonus token).
        hidden: [B, hidden], the target's hidden state at the last committed position.
    """

    lengths: mx.array
    tokens: mx.array
    hidden: mx.array


def select_rows(state: RoundState | None, rows: Sequence[int], joining: Sequence[RoundState]) -> RoundState:
    """Some rows of a state, and those of other states after them."""
    states = [*joining]
    if state is not None and rows:
        index = mx.array(list(rows), dtype=mx.int32)
        states.insert(0, RoundState(state.lengths[index], state.tokens[index], state.hidden[index]))
    return RoundState(
        lengths=mx.concatenate([it.lengths for it in states]),
        tokens=mx.concatenate([it.tokens for it in states]),
        hidden=mx.concatenate([it.hidden for it in states]),
    )


def first_state(target: Target, sampler: Sampler, hidden: mx.array, lengths: mx.array) -> RoundState:
    """The state after a prefill.

    Args:
        hidden: [B, hidden], the target's hidden state at each row's last prompt position.
        lengths: int32 [B], tokens of the prompts.
    """
    return RoundState(lengths, sampler.target(target.raw_logits(hidden)[:, None], lengths[:, None])[:, 0], hidden)


def draft(target: Target, drafter: Drafter, kv: KVCache, sampler: Sampler, state: RoundState, k: int) -> mx.array:
    """Drafts k tokens for every row: int32 [B, k]."""
    shared = drafter.shared_kv(kv, state.lengths)
    token, hidden, drafts = state.tokens, state.hidden, []
    for step in range(k):
        logits, ids, hidden = drafter(target.embed(token), hidden, shared)
        token = sampler.draft(logits, ids, state.lengths + (1 + step))
        drafts.append(token)
    return mx.stack(drafts, axis=1)


def verify(
    target: Target,
    kv: KVCache,
    sampler: Sampler,
    lengths: mx.array,
    block: mx.array,
    stepwise: bool = False,
    counts: Sequence[int] | None = None,
) -> tuple[mx.array, mx.array]:
    """Runs the target over a block and chooses the token after each of its positions.

    Args:
        lengths: int32 [B], committed tokens.
        block: int32 [B, L], the newest token and the drafts.
        stepwise: Run the block token by token, as plain decoding would.
        counts: How many tokens of each row to look at, one at least, in some row all L; None for all of all rows.
            What stands at the other places of the results has no meaning.

    Returns:
        Choices int32 [B, L], and the hidden states [B, L, hidden].
    """
    width = block.shape[1]
    positions = lengths[:, None] + mx.arange(1, width + 1, dtype=mx.int32)
    if counts is not None:
        ragged = RaggedBlock.of(counts)
        line = target(ragged.flatten(block), lengths, kv, ragged)
        each = sampler.of_rows(ragged.rows)
        choices = each.target(target.raw_logits(line).swapaxes(0, 1), ragged.flatten(positions).T)
        return ragged.pad(choices.T), ragged.pad(line)
    if stepwise:
        steps = [target(block[:, i : i + 1], lengths + i, kv) for i in range(width)]
        logits = mx.concatenate([target.raw_logits(hidden) for hidden in steps], axis=1)
        hidden = mx.concatenate(steps, axis=1)
    else:
        hidden = target(block, lengths, kv)
        logits = target.raw_logits(hidden)
    return sampler.target(logits, positions), hidden


def accept(drafts: mx.array, choices: mx.array, most: Sequence[int] | None = None) -> mx.array:
    """How many drafts each row keeps.

    Args:
        drafts: int32 [B, k].
        choices: int32 [B, >= k], the target's.
        most: Drafts that each row may keep; None for all.

    Returns:
        int32 [B].
    """
    agreed = (drafts == choices[:, : drafts.shape[1]]).astype(mx.int32)
    kept = mx.cumprod(agreed, axis=1).sum(axis=1).astype(mx.int32)
    return kept if most is None else mx.minimum(kept, mx.array(list(most), dtype=mx.int32))


def decode_round(
    target: Target,
    drafter: Drafter | None,
    kv: KVCache,
    sampler: Sampler,
    state: RoundState,
    lengths: int | Sequence[int],
    width: int | None = None,
    stepwise: bool = False,
) -> tuple[RoundState, mx.array, mx.array]:
    """One round for all rows; where nothing is drafted, a plain decoding step.

    Args:
        lengths: Draft length of each row, or of all. With K the longest of them, K are drafted for every row, as one
            step serves all, but of each row only its own number is verified.
        width: Width of the verify block where it must not depend on K; at least K + 1. The rest is filled up with
            tokens that are never kept.
        stepwise: See `verify`.

    Returns:
        The state after the round, and the report int32 [B, width + 1]: the target's choices, then the number n of
        drafts kept. The row's new tokens are its first n + 1 choices. Last, the drafts int32 [B, K].
    """
    each = [lengths] * len(state.tokens) if isinstance(lengths, int) else lengths
    k, most = max(each), each if min(each) < max(each) else None
    block = state.tokens[:, None]
    if k:
        assert drafter is not None
        block = mx.concatenate([block, draft(target, drafter, kv, sampler, state, k)], axis=1)
    drafts = block[:, 1:]
    if width is not None and width > k + 1:
        block = mx.pad(block, [(0, 0), (0, width - k - 1)])
    counts = [own + 1 for own in most] if most and width is None and not stepwise else None
    choices, hidden = verify(target, kv, sampler, state.lengths, block, stepwise, counts)
    kept = accept(drafts, choices, most) if k else mx.zeros_like(state.lengths)
    last = kept[:, None]
    new = RoundState(
        lengths=state.lengths + kept + 1,
        tokens=mx.take_along_axis(choices, last, axis=1)[:, 0],
        hidden=mx.take_along_axis(hidden, last[:, :, None], axis=1)[:, 0],
    )
    return new, mx.concatenate([choices, last], axis=1), drafts
