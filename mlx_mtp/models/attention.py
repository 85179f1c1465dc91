"""Rotary embedding, attention and MLP, which target and drafter have in common.

Gemma 4's attention normalises queries and keys per head before rotating them, normalises values without a weight,
and scales scores by 1. Layers that share KV, and all layers of a drafter, have only queries and read the KV of another
layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..config import FULL, SLIDING, LayerConfig, TextConfig
from ..kv import View
from ..kv.blocks import stored
from ..system.fusing import on_gpu
from .avoided import AVOIDED, AttentionShape
from .elementwise import geglu
from .ragged import RaggedBlock

Rotation = mx.array | tuple[mx.array, mx.array]
"""Made by `Rope.at` for `Rope.rotate`: on a GPU offsets [B], else cosines and signed sines [B, 1, L, head_dim]."""

FUSED_TOKENS, FUSED_ROWS, FUSED_HEAD = 8, 32, 256
"""Limits of MLX's fused attention kernel for short blocks: tokens, tokens x query heads per KV head, and head_dim."""


GATE_AND_UP = ["gate_proj", "up_proj"]
"""The input layers of a gated MLP, by name."""


class Rope:
    """Rotary embedding of one kind of layer ("default" and "proportional" of config field `rope_parameters`).

    Pairs are (i, i + head_dim / 2). The proportional kind rotates only a share of the pairs, the first ones, with
    exponents that count over the whole head.
    """

    def __init__(self, head_dim: int, theta: float, rotated: float) -> None:
        """Makes the embedding.

        Args:
            head_dim: Size of a head.
            theta: Base of the periods.
            rotated: Share of the pairs to rotate; 1 for the default kind.
        """
        pairs = head_dim // 2
        turning = int(rotated * pairs)
        exponents = mx.arange(turning, dtype=mx.float32) / pairs
        self._head_dim = head_dim
        self._periods = mx.concatenate([mx.power(theta, exponents), mx.full((pairs - turning,), mx.inf)])
        mx.eval(self._periods)

    def at(self, positions: mx.array, dtype: mx.Dtype) -> Rotation:
        """Prepares the rotation of a block, for all layers of a kind.

        Args:
            positions: int32 [B, L], consecutive in each row.
            dtype: Type of the arrays to rotate.

        Returns:
            The argument for `rotate`.
        """
        if on_gpu():
            return positions[:, 0]
        # The CPU has no fused kernel: cosines and sines are computed once per block, not once per layer.
        angles = positions[:, None, :, None].astype(mx.float32) / self._periods
        cos, sin = mx.cos(angles), mx.sin(angles)
        cos, sin = mx.concatenate([cos, cos], axis=-1), mx.concatenate([-sin, sin], axis=-1)
        return cos.astype(dtype), sin.astype(dtype)

    def rotate(self, x: mx.array, rotation: Rotation) -> mx.array:
        """Rotates queries or keys x [B, heads, L, head_dim] to the positions given to `at`."""
        if isinstance(rotation, tuple):
            cos, sin = rotation
            return x * cos + mx.roll(x, self._head_dim // 2, -1) * sin
        return mx.fast.rope(
            x, self._head_dim, traditional=False, base=None, scale=1.0, offset=rotation, freqs=self._periods
        )


def ropes(config: TextConfig) -> dict[bool, Rope]:
    """The rotary embeddings of a stack, by kind of layer (sliding or not)."""
    heads = {layer.sliding: layer.head_dim for layer in config.layers}
    kinds = {sliding: config.rope[SLIDING if sliding else FULL] for sliding in heads}
    return {sliding: Rope(heads[sliding], kind.theta, kind.rotated) for sliding, kind in kinds.items()}


def fuse_projections(module: nn.Module, names: list[str]) -> None:
    """Joins linear layers with the same input into the first one: one matrix product instead of several.

    Layers that are quantised in different ways, or have an adapter, stay as they are; `apply_projections` runs either.

    Args:
        module: The module that has the layers; the joined ones are removed from it, except the first.
        names: The layers' names.
    """
    layers = [module[name] for name in names]
    kinds = {(type(it), *(getattr(it, key, None) for key in ("bits", "group_size", "mode"))) for it in layers}
    if len(kinds) > 1 or "weight" not in layers[0]:
        return
    for key in layers[0].parameters():
        layers[0][key] = mx.concatenate([layer[key] for layer in layers], axis=-2)
    for name in names[1:]:
        del module[name]


def apply_projections(module: nn.Module, names: list[str], x: mx.array, *others: Any) -> mx.array:
    """Runs linear layers with the same input, joined by `fuse_projections` or not.

    Args:
        module: The module that has the layers.
        names: The layers' names.
        x: [..., inputs].
        others: Further arguments of each layer.

    Returns:
        Their outputs, concatenated along the last axis.
    """
    outputs: list[mx.array] = [module[name](x, *others) for name in names if name in module]
    return outputs[0] if len(outputs) == 1 else mx.concatenate(outputs, axis=-1)


class Attention(nn.Module):
    """Attention of one layer."""

    def __init__(self, config: TextConfig, layer: LayerConfig, own_kv: bool) -> None:
        """Makes the layer with empty weights.

        Args:
            config: The model's.
            layer: The layer's part of it.
            own_kv: Whether the layer makes its own keys and values, or has only queries.
        """
        super().__init__()
        hidden, eps = config.hidden_size, config.rms_norm_eps
        self._heads, self._kv_heads, self._head_dim = config.num_heads, layer.kv_heads if own_kv else 0, layer.head_dim
        self._eps = eps
        self._projections = ["q_proj"]
        self.q_proj = nn.Linear(hidden, config.num_heads * layer.head_dim, bias=False)
        self.q_norm = nn.RMSNorm(layer.head_dim, eps)
        self.o_proj = nn.Linear(config.num_heads * layer.head_dim, hidden, bias=False)
        if own_kv:
            self._projections += ["k_proj"] if layer.k_eq_v else ["k_proj", "v_proj"]
            self.k_norm = nn.RMSNorm(layer.head_dim, eps)
            for name in self._projections[1:]:
                self[name] = nn.Linear(hidden, layer.kv_heads * layer.head_dim, bias=False)

    def prepare(self) -> None:
        """Rearranges the loaded weights for faster computation; must be called once, before the first use."""
        fuse_projections(self, self._projections)
        if self._kv_heads:
            norms = [self.q_norm.weight] * self._heads + [self.k_norm.weight] * self._kv_heads
            self._norms = mx.stack(norms)
            mx.eval(self._norms)

    def project(
        self, x: mx.array, rope: Rope, rotation: Rotation, ragged: RaggedBlock | None = None
    ) -> tuple[mx.array, mx.array | None, mx.array | None]:
        """Computes queries, keys and values of a block.

        Args:
            x: [B, L, hidden], or [1, N, hidden] of a ragged block.
            rope: The rotary embedding of this kind of layer.
            rotation: Its rotation at the block's positions [B, L].
            ragged: The ragged block's layout; None for other blocks.

        Returns:
            Queries [B, heads, L, head_dim]; keys and values [B, kv_heads, L, head_dim] as `kv.blocks.stored` has them,
            or None if the layer has none of its own.
        """
        # All heads are normalised and rotated together.
        heads = apply_projections(self, self._projections, x).reshape(*x.shape[:2], -1, self._head_dim)
        heads = mx.fast.rms_norm(heads, None if self._kv_heads else self.q_norm.weight, self._eps)
        if ragged:
            heads = ragged.pad(heads)
        if not self._kv_heads:
            return rope.rotate(heads.transpose(0, 2, 1, 3), rotation), None, None
        rotated = rope.rotate((heads[:, :, : len(self._norms)] * self._norms).transpose(0, 2, 1, 3), rotation)
        # The last heads are the values. With `attention_k_eq_v` they are the keys, before weight and rotation.
        values = stored(heads)[:, :, heads.shape[2] - self._kv_heads :].transpose(0, 2, 1, 3)
        return rotated[:, : self._heads], stored(rotated)[:, self._heads :], values

    def attend(self, queries: mx.array, views: Sequence[View], ragged: RaggedBlock | None = None) -> mx.array:
        """Attends to KV buffers.

        Args:
            queries: [B, heads, L, head_dim], from `project`.
            views: The keys and values for all queries, see `kv.BlockKV.views`.
            ragged: See `project`.

        Returns:
            [B, L, hidden], or [1, N, hidden] of a ragged block.
        """
        if ragged and not on_gpu():
            # On a CPU padding costs as much as tokens do, so rows are computed one by one, without it.
            counts = ragged.counts
            views = [row for view in views for row in _by_row(view, counts)]
            outs = [_attend(queries[it.rows, :, it.tokens], it) for it in views]
            return self.o_proj(mx.concatenate(outs, axis=1))
        if len(views) == 1:
            out = _attend(queries, views[0])
        else:
            outs = [_attend(queries[it.rows, :, it.tokens], it) for it in views]
            out = mx.concatenate(outs, axis=1 if views[0].rows == views[1].rows else 0)
        return self.o_proj(ragged.flatten(out) if ragged else out)


def _by_row(view: View, counts: Sequence[int]) -> list[View]:
    """Splits a view by rows, each cut to its number of tokens."""
    rows = range(len(counts))[view.rows]
    return [
        View(
            slice(row, row + 1),
            slice(counts[row]),
            view.keys[i : i + 1],
            view.values[i : i + 1],
            view.visible[i : i + 1, :, : counts[row]],
        )
        for i, row in enumerate(rows)
    ]


def _attend(queries: mx.array, view: View) -> mx.array:
    """Attention of a view's queries [b, heads, l, head_dim]: [b, l, heads * head_dim]."""
    return attend(queries, view.keys, view.values, view.visible)


def attend(queries: mx.array, keys: mx.array, values: mx.array, visible: mx.array) -> mx.array:
    """Attention with scale 1, by MLX's own function or `folded_attention`.

    The faster one is used, unless the self-test has found it wrong on this machine.

    Args:
        queries: [B, heads, L, head_dim].
        keys: [B, kv_heads, slots, head_dim].
        values: [B, kv_heads, slots, head_dim].
        visible: bool [B or 1, 1, L, slots].

    Returns:
        [B, L, heads * head_dim].
    """
    folded = on_gpu() and not _has_kernel(queries.shape, keys.shape[1])
    if AVOIDED and AttentionShape.of(queries, keys) in AVOIDED:
        folded = not folded
    if folded:
        out = folded_attention(queries, keys, values, visible)
    else:
        out = mx.fast.scaled_dot_product_attention(queries, keys, values, scale=1.0, mask=visible)
    return out.transpose(0, 2, 1, 3).flatten(2)


def _has_kernel(queries: tuple[int, ...], kv_heads: int) -> bool:
    """Whether MLX's own function is the faster one for queries of shape [B, heads, L, head_dim].

    From mlx 0.32.4 `scaled_dot_product_attention.cpp`: there is a fused kernel for heads of up to 256 and blocks of up
    to 8 tokens, if tokens times query heads per KV head are at most 32, and for heads of 512 and single tokens. Without
    it, MLX computes one product per query head. Each reads all keys, and fills only L rows of a tile of 64, which is
    wasteful for short blocks.
    """
    _, heads, length, head_dim = queries
    if head_dim > FUSED_HEAD:
        return length == 1
    return length > FUSED_TOKENS or length * (heads // kv_heads) <= FUSED_ROWS


def longest_fused(config: TextConfig) -> int:
    """Longest block that the fused kernel takes, in tokens; layers whose heads are too large for it don't count."""
    groups = [config.num_heads // layer.kv_heads for layer in config.layers if layer.head_dim <= FUSED_HEAD]
    return min(FUSED_TOKENS, *(FUSED_ROWS // group for group in groups)) if groups else FUSED_TOKENS


def folded_attention(queries: mx.array, keys: mx.array, values: mx.array, visible: mx.array) -> mx.array:
    """Attention with scale 1 in which the query heads of a KV head are rows of one matrix product.

    Args:
        queries: [B, heads, L, head_dim].
        keys: [B, kv_heads, slots, head_dim].
        values: [B, kv_heads, slots, head_dim].
        visible: bool [B or 1, 1, L, slots].

    Returns:
        [B, heads, L, head_dim].
    """
    batch, heads, length, head_dim = queries.shape
    kv_heads = keys.shape[1]
    rows = queries.reshape(batch, kv_heads, -1, head_dim)
    scores = (rows @ keys.swapaxes(-1, -2)).reshape(batch, kv_heads, heads // kv_heads, length, -1)
    scores = mx.where(visible[:, :, None], scores, mx.array(mx.finfo(scores.dtype).min, scores.dtype))
    shares = mx.softmax(scores, axis=-1, precise=True).reshape(batch, kv_heads, rows.shape[2], -1)
    return (shares @ values).reshape(queries.shape)


class MLP(nn.Module):
    """Gated MLP: down(gelu(gate(x)) * up(x))."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        """Makes the MLP with empty weights."""
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def prepare(self) -> None:
        """See `Attention.prepare`."""
        fuse_projections(self, GATE_AND_UP)

    def __call__(self, x: mx.array) -> mx.array:
        """Maps x [..., hidden] to [..., hidden]."""
        return self.down_proj(geglu(*mx.split(apply_projections(self, GATE_AND_UP, x), 2, axis=-1)))
