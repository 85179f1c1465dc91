"""Measures from how many token-expert pairs sorting them by expert is faster (`SORT_FROM` in mlx_mtp/models/moe.py).

Runs the experts of one layer of 26B-A4B with random weights, for tokens that choose experts independently. Prints
median microseconds per call, unsorted and sorted.

    python scripts/bench_expert_sort.py [--bits 4]
"""

from __future__ import annotations

import statistics
import time
from typing import Annotated

import mlx.core as mx
import typer

from mlx_mtp import profile
from mlx_mtp.checkpoint.description import activation_dtype
from mlx_mtp.models import moe
from mlx_mtp.simulate.known_models import known_pair
from scripts.random_weights import with_random_weights

TOKENS = (1, 2, 3, 4, 6, 7, 8, 10, 12, 14, 16, 20, 24, 32, 40, 48, 64, 72, 96, 128, 256, 512)
CALLS, LAPS = 10, 8


def microseconds(experts: moe.Experts, x: mx.array, chosen: mx.array, weights: mx.array, sort: bool) -> float:
    """Median microseconds of a call."""
    moe.SORT_FROM = moe.SORT_FROM_CUDA = 0 if sort else 10**9
    laps = []
    for _ in range(LAPS):
        begun, y = time.perf_counter(), x
        for _ in range(CALLS):
            y = experts(y, chosen, weights)
        mx.eval(y)
        laps.append((time.perf_counter() - begun) / CALLS)
    return 1e6 * statistics.median(laps[2:])


def main(bits: Annotated[int | None, typer.Option(help="Bits of the weights. Default: bfloat16.")] = None) -> None:
    """Measures and prints a table."""
    mx.random.seed(0)
    config, dtype = known_pair("26B-A4B")[0].text, activation_dtype(mx.bfloat16)
    experts = moe.Experts(config)
    with_random_weights(experts, bits, dtype)
    print(f"{f'{bits} bits' if bits else dtype} on {profile.device()}\n  tokens  pairs  unsorted    sorted")
    for tokens in TOKENS:
        scores = mx.random.uniform(shape=(1, tokens, config.num_experts))
        chosen = mx.argsort(scores, axis=-1)[..., : config.experts_per_token]
        x = mx.random.normal((1, tokens, config.hidden_size)).astype(dtype)
        weights = mx.full(chosen.shape, 1 / config.experts_per_token, dtype)
        mx.eval(chosen, x, weights)
        unsorted, in_order = (microseconds(experts, x, chosen, weights, sort) for sort in (False, True))
        print(f"  {tokens:6}{chosen.size:7}{unsorted:10.0f}{in_order:10.0f}", flush=True)


if __name__ == "__main__":
    typer.run(main)
