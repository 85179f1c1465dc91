"""One round: draft, verify, accept. Pure functions on a small state; no host read, no loop over tokens of text.

    draft    K steps of the drafter from the newest token and the target's last hidden state
    verify   one forward pass of the target over [newest token, K drafts], or fewer drafts in some rows
    accept   the drafts before the first one that differs from the target's choice, plus that choice, the bonus token

A round is one lazily built graph. Every new token is the target's own choice in the verify pass, so the text doesn't
depend on the drafts. `lengths` advances by the new tokens; nothing else marks a draft as rejected.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import mlx.core as mx

from ..kv import KVCache
from ..models.drafter import Drafter
from ..models.ragged import RaggedBlock
from ..models.target import Target
from .adjustments import Adjustment
from .sampling import Sampler

Adjustments = Sequence[Sequence[Adjustment] | None]
"""By row, what is done to the logits of its positions; None for a row without a control."""


@dataclass(frozen=True)
class RoundState:
    """The state of every row between rounds, on the device.

    Attributes:
        lengths: int32 [B], committed tokens.
        tokens: int32 [B], the newest token of each row (the bonus token): chosen, but its KV isn't committed yet.
        hidden: [B, hidden], the target's hidden state at the last committed position.
    """

    lengths: mx.array
    tokens: mx.array
    hidden: mx.array


@dataclass(frozen=True)
class Block:
    """What a round verifies: the newest token of each row, and the drafts after it.

    Attributes:
        tokens: int32 [B, L], the newest token, the drafts, and padding if the width is given.
        drafts: int32 [B, K].
        lengths: The draft length of each row; K is the longest.
    """

    tokens: mx.array
    drafts: mx.array
    lengths: Sequence[int]

    @property
    def counts(self) -> list[int] | None:
        """Tokens of each row to verify, where rows differ and nothing pads the block; else None, for all."""
        even = min(self.lengths) == max(self.lengths) or self.tokens.shape[1] > self.drafts.shape[1] + 1
        return None if even else [own + 1 for own in self.lengths]


@dataclass(frozen=True)
class Forward:
    """The target's view of a verify block, before anything is chosen.

    Attributes:
        logits: [B, L, vocab], before the softcap; [N, 1, vocab] with a ragged block.
        hidden: [B, L, hidden], after the final norm.
        ragged: How N tokens make the block, if its rows have different numbers of them.
    """

    logits: mx.array
    hidden: mx.array
    ragged: RaggedBlock | None = None


def select_rows(state: RoundState | None, rows: Sequence[int], joining: Sequence[RoundState]) -> RoundState:
    """Some rows of a state, followed by all rows of other states.

    Args:
        state: The state of the batch; None if it is empty.
        rows: Indices of the rows to keep, in their new order.
        joining: States of the rows that join.
    """
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
    """The state after a prefill, with each row's first token chosen.

    Args:
        target: The target.
        sampler: Chooses the tokens of these rows.
        hidden: [B, hidden], the target's hidden state at each row's last prompt position.
        lengths: int32 [B], the prompts' lengths in tokens.
    """
    return RoundState(lengths, choose(sampler, lengths - 1, last_position(target, hidden))[:, 0], hidden)


def last_position(target: Target, hidden: mx.array) -> Forward:
    """The target's view of the last position of some prompts, from its hidden states [B, hidden]."""
    return Forward(target.raw_logits(hidden)[:, None], hidden[:, None])


def draft(target: Target, drafter: Drafter, kv: KVCache, sampler: Sampler, state: RoundState, k: int) -> mx.array:
    """Drafts tokens for every row.

    Args:
        target: The target, whose embedding the drafter reads.
        drafter: Its drafter.
        kv: The target's KV, to which the drafter attends.
        sampler: Chooses the tokens of these rows.
        state: Where the rows are.
        k: Draft length, at least 1.

    Returns:
        int32 [B, k].
    """
    shared = drafter.shared_kv(kv, state.lengths)
    token, hidden, drafts = state.tokens, state.hidden, []
    for step in range(k):
        logits, ids, hidden = drafter(target.embed(token), hidden, shared)
        token = sampler.draft(logits, ids, state.lengths + (1 + step))
        drafts.append(token)
    return mx.stack(drafts, axis=1)


def accept(drafts: mx.array, choices: mx.array, most: Sequence[int] | None = None) -> mx.array:
    """How many drafts of each row are accepted, without the bonus token.

    Args:
        drafts: int32 [B, k].
        choices: int32 [B, >= k], the target's choices at the same positions.
        most: The draft length of each row, where it is below k; None if it is k in all rows.

    Returns:
        int32 [B].
    """
    agreed = (drafts == choices[:, : drafts.shape[1]]).astype(mx.int32)
    accepted = mx.cumprod(agreed, axis=1).sum(axis=1).astype(mx.int32)
    return accepted if most is None else mx.minimum(accepted, mx.array(list(most), dtype=mx.int32))


def draft_block(
    target: Target,
    drafter: Drafter | None,
    kv: KVCache,
    sampler: Sampler,
    state: RoundState,
    lengths: Sequence[int],
    width: int | None = None,
    given: Mapping[int, Sequence[int]] | None = None,
) -> Block:
    """Drafts what a round verifies.

    Args:
        target: As for `decode_round`, and so are the next six.
        drafter: See there; None if all drafts are given.
        kv: See there.
        sampler: See there.
        state: See there.
        lengths: See there.
        width: See there.
        given: By index of the row, drafts that need no drafter, as many as its length says.
    """
    given, k, tokens = given or {}, max(lengths), state.tokens[:, None]
    steps = max((length for i, length in enumerate(lengths) if i not in given), default=0)
    if k:
        drafts = mx.zeros((len(lengths), 0), mx.int32)
        if steps:
            assert drafter is not None
            drafts = draft(target, drafter, kv, sampler, state, steps)
        if given:
            rows = [[*given.get(i, ()), *[0] * (k - len(given.get(i, ())))] for i in range(len(lengths))]
            drafts = mx.pad(drafts, [(0, 0), (0, k - steps)])
            drafts = mx.where(mx.array([[i in given] for i in range(len(lengths))]), mx.array(rows), drafts)
        tokens = mx.concatenate([tokens, drafts], axis=1)
    drafts = tokens[:, 1:]
    if width is not None and width > k + 1:
        tokens = mx.pad(tokens, [(0, 0), (0, width - k - 1)])
    return Block(tokens, drafts, lengths)


