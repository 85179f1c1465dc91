"""The two config.json files of the embedded pair, in the fields of the published E2B checkpoints.

Everything else (torch models, export) reads its sizes from here. Every size that is a matrix' input is a multiple
of 64, so that both models quantise with the default group size.
"""

from __future__ import annotations

from typing import Any

VOCAB = 2048
HIDDEN = 128
STOP_TOKENS = [1, 106, 50]
"""<eos>, <turn|>, <|tool_response>: the published models stop on these."""

_ROPE = {
    "full_attention": {"partial_rotary_factor": 0.25, "rope_theta": 1000000.0, "rope_type": "proportional"},
    "sliding_attention": {"rope_theta": 10000.0, "rope_type": "default"},
}
_PATTERN = ["sliding_attention"] * 3 + ["full_attention"]
_COMMON: dict[str, Any] = {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "attention_k_eq_v": False,
    "bos_token_id": 2,
    "dtype": "bfloat16",
    "enable_moe_block": False,
    "eos_token_id": 1,
    "global_head_dim": 64,
    "head_dim": 32,
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": HIDDEN,
    "initializer_range": 0.02,
    "max_position_embeddings": 4096,
    "model_type": "gemma4_text",
    "num_attention_heads": 4,
    "num_experts": None,
    "num_global_key_value_heads": None,
    "num_key_value_heads": 1,
    "num_kv_shared_layers": 4,
    "pad_token_id": 0,
    "rms_norm_eps": 1e-06,
    "rope_parameters": _ROPE,
    "sliding_window": 128,
    "tie_word_embeddings": True,
    "top_k_experts": None,
    "use_bidirectional_attention": None,
    "use_cache": True,
    "vocab_size": VOCAB,
}

TARGET: dict[str, Any] = {
    "architectures": ["Gemma4ForConditionalGeneration"],
    "audio_config": None,
    "dtype": "bfloat16",
    "eos_token_id": STOP_TOKENS[:2],
    "initializer_range": 0.02,
    "model_type": "gemma4",
    "text_config": {
        **_COMMON,
        "final_logit_softcapping": 30.0,
        "hidden_size_per_layer_input": 64,
        "intermediate_size": 192,
        "layer_types": _PATTERN * 3,
        "num_hidden_layers": 12,
        "use_double_wide_mlp": True,
        "vocab_size_per_layer_input": VOCAB,
    },
    "tie_word_embeddings": True,
    "vision_config": None,
    "vocab_size": VOCAB,  # mlx-lm looks for it here
}

DRAFTER: dict[str, Any] = {
    "architectures": ["Gemma4AssistantForCausalLM"],
    "backbone_hidden_size": HIDDEN,
    "centroid_intermediate_top_k": 8,
    "dtype": "bfloat16",
    "model_type": "gemma4_assistant",
    "num_centroids": 64,
    "text_config": {
        **_COMMON,
        "final_logit_softcapping": None,
        "hidden_size_per_layer_input": 0,
        "intermediate_size": 256,
        "layer_types": _PATTERN,
        "num_hidden_layers": 4,
        "use_double_wide_mlp": False,
        "vocab_size_per_layer_input": 0,
    },
    "tie_word_embeddings": True,
    "use_ordered_embeddings": True,
}

GENERATION: dict[str, Any] = {
    "bos_token_id": 2,
    "do_sample": False,  # what so small a model draws at temperature 1 is often nonsense
    "eos_token_id": STOP_TOKENS,
    "pad_token_id": 0,
}
DRAFTER_GENERATION: dict[str, Any] = {
    **GENERATION,
    "is_assistant": True,
    "num_assistant_tokens": 4,
    "num_assistant_tokens_schedule": "constant",
}
