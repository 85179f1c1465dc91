"""The MTP drafter (`gemma4_assistant`): four layers that guess the target's next tokens.

A draft step reads the last token's embedding (the target's, scaled) beside a hidden state of the target's width, and
attends to the target's own KV buffers: sliding layers to those of the target's last sliding owner, full layers to
those of its last full owner. It writes nothing and owns no KV; all steps of a round see the same committed rows from
the same position.

Not here: which of its scores becomes a draft (decode/sampling.py), and how drafts are checked (decode/round.py).
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


@dataclass(frozen=True)
class SharedKV:
    """The target's state as the drafter sees it during one round.

    Attributes:
        views: By kind of layer, the target's keys and values.
        rotations: By kind of layer, the rotation at the round's one position.
    """

    views: dict[bool, list[View]]
    rotations: dict[bool, Rotation]


class DrafterLayer(nn.Module):
    """One layer: attention to the target's KV, then the MLP."""

    def __init__(self, config: TextConfig, layer: LayerConfig):
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
        """One step h [B, 1, hidden]."""
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
        position: Which position its queries sit at during a round, one of POSITIONS. "committed" is the last
            committed one, N - 1; "bonus" is that of the token after it, N, as transformers has it. Changes how often
            drafts are accepted, never the text.
    """

    def __init__(self, config: DrafterConfig, position: str):
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
        """Looks at the target's buffers, for one round.

        Args:
            kv: The target's buffers.
            lengths: int32 [B], committed tokens of each row, at least 1.
        """
        bonus = self.position == "bonus"
        position = (lengths if bonus else lengths - 1)[:, None]
        # transformers counts the window from the newest committed row with both ends included: one row more.
        window = self.config.text.sliding_window + bonus
        return SharedKV(
            views=kv.shared(lengths, window),
            rotations={kind: rope.at(position, self.norm.weight.dtype) for kind, rope in self._ropes.items()},
        )

    def __call__(
        self, embedded: mx.array, hidden: mx.array, shared: SharedKV
    ) -> tuple[mx.array, mx.array | None, mx.array]:
        """One draft step.

        Args:
            embedded: [B, backbone], the last token's embedding, scaled as the target scales it.
            hidden: [B, backbone], at a round's first step the target's at the last committed position, after its
                final norm; later the third result of the step before.
            shared: From `shared_kv`, for the whole round.

        Returns:
            Logits [B, n] of the next token, the token ids [B, n] they belong to (None: the whole vocabulary, in
            order), and the hidden state [B, backbone] for the next step.
        """
        h = self.pre_projection(mx.concatenate([embedded, hidden], axis=-1))[:, None, :]
        for layer, spec in zip(self.layers, self.config.text.layers, strict=True):
            h = layer(h, shared, self._ropes[spec.sliding])
        h = self.norm(h).squeeze(1)
        logits, ids = self.head(h) if self.config.num_clusters else (self.embed_tokens.as_linear(h), None)
        return logits, ids, self.post_projection(h)
