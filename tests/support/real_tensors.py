"""Names, types and shapes of the tensors in the published Gemma 4 checkpoints, and in mlx-community's conversions.

Made from a short description of each size; holds no weights. A helper for tests, which import it by path.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

Json = dict[str, Any]
Tensors = dict[str, tuple[str, tuple[int, ...]]]
"""Name -> type as safetensors spells it, and shape."""

VOCAB = 262144
HEAD, GLOBAL_HEAD = 256, 512
PLE = 256


@dataclass(frozen=True)
class Size:
    """What sets one size apart.

    Attributes:
        hidden: Width of the target's residual stream.
        depth: Its layers.
        period: Every how manieth layer is a full one.
        heads: Query heads.
        kv_heads: KV heads of sliding layers.
        full_kv_heads: Of full layers, if their values are their keys; 0 if full layers are like sliding ones.
        mlp: Width of the MLP.
        shared: Upper layers that read the KV of lower ones; these models have per-layer embeddings.
        wide: Whether these layers' MLP is twice as wide.
        experts: Experts a layer; each is `expert` wide.
        window: Of sliding layers.
        drafter: Width, query heads and MLP width of the drafter.
        unified: Whether the architecture is the "unified" one, without towers.
    """

    hidden: int
    depth: int
    period: int
    heads: int
    kv_heads: int
    mlp: int
    window: int
    drafter: tuple[int, int, int]
    full_kv_heads: int = 0
    shared: int = 0
    wide: bool = False
    experts: int = 0
    expert: int = 0
    unified: bool = False


SIZES = {
    "E2B": Size(1536, 35, 5, 8, 1, 6144, 512, (256, 4, 2048), shared=20, wide=True),
    "E4B": Size(2560, 42, 6, 8, 2, 10240, 512, (256, 4, 2048), shared=18),
    "12B": Size(3840, 48, 6, 16, 8, 15360, 1024, (1024, 16, 8192), full_kv_heads=1, unified=True),
    "26B-A4B": Size(2816, 30, 6, 16, 8, 2112, 1024, (1024, 16, 8192), full_kv_heads=2, experts=128, expert=704),
    "31B": Size(5376, 60, 6, 32, 16, 21504, 1024, (1024, 32, 8192), full_kv_heads=4),
}


def target(name: str) -> Tensors:
    """The tensors of a target as Google publishes it."""
    size = SIZES[name]
    prefix = "model.language_model."
    shapes = {f"{prefix}{k}": v for k, v in _text(size)}
    shapes |= {f"model.{k}": v for k, v in (_unified(size) if size.unified else _towers(size))}
    return {k: ("BF16", v) for k, v in shapes.items()}


def drafter(name: str) -> Tensors:
    """The tensors of its drafter."""
    size = SIZES[name]
    hidden, heads, mlp = size.drafter
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (VOCAB, hidden),
        "model.norm.weight": (hidden,),
        "pre_projection.weight": (hidden, 2 * size.hidden),
        "post_projection.weight": (size.hidden, hidden),
    }
    if size.shared:
        shapes["masked_embedding.centroids.weight"] = (2048, hidden)
    for i, head in enumerate((HEAD, HEAD, HEAD, GLOBAL_HEAD)):
        shapes |= {f"model.layers.{i}.{k}": v for k, v in _layer(hidden, heads * head, head, mlp)}
    tensors = {k: ("BF16", v) for k, v in shapes.items()}
    return tensors | ({"masked_embedding.token_ordering": ("I64", (VOCAB,))} if size.shared else {})


def target_config(name: str) -> Json:
    """What a target's config.json says that matters to a text decoder."""
    size = SIZES[name]
    text = _text_config(size) | {
        "enable_moe_block": size.experts > 0,
        "final_logit_softcapping": 30.0,
        "hidden_size": size.hidden,
        "hidden_size_per_layer_input": PLE if size.shared else 0,
        "intermediate_size": size.mlp,
        "layer_types": ["full_attention" if _full(size, i) else "sliding_attention" for i in range(size.depth)],
        "moe_intermediate_size": size.expert or None,
        "num_attention_heads": size.heads,
        "num_experts": size.experts or None,
        "num_hidden_layers": size.depth,
        "num_kv_shared_layers": size.shared,
        "top_k_experts": 8 if size.experts else None,
        "use_double_wide_mlp": size.wide,
        "vocab_size_per_layer_input": VOCAB,
    }
    return {"model_type": "gemma4_unified" if size.unified else "gemma4", "text_config": text}


