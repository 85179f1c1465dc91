"""Does float16 hold what a model computes? It ends at 65,504, and Gemma's activations were made in bfloat16.

M1 and M2 have no bfloat16 arithmetic, so float16 is worth trying there. What overflows becomes infinite, then no number
at all, and stays in the KV: the text is garbage from there on, without an error. So a pair in float16 runs over a short
block before it is used.
"""

from __future__ import annotations

import logging
import os

import mlx.core as mx
import numpy as np

from ..errors import CheckpointError
from ..kv import KVBuffers
from ..models.drafter import Drafter
from ..models.self_test import SWITCH
from ..models.target import Target
from ..system.fusing import on_gpu
from .prefill import prefill

log = logging.getLogger(__name__)

BOS = 2
"""The token that begins every text of Gemma's, whatever the size."""

TOKENS, CPU_TOKENS = 512, 16
"""Tokens that are run, and on a CPU, where a block of a large model takes seconds."""

DRAFTS = 2
"""Draft steps that are run: the second one is the first to see the drafter's own hidden state."""


def check_overflow(target: Target, drafter: Drafter | None) -> None:
    """Runs a pair over made-up tokens, if it computes in float16, and checks that all results are finite.

    An error for the target: nobody wants its text then, and bfloat16 takes no more memory. A warning for the drafter,
    whose overflow can only cost drafts. SWITCH, "0", leaves it to the user.

    Raises:
        CheckpointError: The target overflows.
    """
    target_half, drafter_half = target.dtype == mx.float16, drafter and drafter.norm.weight.dtype == mx.float16
    if os.environ.get(SWITCH) == "0" or not (target_half or drafter_half):
        return
    config = target.config
    number = min(TOKENS if on_gpu() else CPU_TOKENS, config.max_positions)
    tokens = [BOS, *np.random.default_rng(0).integers(0, config.vocab_size, number - 1).tolist()]
    finite: list[mx.array] = []
    kv, hidden = prefill(target, tokens, lambda it: finite.extend((_finite(it), _finite(target.raw_logits(it)))))
    if target_half and not mx.stack(finite).all().item():
        raise CheckpointError(
            "float16 is too small for what this model computes, and its text would be garbage: load it with "
            f"dtype='bfloat16', or convert it with --dtype bfloat16 ({SWITCH}=0 takes it as it is)"
        )
    if drafter and drafter_half and not _drafts_are_finite(target, drafter, kv, hidden, tokens):
        log.warning(
            "float16 is too small for what this drafter computes: its drafts will be refused, and cost time. Load the "
            "pair with dtype='bfloat16', or without the drafter"
        )


def _finite(array: mx.array) -> mx.array:
    return mx.isfinite(array).all()


def _drafts_are_finite(target: Target, drafter: Drafter, kv: KVBuffers, hidden: mx.array, tokens: list[int]) -> bool:
    """Runs draft steps after tokens; hidden is the target's at the last of them."""
    lent = drafter.shared_kv(kv, mx.array([len(tokens)], dtype=mx.int32))
    results = []
    for token in tokens[:DRAFTS]:
        logits, _, hidden = drafter(target.embed(mx.array([token], dtype=mx.int32)), hidden, lent)
        results += [_finite(logits), _finite(hidden)]
    return bool(mx.stack(results).all().item())
