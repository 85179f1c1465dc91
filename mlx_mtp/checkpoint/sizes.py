"""Sizes of models and KV, and memory traffic per decoding step, from a model's config alone.

Counts the parameters of the modules that would be loaded, without allocating them. Sizes are in bytes.
"""

from __future__ import annotations

import os
import sys
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from ..config import DrafterConfig, TextConfig
from ..kv import CAPACITY_STEP, LONGEST_VERIFY, batch_bytes, kv_bytes
from ..models.drafter import Drafter
from ..models.target import Target
from .description import AnyDescription
from .quantization import Rule

ABOVE = 2 * LONGEST_VERIFY
"""Positions after a row's last token to which drafts may be written: those of two rounds, since a round is submitted
before the tokens of the one before are read."""


@dataclass(frozen=True)
class Sizes:
    """The sizes of a model.

    Attributes:
        parameters: Number of parameters.
        weights: Bytes of the weights in memory.
        read_per_token: Bytes of weights that a decoding step of one row reads.
    """

    parameters: int
    weights: int
    read_per_token: int


@dataclass(frozen=True)
class ReadPerStep:
    """What a decoding step of one row reads of some weights.

    Attributes:
        bytes: Bytes.
        parameters: The same as a number of parameters; each costs two operations per row.
    """

    bytes: float
    parameters: float


@dataclass(frozen=True)
class Traffic:
    """What a decoding step of one row reads, in parts that grow differently with the number of rows.

    Attributes:
        body: Everything except head and experts; doesn't depend on the number of rows.
        head: The output head.
        experts: One token's experts in all layers; more rows use more experts.
    """

    body: ReadPerStep
    head: ReadPerStep
    experts: ReadPerStep


def of(described: AnyDescription) -> Sizes:
    """The sizes of a checkpoint's model once it is loaded on this machine."""
    config = described.config
    if isinstance(config, DrafterConfig):
        return drafter_sizes(config, described.dtype_bytes, described.rule)
    return target_sizes(config.text, described.dtype_bytes, described.rule)


def target_sizes(config: TextConfig, dtype_bytes: int, rule: Rule | None = None) -> Sizes:
    """The sizes of a target.

    Args:
        config: Its config.
        dtype_bytes: Bytes of an unquantised parameter.
        rule: How it is quantised; None if it isn't.
    """
    return _sizes(Target(config), dtype_bytes, rule, _target_share(config))


def drafter_sizes(config: DrafterConfig, dtype_bytes: int, rule: Rule | None = None) -> Sizes:
    """The sizes of a drafter, see `target_sizes`; a step reads only the best clusters of a clustered head."""
    return _sizes(Drafter(config, "committed"), dtype_bytes, rule, _drafter_share(config))


def target_traffic(config: TextConfig, dtype_bytes: int, rule: Rule | None = None) -> Traffic:
    """What a decoding step of a target reads, see `target_sizes`; the parts add up to its `read_per_token`."""
    head = "embed_tokens." if config.tied_head else "lm_head."
    return _traffic(Target(config), dtype_bytes, rule, _target_share(config), head)


def drafter_traffic(config: DrafterConfig, dtype_bytes: int, rule: Rule | None = None) -> Traffic:
    """What a draft step reads, see `drafter_sizes`."""
    return _traffic(Drafter(config, "committed"), dtype_bytes, rule, _drafter_share(config), "head.")


def row_bytes(config: TextConfig, tokens: int, dtype_bytes: int) -> int:
    """KV bytes of a row of `tokens` tokens and the drafts after them.

    Args:
        config: The target's.
        tokens: Full length of the row.
        dtype_bytes: Bytes of a key's or value's number.
    """
    return rows_bytes(config, [tokens], dtype_bytes)


def rows_bytes(config: TextConfig, tokens: Sequence[int], dtype_bytes: int) -> int:
    """KV bytes of a batch, see `row_bytes`; `tokens` has the full length of each row."""
    return batch_bytes(config, [count + ABOVE for count in tokens], dtype_bytes)


