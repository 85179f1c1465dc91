"""Target and drafter as torch modules for training, with the parameter names of the published checkpoints.

Only what the embedded pair needs: one KV head, per-layer embeddings, KV sharing, a clustered head; whole sequences,
no KV cache. `export.py` checks the result against the package's own models.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Json = dict[str, Any]


class RMSNorm(nn.Module):
    """x / rms(x) * weight."""

    def __init__(self, size: int, start: float = 1.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((size,), start))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, 1e-6)


def linear(inputs: int, outputs: int) -> nn.Linear:
    """A linear map without bias that keeps the variance of its input."""
    layer = nn.Linear(inputs, outputs, bias=False)
    nn.init.normal_(layer.weight, std=inputs**-0.5)
    return layer


def rotation(positions: Tensor, head_dim: int, rope: Json) -> tuple[Tensor, Tensor]:
    """Cosines and sines [..., head_dim] at positions [...]; pairs are (i, i + head_dim / 2)."""
    pairs = head_dim // 2
    turning = int(rope.get("partial_rotary_factor", 1.0) * pairs)
    frequencies = torch.zeros(pairs)
    frequencies[:turning] = rope["rope_theta"] ** (-torch.arange(turning) / pairs)
    angles = torch.cat([positions[..., None] * frequencies] * 2, dim=-1)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos_sin: tuple[Tensor, Tensor]) -> Tensor:
    """Rotates [..., head_dim]."""
    a, b = x.chunk(2, dim=-1)
    return x * cos_sin[0] + torch.cat([-b, a], dim=-1) * cos_sin[1]


@dataclass(frozen=True)
class View:
    """Where queries sit and what they see, for one kind of layer.

    Attributes:
        rotation: Rotation of the queries, each [B or 1, 1, L, head_dim].
        visible: bool [B or 1, 1, L, positions].
    """

    rotation: tuple[Tensor, Tensor]
    visible: Tensor


def views(text: Json, queries: Tensor, length: int) -> dict[str, View]:
    """Views of queries at positions [B or 1, L] on the positions 0 .. length - 1, by kind of layer."""
    keys, at = torch.arange(length), queries[:, None, :, None]
    past = keys <= at
    kinds = {
        "sliding_attention": (text["head_dim"], past & (keys > at - text["sliding_window"])),
        "full_attention": (text["global_head_dim"], past),
    }
    ropes = text["rope_parameters"]
    return {k: View(rotation(queries[:, None], dim, ropes[k]), seen) for k, (dim, seen) in kinds.items()}


class Attention(nn.Module):
    """Attention with one KV head of its own, or none."""

    def __init__(self, text: Json, head_dim: int, own_kv: bool) -> None:
        super().__init__()
        hidden, self.heads, self.head_dim = text["hidden_size"], text["num_attention_heads"], head_dim
        # Attention isn't scaled: the norms make queries times keys start with a variance of 1.
        start = head_dim**-0.25
        self.q_proj = linear(hidden, self.heads * head_dim)
        self.o_proj = linear(self.heads * head_dim, hidden)
        self.q_norm = RMSNorm(head_dim, start)
        if own_kv:
            self.k_proj, self.v_proj = linear(hidden, head_dim), linear(hidden, head_dim)
            self.k_norm = RMSNorm(head_dim, start)

    def keys_values(self, x: Tensor, view: View) -> tuple[Tensor, Tensor]:
        """Keys and values [B, 1, L, head_dim]."""
        values = F.rms_norm(self.v_proj(x), (self.head_dim,), eps=1e-6)
        return rotate(self.k_norm(self.k_proj(x))[:, None], view.rotation), values[:, None]

    def forward(self, x: Tensor, keys: Tensor, values: Tensor, view: View) -> Tensor:
        b, length, _ = x.shape
        queries = self.q_norm(self.q_proj(x).view(b, length, self.heads, self.head_dim)).transpose(1, 2)
        shape = (b, self.heads, -1, -1)
        out = F.scaled_dot_product_attention(
            rotate(queries, view.rotation), keys.expand(shape), values.expand(shape), view.visible, scale=1.0
        )
        return self.o_proj(out.transpose(1, 2).reshape(b, length, -1))


class MLP(nn.Module):
    """down(gelu(gate(x)) * up(x))."""

    def __init__(self, hidden: int, inner: int) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = linear(hidden, inner), linear(hidden, inner)
        self.down_proj = linear(inner, hidden)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.gelu(self.gate_proj(x), approximate="tanh") * self.up_proj(x))


class Layer(nn.Module):
    """A decoder layer of either model."""

    def __init__(self, text: Json, kind: str, own_kv: bool, inner: int) -> None:
        super().__init__()
        hidden, self.kind, self.own_kv = text["hidden_size"], kind, own_kv
        ple, branch = text["hidden_size_per_layer_input"], (2 * text["num_hidden_layers"]) ** -0.5
        head_dim = text["head_dim" if kind == "sliding_attention" else "global_head_dim"]
        self.self_attn, self.mlp = Attention(text, head_dim, own_kv), MLP(hidden, inner)
        self.input_layernorm, self.post_attention_layernorm = RMSNorm(hidden), RMSNorm(hidden, branch)
        self.pre_feedforward_layernorm, self.post_feedforward_layernorm = RMSNorm(hidden), RMSNorm(hidden, branch)
        if ple:
            self.per_layer_input_gate, self.per_layer_projection = linear(hidden, ple), linear(ple, hidden)
            self.post_per_layer_input_norm = RMSNorm(hidden, branch)
        self.layer_scalar = nn.Parameter(torch.ones(1))

    def forward(self, h: Tensor, lent: dict[str, tuple[Tensor, Tensor]], view: View, ple: Tensor | None) -> Tensor:
        """Runs h [B, L, hidden]; a layer with KV of its own puts it into `lent`, the others read it there."""
        x = self.input_layernorm(h)
        if self.own_kv:
            lent[self.kind] = self.self_attn.keys_values(x, view)
        h = h + self.post_attention_layernorm(self.self_attn(x, *lent[self.kind], view))
        h = h + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(h)))
        if ple is not None:
            gated = F.gelu(self.per_layer_input_gate(h), approximate="tanh") * ple
            h = h + self.post_per_layer_input_norm(self.per_layer_projection(gated))
        return h * self.layer_scalar


@dataclass(frozen=True)
class Pass:
    """What the target computed for a batch of sequences.

    Attributes:
        hidden: After the final norm, [B, L, hidden].
        lent: By kind of layer, keys and values [B, 1, L, head_dim] of the last layer that owns some.
    """

    hidden: Tensor
    lent: dict[str, tuple[Tensor, Tensor]]


class Target(nn.Module):
    """The target."""

    def __init__(self, config: Json) -> None:
        super().__init__()
        self.text = text = config["text_config"]
        hidden, kinds, self.ple = text["hidden_size"], text["layer_types"], text["hidden_size_per_layer_input"]
        own = len(kinds) - text["num_kv_shared_layers"]
        inner = text["intermediate_size"]
        self.embed_tokens = nn.Embedding(text["vocab_size"], hidden)
        nn.init.normal_(self.embed_tokens.weight, std=hidden**-0.5)
        self.embed_tokens_per_layer = nn.Embedding(text["vocab_size"], len(kinds) * self.ple)
        nn.init.normal_(self.embed_tokens_per_layer.weight, std=self.ple**-0.5)
        self.per_layer_model_projection = linear(hidden, len(kinds) * self.ple)
        self.per_layer_projection_norm = RMSNorm(self.ple)
        self.layers = nn.ModuleList(
            Layer(text, kind, i < own, inner * (1 if i < own else 2)) for i, kind in enumerate(kinds)
        )
        self.norm = RMSNorm(hidden)

    def embed(self, tokens: Tensor) -> Tensor:
        """Scaled embeddings [..., hidden] of token ids [...]."""
        return self.embed_tokens(tokens) * self.text["hidden_size"] ** 0.5

    def forward(self, tokens: Tensor) -> Pass:
        """Runs whole sequences [B, L]."""
        h, shape = self.embed(tokens), (*tokens.shape, len(self.layers), self.ple)
        projected = self.per_layer_model_projection(h).view(shape) * self.text["hidden_size"] ** -0.5
        table = self.embed_tokens_per_layer(tokens).view(shape) * self.ple**0.5
        ple = (self.per_layer_projection_norm(projected) + table) * 2**-0.5
        view = views(self.text, torch.arange(tokens.shape[1])[None], tokens.shape[1])
        lent: dict[str, tuple[Tensor, Tensor]] = {}
        for i, layer in enumerate(self.layers):
            h = layer(h, lent, view[layer.kind], ple[:, :, i])
        return Pass(self.norm(h), lent)

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [..., vocab] of hidden states [..., hidden]."""
        cap = self.text["final_logit_softcapping"]
        return cap * torch.tanh(F.linear(hidden, self.embed_tokens.weight) / cap)


