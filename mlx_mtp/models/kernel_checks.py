"""The checks of the self-test: each kernel that a pair uses, compared with a plain formula in numpy, in float32.

Attention is checked on random numbers, products on the model's own weights: one matrix of each kind, and some of its
outputs. Nothing is computed until a check's functions are called.

Not checked: products with weights that aren't quantised, except experts; norms and rotary embedding; attention of
several rows at a time, which uses the same kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import numpy.typing as npt

from ..config import DrafterConfig, TextConfig
from ..kv import CAPACITY_STEP
from ..kv.blocks import QUERIES, visible
from ..kv.buffers import ring_slots
from ..system.fusing import on_gpu
from .attention import attend
from .avoided import DENSE, MANY, SLOTS, AttentionShape, ProductShape, Shape, dequantized, slots_class, stored_as
from .clustered_head import ClusteredHead
from .drafter import Drafter
from .moe import SORT_FROM, ExpertLinear, QuantizedExpertLinear
from .target import Target

LONG = 64
"""Most tokens of a checked block: a full tile of a matrix product on Metal."""

OUTPUTS = 256
"""Most compared outputs of a product, evenly spread over all."""

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Check:
    """One shape's kernel and its expected results.

    Attributes:
        shape: The shape.
        run: Returns lazy results [n, m], by the functions that the models call.
        expected: Returns the formula's results, float32 [n, m].
        terms: Number of products that are summed in each result.
    """

    shape: Shape
    run: Callable[[], mx.array]
    expected: Callable[[], Array]
    terms: int


def checks_of(target: Target, drafter: Drafter | None) -> Iterator[list[Check]]:
    """The checks of a pair, in groups that share their inputs; nothing is computed yet."""
    config, dtype = target.config, target.dtype
    lengths = range(1, MANY)
    yield from _attention_groups(config, dtype, lengths)
    yield from _product_groups(target, dtype)
    if drafter:
        yield from _attention_groups(drafter.config.text, drafter.norm.weight.dtype, (1,))
        yield from _product_groups(drafter, drafter.norm.weight.dtype)


# Attention


def _attention_groups(config: TextConfig, dtype: mx.Dtype, lengths: Sequence[int]) -> Iterator[list[Check]]:
    """Checks of each kind of layer, with one buffer size for each kernel that MLX may choose."""
    kinds = {(layer.sliding, layer.head_dim, layer.kv_heads) for layer in config.layers}
    for sliding, head_dim, kv_heads in sorted(kinds):
        whole = -(-config.max_positions // CAPACITY_STEP) * CAPACITY_STEP
        most = ring_slots(config.sliding_window) if sliding else whole
        # Odd multiples of CAPACITY_STEP, so that kernels with larger blocks have a remainder.
        by_kernel: dict[int, int] = {}
        for least in SLOTS:
            if least < most:
                slots = min(least + CAPACITY_STEP * (1 if least else 5), most)
                by_kernel[slots_class(slots)] = slots
        if sliding:
            by_kernel[slots_class(most)] = most  # a whole ring, in which positions wrap
        for slots in by_kernel.values():
            window = config.sliding_window if sliding else None
            heads = config.num_heads // kv_heads
            yield _attention_checks(head_dim, heads, min(kv_heads, 2), slots, window, slots == most, dtype, lengths)
            if len(lengths) > 1:  # a prompt's chunk, whose queries see the window in order, not as a ring
                ordered = slots + QUERIES if sliding else slots
                yield _attention_checks(head_dim, heads, min(kv_heads, 2), ordered, window, False, dtype, [LONG])


def _attention_checks(
    head_dim: int,
    heads: int,
    kv_heads: int,
    slots: int,
    window: int | None,
    ring: bool,
    dtype: mx.Dtype,
    lengths: Sequence[int],
) -> list[Check]:
    """Checks of attention, for blocks of several lengths that begin at the same position of the same buffers.

    A query doesn't see later ones, so the formula is computed once, for the longest block.

    Args:
        head_dim: Size of a head.
        heads: Query heads per KV head.
        kv_heads: KV heads; two stand for any larger number.
        slots: Slots of the buffers.
        window: Number of positions that a query sees; None for all.
        ring: Whether positions have wrapped around the buffers.
        dtype: Type of queries, keys and values.
        lengths: Numbers of tokens.
    """
    longest = max(lengths)
    first = slots + slots // 3 if ring and window else slots - longest - 3

    @cache
    def data() -> tuple[mx.array, mx.array, mx.array]:
        # Queries in memory by token, not by head, as in the models. Scores are of size 1, so that many slots matter.
        queries = _random((1, longest, kv_heads * heads, head_dim), 1, dtype) * (3 / head_dim**0.5)
        keys, values = (_random((1, kv_heads, slots, head_dim), seed, dtype) for seed in (2, 3))
        return queries.transpose(0, 2, 1, 3), keys, values

    def seen(length: int) -> mx.array:
        positions = mx.arange(first, first + length, dtype=mx.int32)[None]
        return visible(positions[:, -1], positions, slots, window)

    @cache
    def formula() -> Array:
        """Results for the longest block: [compared tokens, heads, head_dim]."""
        tokens = _sample(longest)
        queries, keys, values = (numbers(it[0]) for it in data())
        rows = queries[:, tokens].reshape(kv_heads, -1, head_dim)
        hidden = np.tile(~np.array(seen(longest))[0, 0, tokens], (heads, 1))
        scores = np.where(hidden, -np.inf, rows @ keys.swapaxes(1, 2))
        shares = np.exp(scores - scores.max(axis=-1, keepdims=True))
        out: Array = shares @ values / shares.sum(axis=-1, keepdims=True)
        return out.reshape(kv_heads * heads, len(tokens), head_dim).swapaxes(0, 1)

    def check(length: int) -> Check:
        tokens = _sample(length)

        def run() -> mx.array:
            queries, keys, values = data()
            out = attend(queries[:, :, :length], keys, values, seen(length))
            return out[0, mx.array(tokens)].reshape(-1, head_dim)

        shape = AttentionShape(head_dim, heads, min(length, MANY), slots_class(slots), dtype)
        return Check(shape, run, lambda: formula()[: len(tokens)].reshape(-1, head_dim), slots)

    return [check(length) for length in lengths]


# Products


def _product_groups(model: Target | Drafter, dtype: mx.Dtype) -> Iterator[list[Check]]:
    """Checks of each kind of quantised weights, of experts, and of a clustered head."""
    # An embedding is used in a product only if it is the output head.
    heads = ("embed_tokens", "embed_tokens.base") if "lm_head" not in model else ()
    seen: set[tuple[object, ...]] = set()
    for name, module in model.named_modules():
        head = name in heads and isinstance(module, nn.QuantizedEmbedding)
        bank = isinstance(module, ExpertLinear | QuantizedExpertLinear)
        if head or bank or isinstance(module, nn.QuantizedLinear):
            kind = (type(module), module.weight.shape, stored_as(module))
            if kind in seen:
                continue  # another layer with the same shapes
            seen.add(kind)
            if bank:
                yield _expert_checks(module, cast(Target, model).config.experts_per_token, dtype)
            else:
                yield _product_checks(module, dtype)
        elif isinstance(module, ClusteredHead) and on_gpu():  # on a CPU it doesn't use a gathered product
            yield [_head_check(module, cast(Drafter, model).config, dtype)]


def _product_checks(layer: nn.QuantizedLinear | nn.QuantizedEmbedding, dtype: mx.Dtype) -> list[Check]:
    """Checks of products with 1 to 8 rows and with two larger numbers, for MLX's kernels for few rows and for many."""
    outputs, inputs = layer.scales.shape[0], layer.scales.shape[1] * layer.group_size
    some = mx.array(_spread(outputs, OUTPUTS))

    @cache
    def data() -> mx.array:
        return _random((LONG, inputs), 4, dtype)

    @cache
    def formula() -> Array:
        return numbers(data()) @ numbers(dequantized(layer, some)).T

    def product(rows: int) -> mx.array:
        x = data()[:rows]
        out: mx.array = layer.as_linear(x) if isinstance(layer, nn.QuantizedEmbedding) else layer(x)
        return out[mx.array(_sample(rows))][:, some]

    def check(*numbers: int) -> Check:
        shape = ProductShape.of(layer, mx.zeros((numbers[0], inputs), dtype))
        return Check(
            shape,
            lambda: mx.concatenate([product(rows) for rows in numbers]),
            lambda: np.concatenate([formula()[_sample(rows)] for rows in numbers]),
            inputs,
        )

    return [*(check(rows) for rows in range(1, MANY)), check(16, LONG)]


