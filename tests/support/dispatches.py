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
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest

from mlx_mtp.checkpoint.quantization import Format, Scheme
from mlx_mtp.config import TextConfig
from mlx_mtp.decode.round import RoundState, decode_round
from mlx_mtp.decode.sampling import Sampler, SamplingOptions
from mlx_mtp.kv import KVBuffers
from mlx_mtp.models.drafter import Drafter
from mlx_mtp.models.target import Target
from mlx_mtp.simulate.known_models import known_pair

# Views of an array, or constants. "View" changes the type, which is free to a smaller one, and to a larger one where
# the array is contiguous, as norms and rotations leave theirs.
_FREE = {
    "AsStrided", "Broadcast", "BroadcastAxes", "Depends", "ExpandDims", "Flatten", "Full", "Reshape", "Slice", "Split",
    "Squeeze", "StopGradient", "Transpose", "Unflatten", "View",
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
    return sum(
        inputs[node] if kind == "Concatenate" else kind.split()[0] not in _FREE for node, kind in _NODE.findall(text)
    )


HIDDEN = 64
GREEDY = SamplingOptions()
GEMMA = SamplingOptions(temperature=1.0, top_k=64, top_p=0.95, seed=3)

Round = Callable[[SamplingOptions, int], int]
"""Kernels of a round, by sampling options and draft length."""


def kernels_of(name: str, monkeypatch: pytest.MonkeyPatch) -> Round:
    """What counts rounds of a published size at batch 1, a target in 4 bits and a drafter in bfloat16.

    Layers, heads and head sizes are the published ones; all else is small, since it changes no number of kernels.
    """
    target_config, drafter_config = known_pair(name)
    text = _narrow(target_config.text)
    drafter_config = replace(drafter_config, text=_narrow(drafter_config.text), backbone_hidden_size=HIDDEN)
    target, drafter = Target(text), Drafter(drafter_config, "committed")
    _fill(target, 4)
    _fill(drafter, None)
    as_on_a_gpu(monkeypatch)

    def kernels(options: SamplingOptions, drafts: int) -> int:
        kv = KVBuffers(text, 1, mx.bfloat16, positions=640)
        state = RoundState(mx.array([600]), mx.array([5]), mx.zeros((1, HIDDEN), mx.bfloat16))
        mx.eval(kv.arrays(), state.lengths, state.tokens, state.hidden)
        new, report, _ = decode_round(target, drafter, kv, Sampler([options], text.logit_softcap), state, drafts)
        return count(report, new.lengths, new.tokens, new.hidden, *kv.arrays())

    return kernels


def _narrow(text: TextConfig) -> TextConfig:
    layers = tuple(replace(layer, intermediate_size=HIDDEN) for layer in text.layers)
    return replace(text, hidden_size=HIDDEN, layers=layers, expert_size=HIDDEN, ple_vocab_size=8)


def _fill(model: nn.Module, bits: int | None) -> None:
    """Gives a model weights of the right types, all zero."""
    model.set_dtype(mx.bfloat16)
    if bits:
        nn.quantize(model, class_predicate=Scheme(Format(bits)).rule())
    for module in model.modules():
        for name, old in module.items():
            if isinstance(old, mx.array):
                module[name] = mx.zeros(old.shape, old.dtype)
    for module in model.modules():
        if hasattr(module, "prepare"):
            module.prepare()
    mx.eval(model.parameters())
