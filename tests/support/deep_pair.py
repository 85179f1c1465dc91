"""A random pair that is tiny but has as many layers as E2B, so that building a round takes as long as running it."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx

from mlx_mtp.checkpoint.description import read_drafter
from mlx_mtp.checkpoint.load import load_drafter
from mlx_mtp.config import target_config
from mlx_mtp.models.drafter import Drafter
from mlx_mtp.models.target import Target
from tests.support.tiny_checkpoints import make_pair

LAYERS = 35


def deep_pair(folder: Path) -> tuple[Target, Drafter]:
    """A random target of E2B's kind with 35 layers, 20 of which share KV as in E2B, and a drafter for it."""
    source, drafter_folder = make_pair("e2b", folder)
    raw = json.loads((source / "config.json").read_text())
    kinds = ["full_attention" if i % 5 == 4 else "sliding_attention" for i in range(LAYERS)]
    more = {"num_hidden_layers": LAYERS, "layer_types": kinds, "num_kv_shared_layers": 20}
    raw["text_config"] |= more | {"max_position_embeddings": 2**17}
    config = target_config(raw)
    target = Target(config.text)
    for part in target.modules():
        if hasattr(part, "prepare"):
            part.prepare()
    mx.eval(target.parameters())
    return target, load_drafter(read_drafter(drafter_folder, dtype="float32"), config, "committed")