def longest_context(config: TextConfig, memory: int, dtype_bytes: int) -> int:
    """Longest context of a single row, in tokens.

    Args:
        config: The target's.
        memory: Bytes for its KV.
        dtype_bytes: Bytes of a key's or value's number.

    Returns:
        At most the model's context; 0 if there isn't room for any token.
    """
    # After a full context one more token can be generated, which is never read.
    if row_bytes(config, config.max_positions + 1, dtype_bytes) <= memory:
        return config.max_positions
    steps = range(config.max_positions // CAPACITY_STEP + 1)
    fitting = bisect_right(steps, memory, key=lambda step: kv_bytes(config, step * CAPACITY_STEP, dtype_bytes))
    return max((fitting - 1) * CAPACITY_STEP - ABOVE, 0)


def kv_read_bytes(config: TextConfig, tokens: int, dtype_bytes: int) -> int:
    """KV bytes that a decoding step of one row reads.

    Layers that share the KV of another layer read it as well and are counted; sliding layers read only their window.

    Args:
        config: The target's.
        tokens: Committed tokens of the row.
        dtype_bytes: Bytes of a key's or value's number.
    """
    return sum(
        2 * (min(tokens, config.sliding_window) if layer.sliding else tokens) * layer.kv_heads * layer.head_dim
        for layer in config.layers
    ) * dtype_bytes  # fmt: skip


def weight_bytes(*models: nn.Module | None) -> int:
    """Bytes of loaded models' weights in memory; None counts nothing."""
    parameters = [model.parameters() for model in models if model is not None]
    return sum(array.nbytes for _, array in cast("list[tuple[str, mx.array]]", tree_flatten(parameters)))


def memory_for_models() -> int:
    """Bytes that models and KV may take: on a Mac what Metal recommends, with CUDA the GPU's memory, else all of it."""
    if sys.platform == "darwin" and mx.metal.is_available():
        return int(mx.device_info()["max_recommended_working_set_size"])
    if mx.default_device() == mx.gpu and "total_memory" in (gpu := mx.device_info()):
        return int(gpu["total_memory"])
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def spare_bytes(weights: int, memory: int | None = None) -> int:
    """Bytes that weights leave for KV.

    Args:
        weights: Bytes of all loaded weights.
        memory: Bytes that weights and KV may take; None for `memory_for_models()`.
    """
    left = (memory_for_models() if memory is None else memory) - weights
    return max(0, left * 7 // 8)  # an eighth is left for temporary arrays


def divide_kv(spare: int, cache_bytes: int | None = None) -> tuple[int, int]:
    """Divides memory between running rows and the prompt cache.

    Args:
        spare: Bytes for both.
        cache_bytes: Most bytes of the prompt cache; None for a quarter of what there is.

    Returns:
        Bytes of KV for running rows, and for the prompt cache.
    """
    cached = spare // 4 if cache_bytes is None else min(spare, cache_bytes)
    return spare - cached, cached


def kv_budget(weights: int, cache_bytes: int | None = None, memory: int | None = None) -> tuple[int, int]:
    """The bytes of KV, as `divide_kv` gives them, of a model with these weights that has the memory to itself."""
    return divide_kv(spare_bytes(weights, memory), cache_bytes)


def format_bytes(count: int) -> str:
    """A number of bytes in words, such as "1.50 GB"; units are powers of ten."""
    for unit, one in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= one:
            return f"{count / one:.2f} {unit}"
    return f"{count} bytes"


def _target_share(config: TextConfig) -> Callable[[str], float]:
    """The share of each tensor that a decoding step of one row reads, by parameter name."""

    def share(name: str) -> float:
        if name.startswith("embed_tokens_per_layer."):
            return 1 / config.ple_vocab_size
        if name.startswith("embed_tokens.") and not config.tied_head:
            return 1 / config.vocab_size
        if ".experts." in name:
            return config.experts_per_token / config.num_experts
        return 1.0

    return share


def _drafter_share(config: DrafterConfig) -> Callable[[str], float]:
    def share(name: str) -> float:
        chosen = name.startswith(("head.embedding.", "head.token_ordering"))
        return config.clusters_read / config.num_clusters if chosen else 1.0

    return share


def _sizes(model: nn.Module, dtype_bytes: int, rule: Rule | None, share: Callable[[str], float]) -> Sizes:
    tensors = list(_tensors(model, dtype_bytes, rule))
    read = sum(size * share(name) for name, _, size in tensors)
    return Sizes(sum(count for _, count, _ in tensors), sum(size for _, _, size in tensors), round(read))


def _traffic(
    model: nn.Module, dtype_bytes: int, rule: Rule | None, share: Callable[[str], float], head: str
) -> Traffic:
    totals = {part: [0.0, 0.0] for part in ("body", "head", "experts")}
    for name, count, size in _tensors(model, dtype_bytes, rule):
        part = "experts" if ".experts." in name else "head" if name.startswith(head) else "body"
        totals[part][0] += size * share(name)
        totals[part][1] += count * share(name)
    return Traffic(**{part: ReadPerStep(*sums) for part, sums in totals.items()})


def _tensors(model: nn.Module, dtype_bytes: int, rule: Rule | None) -> Iterator[tuple[str, int, int]]:
    """Name, number of parameters (0 for indices) and bytes of each tensor."""
    for path, module in model.named_modules():
        if module.children():
            own = {name: value for name, value in module.parameters().items() if isinstance(value, mx.array)}
        else:
            own = dict(cast("list[tuple[str, mx.array]]", tree_flatten(module.parameters())))
        how = rule(path, module) if rule and hasattr(module, "to_quantized") else False
        for name, value in own.items():
            size = value.nbytes if value.dtype == mx.int32 else value.size * dtype_bytes
            if how and name == "weight":
                size = _quantized_bytes(value.size, cast("Mapping[str, Any]", how), dtype_bytes)
            yield f"{path}.{name}", 0 if value.dtype == mx.int32 else value.size, size


def _quantized_bytes(size: int, how: Mapping[str, Any], dtype_bytes: int) -> int:
    # An affine group has a scale and a bias in the model's type; mx and nv formats have a scale of one byte.
    per_group = 2 * dtype_bytes if how.get("mode", "affine") == "affine" else 1
    return size * int(how["bits"]) // 8 + size // int(how.get("group_size", 64)) * per_group