def forward(
    target: Target,
    kv: KVCache,
    lengths: mx.array,
    tokens: mx.array,
    stepwise: bool = False,
    counts: Sequence[int] | None = None,
) -> Forward:
    """Runs the target over a verify block; arguments as for `verify`."""
    if counts is not None:
        ragged = RaggedBlock.of(counts)
        flat = target(ragged.flatten(tokens), lengths, kv, ragged)
        return Forward(target.raw_logits(flat).swapaxes(0, 1), ragged.pad(flat), ragged)
    if stepwise:
        steps = [target(tokens[:, i : i + 1], lengths + i, kv) for i in range(tokens.shape[1])]
        logits = mx.concatenate([target.raw_logits(hidden) for hidden in steps], axis=1)
        return Forward(logits, mx.concatenate(steps, axis=1))
    hidden = target(tokens, lengths, kv)
    return Forward(target.raw_logits(hidden), hidden)


def choose(sampler: Sampler, lengths: mx.array, seen: Forward, adjustments: Adjustments | None = None) -> mx.array:
    """Chooses the token after each position of a verify block.

    Args:
        sampler: Chooses the tokens of these rows.
        lengths: int32 [B], committed tokens.
        seen: The target's view of the block.
        adjustments: For rows with a control, one for each token to verify.

    Returns:
        The target's choices int32 [B, L].
    """
    width, ragged = seen.hidden.shape[1], seen.ragged
    positions = lengths[:, None] + mx.arange(1, width + 1, dtype=mx.int32)
    if ragged is None:
        return sampler.target(seen.logits, positions, adjustments)
    if adjustments:
        each = zip(adjustments, ragged.counts, strict=True)
        adjustments = [[own[i]] if own else None for own, count in each for i in range(count)]
    choices = sampler.of_rows(ragged.rows).target(seen.logits, ragged.flatten(positions).T, adjustments)
    return ragged.pad(choices.T)


def verify(
    target: Target,
    kv: KVCache,
    sampler: Sampler,
    lengths: mx.array,
    tokens: mx.array,
    stepwise: bool = False,
    counts: Sequence[int] | None = None,
) -> tuple[mx.array, mx.array]:
    """Runs the target over a verify block and chooses the token after each of its positions.

    Args:
        target: The target.
        kv: Its KV; the block's keys and values are written to it.
        sampler: Chooses the tokens of these rows.
        lengths: int32 [B], committed tokens.
        tokens: int32 [B, L], the newest token and the drafts.
        stepwise: Run the block token by token, as plain decoding does.
        counts: How many tokens of each row to verify: at least 1, and L in at least one row. None verifies all. Results
            beyond a row's count have no meaning.

    Returns:
        The target's choices int32 [B, L], and its hidden states [B, L, hidden].
    """
    seen = forward(target, kv, lengths, tokens, stepwise, counts)
    return choose(sampler, lengths, seen), seen.hidden


def commit(state: RoundState, block: Block, seen: Forward, choices: mx.array) -> tuple[RoundState, mx.array]:
    """Accepts drafts, and moves every row to its next bonus token.

    Args:
        state: The state that the block followed.
        block: The block.
        seen: The target's view of it.
        choices: int32 [B, L], the target's choices.

    Returns:
        As `decode_round`, without the drafts.
    """
    k, uneven = block.drafts.shape[1], min(block.lengths) < max(block.lengths)
    accepted = accept(block.drafts, choices, block.lengths if uneven else None) if k else mx.zeros_like(state.lengths)
    last = accepted[:, None]
    new = RoundState(
        lengths=state.lengths + accepted + 1,
        tokens=mx.take_along_axis(choices, last, axis=1)[:, 0],
        hidden=mx.take_along_axis(seen.hidden, last[:, :, None], axis=1)[:, 0],
    )
    return new, mx.concatenate([choices, last], axis=1)


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
    """Builds one round for all rows; with draft length 0, a plain decoding step.

    Args:
        target: The target.
        drafter: Its drafter; None only if all draft lengths are 0.
        kv: The target's KV, which the round writes to.
        sampler: Chooses the tokens of these rows.
        state: The state before the round.
        lengths: Draft length of each row, or one for all. K, the longest, is drafted in every row, since a draft step
            serves all rows at once; but only a row's own draft length is verified.
        width: Width of the verify block if it must not depend on K, at least K + 1. The block is padded with tokens
            that are never accepted.
        stepwise: See `verify`.

    Returns:
        The state after the round; the report int32 [B, width + 1]: the target's choices, then n, the number of
        accepted drafts; and the drafts int32 [B, K]. A row's new tokens are its first n + 1 choices, the bonus token
        included.
    """
    each = [lengths] * len(state.tokens) if isinstance(lengths, int) else lengths
    block = draft_block(target, drafter, kv, sampler, state, each, width)
    seen = forward(target, kv, state.lengths, block.tokens, stepwise, None if stepwise else block.counts)
    new, report = commit(state, block, seen, choose(sampler, state.lengths, seen))
    return new, report, block.drafts
