"""The kernels that MLX chooses for the rows of a verify pass on a chip, and their time, which rises in steps.

A product of a few rows with a weight is done by one of these kernels (routing as in mlx 0.32.4: metal/quantized.cpp,
matmul.cpp):

    vector   Quantised weights: one row, and on M1 and M2 all rows below `matrix_from`. Each row is a pass of its own.
             The first pass reads the weight, further ones find it in a cache; each takes at least its arithmetic.
    wide     Quantised weights, below `matrix_from` rows, on M3 and later (mxfp4, mxfp8, nvfp4: on all chips). Passes
             over up to 5 rows, divided evenly; each takes the longer of reading and arithmetic. So 6 rows take twice
             as long as 3, and 11 three times as long as 4. Also 16-bit weights on M3 and later, up to 15 rows.
    matrix   Everything else: tiles of 32 rows (quantised, up to 32 rows) or 64 rows; a partly filled tile takes as
             long as a full one.

Attention reads the same KV for every token of a block. Its arithmetic takes time only where it is done in tiles of 64
rows:

    fused    No tiles: single tokens, and blocks of up to 8 tokens with heads of up to 256, if the query heads of a KV
             head give 32 rows at most.
    folded   The query heads of a KV head are rows of one product (models/attention.py).
    apart    A product for every query head: MLX's own way, and so that of other engines.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from ..checkpoint.quantization import Format
from ..checkpoint.sizes import ReadPerStep
from ..config import TextConfig
from ..models.attention import FUSED_HEAD, FUSED_ROWS, FUSED_TOKENS
from .chips import Chip

TILE_ROWS = 64
"""Rows of a tile of MLX's matrix kernels."""

QUANTISED_TILE_ROWS = 32
"""Rows of a tile for quantised weights, if there are no more rows than that."""

WIDE_ROWS = 5
"""Most rows of a pass of the wide kernels; more would spill registers."""

WIDE_FLOAT_PASSES = 3
"""Most passes for which MLX chooses the wide kernel for 16-bit weights."""

WIDE_SINCE = 3
"""First generation of chips for which MLX chooses the wide kernels for affine and 16-bit weights."""

SMALL, MIDDLE = 2048, 4096
"""Limits of a matrix's longer side: it decides how many rows MLX needs to choose a matrix kernel."""

_MATRIX_FROM = {"early": (14, 10, 6), "Ultra": (32, 18, 12), "later": (13, 15, 13), "M5": (33, 25, 13)}
"""That number of rows for quantised matrices whose longer side is up to SMALL, up to MIDDLE, and larger."""


@dataclass(frozen=True)
class Calibration:
    """The free parameters, which `scripts/check_cost_model.py` fits to the published timings it names.

    Attributes:
        bandwidth: Share of the nominal memory bandwidth that reading weights reaches.
        vector: Share of the FP32 peak that the vector kernel reaches.
        vector_early: The same on M1 and M2, which have no bfloat16 arithmetic and are limited by the rate of loads.
        wide: Share of the FP32 peak that the wide kernels reach; None for MLX before 0.32, which doesn't have them.
        matrix: Share of the FP16 matrix peak that the matrix kernels reach.
        launch: Seconds of a kernel launch.
    """

    bandwidth: float
    vector: float
    vector_early: float
    wide: float | None
    matrix: float
    launch: float

    def vector_on(self, chip: Chip) -> float:
        """Share of the FP32 peak that the vector kernel reaches on a chip."""
        return self.vector if chip.generation >= WIDE_SINCE else self.vector_early

    def wide_on(self, chip: Chip) -> float:
        """Share of the FP32 peak of the wide kernels on a chip; on M1 and M2 reduced as that of the vector kernel."""
        return (self.wide or 0.0) * self.vector_on(chip) / self.vector


def matrix_from(chip: Chip, side: int = MIDDLE + 1) -> int:
    """Fewest rows for which MLX chooses a matrix kernel for a quantised matrix.

    Args:
        chip: The chip.
        side: Elements of the matrix's longer side.
    """
    if chip.generation >= 5:
        limits = _MATRIX_FROM["M5"]
    elif chip.name.endswith("Ultra"):
        limits = _MATRIX_FROM["Ultra"]
    else:
        limits = _MATRIX_FROM["later" if chip.generation >= WIDE_SINCE else "early"]
    return limits[(side > SMALL) + (side > MIDDLE)]


