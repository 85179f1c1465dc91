"""Configs of the five Gemma 4 sizes and their drafters, for predictions without a download.

Each size is a row of a table, completed to a config.json that `mlx_mtp.config` reads, so that the architecture is
described in one place only. The figures are those of Google's published config.json files; the drafters of E4B and
26B-A4B follow Google's converter.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..config import FULL, SLIDING, DrafterConfig, TargetConfig, drafter_config, target_config
from ..errors import MTPError

_COMMON: dict[str, Any] = {
    "vocab_size": 262144,
    "head_dim": 256,
    "global_head_dim": 512,
    "tie_word_embeddings": True,
    "rope_parameters": {
        FULL: {"rope_theta": 1e6, "partial_rotary_factor": 0.25},
        SLIDING: {"rope_theta": 1e4},
    },
}

_SMALL: dict[str, Any] = {
    "sliding_window": 512,
    "max_position_embeddings": 131072,
    "num_attention_heads": 8,
    "hidden_size_per_layer_input": 256,
}
_LARGE: dict[str, Any] = {"sliding_window": 1024, "max_position_embeddings": 262144, "attention_k_eq_v": True}
_EXPERTS: dict[str, Any] = {
    "enable_moe_block": True,
    "num_experts": 128,
    "top_k_experts": 8,
    "moe_intermediate_size": 704,
}


@dataclass(frozen=True)
class _Row:
    """The figures in which a size differs from the others.

    Attributes:
        hidden: Hidden size of the target.
        layers: Layers of the target.
        full_every: Every layer whose number, counted from 1, is a multiple of this has full attention.
        heads: Query heads of the target.
        kv_heads: KV heads of both models.
        full_kv_heads: KV heads of layers with full attention; None for the same.
        intermediate: Width of the target's MLP.
        drafter_hidden: Hidden size of the drafter.
        drafter_heads: Query heads of the drafter.
        more: Further fields of the target's config.
    """

    hidden: int
    layers: int
    full_every: int
    heads: int
    kv_heads: int
    full_kv_heads: int | None
    intermediate: int
    drafter_hidden: int
    drafter_heads: int
    more: dict[str, Any]


_ROWS = {
    "E2B": _Row(1536, 35, 5, 8, 1, None, 6144, 256, 4,
                _SMALL | {"num_kv_shared_layers": 20, "use_double_wide_mlp": True}),
    "E4B": _Row(2560, 42, 6, 8, 2, None, 10240, 256, 4, _SMALL | {"num_kv_shared_layers": 18}),
    "12B": _Row(3840, 48, 6, 16, 8, 1, 15360, 1024, 16, _LARGE),
    "26B-A4B": _Row(2816, 30, 6, 16, 8, 2, 2112, 1024, 16, _LARGE | _EXPERTS),
    "31B": _Row(5376, 60, 6, 32, 16, 4, 21504, 1024, 32, _LARGE),
}  # fmt: skip

KNOWN_MODELS = tuple(_ROWS)
"""Names of the sizes, as in google/gemma-4-NAME-it."""


def known_pair(name: str) -> tuple[TargetConfig, DrafterConfig]:
    """Configs of a size's target and drafter; case doesn't matter.

    Raises:
        MTPError: There is no such size; the message lists them.
    """
    row = {known.lower(): row for known, row in _ROWS.items()}.get(name.lower())
    if row is None:
        raise MTPError(f"no model {name!r}: use one of {', '.join(KNOWN_MODELS)}")
    target = _text(row) | {
        "hidden_size": row.hidden,
        "num_hidden_layers": row.layers,
        "layer_types": [FULL if (i + 1) % row.full_every == 0 else SLIDING for i in range(row.layers)],
        "num_attention_heads": row.heads,
        "intermediate_size": row.intermediate,
        "final_logit_softcapping": 30.0,
        "vocab_size_per_layer_input": _COMMON["vocab_size"],
        **row.more,
    }
    drafter = _text(row) | {
        "hidden_size": row.drafter_hidden,
        "num_hidden_layers": 4,
        "layer_types": [SLIDING] * 3 + [FULL],
        "num_attention_heads": row.drafter_heads,
        "intermediate_size": 8 * row.drafter_hidden,
        "num_kv_shared_layers": 4,
        "sliding_window": target["sliding_window"],
        "max_position_embeddings": target["max_position_embeddings"],
        "attention_k_eq_v": target.get("attention_k_eq_v", False),
    }
    clustered = {"use_ordered_embeddings": True, "num_centroids": 2048, "centroid_intermediate_top_k": 32}
    return target_config({"model_type": "gemma4", "text_config": target}), drafter_config(
        {
            "model_type": "gemma4_assistant",
            "text_config": drafter,
            "backbone_hidden_size": row.hidden,
            **(clustered if row.full_kv_heads is None else {}),
        }
    )


def _text(row: _Row) -> dict[str, Any]:
    return _COMMON | {"num_key_value_heads": row.kv_heads, "num_global_key_value_heads": row.full_kv_heads}
