"""Rotary embedding and attention, as target and drafter have them in common.

Gemma 4's attention normalises queries and keys per head before rotating them, normalises values without a weight,
and scales scores by 1. Layers that share KV, and all layers of a drafter, have queries only and read the arrays of
another layer.
"""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

from ..config import FULL, SLIDING, LayerConfig, TextConfig
from .elementwise import gelu_times, on_gpu


Rotation = mx.array | tuple[mx.array, mx.array]
"""What `Rope.at` prepares for `Rope.rotate`: offsets [B] on a GPU, cosines and signed sines [B, 1, L, head_dim] else."""


class Rope:
    """Rotary embedding of one kind of layer ("default" and "proportional" of config field `rope_parameters`).

    Pairs are (i, i + head_dim / 2). The proportional kind rotates the first `rotated` share of the pairs, with
    exponents over the whole head, and leaves the others alone.
    """

    def __init__(self, head_dim: int, theta: float, rotated: float):
        pairs = head_dim // 2
        turning = int(rotated * pairs)
        exponents = mx.arange(turning, dtype=mx.float32) / pairs
        self._head_dim = head_dim
        self._periods = mx.concatenate([mx.power(theta, exponents), mx.full((pairs - turning,), mx.inf)])

    def at(self, positions: mx.array, dtype: mx.Dtype) -> Rotation:
        """Prepares the rotation for blocks at consecutive positions, int32 [B, L]; the result goes to `rotate`."""
        if on_gpu():
            return positions[:, 0]
        # The CPU has no fused kernel: cosines and sines are made once a block instead of once a layer.
        angles = positions[:, None, :, None].astype(mx.float32) / self._periods
        cos, sin = mx.cos(angles), mx.sin(angles)
        cos, sin = mx.concatenate([cos, cos], axis=-1), mx.concatenate([-sin, sin], axis=-1)
        return cos.astype(dtype), sin.astype(dtype)

    def rotate(self, x: mx.array, rotation: Rotation) -> mx.array:
        """Rotates [B, heads, L, head_dim]."""
        if isinstance(rotation, tuple):
            cos, sin = rotation
            return x * cos + mx.roll(x, self._head_dim // 2, axis=-1) * sin
        return mx.fast.rope(
            x, self._head_dim, traditional=False, base=None, scale=1.0, offset=rotation, freqs=self._periods
        )


def ropes(config: TextConfig) -> dict[bool, Rope]:
    """The rotary embeddings of a stack, by kind of layer (sliding or not)."""
    heads = {layer.sliding: layer.head_dim for layer in config.layers}
    kinds = {sliding: config.rope[SLIDING if sliding else FULL] for sliding in heads}
    return {sliding: Rope(heads[sliding], kind.theta, kind.rotated) for sliding, kind in kinds.items()}


class Attention(nn.Module):
    """Attention of one layer, with keys and values of its own or without."""

    def __init__(self, config: TextConfig, layer: LayerConfig, own_kv: bool):
        super().__init__()
        hidden, eps = config.hidden_size, config.rms_norm_eps
        self._heads, self._kv_heads, self._head_dim = config.num_heads, layer.kv_heads, layer.head_dim
        self._k_eq_v, self._eps = layer.k_eq_v, eps
        self.q_proj = nn.Linear(hidden, config.num_heads * layer.head_dim, bias=False)
        self.q_norm = nn.RMSNorm(layer.head_dim, eps)
        self.o_proj = nn.Linear(config.num_heads * layer.head_dim, hidden, bias=False)
        if own_kv:
            self.k_proj = nn.Linear(hidden, layer.kv_heads * layer.head_dim, bias=False)
            self.k_norm = nn.RMSNorm(layer.head_dim, eps)
            if not layer.k_eq_v:
                self.v_proj = nn.Linear(hidden, layer.kv_heads * layer.head_dim, bias=False)

    def keys_values(self, x: mx.array, rope: Rope, rotation: Rotation) -> tuple[mx.array, mx.array]:
        """Keys and values [B, kv_heads, L, head_dim] of a block x [B, L, hidden]."""
        shape = (*x.shape[:2], self._kv_heads, self._head_dim)
        raw = self.k_proj(x).reshape(shape)
        values = raw if self._k_eq_v else self.v_proj(x).reshape(shape)
        keys = rope.rotate(self.k_norm(raw).transpose(0, 2, 1, 3), rotation)
        return keys, mx.fast.rms_norm(values, None, self._eps).transpose(0, 2, 1, 3)

    def __call__(
        self, x: mx.array, keys: mx.array, values: mx.array, visible: mx.array, rope: Rope, rotation: Rotation
    ) -> mx.array:
        """Attends from a block x [B, L, hidden] to keys and values [B, kv_heads, slots, head_dim].

        Args:
            visible: bool [B, 1, L, slots].

        Returns:
            [B, L, hidden].
        """
        b, length, _ = x.shape
        queries = self.q_norm(self.q_proj(x).reshape(b, length, self._heads, self._head_dim))
        queries = rope.rotate(queries.transpose(0, 2, 1, 3), rotation)
        out = mx.fast.scaled_dot_product_attention(queries, keys, values, scale=1.0, mask=visible)
        return self.o_proj(out.transpose(0, 2, 1, 3).reshape(b, length, -1))


class MLP(nn.Module):
    """Gated MLP: down(gelu(gate(x)) * up(x))."""

    def __init__(self, hidden_size: int, intermediate_size: int):
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def __call__(self, x: mx.array) -> mx.array:
        return self.down_proj(gelu_times(self.gate_proj(x), self.up_proj(x)))