class Drafter(nn.Module):
    """The drafter; its query position is the last committed one."""

    def __init__(self, config: Json) -> None:
        super().__init__()
        self.text = text = config["text_config"]
        hidden, backbone = text["hidden_size"], config["backbone_hidden_size"]
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(text["vocab_size"], hidden)
        self.model.layers = nn.ModuleList(
            Layer(text, kind, False, text["intermediate_size"]) for kind in text["layer_types"]
        )
        self.model.norm = RMSNorm(hidden)
        self.pre_projection, self.post_projection = linear(2 * backbone, hidden), linear(hidden, backbone)
        self.masked_embedding = nn.Module()
        self.masked_embedding.centroids = linear(hidden, config["num_centroids"])
        self.masked_embedding.register_buffer("token_ordering", torch.arange(text["vocab_size"]))

    def unroll(
        self, embedded: Tensor, hidden: Tensor, lent: dict[str, tuple[Tensor, Tensor]], at: Tensor
    ) -> Iterator[Tensor]:
        """Drafts from several places of each sequence at once, fed with given tokens.

        Args:
            embedded: [B, A, steps, backbone], scaled embeddings of the tokens that the steps read.
            hidden: [B, A, backbone], the target's hidden states at the last committed positions.
            lent: The target's keys and values (`Pass.lent`).
            at: int [B, A], the last committed positions.

        Yields:
            For each step the final hidden states [B, A, hidden], for `logits` and `cluster_logits`.
        """
        view = views(self.text, at, next(iter(lent.values()))[0].shape[2])
        for step in range(embedded.shape[2]):
            h = self.pre_projection(torch.cat([embedded[:, :, step], hidden], dim=-1))
            for layer in self.model.layers:
                h = layer(h, lent, view[layer.kind], None)
            h = self.model.norm(h)
            hidden = self.post_projection(h)
            yield h

    def logits(self, h: Tensor) -> Tensor:
        """Scores [..., vocab] of all tokens."""
        return F.linear(h, self.model.embed_tokens.weight)

    def cluster_logits(self, h: Tensor) -> Tensor:
        """Scores [..., clusters] of the clusters."""
        return self.masked_embedding.centroids(h)
