"""The element-wise formulas of Gemma 4, fused into one kernel each where that is free.

On a GPU `mx.compile` fuses them. On the CPU it would start a C++ compiler on first use, which costs a cold start more
than fusing ever gives back, so there the plain operations run.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import mlx.core as mx


@cache
def on_gpu() -> bool:
    """Whether models run on a GPU; decided once, at the first use."""
    return mx.default_device().type == mx.DeviceType.gpu


def fused(formula: Callable[..., mx.array]) -> Callable[..., mx.array]:
    """Decorator: compiles a formula where compiling is free."""
    compiled = mx.compile(formula, shapeless=True)
    return lambda *arrays: compiled(*arrays) if on_gpu() else formula(*arrays)


@fused
def gelu_times(gate: mx.array, x: mx.array) -> mx.array:
    """gelu_pytorch_tanh(gate) * x, by 0.5 (1 + tanh(u)) = sigmoid(2 u)."""
    return gate * mx.sigmoid(gate * (1.5957691216057308 + 0.07135481282052854 * (gate * gate))) * x


@fused
def softcap(logits: mx.array, cap: mx.array | float) -> mx.array:
    """cap * tanh(logits / cap) (config field `final_logit_softcapping`)."""
    return cap * mx.tanh(logits / cap)
