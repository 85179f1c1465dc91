"""Writes tiny random checkpoints of every Gemma 4 size, laid out as Google publishes them.

Each has its size's configuration flags, file names and tensor names; only the dimensions and the vocabulary are small,
and the sliding window (16) is shorter than any useful prompt. All inputs of linear layers are multiples of 64 wide, so
that they quantise. The weights are drawn such that logits are of size 1 to 10 and greedy text doesn't repeat itself.

A helper for tests and scripts, which import it by path; needs numpy and mlx only. That transformers loads these very
folders, without a tensor missing or left over, is for test_parity.py to show.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np

if TYPE_CHECKING:
    from mlx_mtp.models.drafter import Drafter
    from mlx_mtp.models.target import Target

KINDS = ("e2b", "e4b", "12b", "26b", "31b")

ARCHITECTURES = ("e2b", "26b", "31b")
"""One kind of each way to build a target, for tests of what happens around it: e4b is as e2b, and 12b as 31b."""

VOCAB = 512
WINDOW = 16
HEAD_DIM, GLOBAL_HEAD_DIM = 64, 128
PLE = 64
CLUSTERS, CLUSTERS_READ = 16, 4

Json = dict[str, Any]


@dataclass(frozen=True)
class _Kind:
    """What sets one size apart. Numbers are scaled down, their relations kept where they matter.

    Attributes:
        hidden: Width of the target's residual stream.
        heads: Query heads of the target.
        drafter_heads: Query heads of the drafter.
        kv_heads: KV heads.
        layers: The target's layers, "s" for sliding and "f" for full. At least two of each kind own their KV, so
            that reading the first one's instead of the last one's shows.
        text: Fields of the target's text config that differ from `_TEXT`.
        drafter_text: The same for the drafter's.
        clustered: Whether the drafter's head is clustered.
        unified: Whether the architecture is the "unified" one.
    """

    hidden: int
    heads: int
    drafter_heads: int
    kv_heads: int
    layers: str
    text: Mapping[str, Any]
    drafter_text: Mapping[str, Any]
    clustered: bool = False
    unified: bool = False


_TEXT: Json = {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "attention_k_eq_v": False,
    "bos_token_id": 2,
    "dtype": "float32",
    "enable_moe_block": False,
    "eos_token_id": 1,
    "final_logit_softcapping": 30.0,
    "global_head_dim": GLOBAL_HEAD_DIM,
    "head_dim": HEAD_DIM,
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size_per_layer_input": 0,
    "initializer_range": 0.02,
    "intermediate_size": 128,
    "max_position_embeddings": 4096,
    "model_type": "gemma4_text",
    "num_experts": None,
    "num_global_key_value_heads": None,
    "num_kv_shared_layers": 0,
    "pad_token_id": 0,
    "rms_norm_eps": 1e-06,
    "rope_parameters": {
        "full_attention": {"partial_rotary_factor": 0.25, "rope_theta": 1000000.0, "rope_type": "proportional"},
        "sliding_attention": {"rope_theta": 10000.0, "rope_type": "default"},
    },
    "sliding_window": WINDOW,
    "tie_word_embeddings": True,
    "top_k_experts": None,
    "use_bidirectional_attention": None,
    "use_cache": True,
    "use_double_wide_mlp": False,
    "vocab_size": VOCAB,
    "vocab_size_per_layer_input": VOCAB,
}

_PLE: Json = {"hidden_size_per_layer_input": PLE, "num_kv_shared_layers": 2}
_LARGE: Json = {"attention_k_eq_v": True, "use_bidirectional_attention": "vision"}

_KINDS: dict[str, _Kind] = {
    "e2b": _Kind(
        hidden=64, heads=4, drafter_heads=2, kv_heads=1, layers="sfsfsf",
        text={**_PLE, "use_double_wide_mlp": True, "expert_intermediate_size": None}, drafter_text={},
        clustered=True,
    ),
    "e4b": _Kind(
        hidden=64, heads=8, drafter_heads=4, kv_heads=2, layers="ssfsfsf",
        text={**_PLE, "expert_intermediate_size": None}, drafter_text={},
        clustered=True,
    ),
    "12b": _Kind(
        hidden=64, heads=4, drafter_heads=4, kv_heads=2, layers="ssfssf",
        text={**_LARGE, "model_type": "gemma4_unified_text", "moe_intermediate_size": None,
              "num_global_key_value_heads": 1},
        drafter_text={**_LARGE, "model_type": "gemma4_unified_text", "num_global_key_value_heads": 1},
        unified=True,
    ),
    "26b": _Kind(
        hidden=128, heads=4, drafter_heads=4, kv_heads=4, layers="ssfssf",
        text={**_LARGE, "enable_moe_block": True, "moe_intermediate_size": 64, "num_experts": 8, "top_k_experts": 2,
              "num_global_key_value_heads": 2},
        drafter_text={"attention_k_eq_v": True, "num_global_key_value_heads": 2},
    ),
    "31b": _Kind(
        hidden=64, heads=8, drafter_heads=8, kv_heads=4, layers="ssfssf",
        text={**_LARGE, "expert_intermediate_size": None, "num_global_key_value_heads": 2},
        drafter_text={"attention_k_eq_v": True, "num_global_key_value_heads": 2},
    ),
}  # fmt: skip

# Placeholders of images and sound lie outside the vocabulary: no text may contain them. The two closing ones, which
# the 12B model's generation_config suppresses, lie inside it, so that suppressing them matters.
_SPECIAL: Json = {
    "audio_token_id": 258881,
    "boa_token_id": 256000,
    "boi_token_id": 255999,
    "eoa_token_index": VOCAB - 1,
    "eoi_token_id": VOCAB - 2,
    "image_token_id": 258880,
}

_GENERATION: Json = {
    "bos_token_id": 2,
    "do_sample": True,
    "eos_token_id": [1, 106, 50],
    "pad_token_id": 0,
    "temperature": 1.0,
    "top_k": 64,
    "top_p": 0.95,
}


def load_pair(folder: Path, drafter_folder: Path, dtype: str | None = None) -> tuple[Target, Drafter]:
    """Loads a target and its drafter; `dtype` as for `mlx_mtp.load`."""
    from mlx_mtp.checkpoint.description import read_drafter, read_target
    from mlx_mtp.checkpoint.load import load_drafter, load_target

    target = read_target(folder, dtype=dtype)
    own = read_drafter(drafter_folder, dtype=dtype)
    return load_target(target), load_drafter(own, target.config, "committed")


def make_pair(
    kind: str,
    folder: Path,
    *,
    drafter: str | None = None,
    text_only: bool = False,
    towers: bool = False,
    shards: int = 1,
    seed: int = 0,
) -> tuple[Path, Path]:
    """Writes a target and its drafter, float32.

    Args:
        kind: One of KINDS.
        folder: Where to; made if need be.
        drafter: The kind of drafter, if it isn't to be the target's own: no two kinds fit each other.
        text_only: Whether the target is a plain text model (`Gemma4ForCausalLM`) instead of a multimodal one.
        towers: Whether the target's file holds vision and audio tensors too.
        shards: Number of files that the target's tensors are spread over; with an index if there are several.
        seed: Of the weights.

    Returns:
        The folders "target" and "target-assistant" below `folder`.
    """
    size, target_folder, drafter_folder = _KINDS[kind], folder / "target", folder / "target-assistant"
    rng = np.random.default_rng([seed, KINDS.index(kind)])
    text, tensors = _target_text(size), _target_tensors(rng, size)
    unified = "Unified" if size.unified else ""
    config = text
    if text_only:
        config = {"architectures": [f"Gemma4{unified}ForCausalLM"], **text}
    else:
        config = {
            "architectures": [f"Gemma4{unified}ForConditionalGeneration"],
            "dtype": "float32",
            **_SPECIAL,
            "eos_token_id": [1, 106],
            "initializer_range": 0.02,
            "model_type": "gemma4_unified" if size.unified else "gemma4",
            "text_config": text,
            "tie_word_embeddings": True,
            "video_token_id": 258884,
        }
    prefix = "model." if text_only else "model.language_model."
    tensors = {prefix + name: tensor for name, tensor in tensors.items()}
    if towers:
        tensors |= _tower_tensors(rng, size)
    suppressed = {"suppress_tokens": [VOCAB - 1, VOCAB - 2]} if size.unified else {}
    _write(target_folder, config, _GENERATION | suppressed, tensors, shards)
    _write_drafter(drafter or kind, drafter_folder, seed)
    return target_folder, drafter_folder


def _write_drafter(kind: str, folder: Path, seed: int) -> None:
    size = _KINDS[kind]
    text = _drafter_text(size)
    unified = "Unified" if size.unified else ""
    config = {
        "architectures": [f"Gemma4{unified}AssistantForCausalLM"],
        **_SPECIAL,
        "backbone_hidden_size": size.hidden,
        "centroid_intermediate_top_k": CLUSTERS_READ,
        "dtype": "float32",
        "model_type": "gemma4_unified_assistant" if size.unified else "gemma4_assistant",
        "num_centroids": CLUSTERS,
        "text_config": text,
        "tie_word_embeddings": True,
        "use_ordered_embeddings": size.clustered,
    }
    if size.unified:
        generation = _GENERATION | {"eos_token_id": 1, "suppress_tokens": [VOCAB - 1, VOCAB - 2]}
    else:
        assistant = {"is_assistant": True, "num_assistant_tokens": 6, "num_assistant_tokens_schedule": "constant"}
        generation = _GENERATION | assistant
    rng = np.random.default_rng([seed, KINDS.index(kind), 1])
    _write(folder, config, generation, _drafter_tensors(rng, size, text), shards=1)


def _target_text(size: _Kind) -> Json:
    return {
        **_TEXT,
        "hidden_size": size.hidden,
        "layer_types": [_layer_type(letter) for letter in size.layers],
        "num_attention_heads": size.heads,
        "num_hidden_layers": len(size.layers),
        "num_key_value_heads": size.kv_heads,
        **size.text,
    }


def _drafter_text(size: _Kind) -> Json:
    return {
        **_TEXT,
        "final_logit_softcapping": None,
        "hidden_size": 64,
        "layer_types": [_layer_type(letter) for letter in "sssf"],
        "moe_intermediate_size": None,
        "num_attention_heads": size.drafter_heads,
        "num_hidden_layers": 4,
        "num_key_value_heads": size.kv_heads,
        "num_kv_shared_layers": 4,
        "vocab_size_per_layer_input": 0,
        **size.drafter_text,
    }


def _layer_type(letter: str) -> str:
    return {"s": "sliding_attention", "f": "full_attention"}[letter]


def _target_tensors(rng: np.random.Generator, size: _Kind) -> dict[str, np.ndarray]:
    text = _target_text(size)
    hidden, depth = size.hidden, len(size.layers)
    tensors = {"embed_tokens.weight": _normal(rng, VOCAB, hidden), "norm.weight": 1.5 * _gains(rng, hidden)}
    if text["hidden_size_per_layer_input"]:
        tensors["embed_tokens_per_layer.weight"] = _normal(rng, VOCAB, depth * PLE, fan_in=PLE)
        tensors["per_layer_model_projection.weight"] = _normal(rng, depth * PLE, hidden)
        tensors["per_layer_projection_norm.weight"] = _gains(rng, PLE)
    first_shared = depth - text["num_kv_shared_layers"]
    for i, letter in enumerate(size.layers):
        wide = 2 if i >= first_shared and text["use_double_wide_mlp"] else 1
        # The layers drown out the embedding: with a tied head it would make the model repeat its last token.
        layer = _attention_and_mlp(rng, hidden, size.heads, letter, text["intermediate_size"] * wide, post_gain=4.0)
        layer |= _own_kv(rng, size, letter)  # published for layers that share KV too, though never used there
        if text["hidden_size_per_layer_input"]:
            layer["per_layer_input_gate.weight"] = _normal(rng, PLE, hidden)
            layer["per_layer_projection.weight"] = _normal(rng, hidden, PLE)
            layer["post_per_layer_input_norm.weight"] = _gains(rng, hidden)
        if text["enable_moe_block"]:
            layer |= _experts(rng, hidden, text["num_experts"], text["moe_intermediate_size"])
        tensors |= {f"layers.{i}.{name}": tensor for name, tensor in layer.items()}
    return tensors


def _drafter_tensors(rng: np.random.Generator, size: _Kind, text: Json) -> dict[str, np.ndarray]:
    hidden = text["hidden_size"]
    tensors = {
        "model.embed_tokens.weight": _normal(rng, VOCAB, hidden),
        "model.norm.weight": 1.5 * _gains(rng, hidden),
        "pre_projection.weight": _normal(rng, hidden, 2 * size.hidden),
        "post_projection.weight": _normal(rng, size.hidden, hidden),
    }
    for i, letter in enumerate("sssf"):
        layer = _attention_and_mlp(rng, hidden, size.drafter_heads, letter, text["intermediate_size"])
        tensors |= {f"model.layers.{i}.{name}": tensor for name, tensor in layer.items()}
    if size.clustered:
        tensors["masked_embedding.centroids.weight"] = _normal(rng, CLUSTERS, hidden)
        tensors["masked_embedding.token_ordering"] = rng.permutation(VOCAB).astype(np.int64)
    return tensors


def _attention_and_mlp(
    rng: np.random.Generator, hidden: int, heads: int, letter: str, intermediate: int, post_gain: float = 1.0
) -> dict[str, np.ndarray]:
    """What every layer has; `post_gain` scales what it adds to the residual stream."""
    head_dim = HEAD_DIM if letter == "s" else GLOBAL_HEAD_DIM
    tensors = {
        "self_attn.q_proj.weight": _normal(rng, heads * head_dim, hidden),
        "self_attn.o_proj.weight": _normal(rng, hidden, heads * head_dim),
        # Scores aren't divided by sqrt(head_dim): smaller gains keep attention from looking at one position only.
        "self_attn.q_norm.weight": 0.4 * _gains(rng, head_dim),
        "mlp.gate_proj.weight": _normal(rng, intermediate, hidden),
        "mlp.up_proj.weight": _normal(rng, intermediate, hidden),
        "mlp.down_proj.weight": _normal(rng, hidden, intermediate),
        "layer_scalar": rng.uniform(0.7, 1.1, 1).astype(np.float32),
    }
    for name in ("input", "pre_feedforward"):
        tensors[f"{name}_layernorm.weight"] = _gains(rng, hidden)
    for name in ("post_attention", "post_feedforward"):
        tensors[f"{name}_layernorm.weight"] = post_gain * _gains(rng, hidden)
    return tensors


def _own_kv(rng: np.random.Generator, size: _Kind, letter: str) -> dict[str, np.ndarray]:
    head_dim, kv_heads = HEAD_DIM, size.kv_heads
    if letter == "f":
        head_dim, kv_heads = GLOBAL_HEAD_DIM, size.text.get("num_global_key_value_heads") or size.kv_heads
    tensors = {
        "self_attn.k_proj.weight": _normal(rng, kv_heads * head_dim, size.hidden),
        "self_attn.k_norm.weight": 0.4 * _gains(rng, head_dim),
    }
    if letter == "s" or not size.text.get("attention_k_eq_v"):
        tensors["self_attn.v_proj.weight"] = _normal(rng, kv_heads * head_dim, size.hidden)
    return tensors


def _experts(rng: np.random.Generator, hidden: int, experts: int, width: int) -> dict[str, np.ndarray]:
    tensors = {
        "router.proj.weight": _normal(rng, experts, hidden),
        "router.scale": hidden**0.5 * _gains(rng, hidden),
        "router.per_expert_scale": _gains(rng, experts),
        "experts.gate_up_proj": _normal(rng, experts, 2 * width, hidden),
        "experts.down_proj": _normal(rng, experts, hidden, width),
    }
    for name in ("pre_feedforward_layernorm_2", "post_feedforward_layernorm_1", "post_feedforward_layernorm_2"):
        tensors[f"{name}.weight"] = _gains(rng, hidden)
    return tensors


def _tower_tensors(rng: np.random.Generator, size: _Kind) -> dict[str, np.ndarray]:
    """Some of what lies beside the text model, one of each group."""
    tensors = {
        "model.embed_vision.embedding_projection.weight": _normal(rng, size.hidden, 64),
        "model.embed_audio.embedding_projection.weight": _normal(rng, size.hidden, 64),
    }
    if size.unified:
        tensors["model.vision_embedder.patch_dense.weight"] = _normal(rng, 64, 64)
    else:
        tensors["model.vision_tower.encoder.layers.0.self_attn.q_proj.linear.weight"] = _normal(rng, 64, 64)
        tensors["model.vision_tower.encoder.layers.0.self_attn.q_proj.input_max"] = np.float32(3.0).reshape(())
        tensors["model.audio_tower.layers.0.norm_out.weight"] = _gains(rng, 64)
    return tensors


def _normal(rng: np.random.Generator, *shape: int, fan_in: int | None = None) -> np.ndarray:
    """Weights that map inputs of size 1 to outputs of size 1."""
    return (rng.standard_normal(shape) / (fan_in or shape[-1]) ** 0.5).astype(np.float32)


def _gains(rng: np.random.Generator, size: int) -> np.ndarray:
    """Weights of a norm."""
    return rng.uniform(0.6, 1.4, size).astype(np.float32)


def _write(folder: Path, config: Json, generation: Json, tensors: dict[str, np.ndarray], shards: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2))
    weight_map, names = {}, sorted(tensors)
    for shard in range(shards):
        file = f"model-{shard + 1:05}-of-{shards:05}.safetensors" if shards > 1 else "model.safetensors"
        part = {name: mx.array(tensors[name]) for name in names[shard::shards]}
        mx.save_safetensors(str(folder / file), part, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    if shards > 1:
        size = sum(tensor.nbytes for tensor in tensors.values())
        index = {"metadata": {"total_size": size}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
