"""The models' configurations: config.json parsed into frozen dataclasses.

Two forms of config.json exist. Google's has `global_head_dim` and `num_global_key_value_heads` at the top of the text
config; newer transformers versions write `per_layer_config` when they save a model again. Everything that differs from
layer to layer is resolved here, once, into `LayerConfig`, so that the models contain no rules about layer indices.

Not here: files, weights, quantisation.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .errors import CheckpointError, PairingError

TARGET_TYPES = ("gemma4", "gemma4_unified", "gemma4_text", "gemma4_unified_text")
DRAFTER_TYPES = ("gemma4_assistant", "gemma4_unified_assistant")
SLIDING, FULL = "sliding_attention", "full_attention"
"""The kinds of layer in the config field `layer_types`."""

MERGED_FIELDS = ("mtp_assistant_config", "mtp_num_hidden_layers")
"""Fields of a target's text config if a drafter is merged into its files; the first holds the drafter's config.json."""

_OVERRIDES = ("head_dim", "num_key_value_heads")
"""The fields that `per_layer_config` may set for a layer."""

_LARGEST_WIDTH = 2**20
"""Largest matrix width, and number of experts, that is accepted: thirty times the largest model's, and far below MLX's
limit of 31 bits."""

_LARGEST_COUNT = 2**31 - 1
"""Largest number of positions that is accepted."""

_MOST_LAYERS = 1_000
"""Most layers that are accepted, ten times the deepest model's: making a model takes time for each, even without
weights."""

Json = Mapping[str, Any]


@dataclass(frozen=True)
class RopeConfig:
    """Rotary embedding of one kind of layer (config field `rope_parameters`).

    Attributes:
        theta: Base of the frequencies.
        rotated: Share of the head that is rotated (`partial_rotary_factor`); the rest stays as it is.
    """

    theta: float
    rotated: float


@dataclass(frozen=True)
class LayerConfig:
    """One decoder layer.

    Attributes:
        sliding: Whether attention sees only the last `sliding_window` positions.
        head_dim: Size of one attention head.
        kv_heads: Number of key/value heads.
        k_eq_v: Whether values are the key projection (normalised differently), without a projection of their own.
        kv_owner: Index of the layer whose keys and values this layer attends to; its own index if it makes its own.
        intermediate_size: Width of the dense MLP.
    """

    sliding: bool
    head_dim: int
    kv_heads: int
    k_eq_v: bool
    kv_owner: int
    intermediate_size: int


@dataclass(frozen=True)
class TextConfig:
    """A decoder stack, of a target or a drafter.

    Attributes:
        vocab_size: Number of token ids.
        hidden_size: Width of the residual stream.
        num_heads: Number of query heads.
        layers: The layers, bottom first.
        sliding_window: Number of positions that a sliding layer's query sees, its own included.
        rms_norm_eps: Epsilon of every RMSNorm.
        rope: Rotary embedding by kind of layer (`SLIDING`, `FULL`).
        logit_softcap: Logits become cap * tanh(logits / cap); None for no cap.
        ple_size: Width of a per-layer embedding; 0 for none.
        ple_vocab_size: Rows of the per-layer embedding table.
        tied_head: Whether the output head is the embedding table.
        num_experts: Experts per layer; 0 for a dense model.
        experts_per_token: Experts that process each token.
        expert_size: Width of one expert's MLP.
        max_positions: Longest context that the model was made for, in tokens.
    """

    vocab_size: int
    hidden_size: int
    num_heads: int
    layers: tuple[LayerConfig, ...]
    sliding_window: int
    rms_norm_eps: float
    rope: Mapping[str, RopeConfig]
    logit_softcap: float | None
    ple_size: int
    ple_vocab_size: int
    tied_head: bool
    num_experts: int
    experts_per_token: int
    expert_size: int
    max_positions: int

    def kv_source_layer(self, sliding: bool) -> int:
        """Index of the layer whose KV the drafter reads: the last one of a kind that makes its own."""
        return max(i for i, layer in enumerate(self.layers) if layer.sliding == sliding and layer.kv_owner == i)


@dataclass(frozen=True)
class TargetConfig:
    """A target model.

    Attributes:
        model_type: config.json's `model_type`.
        text: The decoder stack.
    """

    model_type: str
    text: TextConfig


@dataclass(frozen=True)
class DrafterConfig:
    """An MTP drafter (`gemma4_assistant`).

    Attributes:
        model_type: config.json's `model_type`.
        text: Its decoder stack; every layer attends to the target's KV.
        backbone_hidden_size: Width of the target's residual stream.
        num_clusters: Clusters of the output head (`num_centroids`); 0 for a dense head.
        clusters_read: Clusters whose tokens are scored (`centroid_intermediate_top_k`).
    """

    model_type: str
    text: TextConfig
    backbone_hidden_size: int
    num_clusters: int
    clusters_read: int


def target_config(config: Json) -> TargetConfig:
    """Reads a target's config.json.

    Args:
        config: The parsed file.

    Raises:
        CheckpointError: Unknown `model_type`, a missing field, or a variant of the architecture that isn't supported.
    """
    model_type = config.get("model_type")
    if model_type in DRAFTER_TYPES:
        raise CheckpointError(f"{model_type} is a drafter, not a target: pass it with drafter= (--drafter)")
    if model_type not in TARGET_TYPES:
        raise CheckpointError(f"model_type {model_type!r} isn't supported: expected one of {', '.join(TARGET_TYPES)}")
    return TargetConfig(model_type, _text_config(config.get("text_config", config), own_kv=True))


def drafter_config(config: Json) -> DrafterConfig:
    """Reads a drafter's config.json.

    Args:
        config: The parsed file.

    Raises:
        CheckpointError: Unknown `model_type`, or a missing field.
    """
    model_type = config.get("model_type")
    if model_type not in DRAFTER_TYPES:
        raise CheckpointError(f"model_type {model_type!r} isn't a drafter: expected {' or '.join(DRAFTER_TYPES)}")
    text = _text_config(_field(config, "text_config"), own_kv=False)
    clusters = _size(config, "num_centroids") if config.get("use_ordered_embeddings") else 0
    if clusters and text.vocab_size % clusters:
        raise CheckpointError(f"num_centroids {clusters} doesn't divide the vocabulary of {text.vocab_size}")
    read = _size(config, "centroid_intermediate_top_k", most=clusters) if clusters else 0
    return DrafterConfig(model_type, text, _size(config, "backbone_hidden_size"), clusters, read)


def merged_drafter(config: Json) -> Any:
    """The config.json of a drafter that is merged into a target's files, unchecked; None if there is none."""
    text = config.get("text_config", config)
    return text.get(MERGED_FIELDS[0]) if isinstance(text, Mapping) else None


