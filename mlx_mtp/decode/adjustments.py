"""What is done to the logits of single rows before their tokens are chosen: penalties, biases, grammar masks.

What a row wants depends on its own text up to a position, so the host works it out, for every position of a verify
block: after the committed tokens, after these and the first draft, and so on (`RowControl`). The device applies it.
Rows without a control never come here, and rows beside each other don't see each other's.

Not here: what the rules are (mlx_mtp/control), and when the host knows the drafts (engine.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from ..models.elementwise import capped
from ..system.fusing import counting, fused

Floats = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int32]
Bits = npt.NDArray[np.uint32]

NO_IDS: Ids = np.zeros(0, np.int32)
NO_FLOATS: Floats = np.zeros(0, np.float32)


@dataclass(frozen=True)
class Adjustment:
    """What is done to the logits of one position, in this order.

    Attributes:
        ids: int32 [n], the tokens that the next three are for, each once.
        bias: float32 [n], added.
        factor: float32 [n], by which positive logits are divided and negative ones multiplied.
        minus: float32 [n], subtracted.
        process: A function of float32 logits [1, vocab] that returns others, or None.
        allowed: uint32 [ceil(vocab / 32)], a bit for each token that may be chosen, the lowest bit first; None for all.
    """

    ids: Ids = field(default_factory=lambda: NO_IDS)
    bias: Floats = field(default_factory=lambda: NO_FLOATS)
    factor: Floats = field(default_factory=lambda: NO_FLOATS)
    minus: Floats = field(default_factory=lambda: NO_FLOATS)
    process: Callable[[mx.array], mx.array] | None = None
    allowed: Bits | None = None


class RowControl(Protocol):
    """Steers one row; lives as long as the row, on the thread that decodes."""

    def advance(self, tokens: Sequence[int]) -> None:
        """Takes tokens that the row has generated, in order.

        Raises:
            MTPError: The text can't go on under these rules.
        """

    def forced(self) -> list[int]:
        """The tokens that must come next, as far as the rules leave no choice; [] if they do."""

    def adjustments(self, drafts: Sequence[int]) -> list[Adjustment]:
        """What applies after the text so far, and after it and each beginning of the drafts: len(drafts) + 1 of them.

        What is said of positions after a draft that the rules forbid has no meaning: that draft is never accepted.

        Raises:
            MTPError: The text can't go on under these rules.
        """


def adjust(logits: mx.array, rows: Sequence[Sequence[Adjustment]], cap: float | None) -> mx.array:
    """Applies adjustments.

    Args:
        logits: [b, L, vocab], before the softcap.
        rows: For each of the b rows, one adjustment for each of its positions, at least one; the last one also stands
            for positions that it doesn't name.
        cap: The softcap, or None.

    Returns:
        float32 [b, L, vocab], after the softcap.
    """
    width, vocab = logits.shape[1:]
    cells = [[row[min(i, len(row) - 1)] for i in range(width)] for row in rows]
    logits = logits.astype(mx.float32)
    if cap is not None:
        logits = capped(logits, mx.array(cap, mx.float32))
    if any(len(cell.ids) for row in cells for cell in row):
        ids = mx.array(_padded(cells, "ids", 0, np.int32))
        bias, factor, minus = (mx.array(_padded(cells, *kind, np.float32)) for kind in _NEUTRAL)
        changed = _penalized(mx.take_along_axis(logits, ids, axis=-1), bias, factor, minus)
        logits = mx.put_along_axis(logits, ids, changed, axis=-1)
    if any(cell.process for row in cells for cell in row):
        logits = mx.stack([
            mx.concatenate([_processed(cell, logits[i, j][None]) for j, cell in enumerate(row)])
            for i, row in enumerate(cells)
        ])  # fmt: skip
    if any(cell.allowed is not None for row in cells for cell in row):
        everything = np.full(-(-vocab // 32), 0xFFFFFFFF, np.uint32)
        masks = np.array([[everything if cell.allowed is None else cell.allowed for cell in row] for row in cells])
        logits = _masked(logits, mx.array(masks), vocab)
    return logits


_NEUTRAL = (("bias", 0.0), ("factor", 1.0), ("minus", 0.0))
"""The parts of an adjustment that belong to its ids, and what changes nothing."""


def _padded(cells: Sequence[Sequence[Adjustment]], name: str, neutral: float, dtype: type) -> npt.NDArray[Any]:
    """One part of all adjustments as [b, L, n]. Ids may be there twice then, but with the same changes."""
    most = max(len(cell.ids) for row in cells for cell in row)
    padded: npt.NDArray[Any] = np.full((len(cells), len(cells[0]), most), neutral, dtype)
    for i, row in enumerate(cells):
        for j, cell in enumerate(row):
            if count := len(cell.ids):
                values = getattr(cell, name)
                padded[i, j, :count], padded[i, j, count:] = values, values[0]
    return padded


@fused
def _penalized(logits: mx.array, bias: mx.array, factor: mx.array, minus: mx.array) -> mx.array:
    biased = logits + bias
    return mx.where(biased > 0, biased / factor, biased * factor) - minus


def _processed(cell: Adjustment, logits: mx.array) -> mx.array:
    return cell.process(logits) if cell.process else logits


def _masked(logits: mx.array, masks: mx.array, vocab: int) -> mx.array:
    """Minus infinity where the bit of a token isn't set; masks are uint32 [b, L, ceil(vocab / 32)]."""
    if rest := -vocab % 32:
        logits = mx.pad(logits, [(0, 0), (0, 0), (0, rest)])
    words = mx.unflatten(logits, -1, (-1, 32))
    return _kept(words, masks[..., None], counting(32, np.uint32)).flatten(-2)[..., :vocab]


@fused
def _kept(words: mx.array, masks: mx.array, bit: mx.array) -> mx.array:
    return mx.where(((masks >> bit) & 1) == 1, words, -mx.inf)