def drafter_config(name: str) -> Json:
    """The same for its drafter."""
    size = SIZES[name]
    hidden, heads, mlp = size.drafter
    text = _text_config(size) | {
        "hidden_size": hidden,
        "intermediate_size": mlp,
        "layer_types": ["sliding_attention"] * 3 + ["full_attention"],
        "num_attention_heads": heads,
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 4,
    }
    return {
        "backbone_hidden_size": size.hidden,
        "centroid_intermediate_top_k": 32,
        "model_type": "gemma4_unified_assistant" if size.unified else "gemma4_assistant",
        "num_centroids": 2048,
        "text_config": text,
        "use_ordered_embeddings": size.shared > 0,
    }


def mlx_community(name: str, bits: int, group: int = 64) -> tuple[Tensors, Json]:
    """A target as mlx-community has it, converted by mlx-vlm: all matrices quantised but those of the towers, and no
    keys and values in layers that don't use them.

    Returns:
        The tensors, and the `quantization` section of config.json.
    """
    size = SIZES[name]
    unused = {f".model.layers.{i}.self_attn.{kind}." for i in _shared(size) for kind in ("k_proj", "v_proj", "k_norm")}
    plain: Tensors = {}
    for stored, (dtype, shape) in target(name).items():
        ours = stored.removeprefix("model.").replace("language_model.", "language_model.model.")
        if any(part in ours for part in unused):  # the towers' layers have such names, too
            continue
        ours = ours.replace(".experts.", ".experts.switch_glu.")
        if ours.endswith("gate_up_proj"):
            half = (shape[0], shape[1] // 2, shape[2])
            plain |= {ours.replace("gate_up_proj", f"{part}_proj.weight"): (dtype, half) for part in ("gate", "up")}
        else:
            plain[ours + ".weight" if ours.endswith("down_proj") else ours] = (dtype, shape)
    tensors: Tensors = {}
    section: Json = {"group_size": group, "bits": bits, "mode": "affine"}
    for stored, (dtype, shape) in plain.items():
        matrix = len(shape) > 1 and stored.endswith(".weight")
        if not matrix or re.match(r"(vision_tower|audio_tower)\.", stored):
            tensors[stored] = (dtype, shape)
            continue
        module = stored.removesuffix(".weight")
        own = 8 if module.endswith("router.proj") else bits
        if own != bits:
            section[module] = {"group_size": group, "bits": own}
        *outer, width = shape
        tensors[stored] = ("U32", (*outer, width * own // 32))
        tensors |= {f"{module}.{part}": (dtype, (*outer, width // group)) for part in ("scales", "biases")}
    return tensors, section


def payload(tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> int:
    """Bytes of tensors."""
    sizes = {"BF16": 2, "U32": 4, "I64": 8}
    return sum(sizes[dtype] * math.prod(shape) for dtype, shape in tensors.values())


def _full(size: Size, layer: int) -> bool:
    return layer % size.period == size.period - 1


def _shared(size: Size) -> range:
    return range(size.depth - size.shared, size.depth)


def _text_config(size: Size) -> Json:
    """What a target's text config and its drafter's have in common."""
    return {
        "attention_k_eq_v": size.full_kv_heads > 0,
        "global_head_dim": GLOBAL_HEAD,
        "head_dim": HEAD,
        "max_position_embeddings": 262144 if size.full_kv_heads else 131072,
        "num_global_key_value_heads": size.full_kv_heads or None,
        "num_key_value_heads": size.kv_heads,
        "rope_parameters": {
            "full_attention": {"partial_rotary_factor": 0.25, "rope_theta": 1e6, "rope_type": "proportional"},
            "sliding_attention": {"rope_theta": 1e4, "rope_type": "default"},
        },
        "sliding_window": size.window,
        "tie_word_embeddings": True,
        "vocab_size": VOCAB,
    }


Shapes = Iterator[tuple[str, tuple[int, ...]]]


def _text(size: Size) -> Shapes:
    hidden = size.hidden
    yield "embed_tokens.weight", (VOCAB, hidden)
    yield "norm.weight", (hidden,)
    if size.shared:
        yield "embed_tokens_per_layer.weight", (VOCAB, size.depth * PLE)
        yield "per_layer_model_projection.weight", (size.depth * PLE, hidden)
        yield "per_layer_projection_norm.weight", (PLE,)
    for i in range(size.depth):
        head = GLOBAL_HEAD if _full(size, i) else HEAD
        kv = (size.full_kv_heads or size.kv_heads if _full(size, i) else size.kv_heads) * head
        wide = 2 if size.wide and i in _shared(size) else 1
        layer = dict(_layer(hidden, size.heads * head, head, size.mlp * wide))
        layer |= {"self_attn.k_proj.weight": (kv, hidden), "self_attn.k_norm.weight": (head,)}
        if not (size.full_kv_heads and _full(size, i)):
            layer["self_attn.v_proj.weight"] = (kv, hidden)
        if size.shared:
            layer["per_layer_input_gate.weight"] = (PLE, hidden)
            layer["per_layer_projection.weight"] = (hidden, PLE)
            layer["post_per_layer_input_norm.weight"] = (hidden,)
        if size.experts:
            layer["router.proj.weight"] = (size.experts, hidden)
            layer["router.scale"] = (hidden,)
            layer["router.per_expert_scale"] = (size.experts,)
            layer["experts.gate_up_proj"] = (size.experts, 2 * size.expert, hidden)
            layer["experts.down_proj"] = (size.experts, hidden, size.expert)
            for norm in ("pre_feedforward_layernorm_2", "post_feedforward_layernorm_1", "post_feedforward_layernorm_2"):
                layer[f"{norm}.weight"] = (hidden,)
        yield from ((f"layers.{i}.{name}", shape) for name, shape in layer.items())


def _layer(hidden: int, queries: int, head: int, mlp: int) -> Shapes:
    """What every text layer has."""
    for norm in ("input", "post_attention", "pre_feedforward", "post_feedforward"):
        yield f"{norm}_layernorm.weight", (hidden,)
    yield "layer_scalar", (1,)
    yield "self_attn.q_proj.weight", (queries, hidden)
    yield "self_attn.o_proj.weight", (hidden, queries)
    yield "self_attn.q_norm.weight", (head,)
    yield from _mlp("", hidden, mlp)


def _mlp(linear: str, hidden: int, mlp: int) -> Shapes:
    yield f"mlp.gate_proj{linear}.weight", (mlp, hidden)
    yield f"mlp.up_proj{linear}.weight", (mlp, hidden)
    yield f"mlp.down_proj{linear}.weight", (hidden, mlp)


def _unified(size: Size) -> Shapes:
    """Vision and audio of the 12B model."""
    hidden, patch = size.hidden, 6912
    yield "embed_vision.embedding_projection.weight", (hidden, hidden)
    yield "embed_audio.embedding_projection.weight", (hidden, 640)
    for norm, width in (("patch_ln1", patch), ("patch_ln2", hidden), ("pos_norm", hidden)):
        yield f"vision_embedder.{norm}.weight", (width,)
        yield f"vision_embedder.{norm}.bias", (width,)
    yield "vision_embedder.patch_dense.weight", (hidden, patch)
    yield "vision_embedder.patch_dense.bias", (hidden,)
    yield "vision_embedder.pos_embedding", (1120, 2, hidden)


def _towers(size: Size) -> Shapes:
    """Vision, and for the small models audio; only these have the bounds of activations."""
    small = size.shared > 0
    width, depth, mlp, head = (768, 16, 3072, 64) if small else (1152, 27, 4304, 72)
    yield "embed_vision.embedding_projection.weight", (size.hidden, width)
    yield "vision_tower.patch_embedder.input_proj.weight", (width, 768)
    yield "vision_tower.patch_embedder.position_embedding_table", (2, 10240, width)
    if not small:
        yield "vision_tower.std_bias", (width,)
        yield "vision_tower.std_scale", (width,)
    for i in range(depth):
        layer: dict[str, tuple[int, ...]] = {
            f"{norm}_layernorm.weight": (width,)
            for norm in ("input", "post_attention", "pre_feedforward", "post_feedforward")
        }
        layer |= {f"self_attn.{part}_norm.weight": (head,) for part in "qk"}
        layer |= {f"self_attn.{part}_proj.linear.weight": (width, width) for part in "qkvo"}
        layer |= dict(_mlp(".linear", width, mlp))
        yield from (
            (f"vision_tower.encoder.layers.{i}.{k}", v) for k, v in (_bounded(layer) if small else layer.items())
        )
    if small:
        yield from _audio(size)


def _audio(size: Size) -> Shapes:
    width = 1024
    yield "embed_audio.embedding_projection.weight", (size.hidden, 1536)
    yield "audio_tower.output_proj.weight", (1536, width)
    yield "audio_tower.output_proj.bias", (1536,)
    subsample = "audio_tower.subsample_conv_projection"
    yield f"{subsample}.layer0.conv.weight", (128, 1, 3, 3)
    yield f"{subsample}.layer0.norm.weight", (128,)
    yield f"{subsample}.layer1.conv.weight", (32, 128, 3, 3)
    yield f"{subsample}.layer1.norm.weight", (32,)
    yield f"{subsample}.input_proj_linear.weight", (width, width)
    layer: dict[str, tuple[int, ...]] = {
        "self_attn.relative_k_proj.weight": (width, width),
        "self_attn.per_dim_scale": (128,),
        "lconv1d.depthwise_conv1d.weight": (width, 1, 5),
        "lconv1d.linear_start.linear.weight": (2 * width, width),
        "lconv1d.linear_end.linear.weight": (width, width),
    }
    layer |= {f"self_attn.{part}.linear.weight": (width, width) for part in ("q_proj", "k_proj", "v_proj", "post")}
    for norm in ("lconv1d.pre_layer_norm", "lconv1d.conv_norm", "norm_pre_attn", "norm_post_attn", "norm_out"):
        layer[f"{norm}.weight"] = (width,)
    for i in (1, 2):
        layer[f"feed_forward{i}.pre_layer_norm.weight"] = layer[f"feed_forward{i}.post_layer_norm.weight"] = (width,)
        layer[f"feed_forward{i}.ffw_layer_1.linear.weight"] = (4 * width, width)
        layer[f"feed_forward{i}.ffw_layer_2.linear.weight"] = (width, 4 * width)
    for i in range(12):
        yield from ((f"audio_tower.layers.{i}.{k}", v) for k, v in _bounded(layer))


def _bounded(layer: Mapping[str, tuple[int, ...]]) -> Shapes:
    """A layer with the bounds of what goes into and comes out of its linear maps."""
    for name, shape in layer.items():
        yield name, shape
        if name.endswith(".linear.weight"):
            for end in ("input_min", "input_max", "output_min", "output_max"):
                yield name.replace("linear.weight", end), ()
