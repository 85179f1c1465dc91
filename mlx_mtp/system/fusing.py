"""Element-wise formulas as one kernel each, where that is free.

On a GPU `mx.compile` fuses them. On the CPU it would start a C++ compiler on first use, which costs a cold start more
than fusing ever gives back, so there the plain operations run.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, lru_cache
from typing import ParamSpec, TypeVar, cast

import mlx.core as mx
import numpy as np

P = ParamSpec("P")
R = TypeVar("R")


@cache
def on_gpu() -> bool:
    """Whether models run on a GPU; decided once, at the first use."""
    return mx.default_device().type == mx.DeviceType.gpu


def fused(formula: Callable[P, R], shapeless: bool = True) -> Callable[P, R]:
    """Decorator: compiles a formula where compiling is free.

    Args:
        formula: Element-wise operations on arrays.
        shapeless: Whether once for all shapes. Else each new shape costs a millisecond of the host's time, but long
            formulas become fewer kernels: broadcasting to shapes that aren't known counts as depth, which is limited.
    """
    compiled = mx.compile(formula, shapeless=shapeless)

    def run(*arrays: P.args, **more: P.kwargs) -> R:
        return cast(R, compiled(*arrays, **more)) if on_gpu() else formula(*arrays, **more)

    return run


@lru_cache(maxsize=256)  # a few for each shape of a round; entries hold small arrays
def counting(end: int, dtype: type = np.int32) -> mx.array:
    """The numbers 0 .. end - 1, [end]: a constant, which costs a GPU nothing where `mx.arange` is a kernel."""
    return mx.array(np.arange(end, dtype=dtype))
