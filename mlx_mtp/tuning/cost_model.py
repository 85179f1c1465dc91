"""What a verify pass, a draft step and a round cost on a chip, predicted from public figures; nothing is measured.

A step of `rows` = batch x length tokens takes

    launches      kernels x seconds per launch
    dense part    body and head: see `matmul_seconds`
    experts       the distinct experts touched are read once; every further token that an expert gets costs arithmetic
    KV            read once for each row of the batch

Three kernels multiply a few rows with a weight, and which one MLX takes decides what a verify block costs:

    qmv       (quantised, M1 and M2) reads the weight again for every row: first row + (M - 1) x arithmetic
    qmv_wide  (quantised, M3 and later, since mlx 0.32) unpacks it once: the larger of reading and M x arithmetic
    matrix    (16-bit, or many rows) works on tiles of 32 rows: a tile costs the same whether it is full or not

Left out: attention's arithmetic, prefill, heat, and work of the host that the GPU has to wait for. Experts whose rows
are few are gathered by the qmv kernel on every chip.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

from ..config import DrafterConfig, TargetConfig, TextConfig
from ..quantization import Format, Scheme
from ..sizes import (
    Part,
    Traffic,
    drafter_sizes,
    drafter_traffic,
    kv_bytes,
    kv_read_bytes,
    target_sizes,
    target_traffic,
)
from .chips import Chip

TILE_ROWS = 32
"""Rows that MLX's matrix kernels work on at once."""

WIDE_SINCE = 3
"""Generation of chips from which on MLX takes `qmv_wide` for affine weights."""

KERNELS_DENSE, KERNELS_PLE, KERNELS_MOE, KERNELS_DRAFTER = 23, 5, 21, 16
"""Kernels that one layer launches, counted in models/: a dense layer; what per-layer embeddings and what experts add
to it; a drafter's layer. Only their ratio matters, since the time of a launch is fitted."""

PUBLISHED_ACCEPTANCE = (0.92, 0.78, 0.67, 0.57)
"""Chance that a draft is accepted if those before it were, by position; published for chat with thinking off."""


@dataclass(frozen=True)
class Calibration:
    """The free parameters. `scripts/check_cost_model.py` fits them, on the published rows named there.

    Attributes:
        bandwidth: Share of the nominal memory bandwidth that weights arrive with.
        qmv: Share of the FP32 peak that `qmv` reaches.
        qmv_wide: The same for `qmv_wide`; None for an MLX before 0.32, which hasn't got it.
        matrix: Share of the FP16 matrix peak that `matrix` reaches.
        launch: Seconds of one kernel's launch.
    """

    bandwidth: float
    qmv: float
    qmv_wide: float | None
    matrix: float
    launch: float


FITTED = Calibration(bandwidth=0.80, qmv=0.138, qmv_wide=0.37, matrix=0.42, launch=5.15e-6)
"""Rounded results of `scripts/check_cost_model.py`; docs/cost_model.md says how good they are."""


@dataclass(frozen=True)
class Pair:
    """A target with its drafter, reduced to what the model needs; `pair` makes it.

    Attributes:
        target: The target's decoder stack.
        drafter: The drafter's; None for a target alone.
        bits: Of the target's weights; None for 16-bit floats.
        traffic: What a step of the target reads.
        drafter_bits: The same of the drafter's.
        drafter_traffic: What a step of the drafter reads; None without one.
        weights: Bytes of the models in memory.
    """

    target: TextConfig
    drafter: TextConfig | None
    bits: int | None
    drafter_bits: int | None
    traffic: Traffic
    drafter_traffic: Traffic | None
    weights: int


def pair(
    target: TargetConfig, drafter: DrafterConfig | None, bits: int | None, drafter_bits: int | None = None
) -> Pair:
    """Counts what the steps of a pair read.

    Args:
        target: The target.
        drafter: Its drafter; None for plain decoding.
        bits: Quantisation of the target, in groups of 64; None for 16-bit floats.
        drafter_bits: The same of the drafter.

    Raises:
        CheckpointError: A number of bits that MLX can't quantise to.
    """
    rule, own = (Scheme(Format(b)).rule() if b else None for b in (bits, drafter_bits))
    text = target.text
    return Pair(
        text,
        drafter.text if drafter else None,
        bits,
        drafter_bits,
        target_traffic(text, 2, rule),
        drafter_traffic(drafter, 2, own) if drafter else None,
        target_sizes(text, 2, rule).weights + (drafter_sizes(drafter, 2, own).weights if drafter else 0),
    )


def fits(chip: Chip, pair: Pair, batch: int, context: int) -> bool:
    """Whether the pair and the KV of `batch` rows fit in three quarters of the chip's largest memory.

    That share is about what Metal recommends as the working set of the GPU.
    """
    return pair.weights + batch * kv_bytes(pair.target, context, 2) <= 0.75 * chip.memory * 1e9


def distinct_experts(experts: int, per_token: int, tokens: int, overlap: float = 0.0) -> float:
    """Expected number of distinct experts of one layer that some tokens touch.

    Args:
        experts: Experts in the layer.
        per_token: Experts that each token is sent to.
        tokens: Number of tokens, at least 1.
        overlap: 0 if tokens choose independently and uniformly, which gives E(1-(1-k/E)^n); 1 if all choose the same.
    """
    uniform = experts * (1 - (1 - per_token / experts) ** tokens)
    return per_token + (1 - overlap) * (uniform - per_token)


