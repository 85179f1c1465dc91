"""Predicts the time of a verify pass, a draft step and a round on a chip from public figures.

A step over `rows` = batch x length tokens takes the sum of

    launches      kernels x seconds per launch
    dense part    body and head, by the kernel that MLX chooses, see kernels.py
    experts       each distinct expert is read once; each further token of an expert costs arithmetic
    KV            read once for each row of the batch
    attention     the arithmetic of blocks for which there is no fused kernel, see kernels.py

Not modelled: prefill, thermal throttling, and host work that the GPU waits for. Experts are taken to run on the vector
kernel on every chip.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..checkpoint.quantization import Format, Scheme
from ..checkpoint.sizes import (
    ReadPerStep,
    Traffic,
    drafter_sizes,
    drafter_traffic,
    kv_read_bytes,
    target_sizes,
    target_traffic,
)
from ..config import DrafterConfig, TargetConfig, TextConfig
from ..decode.objective import tokens_per_round
from ..kv import kv_bytes
from .chips import Chip
from .kernels import Calibration, attention_seconds, matmul_seconds, read_seconds, sides

KERNELS_DENSE, KERNELS_PLE, KERNELS_MOE, KERNELS_DRAFTER = 23, 5, 21, 16
"""Kernel launches of a layer, counted in models/: of a dense target layer; further ones for per-layer embeddings, and
for experts; of a drafter's layer. Only their ratios matter, since the time of a launch is fitted."""

PUBLISHED_ACCEPTANCE = (0.92, 0.78, 0.67, 0.57)
"""Probability that a draft is accepted if those before it were, by position; published for chat without thinking."""


FITTED = Calibration(bandwidth=0.80, vector=0.138, vector_early=0.058, wide=0.37, matrix=0.82, launch=5.15e-6)
"""Rounded results of `scripts/check_cost_model.py`; docs/cost_model.md has the errors of the predictions."""


@dataclass(frozen=True)
class Pair:
    """The figures of a target and its drafter that the cost model needs; `pair` makes it.

    Attributes:
        target: The target's decoder stack.
        drafter: The drafter's; None for a target alone.
        how: Quantisation of the target's weights; None for 16-bit floats.
        drafter_how: Quantisation of the drafter's weights; None for 16-bit floats.
        traffic: Weights that a step of the target reads.
        drafter_traffic: Weights that a step of the drafter reads; None without one.
        weights: Bytes of both models in memory.
    """

    target: TextConfig
    drafter: TextConfig | None
    how: Format | None
    drafter_how: Format | None
    traffic: Traffic
    drafter_traffic: Traffic | None
    weights: int


def pair(
    target: TargetConfig, drafter: DrafterConfig | None, how: Format | None, drafter_how: Format | None = None
) -> Pair:
    """Counts the weights that the steps of a pair read.

    Args:
        target: The target.
        drafter: Its drafter; None for plain decoding.
        how: Quantisation of the target; None for 16-bit floats.
        drafter_how: Quantisation of the drafter; None for 16-bit floats.
    """
    rule, own = (Scheme(it).rule() if it else None for it in (how, drafter_how))
    text = target.text
    return Pair(
        text,
        drafter.text if drafter else None,
        how,
        drafter_how,
        target_traffic(text, 2, rule),
        drafter_traffic(drafter, 2, own) if drafter else None,
        target_sizes(text, 2, rule).weights + (drafter_sizes(drafter, 2, own).weights if drafter else 0),
    )


def fits(chip: Chip, pair: Pair, batch: int, context: int) -> bool:
    """Whether the pair and the KV of `batch` rows fit in the chip's largest memory."""
    return pair.weights + batch * kv_bytes(pair.target, context, 2) <= chip.memory_for_models


def distinct_experts(experts: int, per_token: int, tokens: int, overlap: float = 0.0) -> float:
    """Expected number of distinct experts of a layer that some tokens are routed to.

    Args:
        experts: Experts in the layer.
        per_token: Experts for each token.
        tokens: Number of tokens, at least 1.
        overlap: 0 if tokens choose independently and uniformly, which gives E(1-(1-k/E)^n); 1 if all tokens choose the
            same experts.
    """
    uniform = experts * (1 - (1 - per_token / experts) ** tokens)
    return per_token + (1 - overlap) * (uniform - per_token)


