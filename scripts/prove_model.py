"""Is every text the one that a naive decoder without any cache writes?

Random pairs with every flag of the architecture, weights of 16 or 32 bits or quantised, and adapters; and random calls
of each: prompts at the edges of window, ring, capacity and chunk, every option, batches, several answers, streams whose
readers leave, cancelled calls, prompts that are cached and saved, from several threads at a time. The oracle
(tests/support/oracle.py, numpy in float64) checks each token, where texts end, their strings and their
log-probabilities, and one text's logits for each pair.

A token that differs counts as a difference, unless the oracle's own scores are so near that rounding to float32 could
swap them. How near that is, it measures: 8 times what float32 does to its own logits in that text. Where rounding may
choose another expert, the rest of a text isn't judged. Both are counted. How targets that compute in 16 bits are judged
says tests/support/oracle_judge.py.

    python scripts/prove_model.py [--pairs 120] [--seed 0] [--minutes 30] [--jobs 2]
"""

from __future__ import annotations

import logging
import tempfile
import time
import traceback
from collections import Counter
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated

import mlx.core as mx
import typer

from tests.support.oracle_calls import alone, judge_of, loaded, run_model, shrunk
from tests.support.oracle_judge import wrong_logits
from tests.support.oracle_pairs import random_pair


def prove(seed: int, waves: int, rows: int, crowd: int) -> Counter[str]:
    """Checks one pair; prints what is wrong, in its smallest form."""
    logging.disable(logging.WARNING)  # these models have no chat template, and needn't
    with tempfile.TemporaryDirectory() as folder:
        try:
            return _prove(Path(folder), seed, waves, rows, crowd)
        except Exception:
            print(f"pair {seed}: {traceback.format_exc()}", flush=True)
            return Counter(pairs=1, differences=1)


def _prove(folder: Path, seed: int, waves: int, rows: int, crowd: int) -> Counter[str]:
    pair, counts = random_pair(folder, seed), Counter(pairs=1)
    for given, verdict in run_model(pair, seed, waves, rows, crowd):
        counts.update(
            requests=1,
            tokens=verdict.tokens,
            near=verdict.near,
            unjudged=verdict.unjudged,
            accepted=given.accepted,
            differences=bool(verdict.differences),
        )
        if verdict.differences:
            call = shrunk(pair, given.call)
            where = f"alone: {alone(pair, call)}" if alone(pair, call) else "only in company"
            print(f"pair {seed}: {verdict.differences} ({where}): {call}, was {given}", flush=True)
        last = [*given.call.prompt, *given.tokens]
    with loaded(pair) as lm:
        judge = judge_of(pair, lm)
        wrong = wrong_logits(lm, judge, last[: judge.oracle.config["max_position_embeddings"]])
    if wrong:
        print(f"pair {seed}: {wrong}", flush=True)
        counts["differences"] += 1
    return counts


def main(
    pairs: Annotated[int, typer.Option(help="How many random pairs.")] = 120,
    seed: Annotated[int, typer.Option(help="Seed of the first one.")] = 0,
    waves: Annotated[int, typer.Option(help="How often a pair is called.")] = 1,
    rows: Annotated[int, typer.Option(help="Different calls of each time, about.")] = 24,
    crowd: Annotated[int, typer.Option(help="Longer texts with the same options, beside them.")] = 176,
    minutes: Annotated[float, typer.Option(help="Begin no pair after that.")] = 1e9,
    jobs: Annotated[int, typer.Option(help="Pairs checked at a time, each in its own process.")] = 1,
) -> None:
    """Prints every difference; exits with 1 if there is any."""
    begun, counts, done = time.perf_counter(), Counter[str](), 0
    print(f"mlx {mx.__version__} on {mx.default_device()}")
    with ProcessPoolExecutor(jobs, get_context("spawn"), max_tasks_per_child=20) as pool:
        waiting = iter(range(seed, seed + pairs))
        running = {pool.submit(prove, number, waves, rows, crowd) for number in islice(waiting, jobs)}
        while running:
            finished, running = wait(running, return_when=FIRST_COMPLETED)
            for future in finished:
                counts += future.result()
                done += 1
                if done % 10 == 0:
                    print(", ".join(f"{count:,} {what}" for what, count in counts.items()), flush=True)
            if time.perf_counter() - begun < 60 * minutes:
                running |= {pool.submit(prove, number, waves, rows, crowd) for number in islice(waiting, len(finished))}
    print(
        f"{counts['pairs']} pairs, {counts['requests']:,} requests, {counts['tokens']:,} tokens, of which "
        f"{counts['accepted']:,} were drafts: {counts['differences']} differences; {counts['near']} near ties, "
        f"{counts['unjudged']} tokens not judged"
    )
    raise SystemExit(counts["differences"] > 0)


if __name__ == "__main__":
    typer.run(main)
