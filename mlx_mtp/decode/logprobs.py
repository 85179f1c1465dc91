"""Log-probabilities of chosen tokens and of the best ones beside them.

Of the model's own distribution: after the softcap, before temperature, filters, penalties, biases and grammars.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import mlx.core as mx

from ..models.elementwise import softcap
from .round import Forward
from .sampling import best_few

MOST_LOGPROBS = 20
"""Most tokens beside the chosen one, as in OpenAI's interface."""


@dataclass(frozen=True)
class TokenLogprob:
    """A generated token and its log-probability.

    Attributes:
        token: Its id.
        logprob: Its natural log-probability.
        top: Ids and log-probabilities of the most likely tokens at its position, as many as were asked for, best first.
    """

    token: int
    logprob: float
    top: list[tuple[int, float]]


@dataclass(frozen=True)
class Logprobs:
    """Log-probabilities of a round, on the device.

    Attributes:
        rows: Indices of the rows that asked for them, b of them.
        chosen: float32 [b, L], of the target's choices.
        ids: int32 [b, L, n], of the n most likely tokens, best first.
        top: float32 [b, L, n], theirs.
    """

    rows: list[int]
    chosen: mx.array
    ids: mx.array
    top: mx.array

    @property
    def arrays(self) -> list[mx.array]:
        """For evaluation."""
        return [self.chosen, self.ids, self.top]

    def host(self) -> dict[int, list[tuple[float, list[tuple[int, float]]]]]:
        """Waits for them; by row and position."""
        chosen, ids, top = (cast("list[Any]", array.tolist()) for array in self.arrays)
        return {
            row: [(own, list(zip(*best, strict=True))) for own, *best in zip(chosen[i], ids[i], top[i], strict=True)]
            for i, row in enumerate(self.rows)
        }


def logprobs(wanted: Sequence[int | None], seen: Forward, choices: mx.array, cap: float | None) -> Logprobs | None:
    """Log-probabilities for the rows that want them.

    Args:
        wanted: By row, how many tokens beside the chosen one; None for no log-probabilities.
        seen: The target's view of the block.
        choices: int32 [B, L], the target's choices.
        cap: Its softcap, or None.
    """
    rows = [i for i, count in enumerate(wanted) if count is not None]
    if not rows:
        return None
    index = mx.array(rows, dtype=mx.int32)
    logits = seen.ragged.pad(seen.logits.swapaxes(0, 1)) if seen.ragged else seen.logits
    logits = logits[index].astype(mx.float32)
    if cap is not None:
        logits = softcap(logits, mx.array(cap, mx.float32))
    total = mx.logsumexp(logits, axis=-1, keepdims=True)
    best = best_few(logits, max(1, *(wanted[i] or 0 for i in rows)))[..., ::-1].astype(mx.int32)
    chosen = mx.take_along_axis(logits, choices[index][..., None], axis=-1)
    return Logprobs(rows, (chosen - total)[..., 0], best, mx.take_along_axis(logits, best, axis=-1) - total)
