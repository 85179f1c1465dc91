"""The element-wise formulas of Gemma 4, fused into one kernel each on a GPU."""

from __future__ import annotations

import mlx.core as mx

from ..system.fusing import fused


@fused
def geglu(gate: mx.array, x: mx.array) -> mx.array:
    """gelu_pytorch_tanh(gate) * x of arrays of one shape, computed by 0.5 (1 + tanh(u)) = sigmoid(2 u)."""
    # gate * x first: MLX fuses formulas up to a certain depth, and one level more would need a second kernel.
    return (gate * x) * mx.sigmoid(gate * (1.5957691216057308 + 0.07135481282052854 * (gate * gate)))


@fused
def add_scaled(h: mx.array, x: mx.array, scale: mx.array) -> mx.array:
    """(h + x) * scale, the end of every layer; h and x [..., hidden], scale [1] (tensor `layer_scalar`)."""
    return (h + x) * scale


@fused
def softcap(logits: mx.array, cap: mx.array | float) -> mx.array:
    """Computes cap * tanh(logits / cap) (config field `final_logit_softcapping`)."""
    return cap * mx.tanh(logits / cap)


@fused
def capped(logits: mx.array, cap: mx.array | float) -> mx.array:
    """As `softcap`, but a token that was ruled out, with minus infinity, stays ruled out."""
    return mx.where(logits == -mx.inf, logits, cap * mx.tanh(logits / cap))
