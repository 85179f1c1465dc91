"""Drafters that propose given texts: always right, always wrong, or right now and then.

They stand in for `mlx_mtp.models.drafter.Drafter` in an `Engine`, to show that the text doesn't depend on the drafter.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise
from random import Random

import mlx.core as mx
import numpy as np

from mlx_mtp.kv import KVBuffers
from mlx_mtp.models.target import Target


class ScriptedDrafter:
    """Proposes, for each absolute position, the token that the script has there."""

    def __init__(self, script: Sequence[int]):
        """Takes the script: token ids by absolute position, the prompt's included; it is repeated past its end."""
        self._script = mx.array(list(script), dtype=mx.int32)
        self._step = 0

    def shared_kv(self, kv: KVBuffers, lengths: mx.array) -> mx.array:
        """Starts a round."""
        self._step = 0
        return lengths

    def __call__(self, embedded: mx.array, hidden: mx.array, lent: mx.array) -> tuple[mx.array, mx.array, mx.array]:
        """Proposes one token, as the only candidate."""
        self._step += 1
        token = self._script[(lent + self._step) % self._script.size][:, None]
        return mx.zeros(token.shape), token, hidden


class LuckyDrafter:
    """Knows the texts of all rows of a batch, and proposes what comes next, or now and then something else.

    So the rows of a batch keep different numbers of drafts in every round. Which row it drafts for it can't tell; it
    goes by position and token, and is wrong where two texts have the same token at the same position.
    """

    def __init__(self, target: Target, texts: Iterable[Sequence[int]], share: float, rng: Random):
        """Takes token ids by absolute position, the prompts' included, and how often to be right."""
        texts, vocab = list(texts), target.config.vocab_size
        following = np.zeros((max(map(len, texts)) + 16, vocab), dtype=np.int32)
        for text in texts:
            for position, (token, after) in enumerate(pairwise(text)):
                following[position, token] = after if rng.random() < share else rng.randrange(vocab)
        self._following = mx.array(following)
        self._embeddings = target.embed(mx.arange(vocab))
        self._step = 0

    def shared_kv(self, kv: KVBuffers, lengths: mx.array) -> mx.array:
        """Starts a round."""
        self._step = 0
        return lengths

    def __call__(self, embedded: mx.array, hidden: mx.array, lent: mx.array) -> tuple[mx.array, mx.array, mx.array]:
        """Proposes one token, as the only candidate."""
        last = (embedded[:, None] == self._embeddings).all(axis=-1).argmax(axis=-1)
        position = mx.minimum(lent + self._step, self._following.shape[0] - 1)
        self._step += 1
        token = self._following[position, last][:, None]
        return mx.zeros(token.shape), token, hidden
