"""Ragged blocks: blocks whose rows have different numbers of tokens, computed without padding where possible.

Layers that work token by token (projections, MLPs, experts, the head) see a flat block: the tokens of all rows in one
sequence, without padding. Attention works row by row: its inputs are padded to the width of the longest row, and its
results are flattened again. A padding slot repeats the row's last token; its key and value are written where those of a
rejected draft would be, and no committed token ever sees them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate

import mlx.core as mx


@dataclass(frozen=True)
class RaggedBlock:
    """How a flat block of N tokens maps to a padded block of B rows with L slots each.

    Attributes:
        counts: [B], the number of tokens of each row.
        tokens: int32 [B, L], the index of the flat token in each slot.
        slots: int32 [N], the slot of each flat token, counted through all rows.
    """

    counts: Sequence[int]
    tokens: mx.array
    slots: mx.array

    @classmethod
    def of(cls, counts: Sequence[int]) -> RaggedBlock:
        """The block of rows with these numbers of tokens, each at least 1; cached."""
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
        """L, the slots of a padded row."""
        return max(self.counts)

    @property
    def rows(self) -> list[int]:
        """[N], the row of each flat token."""
        return [row for row, count in enumerate(self.counts) for _ in range(count)]

    def pad(self, x: mx.array) -> mx.array:
        """Turns a flat block [1, N, ...] into a padded one [B, L, ...]."""
        return x[0][self.tokens]

    def flatten(self, x: mx.array) -> mx.array:
        """Turns a padded block [B, L, ...] into a flat one [1, N, ...]."""
        return x.flatten(0, 1)[self.slots][None]


@lru_cache(maxsize=64)  # a few patterns of draft lengths recur again and again
def _of(counts: tuple[int, ...]) -> RaggedBlock:
    return RaggedBlock._made(counts)
