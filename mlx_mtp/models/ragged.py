"""Blocks whose rows bring different numbers of tokens, without the gaps.

What works token by token (projections, MLPs, experts, the head) sees the tokens of all rows in one line and pays for
no others. Attention works row by row: its inputs are spread over as many slots as the longest row needs, and what
comes out is put back in line. A place that no token of its row fills repeats the row's last one; its key and value go
where those of a rejected draft would, and nothing that is kept ever sees them.

Knows nothing of models; they ask it to `pad` and to `flatten`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate

import mlx.core as mx


@dataclass(frozen=True)
class RaggedBlock:
    """Which token of the line belongs to which place of which row.

    Attributes:
        counts: Tokens of each row: [B].
        tokens: int32 [B, L], the token at each place.
        slots: int32 [N], the place of each token, counted through all rows.
    """

    counts: Sequence[int]
    tokens: mx.array
    slots: mx.array

    @classmethod
    def of(cls, counts: Sequence[int]) -> RaggedBlock:
        """For rows with these numbers of tokens, each at least 1."""
        return _of(tuple(counts))

    @classmethod
    def _made(cls, counts: tuple[int, ...]) -> RaggedBlock:
        width, ends = max(counts), accumulate(counts)
        return cls(
            counts=counts,
            tokens=mx.array(
                [[end - max(count - i, 1) for i in range(width)] for end, count in zip(ends, counts, strict=True)],
                dtype=mx.int32,
            ),
            slots=mx.array([row * width + i for row, count in enumerate(counts) for i in range(count)], dtype=mx.int32),
        )

    @property
    def width(self) -> int:
        """L, slots of a row."""
        return max(self.counts)

    @property
    def rows(self) -> list[int]:
        """By token, its row: [N]."""
        return [row for row, count in enumerate(self.counts) for _ in range(count)]

    def pad(self, x: mx.array) -> mx.array:
        """[1, N, ...], by token, to [B, L, ...], by row."""
        return x[0][self.tokens]

    def flatten(self, x: mx.array) -> mx.array:
        """[B, L, ...] to [1, N, ...]."""
        return x.flatten(0, 1)[self.slots][None]


@lru_cache(maxsize=64)  # the same few patterns come again and again
def _of(counts: tuple[int, ...]) -> RaggedBlock:
    return RaggedBlock._made(counts)
