"""Measures the gain from building a round while the previous one runs, as a ratio within one run.

    serial       build a round, run it, read its tokens, build the next
    pipelined    build a round while the previous one runs, submit it, then read the previous one

The target is tiny but has 35 layers, so that building the graph takes about as long as running it, as with a real model
on a fast GPU. Needs two cores. The variants take turns, and the ratio is the median.

    python scripts/bench_pipeline.py [--repeats 7] [--draft-length 3] [--json]
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Annotated

from mlx_mtp.system.blas import use_openblas

BLAS = use_openblas()  # before MLX is imported

import mlx.core as mx
import typer

from mlx_mtp.decode.prefill import prefill
from mlx_mtp.decode.round import decode_round, first_state
from mlx_mtp.decode.sampling import Sampler, SamplingOptions
from mlx_mtp.measuring.machine import machine_line
from mlx_mtp.measuring.spread import Spread
from mlx_mtp.models.drafter import Drafter
from mlx_mtp.models.target import Target
from tests.support.deep_pair import LAYERS, deep_pair

ROUNDS = 60


def seconds(target: Target, drafter: Drafter, k: int, pipelined: bool) -> float:
    """Wall-clock seconds of ROUNDS rounds."""
    kv, hidden = prefill(target, list(range(5, 45)))
    sampler = Sampler([SamplingOptions()], target.config.logit_softcap)
    state = first_state(target, sampler, hidden, mx.array([40], dtype=mx.int32))
    mx.eval(state.lengths, state.tokens, state.hidden)
    kv.reserve(40 + (ROUNDS + 2) * (k + 1))
    before: mx.array | None = None
    started = time.perf_counter()
    for _ in range(ROUNDS):
        state, report, _ = decode_round(target, drafter, kv, sampler, state, k)
        mx.async_eval(report, state.lengths, state.hidden)
        if not pipelined:
            report.tolist()
        elif before is not None:
            before.tolist()
        before = report
    assert before is not None
    before.tolist()
    return time.perf_counter() - started


def main(
    repeats: Annotated[int, typer.Option(help="Repetitions of both variants.")] = 7,
    draft_length: Annotated[int, typer.Option(help="Tokens to draft a round; 0 for plain decoding.")] = 3,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Runs the benchmark and prints its figures."""
    with tempfile.TemporaryDirectory() as folder:
        target, drafter = deep_pair(Path(folder))
    took = []
    ratios = []
    for repeat in range(repeats + 1):
        serial = seconds(target, drafter, draft_length, pipelined=False)
        early = seconds(target, drafter, draft_length, pipelined=True)
        if repeat:  # the first time warms up
            ratios.append(serial / early)
            took.append(1e3 * serial / ROUNDS)
    if as_json:
        print(json.dumps({"serial / pipelined": statistics.median(ratios), "blas": BLAS}))
        return
    print(f"{machine_line()}, BLAS {BLAS}, float32")
    print(f"{LAYERS} layers, {draft_length} drafts a round, {repeats} repetitions; median (lowest to highest)")
    print(f"  speed-up by pipelining   {Spread.of(ratios).text()}")
    print(f"  a serial round takes     {statistics.median(took):5.1f} ms")


if __name__ == "__main__":
    typer.run(main)
