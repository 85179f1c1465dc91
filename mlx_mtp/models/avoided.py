"""MLX kernels that self_test.py found wrong on this machine, and the computations that replace them.

`AVOIDED` is normally empty. The models look up the shapes of their operations in it while they build a graph:

    attention          the other of its two ways, see `attention.attend`
    quantised product  `product_by_hand`: weights are dequantised, then multiplied
    gathered product   `gather_by_hand`: the chosen matrices are copied, then multiplied

The replacements are slower, and use none of the kernels that they replace.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn

MANY = 9
"""Stands for 9 tokens or more: MLX chooses its kernels for few rows by numbers up to 8."""

SLOTS = (0, 1024, 4096)
"""Numbers of slots from which MLX may choose another attention kernel (its scaled_dot_product_attention.cpp)."""

DENSE = 4
"""Rows per matrix from which MLX uses another kernel for sorted gathered products (its quantized.cpp)."""

PAIRS = 16
"""Matrices to copy at a time: a quarter of a gigabyte for the largest experts in 16 bits."""

OUTPUTS = 2**14
"""Rows of weights to dequantise at a time, so that an output head doesn't take gigabytes."""


def slots_class(slots: int) -> int:
    """The largest of SLOTS that isn't above a number of slots: MLX chooses the same kernel for both."""
    return max(least for least in SLOTS if least <= slots)