def _expert_checks(layer: ExpertLinear | QuantizedExpertLinear, chosen: int, dtype: mx.Dtype) -> list[Check]:
    """Checks of experts' products as `Experts` runs them: few pairs in any order, many sorted by expert."""
    experts, outputs = layer.weight.shape[:2]
    inputs = layer.scales.shape[2] * layer.group_size if hasattr(layer, "bits") else layer.weight.shape[2]
    some = mx.array(_spread(outputs, OUTPUTS))
    random = np.random.default_rng(5)

    def check(pairs: int, in_order: bool) -> Check:
        which = random.integers(0, experts, pairs).astype(np.uint32)
        which = np.sort(which) if in_order else which
        # One row per pair, or one per token.
        rows = None if in_order else np.arange(pairs, dtype=np.uint32) // chosen
        compared = _spread(pairs, 8)
        x = _random((pairs if rows is None else pairs // chosen, 1, inputs), 6, dtype)

        def run() -> mx.array:
            out = layer(x, mx.array(which), in_order, None if rows is None else mx.array(rows))
            return out[mx.array(compared), 0][:, some]

        def formula() -> Array:
            matrices = numbers(layer.matrices(mx.array(which[compared]))[:, some])
            own = numbers(x)[compared if rows is None else rows[compared]]
            return (own @ matrices.swapaxes(1, 2))[:, 0]

        return Check(layer.shape(x, mx.array(which), in_order), run, formula, inputs)

    few = max(1, SORT_FROM // chosen - 1)  # tokens
    checks = [check(few * chosen, False), check(SORT_FROM, True), check(DENSE * max(experts, SORT_FROM), True)]
    return list({it.shape: it for it in checks}.values())


def _head_check(head: ClusteredHead, config: DrafterConfig, dtype: mx.Dtype) -> Check:
    """A check of a clustered head's scores, for one row and for many."""
    batches, compared = (1, MANY - 1), _spread(config.clusters_read, 4)
    best = np.random.default_rng(7).integers(0, config.num_clusters, (max(batches), config.clusters_read))
    best = best.astype(np.uint32)
    hidden = _random((max(batches), config.text.hidden_size), 8, dtype)

    def run() -> mx.array:
        scores = [head.scores(hidden[:rows], mx.array(best[:rows])) for rows in batches]
        by_cluster = [it.reshape(len(it), config.clusters_read, -1)[:, mx.array(compared)] for it in scores]
        return mx.concatenate([it.flatten(0, 1) for it in by_cluster])

    def formula() -> Array:
        embeddings = numbers(head.matrices(mx.array(best[:, compared])))
        scores = (embeddings @ numbers(hidden)[:, None, :, None])[..., 0]
        return np.concatenate([scores[:rows].reshape(rows * len(compared), -1) for rows in batches])

    return Check(head.shape(hidden), run, formula, config.text.hidden_size)


def _random(shape: tuple[int, ...], seed: int, dtype: mx.Dtype) -> mx.array:
    return mx.random.uniform(-1, 1, shape, key=mx.random.key(seed)).astype(dtype)


def numbers(array: mx.array) -> Array:
    """An array as numpy's, in float32."""
    return np.array(array.astype(mx.float32))


def _sample(length: int) -> list[int]:
    """The compared tokens of a block: the first ones and the last."""
    return sorted({*range(min(length, MANY - 1)), length - 1})


def _spread(number: int, most: int) -> Array:
    """At most `most` evenly spread indices below `number`, the first and the last among them."""
    return np.unique(np.linspace(0, number - 1, most).astype(np.int32))
