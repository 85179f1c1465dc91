"""Fills models of real shapes with random weights, created directly in their format to save memory.

Such models show whether the code runs and how long it takes, but nothing about acceptance or text.
"""

from __future__ import annotations

from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_mtp.checkpoint.description import activation_dtype
from mlx_mtp.checkpoint.quantization import Format, Scheme
from mlx_mtp.models.drafter import Drafter
from mlx_mtp.models.target import Target
from mlx_mtp.simulate.known_models import known_pair


def random_pair(name: str, bits: int | None, kind: type[Target] = Target) -> tuple[Target, Drafter]:
    """The pair of a published size, with the same random weights each time.

    Args:
        name: See `known_pair`.
        bits: See `with_random_weights`; None for bfloat16.
        kind: Class of the target.

    Raises:
        MTPError: There is no such size.
    """
    target_config, drafter_config = known_pair(name)
    pair = kind(target_config.text), Drafter(drafter_config, "committed")
    mx.random.seed(0)
    for model in pair:
        with_random_weights(model, bits, activation_dtype(mx.bfloat16))
    return pair


def with_random_weights(model: nn.Module, bits: int | None, dtype: mx.Dtype) -> None:
    """Fills a model with random weights that preserve the magnitude of activations.

    Args:
        model: A newly constructed target or drafter.
        bits: Bits of its matrices, in groups of 64 (8 bits for the router); None for `dtype`.
        dtype: Type of everything else, and of the activations.
    """
    if bits:
        # Lazy: the quantised placeholders are never computed.
        nn.quantize(model, class_predicate=Scheme(Format(bits)).rule())
    random = np.random.default_rng(0)
    for module in model.modules():
        own = getattr(module, "bits", None)
        for name, old in module.items():
            if not isinstance(old, mx.array) or name.startswith("_") or old.dtype == mx.int32:
                continue
            if own is None:
                # The same distribution as that of quantised weights, with outputs as large as inputs.
                bound = (3 / old.shape[-1]) ** 0.5
                module[name] = (
                    mx.ones(old.shape, dtype) if old.ndim == 1 else mx.random.uniform(-bound, bound, old.shape, dtype)
                )
            elif name == "weight":
                module[name] = mx.array(random.integers(0, 2**32, old.shape, dtype=np.uint32))
            else:
                # Codes distributed uniformly around 0.
                codes, inputs = 2**own, old.shape[-1] * cast(Any, module).group_size
                step = (12 / inputs) ** 0.5 / codes
                module[name] = mx.full(old.shape, step if name == "scales" else -step * (codes - 1) / 2, dtype)
            mx.eval(module[name])
    for part in model.modules():
        if hasattr(part, "prepare"):
            part.prepare()
            mx.eval(part.parameters())
    mx.eval(model.parameters())
    mx.clear_cache()
