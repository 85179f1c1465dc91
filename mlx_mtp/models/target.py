"""The Gemma 4 text decoder, all five sizes in one port.

    tokens -> embedding -> layers (attention, MLP or MLP + experts, per-layer embedding) -> norm -> head

E2B and E4B have per-layer embeddings, and upper layers that read the KV of lower ones. The full layers of 12B, 26B and
31B use their keys as values. 26B has experts in addition to the dense MLP. `config.py` resolves all of this for each
layer. Parameter names are those of Google's checkpoints.

The same layers run a chunk of a prompt (`Target.prefill`), a plain step and a verify block (`Target.__call__`); these
differ in the number of tokens and in where their KV is written. Not here: sampling, drafting, and the rules of the KV
buffers (kv/).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn

from ..config import LayerConfig, TextConfig
from ..kv import BlockKV, KVBuffers, KVCache
from ..system.fusing import counting
from .attention import MLP, Attention, Rope, Rotation, ropes
from .elementwise import add_scaled, geglu, softcap
from .moe import Experts, Router
from .ragged import RaggedBlock


@dataclass(frozen=True)
class Block:
    """A block of tokens as the layers of one kind see it.

    Attributes:
        rope: The rotary embedding of this kind of layer.
        rotation: Its rotation at the block's positions.
        kv: Where the block's KV is written, and what its queries see.
        ragged: The layout of a ragged block; None for other blocks.
    """

    rope: Rope
    rotation: Rotation
    kv: BlockKV
    ragged: RaggedBlock | None


class TargetLayer(nn.Module):
    """One decoder layer."""

    def __init__(self, config: TextConfig, layer: LayerConfig, index: int) -> None:
        """Makes the layer with empty weights.

        Args:
            config: The target's.
            layer: The layer's part of it.
            index: Index of the layer, and of its KV buffers.
        """
        super().__init__()
        hidden, eps = config.hidden_size, config.rms_norm_eps
        self._index, self._kv_owner = index, layer.kv_owner
        self._moe = config.num_experts > 0
        self.self_attn = Attention(config, layer, own_kv=layer.kv_owner == index)
        self.mlp = MLP(hidden, layer.intermediate_size)
        self.input_layernorm = nn.RMSNorm(hidden, eps)
        self.post_attention_layernorm = nn.RMSNorm(hidden, eps)
        self.pre_feedforward_layernorm = nn.RMSNorm(hidden, eps)
        self.post_feedforward_layernorm = nn.RMSNorm(hidden, eps)
        if self._moe:
            self.router = Router(config)
            self.experts = Experts(config)
            self.post_feedforward_layernorm_1 = nn.RMSNorm(hidden, eps)
            self.pre_feedforward_layernorm_2 = nn.RMSNorm(hidden, eps)
            self.post_feedforward_layernorm_2 = nn.RMSNorm(hidden, eps)
        if config.ple_size:
            self.per_layer_input_gate = nn.Linear(hidden, config.ple_size, bias=False)
            self.per_layer_projection = nn.Linear(config.ple_size, hidden, bias=False)
            self.post_per_layer_input_norm = nn.RMSNorm(hidden, eps)
        self.layer_scalar = mx.ones((1,))

    def __call__(self, h: mx.array, ple: mx.array | None, block: Block) -> mx.array:
        """Runs the layer on a block.

        Args:
            h: Hidden states [B, L, hidden], or [1, N, hidden] of a ragged block.
            ple: The block's per-layer embeddings, [B, L, ple_size] or [1, N, ple_size]; None if the model has none.
            block: The block's positions and KV.

        Returns:
            Hidden states of the same shape.
        """
        ragged = block.ragged
        queries, keys, values = self.self_attn.project(self.input_layernorm(h), block.rope, block.rotation, ragged)
        if keys is not None and values is not None:
            block.kv.write(self._index, keys, values)
        x = self.self_attn.attend(queries, block.kv.views(self._kv_owner), ragged)
        h = h + self.post_attention_layernorm(x)

        x = self.mlp(self.pre_feedforward_layernorm(h))
        if self._moe:
            routed = self.experts(self.pre_feedforward_layernorm_2(h), *self.router(h))
            x = self.post_feedforward_layernorm_1(x) + self.post_feedforward_layernorm_2(routed)
        x = self.post_feedforward_layernorm(x)
        if ple is not None:
            h = h + x
            x = self.per_layer_projection(geglu(self.per_layer_input_gate(h), ple))
            x = self.post_per_layer_input_norm(x)
        return add_scaled(h, x, self.layer_scalar)


class Target(nn.Module):
    """A Gemma 4 target model.

    Attributes:
        config: Its text config.
    """

    def __init__(self, config: TextConfig) -> None:
        """Makes a target with empty weights."""
        super().__init__()
        self.config = config
        self._ropes = ropes(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = [TargetLayer(config, layer, i) for i, layer in enumerate(config.layers)]
        self.norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        if config.ple_size:
            width = len(config.layers) * config.ple_size
            self.embed_tokens_per_layer = nn.Embedding(config.ple_vocab_size, width)
            self.per_layer_model_projection = nn.Linear(config.hidden_size, width, bias=False)
            self.per_layer_projection_norm = nn.RMSNorm(config.ple_size, config.rms_norm_eps)
        if not config.tied_head:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    @property
    def dtype(self) -> mx.Dtype:
        """Type of the activations."""
        dtype: mx.Dtype = self.norm.weight.dtype
        return dtype

    def embed(self, tokens: mx.array) -> mx.array:
        """Scaled embeddings [..., hidden] of token ids [...]."""
        return self._rows(self.embed_tokens, tokens) * mx.array(self.config.hidden_size**0.5, self.dtype)

    def _rows(self, table: nn.Module, tokens: mx.array) -> mx.array:
        """Rows of an embedding table; those of some quantised ones, or with an adapter, come in another type."""
        rows: mx.array = table(tokens)
        return rows.astype(self.dtype)

    def __call__(self, tokens: mx.array, lengths: mx.array, kv: KVCache, ragged: RaggedBlock | None = None) -> mx.array:
        """Runs a block of tokens that follows the committed ones, and writes its KV.

        Args:
            tokens: int32 [B, L], or [1, N] of a ragged block.
            lengths: int32 [B], committed tokens of each row.
            kv: The buffers; room for the block must have been reserved.
            ragged: The layout of a ragged block, in which rows have different numbers of tokens; None for other blocks.

        Returns:
            Hidden states after the final norm, [B, L, hidden] or [1, N, hidden]. Head and drafter read these.
        """
        width = ragged.width if ragged else tokens.shape[1]
        h, blocks = self.embed(tokens), kv.block(lengths, width)
        h = self._run(h, self._ple(tokens, h), blocks, lengths, width, range(len(self.layers)), ragged)
        hidden: mx.array = self.norm(h)
        return hidden

    def prefill(self, tokens: mx.array, start: int, kv: KVBuffers, ends: Sequence[int] | None) -> mx.array:
        """Runs a chunk of prompts, of any length, and writes its KV.

        Layers above the last one with its own KV have no effect on later tokens, so they run only for the tokens whose
        hidden states are wanted.

        Args:
            tokens: int32 [B, L].
            start: Position of the chunk's first tokens, the same in all rows.
            kv: The buffers; room for the chunk must have been reserved.
            ends: For each row, the index in the chunk of the token whose hidden state is wanted; None for all tokens.

        Returns:
            Hidden states after the final norm, [B, hidden], or [B, L, hidden] if `ends` is None.
        """
        width, below = tokens.shape[1], 1 + max(layer.kv_owner for layer in self.config.layers)
        starts = mx.full((len(tokens),), start, dtype=mx.int32)
        h = self.embed(tokens)
        ple = self._ple(tokens, h)
        hidden: mx.array
        if ends is None:
            hidden = self.norm(self._run(h, ple, kv.chunk(start, width), starts, width, range(len(self.layers))))
            return hidden
        h = self._run(h, ple, kv.chunk(start, width), starts, width, range(below))
        last = mx.array(list(ends), dtype=mx.int32)
        h = mx.take_along_axis(h, last[:, None, None], axis=1)
        if above := range(below, len(self.layers)):
            ple = None if ple is None else mx.take_along_axis(ple, last[:, None, None, None], axis=1)
            h = self._run(h, ple, kv.block(starts + last, 1), starts + last, 1, above)
        hidden = self.norm(h)
        return hidden[:, 0]

    def _run(
        self,
        h: mx.array,
        ple: mx.array | None,
        blocks: Mapping[bool, BlockKV],
        lengths: mx.array,
        width: int,
        layers: Iterable[int],
        ragged: RaggedBlock | None = None,
    ) -> mx.array:
        """Runs some layers on a block of `width` tokens at positions `lengths` [B] and after; shapes as in a layer."""
        positions = lengths[:, None] + counting(width)
        by_kind = {
            sliding: Block(rope, rope.at(positions, self.dtype), blocks[sliding], ragged)
            for sliding, rope in self._ropes.items()
        }
        for i in layers:
            h = self.layers[i](h, None if ple is None else ple[:, :, i], by_kind[self.config.layers[i].sliding])
        return h

    def raw_logits(self, hidden: mx.array) -> mx.array:
        """Logits [..., vocab] of hidden states [..., hidden] before the softcap, which doesn't change their order."""
        logits: mx.array = self.embed_tokens.as_linear(hidden) if self.config.tied_head else self.lm_head(hidden)
        return logits

    def logits(self, hidden: mx.array) -> mx.array:
        """Logits [..., vocab] of hidden states [..., hidden]."""
        raw = self.raw_logits(hidden)
        return raw if self.config.logit_softcap is None else softcap(raw, self.config.logit_softcap)

    def _ple(self, tokens: mx.array, embedded: mx.array) -> mx.array | None:
        """Per-layer embeddings [B, L, layers, ple_size]: a table's row plus a projection of the token's embedding."""
        if not self.config.ple_size:
            return None
        shape = (*tokens.shape, len(self.layers), self.config.ple_size)
        table = self._rows(self.embed_tokens_per_layer, tokens) * mx.array(self.config.ple_size**0.5, self.dtype)
        projected = self.per_layer_model_projection(embedded) * self.config.hidden_size**-0.5
        normed: mx.array = self.per_layer_projection_norm(projected.reshape(shape))
        return (normed + table.reshape(shape)) * 2**-0.5
