"""Random Gemma 4 pairs: every flag of the architecture in combinations that no published size has, and tiny.

Sizes are small enough for the oracle, and odd where nothing forbids it: windows shorter than a block, vocabularies that
are no multiple of 32, contexts that fill up. Tensors are named as in Google's files.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import mlx.core as mx
import numpy as np

from .oracle_storage import Storage, write_adapter
from .tiny_tokenizer import BYTES, SPECIAL, write_tokenizer

Json = dict[str, Any]

FULL, SLIDING = "full_attention", "sliding_attention"

TEXT_VOCAB = 306
"""Tokens of tiny_tokenizer.py."""

SILENT = [*range(3, len(SPECIAL)), *BYTES[128:]]
"""Tokens that a model with a tokenizer never chooses: every text is ASCII, and has neither thoughts nor calls."""


@dataclass(frozen=True)
class Pair:
    """A pair, and how it is to be loaded.

    Attributes:
        target, drafter: The folders.
        adapter: Folder of the target's adapter, or None.
        dtype: Type of the activations.
    """

    target: Path
    drafter: Path
    adapter: Path | None = None
    dtype: str = "float32"


def random_pair(folder: Path, seed: int) -> Pair:
    """Writes a random pair, stored in a random way, perhaps with an adapter; the same seed gives the same files."""
    rng = Random(f"{seed} stored")
    storage = Storage(rng.choice(["float32", "float32", "bfloat16", "float16"]), rng.random() < 0.5, seed)
    target, drafter = write_pair(folder, seed, storage)
    adapter = None
    if rng.random() < 0.4:
        shapes = {name: it.shape for name, it in _target_tensors(np.random.default_rng(0), _text(target), 1.0).items()}
        adapter = write_adapter(folder / "adapter", shapes, seed)
    short = rng.random() < 0.15 and not _text(target)["enable_moe_block"]  # which needs float32 on a CPU
    return Pair(target, drafter, adapter, rng.choice(["bfloat16", "float16"]) if short else "float32")


def _text(target: Path) -> Json:
    text: Json = json.loads((target / "config.json").read_text())["text_config"]
    return text


def random_config(rng: Random, wide: bool = False) -> Json:
    """A target's config.json with a random text config; `wide` for matrices that can be quantised, most of them."""
    depth = rng.choice([1, 2, 2, 3, 3, 4, 6])
    kinds = [rng.choice([SLIDING, SLIDING, FULL]) for _ in range(depth)]
    owners = next(i for i in range(1, depth + 1) if set(kinds[:i]) == set(kinds))
    kv_heads, heads_each = rng.choice([1, 1, 2, 3]), rng.choice([1, 2, 3])
    same, shared = rng.random() < 0.4, rng.choice([0, 0, rng.randint(0, depth - owners)])
    heads = kv_heads * heads_each
    text: Json = {
        "attention_bias": False, "attention_k_eq_v": same, "enable_moe_block": False,
        "final_logit_softcapping": rng.choice([None, 30.0, 30.0, 3.0]),
        "global_head_dim": rng.choice([None, 4, 8, 12]), "head_dim": rng.choice([4, 6, 8]),
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size": rng.choice([32, 32, 64, 64] if wide else [8, 12, 16, 24]),
        "hidden_size_per_layer_input": rng.choice([0, 0, 4, 6]),
        "intermediate_size": rng.choice([64, 20, 32] if wide else [8, 20, 32]),
        "layer_types": kinds, "max_position_embeddings": rng.choice([60, 131, 200, 700, 4096]),
        "model_type": "gemma4_text", "num_attention_heads": heads, "num_hidden_layers": depth,
        "num_global_key_value_heads": rng.choice([None, *(n for n in range(1, heads + 1) if heads % n == 0)]),
        "num_key_value_heads": kv_heads, "num_kv_shared_layers": shared, "rms_norm_eps": rng.choice([1e-6, 1e-5]),
        "rope_parameters": {
            FULL: {"partial_rotary_factor": rng.choice([0.25, 0.5, 1.0]), "rope_theta": rng.choice([1e4, 1e6]),
                   "rope_type": "proportional"},
            SLIDING: {"rope_theta": 1e4, "rope_type": "default"},
        },
        "sliding_window": rng.choice([1, 2, 3, 5, 8, 13, 16, 31, 47]),
        "tie_word_embeddings": rng.random() < 0.7, "use_double_wide_mlp": shared > 0 and rng.random() < 0.5,
        "vocab_size": TEXT_VOCAB if rng.random() < 0.4 else rng.choice([8, 33, 64, 97, 320]),
    }  # fmt: skip
    text["vocab_size_per_layer_input"] = text["vocab_size"] + rng.choice([0, 0, 3])
    if rng.random() < 0.35:
        experts = rng.randint(1, 6)
        text |= {"enable_moe_block": True, "num_experts": experts, "top_k_experts": rng.randint(1, experts),
                 "moe_intermediate_size": rng.choice([32, 12] if wide else [4, 12])}  # fmt: skip
    if rng.random() < 0.2:
        text = _per_layer_form(text)
    return {"model_type": "gemma4", "text_config": text, "tie_word_embeddings": text["tie_word_embeddings"]}


