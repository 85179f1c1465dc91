"""The MTP drafter (`gemma4_assistant`): four layers that predict the target's next tokens.

A draft step reads the newest token's embedding (the target's, scaled), concatenated with a hidden state of the target's
width. It attends to the target's KV: sliding layers to the KV of the target's last sliding layer that has its own, full
layers to that of its last full one. The drafter has no KV and writes none; all steps of a round see the same committed
positions, from the same position.

Not here: choosing drafts from its logits (decode/sampling.py), and verifying them (decode/round.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import mlx.core as mx
import mlx.nn as nn

from ..config import DrafterConfig, LayerConfig, TextConfig
from ..kv import KVCache, View
from .attention import MLP, Attention, Rope, Rotation, ropes
from .clustered_head import ClusteredHead
from .elementwise import add_scaled

Position = Literal["committed", "bonus"]
POSITIONS: tuple[str, ...] = get_args(Position)
"""See `Drafter.position`."""


@dataclass(frozen=True)
class SharedKV:
    """The target's KV as the drafter sees it in all steps of a round.

    Attributes:
        views: By kind of layer (sliding or not), the target's keys and values.
        rotations: By kind of layer, the rotation of the queries.
    """

    views: dict[bool, list[View]]
    rotations: dict[bool, Rotation]


class DrafterLayer(nn.Module):
    """One layer: attention to the target's KV, then the MLP."""

    def __init__(self, config: TextConfig, layer: LayerConfig) -> None:
        """Makes the layer with empty weights."""
        super().__init__()
        hidden, eps = config.hidden_size, config.rms_norm_eps
        self._sliding = layer.sliding
        self.self_attn = Attention(config, layer, own_kv=False)
        self.mlp = MLP(hidden, layer.intermediate_size)
        self.input_layernorm = nn.RMSNorm(hidden, eps)
        self.post_attention_layernorm = nn.RMSNorm(hidden, eps)
        self.pre_feedforward_layernorm = nn.RMSNorm(hidden, eps)
        self.post_feedforward_layernorm = nn.RMSNorm(hidden, eps)
        self.layer_scalar = mx.ones((1,))

    def __call__(self, h: mx.array, shared: SharedKV, rope: Rope) -> mx.array:
        """Maps hidden states h [B, 1, hidden] to [B, 1, hidden]."""
        kind = self._sliding
        queries, _, _ = self.self_attn.project(self.input_layernorm(h), rope, shared.rotations[kind])
        x = self.self_attn.attend(queries, shared.views[kind])
        h = h + self.post_attention_layernorm(x)
        x = self.mlp(self.pre_feedforward_layernorm(h))
        return add_scaled(h, self.post_feedforward_layernorm(x), self.layer_scalar)


class Drafter(nn.Module):
    """An MTP drafter.

    Attributes:
        config: Its config.
        position: The position of its queries in a round, one of POSITIONS. With N committed tokens, "committed" is the
            last of them, N - 1, and "bonus" the next, N, as in transformers. It changes acceptance, never the text.
    """

    def __init__(self, config: DrafterConfig, position: str) -> None:
        """Makes a drafter with empty weights."""
        super().__init__()
        text = config.text
        self.config = config
        self.position = position
        self._ropes = ropes(text)
        self.pre_projection = nn.Linear(2 * config.backbone_hidden_size, text.hidden_size, bias=False)
        self.layers = [DrafterLayer(text, layer) for layer in text.layers]
        self.norm = nn.RMSNorm(text.hidden_size, text.rms_norm_eps)
        self.post_projection = nn.Linear(text.hidden_size, config.backbone_hidden_size, bias=False)
        if config.num_clusters:
            self.head = ClusteredHead(text.vocab_size, text.hidden_size, config.num_clusters, config.clusters_read)
        else:
            self.embed_tokens = nn.Embedding(text.vocab_size, text.hidden_size)

    def shared_kv(self, kv: KVCache, lengths: mx.array) -> SharedKV:
        """Prepares the target's KV for the draft steps of one round.

        Args:
            kv: The target's buffers.
            lengths: int32 [B], committed tokens of each row, at least 1.
        """
        bonus = self.position == "bonus"
        position = (lengths if bonus else lengths - 1)[:, None]
        # transformers counts the window from the newest committed position and includes both ends: one position more.
        window = self.config.text.sliding_window + bonus
        return SharedKV(
            views=kv.shared(lengths, window),
            rotations={kind: rope.at(position, self.norm.weight.dtype) for kind, rope in self._ropes.items()},
        )

    def __call__(
        self, embedded: mx.array, hidden: mx.array, shared: SharedKV
    ) -> tuple[mx.array, mx.array | None, mx.array]:
        """Runs one draft step.

        Args:
            embedded: [B, backbone], the newest token's embedding, from `Target.embed`.
            hidden: [B, backbone]. In a round's first step the target's hidden state at the last committed position,
                after its final norm; later the third result of the step before.
            shared: From `shared_kv`, for the whole round.

        Returns:
            Logits [B, n] of the next token; their token ids int32 [B, n], or None for the whole vocabulary in order;
            and the hidden state [B, backbone] for the next step.
        """
        h = self.pre_projection(mx.concatenate([embedded, hidden], axis=-1))[:, None, :]
        for layer, spec in zip(self.layers, self.config.text.layers, strict=True):
            h = layer(h, shared, self._ropes[spec.sliding])
        h = self.norm(h).squeeze(1)
        logits, ids = self.head(h) if self.config.num_clusters else (self.embed_tokens.as_linear(h), None)
        return logits, ids, self.post_projection(h)