def tokens_per_round(acceptance: Sequence[float]) -> float:
    """Tokens that a round yields for a row: 1 + sum over j of the product of the first j acceptances.

    Args:
        acceptance: Chance that a draft is accepted if those before it were, one for each draft.
    """
    total = reached = 1.0
    for chance in acceptance:
        reached *= chance
        total += reached
    return total


def acceptance_for(drafts: int, published: Sequence[float] = PUBLISHED_ACCEPTANCE) -> tuple[float, ...]:
    """`published` for that many drafts; positions beyond its end repeat the last one."""
    return tuple(published[min(i, len(published) - 1)] for i in range(drafts))


def matmul_seconds(chip: Chip, part: Part, rows: int, quantised: bool, fit: Calibration = FITTED) -> float:
    """Seconds that the products with one part of the weights take, without launches.

    Args:
        chip: Where.
        part: The weights.
        rows: Tokens at once.
        quantised: Whether the weights are.
        fit: The free parameters.
    """
    read = _read_seconds(chip, part.bytes, fit)
    if rows == 1:
        return read
    matrix = max(
        read, ceil(rows / TILE_ROWS) * TILE_ROWS * 2 * part.parameters / (fit.matrix * chip.fp16_tflops * 1e12)
    )
    if not quantised:
        return matrix
    row = 2 * part.parameters / (chip.fp32_tflops * 1e12)
    if fit.qmv_wide and chip.generation >= WIDE_SINCE:
        return min(matrix, max(read, rows * row / fit.qmv_wide))
    return min(matrix, read + (rows - 1) * row / fit.qmv)


def verify_seconds(
    chip: Chip, pair: Pair, batch: int, length: int, context: int, overlap: float = 0.0, fit: Calibration = FITTED
) -> float:
    """Seconds of one pass of the target over `length` tokens of each of `batch` rows.

    Args:
        chip: Where.
        pair: The models.
        batch: Rows.
        length: Tokens of each row; 1 is a plain decoding step.
        context: Committed tokens of each row.
        overlap: See `distinct_experts`.
        fit: The free parameters.
    """
    text, rows, quantised = pair.target, batch * length, pair.bits is not None
    per_layer = KERNELS_DENSE + KERNELS_PLE * (text.ple_size > 0) + KERNELS_MOE * (text.num_experts > 0)
    seconds = per_layer * len(text.layers) * fit.launch
    seconds += sum(matmul_seconds(chip, p, rows, quantised, fit) for p in (pair.traffic.body, pair.traffic.head))
    seconds += _read_seconds(chip, batch * kv_read_bytes(text, context, 2), fit)
    if text.num_experts:
        one, chosen = pair.traffic.experts, text.experts_per_token
        distinct = distinct_experts(text.num_experts, chosen, rows, overlap) / chosen
        seconds += _read_seconds(chip, distinct * one.bytes, fit)
        seconds += (rows - distinct) * 2 * one.parameters / (fit.qmv * chip.fp32_tflops * 1e12)
    return seconds


def draft_seconds(chip: Chip, pair: Pair, batch: int, context: int, fit: Calibration = FITTED) -> float:
    """Seconds of one step of the drafter, which drafts one token for each row. Arguments as for `verify_seconds`."""
    assert pair.drafter and pair.drafter_traffic, "a target alone drafts nothing"
    seconds = KERNELS_DRAFTER * len(pair.drafter.layers) * fit.launch
    parts = (pair.drafter_traffic.body, pair.drafter_traffic.head)
    seconds += sum(matmul_seconds(chip, part, batch, pair.drafter_bits is not None, fit) for part in parts)
    return seconds + _read_seconds(chip, batch * kv_read_bytes(pair.drafter, context, 2), fit)


def round_seconds(
    chip: Chip, pair: Pair, batch: int, drafts: int, context: int, overlap: float = 0.0, fit: Calibration = FITTED
) -> float:
    """Seconds of a round with `drafts` drafts a row; 0 is plain decoding. Arguments as for `verify_seconds`."""
    verify = verify_seconds(chip, pair, batch, drafts + 1, context, overlap, fit)
    return verify + drafts * draft_seconds(chip, pair, batch, context, fit) if drafts else verify


def tokens_per_second(
    chip: Chip,
    pair: Pair,
    batch: int,
    acceptance: Sequence[float],
    context: int,
    overlap: float = 0.0,
    fit: Calibration = FITTED,
) -> float:
    """Tokens a second of all rows together, each accepting for itself.

    Args:
        acceptance: As for `tokens_per_round`; as many drafts are made as it has entries, none for plain decoding.
    """
    yielded = batch * tokens_per_round(acceptance)
    return yielded / round_seconds(chip, pair, batch, len(acceptance), context, overlap, fit)


def _read_seconds(chip: Chip, count: float, fit: Calibration) -> float:
    return count / (fit.bandwidth * chip.bandwidth * 1e9)