def _per_layer_form(text: Json) -> Json:
    """The same config as newer versions of transformers write it."""
    own = {
        str(i): {"head_dim": size[0], "num_key_value_heads": size[1]}
        for i, kind in enumerate(text["layer_types"])
        if (size := sizes(text, kind)) != (text["head_dim"], text["num_key_value_heads"])
    }
    return {**text, "per_layer_config": own}


def sizes(text: Json, kind: str) -> tuple[int, int]:
    """Head size and KV heads of a kind of layer, as Google's form of the config gives them."""
    if kind == SLIDING:
        return text["head_dim"], text["num_key_value_heads"]
    kv_heads = (text["attention_k_eq_v"] and text["num_global_key_value_heads"]) or text["num_key_value_heads"]
    return text["global_head_dim"] or text["head_dim"], kv_heads


def drafter_config(rng: Random, target: Json) -> Json:
    """The config.json of a drafter for a target."""
    own = target["text_config"]
    kinds = sorted(set(own["layer_types"]))
    layers = [rng.choice(kinds) for _ in range(rng.randint(1, 3))]
    vocab = own["vocab_size"]
    divisors = [n for n in range(2, vocab + 1) if vocab % n == 0]
    clusters = rng.choice(divisors[:4])
    heads = own["num_attention_heads"]
    text = {
        **{name: value for name, value in own.items() if name != "per_layer_config"},
        "enable_moe_block": False, "final_logit_softcapping": None, "hidden_size": rng.choice([8, 16]),
        "hidden_size_per_layer_input": 0, "layer_types": layers, "num_attention_heads": heads * rng.choice([1, 2]),
        "num_hidden_layers": len(layers), "num_kv_shared_layers": len(layers), "use_double_wide_mlp": False,
        "tie_word_embeddings": True,
    }  # fmt: skip
    return {
        "model_type": "gemma4_assistant", "backbone_hidden_size": own["hidden_size"], "text_config": text,
        "num_centroids": clusters, "centroid_intermediate_top_k": rng.randint(1, clusters),
        "use_ordered_embeddings": rng.random() < 0.5, "tie_word_embeddings": True,
    }  # fmt: skip


def write_pair(folder: Path, seed: int, storage: Storage | None = None) -> tuple[Path, Path]:
    """Writes a random pair; the same seed gives the same files.

    Args:
        folder: Where to write them.
        seed: Of everything about the pair.
        storage: How the target's weights are stored; None for float32.

    Returns:
        The folders "target" and "drafter" below `folder`.
    """
    rng, weights = Random(seed), np.random.default_rng(seed)
    storage = storage or Storage()
    config = random_config(rng, storage.quantised)
    own = drafter_config(rng, config)
    text = config["text_config"]
    vocab = text["vocab_size"]
    generation: Json = {"eos_token_id": rng.choice([1, [1], [1, 2]])}
    if vocab == TEXT_VOCAB:
        generation["suppress_tokens"] = SILENT
    elif rng.random() < 0.3:
        generation["suppress_tokens"] = rng.sample(range(3, vocab), 2)
    # Flat distributions make drafters that draw with the same noise right; steep ones make texts that repeat.
    tensors = _target_tensors(weights, text, steepness=rng.choice([0.3, 1.0, 2.0]))
    names = {"lm_head.weight": "lm_head.weight"}
    tensors = {names.get(name, f"model.language_model.{name}"): it for name, it in tensors.items()}
    target = _written(folder / "target", config, storage.stored(config, tensors))
    (target / "generation_config.json").write_text(json.dumps(generation))
    if vocab == TEXT_VOCAB:
        write_tokenizer(target)
    return target, _written(folder / "drafter", own, Storage().stored(own, _drafter_tensors(weights, own)))


def _written(folder: Path, config: Json, tensors: dict[str, mx.array]) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    mx.save_safetensors(str(folder / "model.safetensors"), tensors)
    return folder


