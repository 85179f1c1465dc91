"""How much the target's scores depend on the shape of a pass, on this machine.

A verify block, or a batch, may use another kernel than a single token, which adds the same numbers in another order.
Two tokens whose scores are closer than what that changes can swap: a near tie. Here the target alone reads a known text
in passes of several shapes; nothing is drafted, so a fault of the drafting can't hide in the result.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import cast

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from ..decode.noise import gumbel, seed_key
from ..decode.prefill import prefill_block
from ..decode.sampling import SamplingOptions
from ..kv import KVBuffers
from ..models.self_test import COARSEST_FLOAT32
from ..models.target import Target

TIE = 4
"""A gap is a near tie up to so many times the largest change of a score: each of two scores may have changed by it on
either of two ways, and the text that was read doesn't hold the worst case."""

_ROUNDINGS = 32
"""Roundings (`finfo.eps`) by which the scores of a sound target may typically change, relative to their size. Errors of
hundreds of products add up like a random walk, to ten or twenty; a slot too many or too few changes scores by more."""


@dataclass(frozen=True)
class Agreement:
    """How far scores in passes of other shapes are from those of single tokens, one row at a time.

    Attributes:
        shapes: The shapes compared: rows and tokens of each in a pass.
        positions: Positions of the text compared, for each shape.
        largest: Largest change of any token's logit.
        typical: Root mean square of the changes at a position relative to that of the logits: the largest shape's
            median over positions.
        allowed: What `typical` may be for rounding alone.
    """

    shapes: tuple[tuple[int, int], ...]
    positions: int
    largest: float
    typical: float
    allowed: float

    @property
    def equal(self) -> bool:
        """Whether all scores are the same, bit for bit."""
        return self.largest == 0

    @property
    def sound(self) -> bool:
        """Whether rounding explains the changes."""
        return self.typical <= self.allowed  # NaN isn't

    @property
    def tie(self) -> float:
        """The largest gap between two scores that is a near tie."""
        return TIE * self.largest if self.sound else 0.0


def agreement(target: Target, text: Sequence[int], start: int, shapes: Sequence[tuple[int, int]]) -> Agreement:
    """Compares the scores of passes of several shapes with those of single tokens.

    Args:
        target: The target.
        text: Token ids.
        start: Number of them that are the prompt, at least 1 and below their number.
        shapes: Rows, and tokens of each row, in a pass.

    Returns:
        What the comparison says.
    """
    alone = _scores(target, text, start, 1, 1)
    size = np.sqrt(np.mean(alone**2, axis=-1)) + np.finfo(np.float32).tiny
    largest = typical = 0.0
    for rows, width in shapes:
        apart = _scores(target, text, start, rows, width) - alone
        largest = float(np.max([largest, np.max(np.abs(apart))]))  # np.max keeps NaN
        typical = float(np.max([typical, median(np.sqrt(np.mean(apart**2, axis=-1)) / size)]))
    allowed = _ROUNDINGS * max(float(mx.finfo(target.dtype).eps), COARSEST_FLOAT32)
    return Agreement(tuple(shapes), len(alone), largest, typical, allowed)


def _scores(target: Target, text: Sequence[int], start: int, rows: int, width: int) -> npt.NDArray[np.float32]:
    """The logits [N, vocab] after each token from `start` on, of the last of `rows` equal rows in blocks of `width`."""
    kv = KVBuffers(target.config, rows, target.dtype, positions=len(text) + width)
    prefill_block(target, kv, [list(text[:start])] * rows, 0, [start - 1] * rows)
    found = []
    for begin in range(start, len(text), width):
        block = [*text[begin : begin + width]]
        kv.reserve(begin + width)
        tokens = mx.array([block + [0] * (width - len(block))] * rows, dtype=mx.int32)
        hidden = target(tokens, mx.full((rows,), begin, dtype=mx.int32), kv)
        logits = target.logits(hidden[-1, : len(block)]).astype(mx.float32)
        mx.eval(logits, kv.arrays())
        found.append(np.array(logits))
    kv.bound_pool()
    return np.concatenate(found)


def margin(logits: mx.array, one: int, other: int, sampling: SamplingOptions, position: int) -> float:
    """How far the choice of one token is from that of another.

    Args:
        logits: float32 [vocab], those from which the token is chosen.
        one: A token id.
        other: Another one.
        sampling: How it is chosen: greedily, or drawn with or without top-k.
        position: Its absolute position.

    Returns:
        The difference of their logits, noise included if they are drawn; if top-k leaves one out, how much its logit
        lacks. At least 0.
    """
    ids = mx.array([one, other], dtype=mx.int32)
    chosen = logits[ids]
    if not sampling.temperature:
        return gap(chosen)
    if sampling.top_k:
        least = mx.sort(logits)[-sampling.top_k]
        if (lacking := float(mx.maximum(least - chosen, 0).max())) > 0:
            return lacking
    first, second = (mx.array(word, dtype=mx.uint32) for word in seed_key(sampling.seed))
    drawn = chosen + sampling.temperature * gumbel(first, second, mx.array(position, dtype=mx.int32), ids)
    return gap(drawn)


def gap(pair: mx.array) -> float:
    """The difference of two numbers float32 [2], at least 0."""
    return abs(cast(float, (pair[0] - pair[1]).item()))
