"""Is every text the one that a naive decoder without any cache writes?

Random pairs with every flag of the architecture, and random calls of each: prompts at the edges of window, ring,
capacity and chunk, every option, batches, several answers, streams whose readers leave, cancelled calls, prompts that
are cached and saved, from several threads at a time. The oracle (tests/support/oracle.py, numpy in float64) checks each
token, where texts end, their strings and their log-probabilities, and one text's logits for each pair.

A token that differs counts as a difference, unless the oracle's own scores are so near that rounding to float32 could
swap them. How near that is, it measures: 8 times what float32 does to its own logits in that text. Where rounding may
choose another expert, the rest of a text isn't judged. Both are counted.

    python scripts/prove_model.py [--pairs 200] [--seed 0] [--minutes 30]
"""

from __future__ import annotations

import logging
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Annotated

import mlx.core as mx
import typer

from tests.support.oracle_calls import alone, loaded, run_model, shrunk
from tests.support.oracle_judge import Judge, wrong_logits
from tests.support.oracle_pairs import write_pair


def prove(folder: Path, seed: int, waves: int, rows: int) -> Counter[str]:
    """Checks one pair; prints what is wrong, in its smallest form."""
    pair, counts = write_pair(folder, seed), Counter(pairs=1)
    for given, verdict in run_model(pair, seed, waves, rows):
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
            print(f"pair {seed}: {verdict.differences} ({where}): {call}", flush=True)
        last = [*given.call.prompt, *given.tokens]
    judge = Judge(pair[0])
    with loaded(pair) as lm:
        wrong = wrong_logits(lm, judge, last[: judge.oracle.config["max_position_embeddings"]])
    if wrong:
        print(f"pair {seed}: {wrong}", flush=True)
        counts["differences"] += 1
    return counts


def main(
    pairs: Annotated[int, typer.Option(help="How many random pairs.")] = 200,
    seed: Annotated[int, typer.Option(help="Seed of the first one.")] = 0,
    waves: Annotated[int, typer.Option(help="How often a pair is called.")] = 3,
    rows: Annotated[int, typer.Option(help="Rows of each time, about.")] = 32,
    minutes: Annotated[float, typer.Option(help="Begin no pair after that.")] = 1e9,
) -> None:
    """Prints every difference; exits with 1 if there is any."""
    logging.disable(logging.WARNING)  # these models have no chat template, and needn't
    begun, counts = time.perf_counter(), Counter[str]()
    print(f"mlx {mx.__version__} on {mx.default_device()}")
    for number in range(seed, seed + pairs):
        if time.perf_counter() - begun > 60 * minutes:
            break
        with tempfile.TemporaryDirectory() as folder:
            counts += prove(Path(folder), number, waves, rows)
        if (number - seed) % 10 == 9:
            print(", ".join(f"{count:,} {what}" for what, count in counts.items()), flush=True)
    print(
        f"{counts['pairs']} pairs, {counts['requests']:,} requests, {counts['tokens']:,} tokens, of which "
        f"{counts['accepted']:,} were drafts: {counts['differences']} differences; {counts['near']} near ties, "
        f"{counts['unjudged']} tokens not judged"
    )
    raise SystemExit(counts["differences"] > 0)


if __name__ == "__main__":
    typer.run(main)