def _target_tensors(rng: np.random.Generator, text: Json, steepness: float) -> dict[str, np.ndarray]:
    hidden, vocab, depth = text["hidden_size"], text["vocab_size"], len(text["layer_types"])
    found = {"embed_tokens.weight": _normal(rng, vocab, hidden), "norm.weight": steepness * _gains(rng, hidden)}
    if not text["tie_word_embeddings"]:
        found["lm_head.weight"] = _normal(rng, vocab, hidden) * hidden**0.5
    if size := text["hidden_size_per_layer_input"]:
        found["embed_tokens_per_layer.weight"] = _normal(rng, text["vocab_size_per_layer_input"], depth * size)
        found["per_layer_model_projection.weight"] = _normal(rng, depth * size, hidden)
        found["per_layer_projection_norm.weight"] = _gains(rng, size)
    for i, kind in enumerate(text["layer_types"]):
        shared = i >= depth - text["num_kv_shared_layers"]
        wide = text["intermediate_size"] * (2 if shared and text["use_double_wide_mlp"] else 1)
        layer = _layer(rng, text, kind, hidden, wide)
        if not shared:
            head_dim, kv_heads = sizes(text, kind)
            layer["self_attn.k_proj.weight"] = _normal(rng, kv_heads * head_dim, hidden)
            layer["self_attn.k_norm.weight"] = 0.7 * _gains(rng, head_dim)
            if not (text["attention_k_eq_v"] and kind == FULL):
                layer["self_attn.v_proj.weight"] = _normal(rng, kv_heads * head_dim, hidden)
        if size:
            layer["per_layer_input_gate.weight"] = _normal(rng, size, hidden)
            layer["per_layer_projection.weight"] = _normal(rng, hidden, size)
            layer["post_per_layer_input_norm.weight"] = _gains(rng, hidden)
        if text["enable_moe_block"]:
            experts, width = text["num_experts"], text["moe_intermediate_size"]
            layer["router.proj.weight"] = _normal(rng, experts, hidden)
            layer["router.scale"] = hidden**0.5 * _gains(rng, hidden)
            layer["router.per_expert_scale"] = _gains(rng, experts)
            layer["experts.gate_up_proj"] = _normal(rng, experts, 2 * width, hidden)
            layer["experts.down_proj"] = _normal(rng, experts, hidden, width)
            for name in ("pre_feedforward_layernorm_2", "post_feedforward_layernorm_1", "post_feedforward_layernorm_2"):
                layer[f"{name}.weight"] = _gains(rng, hidden)
        found |= {f"layers.{i}.{name}": tensor for name, tensor in layer.items()}
    return found


def _layer(rng: np.random.Generator, text: Json, kind: str, hidden: int, wide: int) -> dict[str, np.ndarray]:
    """What the layers of targets and drafters have in common."""
    head_dim, heads = sizes(text, kind)[0], text["num_attention_heads"]
    norms = {"input": 1.0, "pre_feedforward": 1.0, "post_attention": 2.0, "post_feedforward": 2.0}
    return {
        "self_attn.q_proj.weight": _normal(rng, heads * head_dim, hidden),
        "self_attn.q_norm.weight": 0.7 * _gains(rng, head_dim),
        "self_attn.o_proj.weight": _normal(rng, hidden, heads * head_dim),
        "mlp.gate_proj.weight": _normal(rng, wide, hidden),
        "mlp.up_proj.weight": _normal(rng, wide, hidden),
        "mlp.down_proj.weight": _normal(rng, hidden, wide),
        "layer_scalar": rng.uniform(0.7, 1.1, 1).astype(np.float32),
        **{f"{name}_layernorm.weight": gain * _gains(rng, hidden) for name, gain in norms.items()},
    }


def _drafter_tensors(rng: np.random.Generator, config: Json) -> dict[str, np.ndarray]:
    text = config["text_config"]
    hidden, backbone, vocab = text["hidden_size"], config["backbone_hidden_size"], text["vocab_size"]
    found = {
        "model.embed_tokens.weight": _normal(rng, vocab, hidden),
        "model.norm.weight": _gains(rng, hidden),
        "pre_projection.weight": _normal(rng, hidden, 2 * backbone),
        "post_projection.weight": _normal(rng, backbone, hidden),
    }
    for i, kind in enumerate(text["layer_types"]):
        layer = _layer(rng, text, kind, hidden, text["intermediate_size"])
        found |= {f"model.layers.{i}.{name}": tensor for name, tensor in layer.items()}
    if config["use_ordered_embeddings"]:
        found["masked_embedding.centroids.weight"] = _normal(rng, config["num_centroids"], hidden)
        found["masked_embedding.token_ordering"] = rng.permutation(vocab).astype(np.int64)
    return found


def _normal(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """Weights that map inputs of size 1 to outputs of size 1."""
    return (rng.standard_normal(shape) / shape[-1] ** 0.5).astype(np.float32)


def _gains(rng: np.random.Generator, size: int) -> np.ndarray:
    """Weights of a norm."""
    return rng.uniform(0.6, 1.4, size).astype(np.float32)
