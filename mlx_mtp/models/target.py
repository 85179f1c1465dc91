"""The Gemma 4 text decoder, all five sizes in one port.

    tokens -> embedding -> layers (attention, MLP or MLP + experts, per-layer embedding) -> norm -> head

E2B and E4B have per-layer embeddings and upper layers that read the KV of lower ones; 12B, 26B and 31B have full
layers whose values are their keys; 26B has experts beside the dense MLP. `config.py` has resolved all of this per
layer. Parameter names are those of Google's checkpoints.

The same layers serve a chunk of a prompt (`Target.prefill`), a plain step and a verify block (`Target.__call__`): the
difference is how many tokens come in, and where their KV goes. Not here: sampling, drafting, and the rules of the KV
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
    """What a layer needs to know of a block of tokens: where it sits and what it sees.

    Attributes:
        rope: Rotary embedding of this kind of layer.
        rotation: Its rotation at the block's positions.
        kv: The block's place in the KV buffers.
        ragged: How its tokens make rows, if these have different numbers of them.
    """

    rope: Rope
    rotation: Rotation
    kv: BlockKV
    ragged: RaggedBlock | None


class TargetLayer(nn.Module):
    """One decoder layer; `index` names its KV buffers."""

    def __init__(self, config: TextConfig, layer: LayerConfig, index: int):
        super().__init__()
        hidden, eps = config.hidden_size, config.rms_norm_eps
        self._index, self._kv_owner = index, layer.kv_owner
        self._moe, self._ple = config.num_experts > 0, config.ple_size > 0
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
        if self._ple:
            self.per_layer_input_gate = nn.Linear(hidden, config.ple_size, bias=False)
            self.per_layer_projection = nn.Linear(config.ple_size, hidden, bias=False)
            self.post_per_layer_input_norm = nn.RMSNorm(hidden, eps)
        self.layer_scalar = mx.ones((1,))

    def __call__(self, h: mx.array, ple: mx.array | None, block: Block) -> mx.array:
        """Runs a block h [B, L, hidden], with its per-layer embeddings ple [B, L, ple_size] if the model has them.

        Both are [1, N, ...] if the block is packed.
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
        if self._ple:
            h = h + x
            x = self.per_layer_projection(geglu(self.per_layer_input_gate(h), ple))
            x = self.post_per_layer_input_norm(x)
        return add_scaled(h, x, self.layer_scalar)


class Target(nn.Module):
    """A Gemma 4 target model.

    Attributes:
        config: Its text config.
    """

    def __init__(self, config: TextConfig):
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
        return self.norm.weight.dtype

    def embed(self, tokens: mx.array) -> mx.array:
        """Scaled embeddings [..., hidden] of token ids [...]."""
        return self.embed_tokens(tokens) * mx.array(self.config.hidden_size**0.5, self.dtype)

    def __call__(self, tokens: mx.array, lengths: mx.array, kv: KVCache, ragged: RaggedBlock | None = None) -> mx.array:
        """Runs a block of tokens that follows the committed ones, and writes its KV.

        Args:
            tokens: int32 [B, L], or [1, N] with a ragged block.
            lengths: int32 [B], committed tokens of each row.
            kv: The buffers; room for the block must have been reserved.
            ragged: How N tokens make B rows of up to L, if these have different numbers of them.

        Returns:
            Hidden states after the final norm, [..., hidden] as the tokens came: what the head, and the drafter, read.
        """
        width = ragged.width if ragged else tokens.shape[1]
        h, places = self.embed(tokens), kv.block(lengths, width)
        return self.norm(self._run(h, self._ple(tokens, h), places, lengths, width, range(len(self.layers)), ragged))

    def prefill(self, tokens: mx.array, start: int, kv: KVBuffers, ends: Sequence[int] | None) -> mx.array:
        """Runs a chunk of prompts, of any length, and writes its KV.

        The layers above the last one with KV of its own are of use to no later token: they run for the last token of
        each prompt only.

        Args:
            tokens: int32 [B, L].
            start: Position of the chunk's first tokens, the same in all rows.
            kv: The buffers; room for the chunk must have been reserved.
            ends: For each row the index of the token in the chunk whose hidden state is wanted; None for all tokens.

        Returns:
            Hidden states after the final norm, [B, hidden], or [B, L, hidden] without `ends`.
        """
        width, below = tokens.shape[1], 1 + max(layer.kv_owner for layer in self.config.layers)
        starts = mx.full((len(tokens),), start, dtype=mx.int32)
        h = self.embed(tokens)
        ple = self._ple(tokens, h)
        if ends is None:
            return self.norm(self._run(h, ple, kv.chunk(start, width), starts, width, range(len(self.layers))))
        h = self._run(h, ple, kv.chunk(start, width), starts, width, range(below))
        last = mx.array(list(ends), dtype=mx.int32)
        h = mx.take_along_axis(h, last[:, None, None], axis=1)
        if above := range(below, len(self.layers)):
            ple = None if ple is None else mx.take_along_axis(ple, last[:, None, None, None], axis=1)
            h = self._run(h, ple, kv.block(starts + last, 1), starts + last, 1, above)
        return self.norm(h)[:, 0]

    def _run(
        self,
        h: mx.array,
        ple: mx.array | None,
        places: Mapping[bool, BlockKV],
        lengths: mx.array,
        width: int,
        layers: Iterable[int],
        ragged: RaggedBlock | None = None,
    ) -> mx.array:
        """Runs some layers over a block h [B, L, hidden] of `width` tokens that follows `lengths` [B] tokens."""
        positions = lengths[:, None] + counting(width)
        blocks = {
            sliding: Block(rope, rope.at(positions, self.dtype), places[sliding], ragged)
            for sliding, rope in self._ropes.items()
        }
        for i in layers:
            h = self.layers[i](h, None if ple is None else ple[:, :, i], blocks[self.config.layers[i].sliding])
        return h

    def raw_logits(self, hidden: mx.array) -> mx.array:
        """Logits [..., vocab] before the softcap, which changes neither the order of tokens nor the best one."""
        return self.embed_tokens.as_linear(hidden) if self.config.tied_head else self.lm_head(hidden)

    def logits(self, hidden: mx.array) -> mx.array:
        """Logits [..., vocab] of hidden states [..., hidden]."""
        raw = self.raw_logits(hidden)
        return raw if self.config.logit_softcap is None else softcap(raw, self.config.logit_softcap)

    def _ple(self, tokens: mx.array, embedded: mx.array) -> mx.array | None:
        """Per-layer embeddings [B, L, layers, ple_size]: a row of a table, plus a projection of the embedding."""
        if not self.config.ple_size:
            return None
        shape = (*tokens.shape, len(self.layers), self.config.ple_size)
        table = self.embed_tokens_per_layer(tokens) * mx.array(self.config.ple_size**0.5, self.dtype)
        projected = self.per_layer_model_projection(embedded) * self.config.hidden_size**-0.5
        projected = self.per_layer_projection_norm(projected.reshape(shape))
        return (projected + table.reshape(shape)) * 2**-0.5
