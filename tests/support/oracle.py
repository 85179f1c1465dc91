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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]


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


def read_safetensors(path: Path) -> dict[str, Array]:
    """The tensors of a file with nothing but float32 and int64 in it."""
    raw = path.read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    tensors = {}
    for name, entry in json.loads(raw[8:start]).items():
        if name != "__metadata__":
            begin, end = entry["data_offsets"]
            kind = {"F32": np.float32, "I64": np.int64}[entry["dtype"]]
            flat = np.frombuffer(raw[start + begin : start + end], kind)
            tensors[name] = flat.reshape(entry["shape"]).astype(np.float64)
    return tensors


class Oracle:
    """A target's formulas.

    Attributes:
        config: The text config, as the file has it.
        vocab: Number of token ids.
        cap: Softcap of the logits, or None.
    """

    def __init__(self, folder: Path) -> None:
        """Reads config.json and model.safetensors."""
        whole = json.loads((folder / "config.json").read_text())
        self.config: dict[str, Any] = whole.get("text_config", whole)
        self.vocab: int = self.config["vocab_size"]
        self.cap: float | None = self.config.get("final_logit_softcapping")
        prefix = "model.language_model." if "text_config" in whole else "model."
        found = read_safetensors(folder / "model.safetensors")
        self._weights = {name.removeprefix(prefix): tensor for name, tensor in found.items()}
        self._eps = self.config["rms_norm_eps"]

    def rounding(self, tokens: list[int]) -> Array:
        """What rounding to float32 does to a text's logits: the largest error up to each position, [len(tokens)].

        Measured on these very formulas, in float32 beside float64: it depends on the weights, and grows with depth.
        """
        rough = copy.copy(self)
        rough._weights = {name: tensor.astype(np.float32) for name, tensor in self._weights.items()}
        errors = np.abs(self.see(tokens).logits - rough.see(tokens).logits).max(axis=-1)
        return np.maximum.accumulate(errors)

    def see(self, tokens: list[int]) -> Seen:
        """Runs a text."""
        config, weights, count = self.config, self._weights, len(tokens)
        kinds = config["layer_types"]
        first_shared = len(kinds) - (config.get("num_kv_shared_layers") or 0)
        embedded = weights["embed_tokens.weight"][tokens] * math.sqrt(config["hidden_size"])
        ple = self._per_layer(tokens, embedded)
        margins, made, h = np.full(count, np.inf), {}, embedded
        for i, kind in enumerate(kinds):
            x = self._norm(h, f"layers.{i}.input_layernorm")
            if i < first_shared:
                made[kind] = self._keys_and_values(i, kind, x)
            x = self._attention(i, kind, x, *made[kind])
            h = h + self._norm(x, f"layers.{i}.post_attention_layernorm")
            x = self._mlp(i, self._norm(h, f"layers.{i}.pre_feedforward_layernorm"))
            if config.get("enable_moe_block"):
                routed, gaps = self._experts(i, h)
                margins = np.minimum(margins, gaps)
                x = self._norm(x, f"layers.{i}.post_feedforward_layernorm_1")
                x = x + self._norm(routed, f"layers.{i}.post_feedforward_layernorm_2")
            h = h + self._norm(x, f"layers.{i}.post_feedforward_layernorm")
            if ple is not None:
                x = _gelu(h @ weights[f"layers.{i}.per_layer_input_gate.weight"].T) * ple[:, i]
                x = x @ weights[f"layers.{i}.per_layer_projection.weight"].T
                h = h + self._norm(x, f"layers.{i}.post_per_layer_input_norm")
            h = h * weights[f"layers.{i}.layer_scalar"]
        tied = config.get("tie_word_embeddings", True)
        head = weights["embed_tokens.weight" if tied else "lm_head.weight"]
        return Seen(self._norm(h, "norm") @ head.T, np.minimum.accumulate(margins))

    def _norm(self, x: Array, name: str | None) -> Array:
        """RMSNorm along the last axis, with the weight of that name; None for none."""
        scaled = x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + self._eps)
        return scaled if name is None else scaled * self._weights[f"{name}.weight"]

    def _per_layer(self, tokens: list[int], embedded: Array) -> Array | None:
        """Per-layer embeddings [tokens, layers, size]; None if the model has none."""
        size = self.config.get("hidden_size_per_layer_input")
        if not size:
            return None
        shape = len(tokens), len(self.config["layer_types"]), size
        own = self._weights["embed_tokens_per_layer.weight"][tokens].reshape(shape) * math.sqrt(size)
        projected = embedded @ self._weights["per_layer_model_projection.weight"].T / math.sqrt(embedded.shape[-1])
        return (own + self._norm(projected.reshape(shape), "per_layer_projection_norm")) / math.sqrt(2)

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
        return out

    def _keys_and_values(self, i: int, kind: str, x: Array) -> tuple[list[Array], list[Array]]:
        """Keys and values of a layer, [tokens, head_dim] for each KV head."""
        head_dim, kv_heads = self._sizes(i, kind)
        name = f"layers.{i}.self_attn"
        keys = (x @ self._weights[f"{name}.k_proj.weight"].T).reshape(len(x), kv_heads, head_dim)
        same = self.config.get("attention_k_eq_v") and kind == "full_attention"
        values = keys if same else (x @ self._weights[f"{name}.v_proj.weight"].T).reshape(keys.shape)
        return (
            [self._rotated(self._norm(keys[:, head], f"{name}.k_norm"), kind) for head in range(kv_heads)],
            [self._norm(values[:, head], None) for head in range(kv_heads)],
        )

    def _attention(self, i: int, kind: str, x: Array, keys: list[Array], values: list[Array]) -> Array:
        """Attention of every position to itself and those before it, as far as the window reaches."""
        name, heads = f"layers.{i}.self_attn", self.config["num_attention_heads"]
        queries = (x @ self._weights[f"{name}.q_proj.weight"].T).reshape(len(x), heads, -1)
        back = np.arange(len(x))[:, None] - np.arange(len(x))[None]  # how far behind the query a key lies
        sees = back >= 0
        if kind == "sliding_attention":
            sees &= back < self.config["sliding_window"]
        outputs = []
        for head in range(heads):
            query = self._rotated(self._norm(queries[:, head], f"{name}.q_norm"), kind)
            shared = head // (heads // len(keys))
            scores = np.where(sees, query @ keys[shared].T, -np.inf)
            outputs.append(softmax(scores) @ values[shared])
        return np.concatenate(outputs, axis=-1) @ self._weights[f"{name}.o_proj.weight"].T

    def _mlp(self, i: int, x: Array) -> Array:
        gate, up, down = (self._weights[f"layers.{i}.mlp.{name}_proj.weight"] for name in ("gate", "up", "down"))
        return (_gelu(x @ gate.T) * (x @ up.T)) @ down.T

    def _experts(self, i: int, h: Array) -> tuple[Array, Array]:
        """What the experts of a layer add, and by how much the last one chosen was ahead of the next."""
        name, most = f"layers.{i}", self.config["top_k_experts"]
        scaled = self._norm(h, None) * self._weights[f"{name}.router.scale"] / math.sqrt(h.shape[-1])
        shares = softmax(scores := scaled @ self._weights[f"{name}.router.proj.weight"].T)
        x = self._norm(h, f"{name}.pre_feedforward_layernorm_2")
        gate_up, down = (self._weights[f"{name}.experts.{part}"] for part in ("gate_up_proj", "down_proj"))
        out, gaps = np.zeros_like(h), np.full(len(h), np.inf)
        for token in range(len(h)):
            order = np.argsort(-scores[token])
            chosen = order[:most]
            if len(order) > most:
                gaps[token] = scores[token, order[most - 1]] - scores[token, order[most]]
            for expert in chosen:
                gate, up = np.split(gate_up[expert] @ x[token], 2)
                share = shares[token, expert] / shares[token, chosen].sum()
                weight = share * self._weights[f"{name}.router.per_expert_scale"][expert]
                out[token] += weight * (down[expert] @ (_gelu(gate) * up))
        return out, gaps


def softmax(x: Array) -> Array:
    """Shares along the last axis."""
    weights = np.exp(x - x.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


def _gelu(x: Array) -> Array:
    """gelu_pytorch_tanh."""
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