def acceptance_for(drafts: int, published: Sequence[float] = PUBLISHED_ACCEPTANCE) -> tuple[float, ...]:
    """The first `drafts` entries of `published`; positions beyond its end repeat the last entry."""
    return tuple(published[min(i, len(published) - 1)] for i in range(drafts))


def verify_seconds(
    chip: Chip,
    pair: Pair,
    batch: int,
    length: int,
    context: int,
    overlap: float = 0.0,
    fit: Calibration = FITTED,
    ours: bool = True,
) -> float:
    """Seconds of one pass of the target over `length` tokens of each of `batch` rows.

    Args:
        chip: The chip.
        pair: The models.
        batch: Rows.
        length: Tokens of each row; 1 is a plain decoding step.
        context: Committed tokens of each row.
        overlap: See `distinct_experts`.
        fit: The free parameters.
        ours: Whether projections are fused and query heads folded, as in this package; False for other engines.
    """
    text, rows = pair.target, batch * length
    per_layer = KERNELS_DENSE + KERNELS_PLE * (text.ple_size > 0) + KERNELS_MOE * (text.num_experts > 0)
    seconds = per_layer * len(text.layers) * fit.launch
    seconds += _products(chip, text, pair.traffic, rows, pair.how, fit, ours)
    seconds += read_seconds(chip, batch * kv_read_bytes(text, context, 2), fit)
    seconds += attention_seconds(chip, text, batch, length, context, fit, ours)
    if text.num_experts:
        one, chosen = pair.traffic.experts, text.experts_per_token
        distinct = distinct_experts(text.num_experts, chosen, rows, overlap) / chosen
        row = 2 * one.parameters / (fit.vector_on(chip) * chip.fp32_tflops * 1e12)
        first = max(read_seconds(chip, one.bytes, fit), row if pair.how else 0.0)
        seconds += distinct * first + (rows - distinct) * row
    return seconds


def draft_seconds(chip: Chip, pair: Pair, batch: int, context: int, fit: Calibration = FITTED) -> float:
    """Seconds of one step of the drafter, which drafts one token for each row. Arguments as for `verify_seconds`."""
    assert pair.drafter, "there is no drafter"
    assert pair.drafter_traffic
    seconds = KERNELS_DRAFTER * len(pair.drafter.layers) * fit.launch
    seconds += _products(chip, pair.drafter, pair.drafter_traffic, batch, pair.drafter_how, fit, True)
    return seconds + read_seconds(chip, batch * kv_read_bytes(pair.drafter, context, 2), fit)


def round_seconds(
    chip: Chip,
    pair: Pair,
    batch: int,
    drafts: int,
    context: int,
    overlap: float = 0.0,
    fit: Calibration = FITTED,
    ours: bool = True,
) -> float:
    """Seconds of a round with `drafts` drafts per row; 0 is plain decoding. Arguments as for `verify_seconds`."""
    verify = verify_seconds(chip, pair, batch, drafts + 1, context, overlap, fit, ours)
    return verify + drafts * draft_seconds(chip, pair, batch, context, fit) if drafts else verify


def tokens_per_second(
    chip: Chip,
    pair: Pair,
    batch: int,
    acceptance: Sequence[float],
    context: int,
    overlap: float = 0.0,
    fit: Calibration = FITTED,
    ours: bool = True,
) -> float:
    """Tokens per second of all rows together.

    The draft length is the number of entries of `acceptance` (see `tokens_per_round`), none for plain decoding. Other
    arguments as for `verify_seconds`.
    """
    yielded = batch * tokens_per_round(acceptance)
    return yielded / round_seconds(chip, pair, batch, len(acceptance), context, overlap, fit, ours)


def _products(
    chip: Chip, config: TextConfig, traffic: Traffic, rows: int, how: Format | None, fit: Calibration, ours: bool
) -> float:
    """Seconds of the matrix products of a decoder stack's body and head."""
    seconds = matmul_seconds(chip, traffic.head, rows, how, fit)
    for side, share in sides(config, ours).items():
        part = ReadPerStep(share * traffic.body.bytes, share * traffic.body.parameters)
        seconds += matmul_seconds(chip, part, rows, how, fit, side)
    return seconds