def sides(config: TextConfig, stacked: bool = True) -> dict[int, float]:
    """Shares of a decoder stack's parameters, without experts, by the longer side of their matrix.

    Args:
        config: The decoder stack.
        stacked: Whether projections of the same input are fused, as in this package; False for other engines.

    Returns:
        Shares by side, which add up to 1: SMALL for sides up to it, MIDDLE likewise, MIDDLE + 1 for longer ones.
    """
    found = {SMALL: 0.0, MIDDLE: 0.0, MIDDLE + 1: 0.0}
    for i, layer in enumerate(config.layers):
        keys = layer.kv_heads * layer.head_dim if layer.kv_owner == i else 0
        heads = config.num_heads * layer.head_dim
        reading = [heads, keys, 0 if layer.k_eq_v else keys], [layer.intermediate_size] * 2
        outputs = [sum(group) for group in reading] if stacked else [it for group in reading for it in group]
        for width in (*outputs, heads, layer.intermediate_size):
            widest = max(width, config.hidden_size)
            found[next((side for side in (SMALL, MIDDLE) if widest <= side), MIDDLE + 1)] += width
    total = sum(found.values())
    return {side: share / total for side, share in found.items() if share}


def kernel(chip: Chip, rows: int, how: Format | None, wide: bool = True, side: int = MIDDLE + 1) -> str:
    """The kernel that multiplies `rows` rows with a weight: "vector", "wide" or "matrix".

    Args:
        chip: The chip.
        rows: Rows of the product.
        how: Quantisation of the weight; None for 16-bit floats.
        wide: Whether MLX has the wide kernels.
        side: Elements of the matrix's longer side.
    """
    if rows == 1:
        return "vector"
    if how is None:
        few = rows <= WIDE_ROWS * WIDE_FLOAT_PASSES
        return "wide" if few and wide and chip.generation >= WIDE_SINCE else "matrix"
    if rows >= matrix_from(chip, side):
        return "matrix"
    return "wide" if wide and (chip.generation >= WIDE_SINCE or how.mode != "affine") else "vector"


def matmul_seconds(
    chip: Chip, part: ReadPerStep, rows: int, how: Format | None, fit: Calibration, side: int = MIDDLE + 1
) -> float:
    """Seconds of the products with a part of the weights, without launches.

    Args:
        chip: The chip.
        part: The weights.
        rows: Rows of the product.
        how: Quantisation of the weights; None for 16-bit floats.
        fit: The free parameters.
        side: Elements of the longer side of the matrices.
    """
    read, row = read_seconds(chip, part.bytes, fit), 2 * part.parameters / (chip.fp32_tflops * 1e12)
    taken = kernel(chip, rows, how, fit.wide is not None, side)
    if taken == "vector":
        one = row / fit.vector_on(chip) if how else 0.0  # 16-bit weights need no unpacking
        return max(read, one) + (rows - 1) * one
    if taken == "wide":
        passes = ceil(rows / WIDE_ROWS)
        return passes * max(read, ceil(rows / passes) * row / fit.wide_on(chip))
    tile = QUANTISED_TILE_ROWS if how and rows <= QUANTISED_TILE_ROWS else TILE_ROWS
    return max(read, _tiles_seconds(chip, rows, tile, part.parameters, fit))


def attention_seconds(
    chip: Chip, config: TextConfig, batch: int, length: int, context: int, fit: Calibration, folded: bool = True
) -> float:
    """Seconds of attention's arithmetic in a pass, over all layers, without that which reading the KV hides.

    Args:
        chip: The chip.
        config: The decoder stack.
        batch: Rows.
        length: Tokens of each row.
        context: Committed tokens of each row.
        fit: The free parameters.
        folded: Whether query heads are folded into rows, as in this package; False for other engines.
    """
    if length == 1:
        return 0.0
    seconds = 0.0
    for layer in config.layers:
        group = config.num_heads // layer.kv_heads
        fused = layer.head_dim <= FUSED_HEAD and length <= FUSED_TOKENS and length * group <= FUSED_ROWS
        if fused:
            continue
        apart = not folded or (layer.head_dim <= FUSED_HEAD and length > FUSED_TOKENS)
        products, rows = (config.num_heads, length) if apart else (layer.kv_heads, length * group)
        # The wide kernel also takes the scores' product, whose matrix is transposed, but not that of the values.
        scores = kernel(chip, rows, None, fit.wide is not None) != "wide"
        seen = min(context, config.sliding_window) if layer.sliding else context
        work = (1 + scores) * batch * products * seen * layer.head_dim
        seconds += _tiles_seconds(chip, rows, TILE_ROWS, work, fit)
    return seconds


def read_seconds(chip: Chip, count: float, fit: Calibration) -> float:
    """Seconds to read `count` bytes."""
    return count / (fit.bandwidth * chip.bandwidth * 1e9)


def _tiles_seconds(chip: Chip, rows: int, tile: int, parameters: float, fit: Calibration) -> float:
    """Seconds of a matrix kernel; each of its tiles multiplies `tile` rows with all parameters."""
    return ceil(rows / tile) * tile * 2 * parameters / (fit.matrix * chip.fp16_tflops * 1e12)
