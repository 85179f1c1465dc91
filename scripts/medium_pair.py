"""Pairs of medium size for benchmarks: random weights, and about three of four drafts are accepted.

A drafter with purely random weights would never predict a random target. Here the vocabulary consists of rings of
tokens, and the target mostly chooses the next token of the ring: the embedding of that token is the current one's,
rolled by one entry, and the MLP of the target's last layer rolls its input. The other layers are random, and strong
enough to change the choice now and then, depending on the whole text. The drafter knows only the rings. Both models do
all the work of their architecture.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlx_mtp.checkpoint.pair import DEMO
from mlx_mtp.config import drafter_config, target_config
from mlx_mtp.models.drafter import Drafter
from mlx_mtp.models.target import Target
from tests.support.tiny_checkpoints import make_pair

HIDDEN, VOCAB, WINDOW, CONTEXT = 512, 8192, 256, 16384
_DRAFTER_HIDDEN = 256
# What the random layers add to the residual stream, each relative to the embedding; and the one that rolls. The first
# decides how often the target says something else than the next token of the ring.
_NOISE, _ROLL = {"31b": 0.56, "26b": 0.4}, 4.0


def make_medium_pair(kind: str, folder: Path) -> tuple[Path, Path]:
    """Writes a target of 20 to 50 million parameters and its drafter, with the architecture of "31b" or "26b"."""
    target, drafter = make_pair(kind, folder)
    rings = mx.random.normal((VOCAB // HIDDEN, HIDDEN), key=mx.random.key(5)) * HIDDEN**-0.5
    embedding = mx.stack([mx.roll(rings, i, axis=1) for i in range(HIDDEN)], axis=1).reshape(VOCAB, HIDDEN)

    raw = json.loads((target / "config.json").read_text())
    text = raw["text_config"]
    text |= {"hidden_size": HIDDEN, "intermediate_size": 3 * HIDDEN, "sliding_window": WINDOW, "vocab_size": VOCAB}
    text |= {"vocab_size_per_layer_input": VOCAB, "num_hidden_layers": 2 * text["num_hidden_layers"]}
    text |= {"layer_types": 2 * text["layer_types"], "max_position_embeddings": CONTEXT}
    if text["num_experts"]:
        text |= {"num_experts": 32, "moe_intermediate_size": 128}
    raw["vocab_size"] = VOCAB  # which mlx-lm's loader reads
    weights = _random(Target(target_config(raw).text), 3)
    for name in weights:
        if name.endswith(("post_attention_layernorm.weight", "post_feedforward_layernorm.weight")):
            weights[name] = mx.full((HIDDEN,), _NOISE[kind])
    weights["embed_tokens.weight"] = embedding
    last = f"layers.{text['num_hidden_layers'] - 1}."
    one = mx.eye(HIDDEN)
    # gelu(x) x + gelu(-x) x is about |x| x.
    weights[last + "mlp.gate_proj.weight"] = 4 * mx.concatenate([one, -one, 0 * one])
    weights[last + "mlp.up_proj.weight"] = mx.concatenate([one, one, 0 * one])
    weights[last + "mlp.down_proj.weight"] = mx.concatenate([mx.roll(one, 1, axis=0)] * 2 + [0 * one], axis=1)
    weights[last + "post_feedforward_layernorm.weight"] = mx.full((HIDDEN,), _ROLL)
    names = {name: f"language_model.model.{name.replace('.experts.', '.experts.switch_glu.')}" for name in weights}
    _rewrite(target, raw, {names[name]: value for name, value in weights.items()})

    raw = json.loads((drafter / "config.json").read_text())
    raw["backbone_hidden_size"] = HIDDEN
    raw["text_config"] |= {"hidden_size": _DRAFTER_HIDDEN, "intermediate_size": 2 * _DRAFTER_HIDDEN}
    raw["text_config"] |= {"sliding_window": WINDOW, "vocab_size": VOCAB, "max_position_embeddings": CONTEXT}
    weights = _random(Drafter(drafter_config(raw), "committed"), 4)
    for name in weights:
        if name.endswith(("post_attention_layernorm.weight", "post_feedforward_layernorm.weight")):
            weights[name] = mx.full((_DRAFTER_HIDDEN,), 0.05)
    projection = mx.random.normal((_DRAFTER_HIDDEN, HIDDEN), key=mx.random.key(6)) * HIDDEN**-0.5
    weights["pre_projection.weight"] = mx.concatenate([projection, 0 * projection], axis=1)
    weights["embed_tokens.weight"] = mx.roll(embedding, -1, axis=1) @ projection.T
    inner = {name: name if name.startswith(("pre_", "post_")) else f"model.{name}" for name in weights}
    _rewrite(drafter, raw, {inner[name]: value for name, value in weights.items()})
    return target, drafter


def add_tokenizer(target: Path) -> None:
    """Gives a target the embedded pair's tokenizer, for what needs text; each further token is its number in brackets.

    The chat template is the last message alone, so that a prompt ends with a token that the caller chose.
    """
    shutil.copy(DEMO / "target" / "tokenizer_config.json", target)
    raw = json.loads((DEMO / "target" / "tokenizer.json").read_text("utf-8"))
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
    raw["added_tokens"] += [{"id": i, "content": f"[{i}]", **plain} for i in range(len(raw["model"]["vocab"]), VOCAB)]
    (target / "tokenizer.json").write_text(json.dumps(raw), "utf-8")
    (target / "chat_template.jinja").write_text("{{ messages[-1]['content'] }}", "utf-8")


def _random(model: nn.Module, seed: int) -> dict[str, mx.array]:
    """Weights that map inputs of magnitude 1 to outputs of magnitude 1; norms stay as they are."""
    weights = {}
    for i, (name, value) in enumerate(tree_flatten(model.parameters())):
        key = mx.random.split(mx.random.key(seed), i + 1)[-1]
        weights[name] = mx.random.normal(value.shape, key=key) * value.shape[-1] ** -0.5 if value.ndim > 1 else value
    return weights


def _rewrite(folder: Path, raw: dict[str, Any], weights: dict[str, mx.array]) -> None:
    (folder / "config.json").write_text(json.dumps(raw))
    (folder / "model.safetensors").unlink()
    mx.save_safetensors(str(folder / "model.safetensors"), weights)
