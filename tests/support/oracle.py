"""A naive Gemma 4 in numpy, float64, without any cache: what every logit of the package must be equal to.

It reads a checkpoint's files by itself and runs the whole text at once, position by position as the formulas say: no
KV buffers, blocks, rings or chunks, nothing fused, one loop for each head and each expert. It shares no code with
mlx_mtp; `scripts/prove_model.py` and test_oracle.py hold the two against each other, and test_oracle.py holds it
against transformers.

Not here: how a token is chosen from logits (oracle_choice.py).
"""

from __future__ import annotations

import copy
import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from .oracle_files import Array, read_adapter, read_weights, rounded


@dataclass(frozen=True)
class Seen:
    """What the oracle says of a text.

    Attributes:
        logits: float64 [len(tokens), vocab], after each token, before the softcap.
        margins: float64 [len(tokens)], by how much the nearest expert that wasn't chosen was beaten, in any layer, at
            this or an earlier position. Where it is tiny, rounding may choose another expert.
    """

    logits: Array
    margins: Array


class Oracle:
    """A target's formulas.

    Attributes:
        config: The text config, as the file has it.
        vocab: Number of token ids.
        cap: Softcap of the logits, or None.
    """

    def __init__(self, folder: Path, adapter: Path | None = None, dtype: str = "float32") -> None:
        """Reads config.json, model.safetensors and perhaps an adapter's files.

        Args:
            folder: The target's.
            adapter: The adapter's.
            dtype: What the target is loaded in. In 16 bits the weights are rounded so; the formulas never are.
        """
        whole = json.loads((folder / "config.json").read_text())
        self.config: dict[str, Any] = whole.get("text_config", whole)
        self.vocab: int = self.config["vocab_size"]
        self.cap: float | None = self.config.get("final_logit_softcapping")
        self._weights, self._dtype, self._rough = read_weights(folder, dtype), dtype, False
        self._adapter = read_adapter(adapter) if adapter else {}
        self._eps = self.config["rms_norm_eps"]

    def rounding(self, tokens: list[int]) -> Array:
        """What rounding does to a text's logits: the largest error up to each position, [len(tokens)].

        Measured on these very formulas, in float32 beside float64; for a target in 16 bits, with the result of each
        step rounded to them. It depends on the weights, and grows with depth.
        """
        rough = copy.copy(self)
        rough._weights = {name: tensor.astype(np.float32) for name, tensor in self._weights.items()}
        rough._adapter = {
            name: replace(it, a=it.a.astype(np.float32), b=it.b.astype(np.float32))
            for name, it in self._adapter.items()
        }
        rough._rough = True
        errors = np.abs(self.see(tokens).logits - rough.see(tokens).logits).max(axis=-1)
        return np.maximum.accumulate(errors)

    def see(self, tokens: list[int]) -> Seen:
        """Runs a text."""
        config, weights, count = self.config, self._weights, len(tokens)
        kinds = config["layer_types"]
        first_shared = len(kinds) - (config.get("num_kv_shared_layers") or 0)
        embedded = self._step(self._rows("embed_tokens", tokens) * math.sqrt(config["hidden_size"]))
        ple = self._per_layer(tokens, embedded)
        margins, made, h = np.full(count, np.inf), {}, embedded
        for i, kind in enumerate(kinds):
            x = self._norm(h, f"layers.{i}.input_layernorm")
            if i < first_shared:
                made[kind] = self._keys_and_values(i, kind, x)
            x = self._attention(i, kind, x, *made[kind])
            h = self._step(h + self._norm(x, f"layers.{i}.post_attention_layernorm"))
            x = self._mlp(i, self._norm(h, f"layers.{i}.pre_feedforward_layernorm"))
            if config.get("enable_moe_block"):
                routed, gaps = self._experts(i, h)
                margins = np.minimum(margins, gaps)
                x = self._norm(x, f"layers.{i}.post_feedforward_layernorm_1")
                x = x + self._norm(routed, f"layers.{i}.post_feedforward_layernorm_2")
            h = self._step(h + self._norm(x, f"layers.{i}.post_feedforward_layernorm"))
            if ple is not None:
                x = self._step(_gelu(self._map(h, f"layers.{i}.per_layer_input_gate")) * ple[:, i])
                x = self._map(x, f"layers.{i}.per_layer_projection")
                h = h + self._norm(x, f"layers.{i}.post_per_layer_input_norm")
            h = self._step(h * weights[f"layers.{i}.layer_scalar"])
        h = self._norm(h, "norm")
        logits = self._embedded_back(h) if config.get("tie_word_embeddings", True) else self._map(h, "lm_head")
        return Seen(logits, np.minimum.accumulate(margins))

    def _step(self, x: Array) -> Array:
        """A result as it is; as 16 bits would have it where these are tried out, see `rounding`."""
        return rounded(x, self._dtype) if self._rough and self._dtype != "float32" else x

    def _map(self, x: Array, name: str) -> Array:
        """A linear map with what an adapter adds."""
        out = self._step(x @ self._weights[f"{name}.weight"].T)
        return self._step(out + self._adapter[name](x)) if name in self._adapter else out

    def _rows(self, name: str, tokens: list[int]) -> Array:
        """Rows of an embedding table with what an adapter adds."""
        out = self._weights[f"{name}.weight"][tokens]
        delta = self._adapter.get(name)
        return self._step(out + delta.scale * (delta.a[tokens] @ delta.b)) if delta else out

    def _embedded_back(self, h: Array) -> Array:
        """Logits by the embedding table, with what an adapter adds to it."""
        out = self._step(h @ self._weights["embed_tokens.weight"].T)
        delta = self._adapter.get("embed_tokens")
        return self._step(out + delta.scale * ((h @ delta.b.T) @ delta.a.T)) if delta else out

    def _norm(self, x: Array, name: str | None) -> Array:
        """RMSNorm along the last axis, with the weight of that name; None for none."""
        scaled = x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + self._eps)
        return self._step(scaled if name is None else scaled * self._weights[f"{name}.weight"])

    def _per_layer(self, tokens: list[int], embedded: Array) -> Array | None:
        """Per-layer embeddings [tokens, layers, size]; None if the model has none."""
        size = self.config.get("hidden_size_per_layer_input")
        if not size:
            return None
        shape = len(tokens), len(self.config["layer_types"]), size
        own = self._rows("embed_tokens_per_layer", tokens).reshape(shape) * math.sqrt(size)
        projected = self._map(embedded, "per_layer_model_projection") / math.sqrt(embedded.shape[-1])
        both = own + self._norm(projected.reshape(shape), "per_layer_projection_norm")
        return self._step(both / math.sqrt(2))

    def _sizes(self, i: int, kind: str) -> tuple[int, int]:
        """Head size and number of KV heads of a layer, in Google's form of the config or transformers'."""
        config = self.config
        head_dim, kv_heads = config["head_dim"], config["num_key_value_heads"]
        if config.get("per_layer_config") is not None:
            own = config["per_layer_config"].get(str(i), {})
            return own.get("head_dim", head_dim), own.get("num_key_value_heads", kv_heads)
        if kind == "full_attention":
            head_dim = config.get("global_head_dim") or head_dim
            if config.get("attention_k_eq_v"):
                kv_heads = config.get("num_global_key_value_heads") or kv_heads
        return head_dim, kv_heads

    def _rotated(self, x: Array, kind: str) -> Array:
        """Rotary embedding of x [tokens, head_dim] at positions 0, 1, 2, ...: dimension i turns with i + half."""
        rope = self.config["rope_parameters"][kind]
        half = x.shape[-1] // 2
        turning = int(rope.get("partial_rotary_factor", 1.0) * half)
        out = x.copy()  # of the same type
        for i in range(turning):
            angles = np.arange(len(x)) / rope["rope_theta"] ** (i / half)
            out[:, i] = x[:, i] * np.cos(angles) - x[:, i + half] * np.sin(angles)
            out[:, i + half] = x[:, i + half] * np.cos(angles) + x[:, i] * np.sin(angles)
        return self._step(out)

    def _keys_and_values(self, i: int, kind: str, x: Array) -> tuple[list[Array], list[Array]]:
        """Keys and values of a layer, [tokens, head_dim] for each KV head."""
        head_dim, kv_heads = self._sizes(i, kind)
        name = f"layers.{i}.self_attn"
        keys = self._map(x, f"{name}.k_proj").reshape(len(x), kv_heads, head_dim)
        same = self.config.get("attention_k_eq_v") and kind == "full_attention"
        values = keys if same else self._map(x, f"{name}.v_proj").reshape(keys.shape)
        return (
            [self._rotated(self._norm(keys[:, head], f"{name}.k_norm"), kind) for head in range(kv_heads)],
            [self._norm(values[:, head], None) for head in range(kv_heads)],
        )

    def _attention(self, i: int, kind: str, x: Array, keys: list[Array], values: list[Array]) -> Array:
        """Attention of every position to itself and those before it, as far as the window reaches."""
        name, heads = f"layers.{i}.self_attn", self.config["num_attention_heads"]
        queries = self._map(x, f"{name}.q_proj").reshape(len(x), heads, -1)
        back = np.arange(len(x))[:, None] - np.arange(len(x))[None]  # how far behind the query a key lies
        sees = back >= 0
        if kind == "sliding_attention":
            sees &= back < self.config["sliding_window"]
        outputs = []
        for head in range(heads):
            query = self._rotated(self._norm(queries[:, head], f"{name}.q_norm"), kind)
            shared = head // (heads // len(keys))
            scores = np.where(sees, query @ keys[shared].T, -np.inf)
            outputs.append(self._step(softmax(scores) @ values[shared]))
        return self._map(np.concatenate(outputs, axis=-1), f"{name}.o_proj")

    def _mlp(self, i: int, x: Array) -> Array:
        gate, up = (self._map(x, f"layers.{i}.mlp.{part}_proj") for part in ("gate", "up"))
        return self._map(self._step(_gelu(gate) * up), f"layers.{i}.mlp.down_proj")

    def _experts(self, i: int, h: Array) -> tuple[Array, Array]:
        """What the experts of a layer add, and by how much the last one chosen was ahead of the next."""
        name, most = f"layers.{i}", self.config["top_k_experts"]
        scaled = self._norm(h, None) * self._weights[f"{name}.router.scale"] / math.sqrt(h.shape[-1])
        shares = softmax(scores := self._map(scaled, f"{name}.router.proj"))
        x = self._norm(h, f"{name}.pre_feedforward_layernorm_2")
        gate_up, down = (self._weights[f"{name}.experts.{part}"] for part in ("gate_up_proj", "down_proj"))

        def added(part: str, x: Array, expert: int) -> Array | float:
            delta = self._adapter.get(f"{name}.experts.{part}_proj")
            return delta(x, expert) if delta else 0.0

        order = np.argsort(-scores, axis=1)
        chosen, ranked = order[:, :most], np.take_along_axis(scores, order, axis=1)
        gaps = ranked[:, most - 1] - ranked[:, most] if most < ranked.shape[1] else np.full(len(h), np.inf)
        total, out = np.take_along_axis(shares, chosen, axis=1).sum(axis=1), np.zeros_like(h)
        for expert in range(ranked.shape[1]):
            who = np.flatnonzero((chosen == expert).any(axis=1))
            gate, up = np.split(x[who] @ gate_up[expert].T, 2, axis=1)
            gate, up = gate + added("gate", x[who], expert), up + added("up", x[who], expert)
            inner = _gelu(gate) * up
            weight = shares[who, expert] / total[who] * self._weights[f"{name}.router.per_expert_scale"][expert]
            out[who] += weight[:, None] * (inner @ down[expert].T + added("down", inner, expert))
        return out, gaps


def softmax(x: Array) -> Array:
    """Shares along the last axis."""
    weights = np.exp(x - x.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


def _gelu(x: Array) -> Array:
    """gelu_pytorch_tanh."""
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
