"""Records which experts the layers of a mixture of experts are asked for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

import mlx.core as mx

from ..models.moe import Router
from ..models.target import Target


class _Recorder:
    """Calls a router and records the experts that it chose."""

    def __init__(self, router: Router, asked: list[mx.array]) -> None:
        self._router, self._asked = router, asked

    def __call__(self, x: mx.array) -> tuple[mx.array, mx.array]:
        experts, weights = self._router(x)
        self._asked.append(experts)
        return experts, weights


@contextmanager
def recorded_experts(target: Target) -> Iterator[list[mx.array]]:
    """Records the chosen experts of every layer for the block.

    Args:
        target: A mixture of experts; its routers are replaced by recorders until the block ends.

    Yields:
        A list that grows by the expert ids of each router's call, as the router returns them.
    """
    asked: list[mx.array] = []
    routers = [layer.router for layer in target.layers]
    try:
        for layer, router in zip(target.layers, routers, strict=True):
            layer.router = cast(Router, _Recorder(router, asked))  # layers only call it
        yield asked
    finally:
        for layer, router in zip(target.layers, routers, strict=True):
            layer.router = router