def check_pair(target: TargetConfig, drafter: DrafterConfig) -> None:
    """Checks that a drafter fits a target.

    The target may have a larger vocabulary: a fine-tune may have added tokens, which are then never drafted.

    Raises:
        PairingError: Sizes clash; the message names all of them.
    """
    t, d = target.text, drafter.text
    clashes = []
    if drafter.backbone_hidden_size != t.hidden_size:
        clashes.append(f"hidden size {drafter.backbone_hidden_size}, the target has {t.hidden_size}")
    if d.vocab_size > t.vocab_size:
        clashes.append(f"vocabulary {d.vocab_size}, the target has {t.vocab_size}")
    for sliding in {layer.sliding for layer in d.layers}:
        name = "sliding" if sliding else "full"
        if not any(layer.sliding == sliding for layer in t.layers):
            clashes.append(f"{name} layers, the target has none")
            continue
        reader = next(layer for layer in d.layers if layer.sliding == sliding)
        source = t.layers[t.kv_source_layer(sliding)]
        if (reader.head_dim, reader.kv_heads) != (source.head_dim, source.kv_heads):
            clashes.append(
                f"{name} layers with {reader.kv_heads} KV heads of {reader.head_dim}, "
                f"the target has {source.kv_heads} of {source.head_dim}"
            )
        if sliding and d.sliding_window != t.sliding_window:
            clashes.append(f"sliding window {d.sliding_window}, the target has {t.sliding_window}")
    if clashes:
        raise PairingError("the drafter was made for another target: it expects " + "; ".join(clashes))


