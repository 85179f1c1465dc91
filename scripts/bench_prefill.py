"""Compares the speed of prefill with mlx-lm's, on the same weights in the same run.

Prompts of several lengths are prefilled by the medium pairs' targets (random weights of a dense and of a
mixture-of-experts architecture). Ours and mlx-lm's take turns, each from an empty cache to the first token. Every
figure is the median ratio of mlx-lm's seconds to ours: above 1, ours is faster.

    python scripts/bench_prefill.py [--repeats 5] [--lengths 512,2000,8000] [--kinds 31b,26b] [--json]
"""

from __future__ import annotations

import json
import statistics
import tempfile
from pathlib import Path
from typing import Annotated

from mlx_mtp.system.blas import use_openblas

BLAS = use_openblas()  # before MLX is imported

import mlx.core as mx
import typer
from mlx_lm.generate import generate_step

import mlx_mtp
from mlx_mtp.measuring.machine import machine_line
from mlx_mtp.measuring.peer_mlx_lm import load_target
from mlx_mtp.measuring.spread import Spread, seconds
from scripts.medium_pair import VOCAB, make_medium_pair


def ratios(kind: str, length: int, repeats: int) -> list[float]:
    """Ratios of mlx-lm's seconds to the first token to ours, one per turn."""
    prompt = [5 + (i * 7919) % (VOCAB - 10) for i in range(length)]
    with tempfile.TemporaryDirectory() as folder:
        target, _ = make_medium_pair(kind, Path(folder))
        theirs = load_target(target, mx.float32)
        with mlx_mtp.load(target, drafter=False, profile=None, cache_bytes=0) as lm:

            def ours() -> object:
                return lm.generate(prompt, 1, temperature=0, ignore_eos=True)

            def mlx_lm() -> object:
                return next(generate_step(mx.array(prompt), theirs, max_tokens=1))

            ours(), mlx_lm()  # warm-up
            return [seconds(mlx_lm) / seconds(ours) for _ in range(repeats)]


def main(
    repeats: Annotated[int, typer.Option(help="Turns of each.")] = 5,
    lengths: Annotated[str, typer.Option(help="Tokens of the prompts.")] = "512,2000,8000",
    kinds: Annotated[str, typer.Option(help="31b is dense, 26b has experts.")] = "31b,26b",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Runs the benchmark and prints its table."""
    found = {
        (kind, length): ratios(kind, length, repeats)
        for kind in kinds.split(",")
        for length in map(int, lengths.split(","))
    }
    if as_json:
        print(json.dumps({f"{kind} {length}": statistics.median(all_) for (kind, length), all_ in found.items()}))
        return
    print(f"{machine_line()}, BLAS {BLAS}")
    print("prefill, ours / mlx-lm's speed; median (lowest to highest)")
    for (kind, length), all_ in found.items():
        print(f"  {kind} {length:6,} tokens  {Spread.of(all_).text()}")


if __name__ == "__main__":
    typer.run(main)
