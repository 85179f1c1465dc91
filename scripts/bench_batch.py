"""Measures total tokens per second of batches, as ratios within one run.

    plain    our plain decoding / mlx-lm's BatchGenerator on the same target
    MTP      our decoding with the drafter / our plain decoding, at the same batch size
    mlx-vlm  our decoding with the drafter / mlx-vlm's, same pair and draft length (with --mlx-vlm)
    rounds   tokens per row and round, and their ratio to that of the same prompts one by one

In these batches all rows begin together and have the same length, stop tokens ignored, so that the rows of plain
decoding stay in step. The part "queue" is closer to real use: 40 prompts, 8 at a time, each to its own end.

Pairs: the embedded one on chat prompts, and two of medium size, dense and mixture of experts, on random prompts. Their
weights are constructed so that some drafts are accepted (medium_pair.py). Every ratio is the median over repetitions
in which all variants take turns.

    python scripts/bench_batch.py [--repeats 5] [--draft-length 4] [--mlx-vlm PYTHON] [--part queue] [--json]

mlx-vlm may have an environment of its own, with the same BLAS:

    python -m venv /tmp/mlx-vlm
    /tmp/mlx-vlm/bin/pip install "mlx[cpu]" mlx-vlm==0.7.10 scipy-openblas32==0.3.23.293.2
    python scripts/bench_batch.py --mlx-vlm /tmp/mlx-vlm/bin/python
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from random import Random
from typing import Annotated, Any

from mlx_mtp.system.blas import use_openblas

BLAS = use_openblas()  # before MLX is imported

import mlx.core as mx
import typer

import mlx_mtp
from mlx_mtp.checkpoint.pair import DEMO
from mlx_mtp.errors import MTPError
from mlx_mtp.measuring import peer_mlx_lm
from mlx_mtp.measuring.machine import machine_line
from mlx_mtp.measuring.peer_protocol import Job
from mlx_mtp.measuring.peers import Peer
from mlx_mtp.measuring.spread import Spread, seconds
from scripts.medium_pair import VOCAB, make_medium_pair

SIZES = (1, 2, 4, 8)
TOKENS = 120
PARTS = ("queue", "embedded", "dense", "MoE")
PROMPTS = (
    "What is a drafter?",
    "Tell me a short story about a fox and a lantern.",
    "Write a Python function that adds two numbers.",
    "How does speculative decoding work?",
    "Tell me a story about an owl.",
    "What can you do?",
    "Give me a JSON record for a book.",
    "List the months of the year.",
)


def begun(name: str, repeat: int, repeats: int, facts: str = "") -> None:
    """Reports progress: some parts take many minutes."""
    print(f"{name}{facts}: " + (f"repetition {repeat} of {repeats}" if repeat else "warming up"), file=sys.stderr)


def ours(lm: mlx_mtp.MTPModel, prompts: Sequence[list[int]], draft_length: int | str) -> tuple[float, float]:
    """Tokens per second of a batch, prefill included, and tokens per row and round."""
    started = time.perf_counter()
    results = lm.generate_batch(
        prompts, len(prompts), max_tokens=TOKENS, temperature=0, draft_length=draft_length, ignore_eos=True
    )
    seconds = time.perf_counter() - started
    generated = sum(len(result.tokens) for result in results)
    return generated / seconds, (generated - len(results)) / sum(result.stats.rounds for result in results)


def total_tps(rows: int, work: Callable[[], object]) -> float:
    """Tokens per second of so many rows, prefill included."""
    return rows * TOKENS / seconds(work)


def measure(
    name: str,
    folders: tuple[Path, Path],
    prompts: list[list[int]],
    sizes: Sequence[int],
    k: int,
    repeats: int,
    vlm: Path | None,
) -> dict[str, list[float]]:
    """Ratios for one pair, by batch size."""
    target, drafter = folders
    rows: dict[str, list[float]] = {}
    job: Job = {"target": str(target), "drafter": str(drafter), "dtype": "float32"}
    try:
        peer = Peer("mlx-vlm", job, vlm) if vlm else None
    except MTPError as error:
        raise typer.BadParameter(str(error), param_hint="--mlx-vlm") from None
    with mlx_mtp.load(target, drafter, dtype="float32", profile=None, cache_bytes=0) as lm:
        theirs = peer_mlx_lm.load_target(target, mx.float32)
        # All texts have the same length, so that the mean over texts is one over rounds too.
        alone = [1 / ours(lm, [prompt], k)[1] for prompt in prompts[: max(sizes)]]
        for repeat in range(repeats + 1):
            for size in sizes:
                begun(name, repeat, repeats, f", {size} rows")
                batch = prompts[:size]
                plain, _ = ours(lm, batch, 0)
                mtp, tokens = ours(lm, batch, k)
                auto, _ = ours(lm, batch, "auto")
                mlx_lm = total_tps(size, partial(peer_mlx_lm.decode, theirs, batch, TOKENS))
                figures = {
                    "plain / mlx-lm": plain / mlx_lm,
                    f"MTP ({k}) / plain": mtp / plain,
                    "MTP (auto) / plain": auto / plain,
                    "tokens a round": tokens,
                    "tokens a round / one by one": tokens * statistics.mean(alone[:size]),
                }
                if peer:
                    theirs_mtp = size * TOKENS / peer.run(batch, TOKENS, k)["seconds"]
                    figures |= {f"MTP ({k}) / mlx-vlm's MTP ({k})": mtp / theirs_mtp}
                if repeat:  # the first time warms up
                    for label, value in figures.items():
                        rows.setdefault(f"{name}, {size} rows: {label}", []).append(value)
    if peer:
        peer.close()
    return rows


def queue(prompts: list[list[int]], k: int, repeats: int) -> dict[str, list[float]]:
    """Ratios for the embedded pair with prompts that wait for a free row, and texts of different lengths."""
    rows: dict[str, list[float]] = {}
    waiting = 5 * prompts
    Random(0).shuffle(waiting)

    def tokens_per_second(draft_length: int | str) -> float:
        started = time.perf_counter()
        results = lm.generate_batch(waiting, 8, max_tokens=2 * TOKENS, temperature=0, draft_length=draft_length)
        return sum(len(result.tokens) for result in results) / (time.perf_counter() - started)

    with mlx_mtp.load(dtype="float32", profile=None, cache_bytes=0) as lm:
        for repeat in range(repeats + 1):
            begun("queue", repeat, repeats)
            plain, mtp, auto = map(tokens_per_second, (0, k, "auto"))
            if repeat:  # the first time warms up
                rows.setdefault(f"queue, 8 rows: MTP ({k}) / plain", []).append(mtp / plain)
                rows.setdefault("queue, 8 rows: MTP (auto) / plain", []).append(auto / plain)
    return rows


def main(
    repeats: Annotated[int, typer.Option(help="Repetitions of every variant.")] = 5,
    draft_length: Annotated[int, typer.Option(help="Tokens to draft a round.")] = 4,
    mlx_vlm: Annotated[Path | None, typer.Option(help="Python of an environment with mlx-vlm.")] = None,
    part: Annotated[list[str] | None, typer.Option(help=f"Some of {', '.join(PARTS)}. Default: all.")] = None,
    size: Annotated[list[int] | None, typer.Option(help="Some rows of a batch, 1 to 8. Default: 1, 2, 4, 8.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Runs the benchmark and prints its table."""
    if unknown := set(part or ()) - set(PARTS):
        raise typer.BadParameter(f"unknown part {', '.join(unknown)}: expected some of {', '.join(PARTS)}")
    if not all(1 <= rows <= max(SIZES) for rows in size or ()):
        raise typer.BadParameter(f"expected 1 to {max(SIZES)}", param_hint="--size")
    parts, sizes = part or PARTS, size or SIZES
    rows: dict[str, Any] = {}
    with mlx_mtp.load() as lm:
        chat = [lm.encode(text) for text in PROMPTS]
    random = [mx.random.randint(0, VOCAB, (10 + 7 * i,), key=mx.random.key(i)).tolist() for i in range(8)]
    if "queue" in parts:
        rows |= queue(chat, draft_length, repeats)
    if "embedded" in parts:
        rows |= measure("embedded", (DEMO / "target", DEMO / "drafter"), chat, sizes, draft_length, repeats, mlx_vlm)
    with tempfile.TemporaryDirectory() as folder:
        for name, kind in (("dense", "31b"), ("MoE", "26b")):
            if name not in parts:
                continue
            pair = make_medium_pair(kind, Path(folder) / kind)
            rows |= measure(name, pair, random, sizes, draft_length, repeats, mlx_vlm)
    if as_json:
        print(json.dumps({name: statistics.median(values) for name, values in rows.items()} | {"blas": BLAS}))
        return
    print(f"{machine_line()}, BLAS {BLAS}, float32")
    lengths = f"{TOKENS} tokens a row (queue: up to {2 * TOKENS})"
    print(f"{lengths}, greedy, {repeats} repetitions; median (lowest to highest)")
    for name, values in rows.items():
        print(f"  {name:44} {Spread.of(values).text()}")


if __name__ == "__main__":
    typer.run(main)