def _field(config: Json, name: str) -> Any:
    value = config.get(name)
    if value is None:
        raise CheckpointError(f"config.json lacks {name}")
    return value


def _size(config: Json, name: str, least: int = 1, most: int = _LARGEST_WIDTH) -> int:
    """A whole number from `least` to `most`; if `least` is 0, a missing field counts as 0."""
    value = (config.get(name) or 0) if least == 0 else _field(config, name)
    if not isinstance(value, int) or not least <= value <= most:
        raise CheckpointError(f"config.json: {name} is {value!r}, expected a whole number from {least} to {most}")
    return int(value)  # JSON's true is an int, too


def _positive(config: Json, name: str, default: float | None = None) -> float:
    value = _field(config, name) if default is None else config.get(name, default)
    if not isinstance(value, (int, float)) or not 0 < value <= sys.float_info.max:
        raise CheckpointError(f"config.json: {name} is {value!r}, expected a number above 0")
    return float(value)


def _rope(given: Json) -> RopeConfig:
    kind, factor = given.get("rope_type") or "default", given.get("factor") or 1
    if kind not in ("default", "proportional") or factor != 1:
        raise CheckpointError(f"rope_type {kind!r} with factor {factor} isn't supported: no Gemma 4 model has that")
    rotated = _positive(given, "partial_rotary_factor", 1.0)
    if rotated > 1:
        raise CheckpointError(f"config.json: partial_rotary_factor is {rotated}, expected at most 1")
    return RopeConfig(_positive(given, "rope_theta"), rotated)


def _text_config(config: Json, own_kv: bool) -> TextConfig:
    if not isinstance(config, Mapping):
        raise CheckpointError(f"config.json: text_config is {config!r}, expected an object")
    if config.get("attention_bias"):
        raise CheckpointError("attention_bias is set: no Gemma 4 model has attention biases")
    if config.get("use_bidirectional_attention") == "all":
        raise CheckpointError("use_bidirectional_attention is 'all': this is an encoder and can't generate text")
    if (activation := config.get("hidden_activation", "gelu_pytorch_tanh")) != "gelu_pytorch_tanh":
        raise CheckpointError(f"hidden_activation {activation!r} isn't supported: expected gelu_pytorch_tanh")
    cap = config.get("final_logit_softcapping")
    try:
        layers = _layers(config, own_kv)
        experts = _size(config, "num_experts") if config.get("enable_moe_block") else 0
        rope = {kind: _rope(given) for kind, given in _field(config, "rope_parameters").items()}
        text = TextConfig(
            vocab_size=_size(config, "vocab_size"),
            hidden_size=_size(config, "hidden_size"),
            num_heads=_size(config, "num_attention_heads"),
            layers=layers,
            sliding_window=_size(config, "sliding_window", most=_LARGEST_COUNT),
            rms_norm_eps=_positive(config, "rms_norm_eps", 1e-6),
            rope=rope,
            logit_softcap=None if cap is None else _positive(config, "final_logit_softcapping"),
            ple_size=_size(config, "hidden_size_per_layer_input", least=0),
            ple_vocab_size=_size(config, "vocab_size_per_layer_input", least=0),
            tied_head=bool(config.get("tie_word_embeddings", True)),
            num_experts=experts,
            experts_per_token=_size(config, "top_k_experts", most=experts) if experts else 0,
            expert_size=_size(config, "moe_intermediate_size") if experts else 0,
            max_positions=_size(config, "max_position_embeddings", most=_LARGEST_COUNT),
        )
        _check_widths(text)
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise CheckpointError(f"config.json can't be understood: {type(error).__name__} at {error}") from error
    for kind in {SLIDING if layer.sliding else FULL for layer in layers}:
        if kind not in rope:
            raise CheckpointError(f"config.json lacks rope_parameters for {kind} layers")
    return text


def _check_widths(text: TextConfig) -> None:
    """Checks widths that are the product of two fields."""
    for what, width in (
        ("attention heads", max(text.num_heads * layer.head_dim for layer in text.layers)),
        ("key/value heads", max(layer.kv_heads * layer.head_dim for layer in text.layers)),
        ("per-layer embeddings", len(text.layers) * text.ple_size),
    ):
        if width > _LARGEST_WIDTH:
            raise CheckpointError(
                f"config.json: {what} are {width:,} wide together, expected at most {_LARGEST_WIDTH:,}"
            )


