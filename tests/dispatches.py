"""Counts the kernels that a GPU would be given for a piece of work, without a GPU and without computing it.

MLX builds the same graph everywhere but for what our models ask `on_gpu` for and what its fused operations become: on
a CPU these are many plain ones. So `as_on_a_gpu` answers yes, and puts a single operation in the place of each that
Metal has a kernel for. What MLX itself copies, to make rows contiguous, stays out of the count: it is a lower bound.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

# Views of an array, or constants.
_FREE = {
    "AsStrided", "Broadcast", "BroadcastAxes", "Depends", "ExpandDims", "Flatten", "Full", "Reshape", "Slice", "Split",
    "Squeeze", "StopGradient", "Transpose", "Unflatten",
}  # fmt: skip
_NODE = re.compile(r'(\d+) \[label ="([^"]+)", shape=rectangle\]')
_INPUT = re.compile(r'"\w+" -> (\d+)')


_compiler = shutil.which("g++")


def prepare() -> None:
    """Lets formulas be compiled into graphs on a machine without a C++ compiler; to be called before MLX is used.

    MLX looks for one once, and doesn't compile without. What is only counted needs none that works; all else must
    then run uncompiled.
    """
    if not _compiler:
        stand_in = Path(tempfile.mkdtemp()) / "g++"
        stand_in.touch(0o755)
        os.environ["PATH"] = f"{stand_in.parent}{os.pathsep}{os.environ['PATH']}"
        mx.disable_compile()


@contextmanager
def compiling() -> Iterator[None]:
    """Meanwhile formulas are compiled, wherever this runs."""
    mx.enable_compile()
    yield
    if not _compiler:
        mx.disable_compile()


def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Has models build the graph that they build on Metal, where `count` can see it; nothing of it may be evaluated."""
    for name, module in list(sys.modules.items()):
        if name.startswith("mlx_mtp.") and hasattr(module, "on_gpu"):
            monkeypatch.setattr(module, "on_gpu", lambda: True)
    unfused = mx.fast.scaled_dot_product_attention

    def attention(q: mx.array, k: mx.array, v: mx.array, scale: float, mask: mx.array) -> mx.array:
        _, heads, length, head_dim = q.shape
        # The kernels for short queries; MLX_SDPA_D512_MIN_KL=0 lets masked single tokens have the one for 512 too.
        if length * (heads // k.shape[1]) <= 32 and (length <= 8 if head_dim == 256 else length == 1):
            return mx.depends([mx.erf(q)], [k, v, mask])[0]
        return unfused(q, k, v, scale=scale, mask=mask)

    def dequantize(weight: mx.array, scales: mx.array, biases: mx.array | None = None, **how: Any) -> mx.array:
        width = weight.shape[-1] * 32 // how["bits"]
        return mx.depends([mx.erf(mx.zeros((*weight.shape[:-1], width), scales.dtype))], [weight, scales])[0]

    monkeypatch.setattr(mx, "dequantize", dequantize)
    monkeypatch.setattr(mx.fast, "rms_norm", lambda x, weight, eps: mx.erf(x))
    monkeypatch.setattr(mx.fast, "rope", lambda x, *_, **__: mx.erf(x))
    monkeypatch.setattr(mx.fast, "scaled_dot_product_attention", attention)


def count(*arrays: mx.array) -> int:
    """Kernels that these arrays take."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "graph.dot"
        mx.export_to_dot(str(path), *arrays)
        text = path.read_text()
    inputs = Counter(_INPUT.findall(text))
    # Concatenating copies its inputs one by one.
    return sum(inputs[node] if kind == "Concatenate" else kind not in _FREE for node, kind in _NODE.findall(text))
