"""Fuses element-wise formulas into one kernel each, on a GPU.

There `mx.compile` fuses them. On a CPU it would start a C++ compiler at the first use, which costs a cold start more
than fusing saves, so the plain operations run.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, lru_cache
from typing import ParamSpec, TypeVar

import mlx.core as mx
import numpy as np

P = ParamSpec("P")
R = TypeVar("R")


@cache
def on_gpu() -> bool:
    """Whether models run on a GPU; decided once per process, at the first call."""
    return mx.default_device().type == mx.DeviceType.gpu


def fused(formula: Callable[P, R], shapeless: bool = True) -> Callable[P, R]:
    """Decorator that compiles a formula on a GPU, and leaves it as it is on a CPU.

    Args:
        formula: Element-wise operations on arrays.
        shapeless: Whether to compile once for all shapes. Otherwise each new shape costs a millisecond of host time,
            but a long formula may become fewer kernels: broadcasting of unknown shapes adds to the depth of a formula,
            and a fused kernel's depth is limited.
    """
    compiled = mx.compile(formula, shapeless=shapeless)

    def run(*arrays: P.args, **more: P.kwargs) -> R:
        return compiled(*arrays, **more) if on_gpu() else formula(*arrays, **more)

    return run


@lru_cache(maxsize=256)  # a few for each shape of a round; the arrays are small
def counting(end: int, dtype: type = np.int32) -> mx.array:
    """The numbers 0 .. end - 1, [end], as a cached constant; `mx.arange` would run a kernel each time."""
    return mx.array(np.arange(end, dtype=dtype))