class AttentionShape(NamedTuple):
    """The shape by which MLX and `attention.attend` choose an attention kernel; `slots` is one of SLOTS."""

    head_dim: int
    heads_per_kv_head: int
    tokens: int
    slots: int
    dtype: mx.Dtype

    @classmethod
    def of(cls, queries: mx.array, keys: mx.array) -> AttentionShape:
        """The shape for queries [B, heads, L, head_dim] and keys [B, kv_heads, slots, head_dim]."""
        _, heads, length, head_dim = queries.shape
        return cls(head_dim, heads // keys.shape[1], min(length, MANY), slots_class(keys.shape[2]), queries.dtype)

    def __str__(self) -> str:
        return (
            f"attention (tokens: {_count(self.tokens)}, slots: {self.slots or 1} or more, heads of {self.head_dim}, "
            f"{self.heads_per_kv_head} per KV head, {_name(self.dtype)})"
        )


class ProductShape(NamedTuple):
    """The shape by which MLX chooses a kernel for a quantised product of [rows, inputs] and [outputs, inputs]."""

    outputs: int
    inputs: int
    stored: str
    rows: int
    dtype: mx.Dtype

    @classmethod
    def of(cls, layer: nn.Module, x: mx.array) -> ProductShape:
        """The shape for a quantised layer and its input x [..., inputs]."""
        rows, inputs = x.size // x.shape[-1], x.shape[-1]
        return cls(layer.weight.shape[-2], inputs, stored_as(layer), min(rows, MANY), x.dtype)

    def __str__(self) -> str:
        return (
            f"product (rows: {_count(self.rows)}, weights: {self.outputs} x {self.inputs}, {self.stored}, "
            f"{_name(self.dtype)})"
        )


class GatherShape(NamedTuple):
    """The shape by which MLX chooses a kernel for gathered products: of single rows and one of many matrices each."""

    matrices: int
    outputs: int
    inputs: int
    stored: str
    order: str
    dtype: mx.Dtype

    @classmethod
    def of(
        cls, layer: nn.Module, matrices: int, outputs: int, x: mx.array, products: int, in_order: bool
    ) -> GatherShape:
        """The shape for a layer and its input.

        Args:
            layer: A layer with weights [matrices, outputs, inputs].
            matrices: Number of matrices.
            outputs: Rows of a matrix.
            x: The input [..., inputs].
            products: Number of products.
            in_order: Whether the products are sorted by matrix.
        """
        order = "unsorted" if not in_order else "sorted, many" if products >= DENSE * matrices else "sorted"
        return cls(matrices, outputs, x.shape[-1], stored_as(layer), order, x.dtype)

    def __str__(self) -> str:
        return (
            f"gathered product (of {self.matrices} matrices {self.outputs} x {self.inputs}, {self.stored}, "
            f"{self.order}, {_name(self.dtype)})"
        )


Shape = AttentionShape | ProductShape | GatherShape

AVOIDED: set[Shape] = set()
"""Shapes for which MLX's kernel isn't used."""


def stored_as(layer: nn.Module) -> str:
    """How a layer's weights are quantised, in words."""
    if not hasattr(layer, "bits"):
        return "not quantised"
    return f"{layer.bits} bits, {layer.mode}, groups of {layer.group_size}"


def dequantized(layer: nn.Module, which: mx.array | slice) -> mx.array:
    """Some of a layer's weights, dequantised if need be.

    Args:
        layer: A linear layer, embedding or bank of experts.
        which: Indices along the first axis of the weights: rows, or an expert's matrices.

    Returns:
        [len(which), ...].
    """
    if not hasattr(layer, "bits"):
        weights: mx.array = layer.weight[which]
        return weights
    biases = None if layer.get("biases") is None else layer.biases[which]
    how = {"group_size": layer.group_size, "bits": layer.bits, "mode": layer.mode}
    return mx.dequantize(layer.weight[which], layer.scales[which], biases, **how)


def product_by_hand(layer: nn.Module, x: mx.array) -> mx.array:
    """Multiplies x [..., inputs] by a quantised layer's weights without MLX's quantised kernels: [..., outputs]."""
    starts = range(0, layer.weight.shape[0], OUTPUTS)
    parts = [x @ dequantized(layer, slice(i, i + OUTPUTS)).T.astype(x.dtype) for i in starts]
    return parts[0] if len(parts) == 1 else mx.concatenate(parts, axis=-1)


def gather_by_hand(
    matrices: Callable[[mx.array], mx.array], x: mx.array, which: mx.array, rows: mx.array | None
) -> mx.array:
    """Multiplies rows by chosen matrices without MLX's gathered kernels.

    Args:
        matrices: Returns the matrices [n, out, in] of indices [n].
        x: [..., 1, in].
        which: uint32, the matrix of each result.
        rows: uint32 that broadcasts to the same shape, the row of x for each result; None if each result has its own.

    Returns:
        [*which.shape, 1, out].
    """
    flat, vectors = which.flatten(), x.reshape(-1, 1, x.shape[-1])
    if rows is not None:
        vectors = vectors[mx.broadcast_to(rows, which.shape).flatten()]
    parts = [
        vectors[i : i + PAIRS] @ matrices(flat[i : i + PAIRS]).swapaxes(-1, -2).astype(x.dtype)
        for i in range(0, flat.size, PAIRS)
    ]
    return mx.concatenate(parts).reshape(*which.shape, 1, -1)


class CarefulLinear(nn.QuantizedLinear):
    """A quantised linear layer that doesn't use the kernels of `AVOIDED`."""

    def __call__(self, x: mx.array) -> mx.array:
        """As `nn.QuantizedLinear`."""
        return product_by_hand(self, x) if ProductShape.of(self, x) in AVOIDED else super().__call__(x)


class CarefulEmbedding(nn.QuantizedEmbedding):
    """The same for an embedding that is an output head."""

    def as_linear(self, x: mx.array) -> mx.array:
        """As `nn.QuantizedEmbedding`."""
        return product_by_hand(self, x) if ProductShape.of(self, x) in AVOIDED else super().as_linear(x)


_CAREFUL: dict[type[nn.Module], type[nn.Module]] = {
    nn.QuantizedLinear: CarefulLinear,
    nn.QuantizedEmbedding: CarefulEmbedding,
}


def apply_avoided(*models: nn.Module | None) -> None:
    """Makes the models' quantised layers avoid the kernels of `AVOIDED`, if it has shapes of quantised products.

    Their products are MLX's code, so their classes are replaced; all other operations look at `AVOIDED` themselves.
    """
    if any(isinstance(shape, ProductShape) for shape in AVOIDED):
        for module in (module for model in models if model for module in model.modules()):
            if type(module) in _CAREFUL:
                module.__class__ = _CAREFUL[type(module)]


def _count(number: int) -> str:
    return f"{MANY} or more" if number == MANY else str(number)


def _name(dtype: mx.Dtype) -> str:
    return str(dtype).removeprefix("mlx.core.")
