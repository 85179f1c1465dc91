"""Checks MLX's kernels in the shapes of every Gemma 4 size; needs no checkpoint.

Checks a layer of each kind and a whole drafter of each size, with random weights in 4 bits, and the embedded pair.
Prints the findings; exits with 1 if there are any. Only the target's vocabulary and, for E2B and E4B, the projection to
all per-layer embeddings are smaller than the real ones. Meant for a GPU: on a CPU it takes minutes per size.

    scripts/self_test [SIZE ...]      # E2B E4B 12B 26B-A4B 31B demo; all without arguments
"""

from __future__ import annotations

import sys
import time
from dataclasses import replace

from mlx_mtp.system.blas import use_openblas

use_openblas()  # before MLX is imported

import mlx.core as mx

import mlx_mtp
from mlx_mtp.checkpoint.description import activation_dtype
from mlx_mtp.config import TextConfig
from mlx_mtp.measuring.kernels import complaints, summary
from mlx_mtp.measuring.machine import machine_line
from mlx_mtp.models.drafter import Drafter
from mlx_mtp.models.self_test import Finding, self_test
from mlx_mtp.models.target import Target
from mlx_mtp.simulate.known_models import KNOWN_MODELS, known_pair
from scripts.random_weights import with_random_weights

BITS = 4
VOCAB = 8192
"""Vocabulary of the target. MLX chooses its kernels by whether a side exceeds 4,096, not by how much."""


def one_of_each(text: TextConfig) -> TextConfig:
    """The config with one layer of each kind: sliding or full, own or shared KV, each width of the MLP."""
    kept: dict[tuple[bool, bool, int], int] = {}
    for i, layer in enumerate(text.layers):
        kept.setdefault((layer.sliding, layer.kv_owner == i, layer.intermediate_size), i)
    chosen = sorted(kept.values())
    owners = {text.layers[i].sliding: new for new, i in enumerate(chosen) if text.layers[i].kv_owner == i}
    layers = tuple(replace(text.layers[i], kv_owner=owners[text.layers[i].sliding]) for i in chosen)
    return replace(text, layers=layers, vocab_size=VOCAB, ple_vocab_size=VOCAB)


def findings(size: str) -> list[Finding]:
    """Findings of the self-test for a size, or for the embedded pair."""
    if size == "demo":
        with mlx_mtp.load(profile=None) as lm, lm.models() as (target, drafter):
            return self_test(target, drafter)
    target_config, drafter_config = known_pair(size)
    target, drafter = Target(one_of_each(target_config.text)), Drafter(drafter_config, "committed")
    mx.random.seed(0)
    for model in (target, drafter):
        with_random_weights(model, BITS, activation_dtype(mx.bfloat16))
    return self_test(target, drafter)


def main(sizes: list[str]) -> int:
    """Checks the given sizes, or all; returns the exit code."""
    known = [*KNOWN_MODELS, "demo"]
    if unknown := set(sizes) - set(known):
        raise SystemExit(f"unknown sizes {', '.join(sorted(unknown))}: use {', '.join(known)}")
    print(machine_line(), flush=True)
    failed = False
    for size in sizes or known:
        started = time.perf_counter()
        found = findings(size)
        wrong = complaints(found)
        failed = failed or bool(wrong)
        print(f"{size}: {summary(found)} ({time.perf_counter() - started:.1f} s)", flush=True)
        for line in wrong:
            print(f"  {line}", flush=True)
        mx.clear_cache()
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
