"""Which kernels MLX takes for the rows of a verify pass on a chip, and what they take: the steps in a pass's price.

A product of a few rows with a weight costs, by kernel (routing as in mlx 0.32.4: metal/quantized.cpp, matmul.cpp),

    vector   quantised, one row, and on M1 and M2 all below `matrix_from`: every row is a pass of its own. The first
             reads the weight, further ones find it in a cache; a pass takes its arithmetic at least
    wide     quantised, M3 and later (mxfp4, mxfp8, nvfp4: all), below `matrix_from` rows: passes over up to 5 rows,
             as even as can be, each of which takes the larger of reading and arithmetic. So 6 rows cost twice what 3
             do, and 11 three times what 4 do. For 16-bit weights the same on M3 and later, up to 15 rows
    matrix   all others: tiles of 32 rows (quantised, up to 32 rows) or 64, which cost the same full or not

Attention reads the same KV for every token of a block; its arithmetic counts where it is done in tiles of 64 rows:

    fused    no tiles: single tokens, and heads of up to 256 for blocks of up to 8 tokens whose query heads of a KV head
             make 32 rows at most
    folded   the query heads of a KV head are rows of one product (models/attention.py)
    apart    a product for every query head: what MLX does by itself, and so what other engines do
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
"""The same for quantised weights, while the rows are no more than these."""

WIDE_ROWS = 5
"""Rows that a pass of the wide kernels takes at most; more would spill registers."""

WIDE_FLOAT_PASSES = 3
"""Passes up to which MLX takes the wide kernel for 16-bit weights."""

WIDE_SINCE = 3
"""Generation of chips from which on MLX takes the wide kernels for affine and 16-bit weights."""

SMALL, MIDDLE = 2048, 4096
"""Widest sides of a matrix by which MLX decides from how many rows on it takes a matrix kernel."""

_MATRIX_FROM = {"early": (14, 10, 6), "Ultra": (32, 18, 12), "later": (13, 15, 13), "M5": (33, 25, 13)}
"""That number of rows for quantised matrices whose sides are up to SMALL, up to MIDDLE, and larger."""


@dataclass(frozen=True)
class Calibration:
    """The free parameters. `scripts/check_cost_model.py` fits them, on the published rows named there.

    Attributes:
        bandwidth: Share of the nominal memory bandwidth that weights arrive with.
        vector: Share of the FP32 peak that the vector kernel reaches.
        vector_early: The same on M1 and M2, which have no bfloat16 arithmetic and are limited by the rate of loads.
        wide: The same of the wide kernels; None for an MLX before 0.32, which hasn't got them.
        matrix: Share of the FP16 matrix peak that the matrix kernels reach.
        launch: Seconds of one kernel's launch.
    """

    bandwidth: float
    vector: float
    vector_early: float
    wide: float | None
    matrix: float
    launch: float

    def vector_on(self, chip: Chip) -> float:
        """The share of the vector kernel on a chip."""
        return self.vector if chip.generation >= WIDE_SINCE else self.vector_early

    def wide_on(self, chip: Chip) -> float:
        """The share of the wide kernels on a chip; taken to be smaller on M1 and M2 as that of the vector kernel is."""
        return (self.wide or 0.0) * self.vector_on(chip) / self.vector


def matrix_from(chip: Chip, side: int = MIDDLE + 1) -> int:
    """Rows from which on MLX multiplies a quantised matrix with a widest side of so many weights as matrices."""
    if chip.generation >= 5:
        limits = _MATRIX_FROM["M5"]
    elif chip.name.endswith("Ultra"):
        limits = _MATRIX_FROM["Ultra"]
    else:
        limits = _MATRIX_FROM["later" if chip.generation >= WIDE_SINCE else "early"]
    return limits[(side > SMALL) + (side > MIDDLE)]


def sides(config: TextConfig, stacked: bool = True) -> dict[int, float]:
    """Shares of a stack's matrices, without experts, by their widest side: SMALL, MIDDLE, or one more for all larger.

    Args:
        config: The decoder stack.
        stacked: Whether matrices that read the same input are one, as here; False for other engines.
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
        chip: Where.
        rows: Rows at once.
        how: How the weight is quantised; None for 16-bit floats.
        wide: Whether MLX has the wide kernels.
        side: The matrix's widest side.
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
    """Seconds that the products with one part of the weights take, without launches.

    Args:
        chip: Where.
        part: The weights.
        rows: Rows at once.
        how: How they are quantised; None for 16-bit floats.
        fit: The free parameters.
        side: The widest side of its matrices.
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
    """Seconds of attention's arithmetic in a pass, all layers together, as far as reading the KV doesn't hide it.

    Args:
        chip: Where.
        config: The decoder stack.
        batch: Rows.
        length: Tokens of each row.
        context: Committed tokens of each row.
        fit: The free parameters.
        folded: Whether query heads are folded into rows, as here; False for other engines, which leave it to MLX.
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
        # Scores are a product with a transposed matrix, for which there is a wide kernel too; values never.
        scores = kernel(chip, rows, None, fit.wide is not None) != "wide"
        seen = min(context, config.sliding_window) if layer.sliding else context
        work = (1 + scores) * batch * products * seen * layer.head_dim
        seconds += _tiles_seconds(chip, rows, TILE_ROWS, work, fit)
    return seconds


def read_seconds(chip: Chip, count: float, fit: Calibration) -> float:
    """Seconds in which `count` bytes arrive."""
    return count / (fit.bandwidth * chip.bandwidth * 1e9)


def _tiles_seconds(chip: Chip, rows: int, tile: int, parameters: float, fit: Calibration) -> float:
    """Seconds of a matrix kernel's tiles, each of which multiplies `tile` rows with all parameters."""
    return ceil(rows / tile) * tile * 2 * parameters / (fit.matrix * chip.fp16_tflops * 1e12)
