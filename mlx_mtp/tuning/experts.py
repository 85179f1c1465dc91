"""Notes which experts a mixture of experts is asked for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import mlx.core as mx
import mlx.nn as nn

from ..models.target import Target


class _Recorder(nn.Module):
    """A router that notes which experts it chose."""

    def __init__(self, router: nn.Module, asked: list[mx.array]):
        super().__init__()
        self._router, self._asked = router, asked

    def __call__(self, x: mx.array) -> tuple[mx.array, mx.array]:
        experts, weights = self._router(x)
        self._asked.append(experts)
        return experts, weights


@contextmanager
def recorded_experts(target: Target) -> Iterator[list[mx.array]]:
    """Puts recorders in the place of all routers meanwhile; what they note is in the list, by layer."""
    asked: list[mx.array] = []
    routers = [layer.router for layer in target.layers]
    try:
        for layer, router in zip(target.layers, routers, strict=True):
            layer.router = _Recorder(router, asked)
        yield asked
    finally:
        for layer, router in zip(target.layers, routers, strict=True):
            layer.router = router