def _layers(config: Json, own_kv: bool) -> tuple[LayerConfig, ...]:
    kinds = list(_field(config, "layer_types"))
    if len(kinds) != _field(config, "num_hidden_layers"):
        raise CheckpointError(f"config.json has {len(kinds)} layer_types for {config['num_hidden_layers']} layers")
    if not 0 < len(kinds) <= _MOST_LAYERS:
        raise CheckpointError(f"config.json has {len(kinds):,} layer_types, expected 1 to {_MOST_LAYERS:,}")
    if unknown := set(kinds) - {SLIDING, FULL}:
        raise CheckpointError(f"layer type {min(unknown)!r} isn't supported: expected {SLIDING} or {FULL}")
    first_shared = len(kinds) - _size(config, "num_kv_shared_layers", least=0, most=len(kinds))
    if own_kv and not set(kinds) <= set(kinds[:first_shared]):
        raise CheckpointError("config.json has layers that share KV, but no layer of their kind that makes it")
    k_eq_v = bool(config.get("attention_k_eq_v"))
    overrides = _overrides(config)

    layers = []
    for i, kind in enumerate(kinds):
        sliding = kind == SLIDING
        head_dim, kv_heads = _size(config, "head_dim"), _size(config, "num_key_value_heads")
        if not sliding and overrides is None:
            head_dim = _size(config, "global_head_dim", least=0) or head_dim
            kv_heads = (_size(config, "num_global_key_value_heads", least=0) if k_eq_v else 0) or kv_heads
        override = (overrides or {}).get(i, {})
        shared = i >= first_shared
        # All layers of a drafter read the target's KV, so none shares that of another drafter layer.
        owner = max(j for j in range(first_shared) if kinds[j] == kind) if shared and own_kv else i
        wide = 2 if shared and own_kv and config.get("use_double_wide_mlp") else 1
        layers.append(
            LayerConfig(
                sliding=sliding,
                head_dim=_size({"head_dim": head_dim, **override}, "head_dim"),
                kv_heads=_size({"num_key_value_heads": kv_heads, **override}, "num_key_value_heads"),
                k_eq_v=k_eq_v and not sliding,
                kv_owner=owner,
                intermediate_size=_size(config, "intermediate_size") * wide,
            )
        )
    return tuple(layers)


def _overrides(config: Json) -> dict[int, Json] | None:
    """The contents of `per_layer_config` by layer; None in Google's form, which doesn't have it."""
    given = config.get("per_layer_config")
    if given is None:
        return None
    try:
        # Keys may have leading zeros: "04".
        overrides: dict[int, Json] = {int(i): dict(fields) for i, fields in given.items()}
    except (TypeError, ValueError, AttributeError):
        raise CheckpointError(f"config.json: per_layer_config is {given!r}, expected objects by layer") from None
    for i, fields in overrides.items():
        if odd := [name for name, value in fields.items() if name not in _OVERRIDES and value != config.get(name)]:
            raise CheckpointError(f"config.json: per_layer_config gives layer {i} its own {odd[0]}: not supported")
    return overrides


def in_published_fields(config: Json) -> dict[str, Any]:
    """A text config in Google's form, which all readers know, instead of `per_layer_config`.

    Args:
        config: The text config in either form.

    Returns:
        The same in Google's form, or an unchanged copy if that form can't express it.

    Raises:
        CheckpointError: It can't be understood.
    """
    new = {name: value for name, value in config.items() if name != "per_layer_config"}
    if overrides := _overrides(config):
        full = overrides.get(list(config["layer_types"]).index(FULL), {}) if FULL in config["layer_types"] else {}
        new["global_head_dim"] = full.get("head_dim", config["head_dim"])
        if config.get("attention_k_eq_v"):
            new["num_global_key_value_heads"] = full.get("num_key_value_heads", config["num_key_value_heads"])
    # Google's form can't express everything: there, all layers of a kind have the same sizes.
    return new if _layers(new, own_kv=False) == _layers(config, own_kv=False) else dict(config)
