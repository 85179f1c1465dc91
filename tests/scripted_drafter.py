"""A drafter that proposes a given text: always right, always wrong, or anything between.

Stands in for `mlx_mtp.models.drafter.Drafter` in an `Engine`, to show that the text doesn't depend on the drafter.
"""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

from mlx_mtp.kv import KVBuffers


class ScriptedDrafter:
    """Proposes, for each absolute position, the token that the script has there."""

    def __init__(self, script: Sequence[int]):
        """Takes the script: token ids by absolute position, the prompt's included; it is repeated past its end."""
        self._script = mx.array(list(script), dtype=mx.int32)
        self._step = 0

    def borrow(self, kv: KVBuffers, lengths: mx.array) -> mx.array:
        """Starts a round."""
        self._step = 0
        return lengths

    def __call__(self, embedded: mx.array, hidden: mx.array, lent: mx.array) -> tuple[mx.array, mx.array, mx.array]:
        """Proposes one token, as the only candidate."""
        self._step += 1
        token = self._script[(lent + self._step) % self._script.size][:, None]
        return mx.zeros(token.shape), token, hidden
