"""Are texts under control the same with drafts and in batches as alone, without a drafter?

Calls with random penalties, biases, grammars, tool choices, thinking budgets, predictions, processors, seeds and draft
lengths run in batches of random size; each must give the text that it gives alone with draft length 0. On the embedded
pair, in float32, with MLX's own BLAS: others round products of several rows in another way than those of one.

    python scripts/prove_control.py [--calls 500] [--seed 1] [--max-tokens 60]
"""

from __future__ import annotations

import time
from typing import Annotated

import typer

import mlx_mtp
from tests.support.random_controls import compare_at_random


def main(
    calls: Annotated[int, typer.Option(help="How many calls.")] = 500,
    seed: Annotated[int, typer.Option(help="What they are drawn with.")] = 1,
    max_tokens: Annotated[int, typer.Option(help="Most tokens of a text.")] = 60,
) -> None:
    """Prints every difference; exits with 1 if there is any."""
    begun, differences, done = time.perf_counter(), 0, 0
    with mlx_mtp.load() as lm:
        for done, difference in enumerate(compare_at_random(lm, calls, seed, max_tokens), 1):
            if difference:
                differences += 1
                print(f"differs: {difference}", flush=True)
            if done % 50 == 0:
                print(f"{done} of {calls} calls, {differences} differences", flush=True)
    print(f"{done} calls in {time.perf_counter() - begun:.0f} s: {differences} differences")
    raise SystemExit(differences > 0)


if __name__ == "__main__":
    typer.run(main)
