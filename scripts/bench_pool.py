"""Measures MLX's pool of freed buffers during the prefill of a long prompt, and the cost of bounding it.

On a Mac, MLX pools freed buffers up to about the machine's memory; this script raises the limit to the same. It
prefills a prompt with the pool bounded, as decoding does, and unbounded, in turns. Prints the largest pool after any
chunk relative to the KV's size, and the time with the bound relative to the time without.

    python scripts/bench_pool.py [--tokens 16000] [--repeats 3] [--json]
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Annotated
from unittest import mock

from mlx_mtp.system.blas import use_openblas

BLAS = use_openblas()  # before MLX is imported

import mlx.core as mx
import typer

from mlx_mtp.decode.prefill import prefill
from mlx_mtp.kv import KVBuffers
from mlx_mtp.measuring.machine import machine_line
from mlx_mtp.models.target import Target
from tests.support.deep_pair import LAYERS, deep_pair

_LIMIT = 2**35
"""Limit of the pool in bytes; never reached here, as on a Mac."""


def run(target: Target, tokens: int) -> tuple[float, float]:
    """Prefills a prompt; returns the seconds, and the largest pool after a chunk relative to the KV's size."""
    mx.clear_cache()
    pools: list[int] = []
    started = time.perf_counter()
    kv, _ = prefill(target, [5 + i % 200 for i in range(tokens)], lambda _: pools.append(mx.get_cache_memory()))
    return time.perf_counter() - started, max(pools) / kv.nbytes


def main(
    tokens: Annotated[int, typer.Option(help="Length of the prompt.")] = 16_000,
    repeats: Annotated[int, typer.Option(help="Repetitions of both variants.")] = 3,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Runs the benchmark and prints its figures."""
    mx.set_cache_limit(_LIMIT)
    with tempfile.TemporaryDirectory() as folder:
        target, _ = deep_pair(Path(folder))
    bounded, free = [], []
    for _ in range(repeats):
        bounded.append(run(target, tokens))
        with mock.patch.object(KVBuffers, "bound_pool"):
            free.append(run(target, tokens))
    times = [one[0] / other[0] for one, other in zip(bounded, free, strict=True)]
    found = {
        "pool / KV, bounded": max(pool for _, pool in bounded),
        "pool / KV, unbounded": max(pool for _, pool in free),
        "seconds bounded / unbounded": statistics.median(times),
    }
    if as_json:
        print(json.dumps(found | {"blas": BLAS, "tokens": tokens}))
        return
    print(f"{machine_line()}, BLAS {BLAS}")
    print(f"a random target of {LAYERS} layers, float32, {tokens:,} tokens, {repeats} repetitions")
    for name, value in found.items():
        print(f"  {name:28s} {value:6.2f}")
    print(f"  (time ratios from {min(times):.2f} to {max(times):.2f})")


if __name__ == "__main__":
    typer.run(main)
