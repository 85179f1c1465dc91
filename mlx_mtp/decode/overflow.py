"""Checks that a model's activations fit float16, whose largest number is 65,504.

Gemma was trained in bfloat16, which has a larger range. M1 and M2 have no bfloat16 arithmetic, so float16 is worth
trying there. Activations that overflow become infinite, then NaN, and stay in the KV: from there on the text is
garbage, without an error. So a pair in float16 is run on a short block before it is used.
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
"""The token that begins every Gemma text, in all sizes."""

TOKENS, CPU_TOKENS = 512, 16
"""Tokens to run on a GPU and on a CPU, where a block of a large model takes seconds."""

DRAFTS = 2
"""Draft steps to run: only from the second on does the drafter read its own hidden state."""


def check_overflow(target: Target, drafter: Drafter | None) -> None:
    """Runs a pair in float16 on random tokens and checks that all results are finite.

    Does nothing if neither model computes in float16, or if the environment variable `SWITCH` is "0". An overflow of
    the target is an error: its text would be garbage, and bfloat16 takes no more memory. An overflow of the drafter is
    only logged as a warning: it can't change the text, since its drafts are rejected.

    Args:
        target: The target.
        drafter: Its drafter, or None.

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
            "this model's activations overflow float16, and its text would be garbage: load it with "
            f"dtype='bfloat16', or convert it with --dtype bfloat16 ({SWITCH}=0 skips this check)"
        )
    if drafter and drafter_half and not _drafts_are_finite(target, drafter, kv, hidden, tokens):
        log.warning(
            "this drafter's activations overflow float16: its drafts will be rejected, and cost time. Load the pair "
            "with dtype='bfloat16', or without the drafter"
        )


def _finite(array: mx.array) -> mx.array:
    return mx.isfinite(array).all()


def _drafts_are_finite(target: Target, drafter: Drafter, kv: KVBuffers, hidden: mx.array, tokens: list[int]) -> bool:
    """Runs draft steps after a prefill of `tokens`; `hidden` is the target's at the last token."""
    shared = drafter.shared_kv(kv, mx.array([len(tokens)], dtype=mx.int32))
    results = []
    for token in tokens[:DRAFTS]:
        logits, _, hidden = drafter(target.embed(mx.array([token], dtype=mx.int32)), hidden, shared)
        results += [_finite(logits), _finite(hidden)]
    return bool(mx.stack(results).all().item())
