"""Measures the speed of one row on the embedded pair, as ratios within one run.

    plain        our plain decoding / mlx-lm's generate_step on the same target
    MTP          our decoding with the drafter / our plain decoding, on chat prompts
    efficiency   measured speed-up / ideal speed-up; the ideal is tokens per round * plain step / (verify + drafts)
                 with each of the three times measured separately

Every ratio is the median over repetitions in which all variants take turns.

    python scripts/bench_round.py [--repeats 7] [--draft-length 4] [--json]
"""

from __future__ import annotations

import json
import statistics
import sys
from typing import Annotated

from mlx_mtp.system.blas import use_openblas

BLAS = use_openblas()  # before MLX is imported

import mlx.core as mx
import typer
from mlx_lm.generate import generate_step

import mlx_mtp
from mlx_mtp.checkpoint.pair import DEMO
from mlx_mtp.decode.prefill import prefill
from mlx_mtp.decode.round import draft, first_state, verify
from mlx_mtp.decode.sampling import Sampler, SamplingOptions
from mlx_mtp.measuring.machine import machine_line
from mlx_mtp.measuring.peer_mlx_lm import load_target
from mlx_mtp.measuring.spread import Spread, seconds
from mlx_mtp.models.drafter import Drafter
from mlx_mtp.models.target import Target

PROMPTS = (
    "What is a drafter?",
    "Tell me a short story about a fox and a lantern.",
    "Convert 12 kilometres to miles.",
    "Write a Python function that adds two numbers.",
    "Give me a JSON record for a book.",
    "What is the capital of Portugal?",
    "Count from 1 to 30.",
    "How does speculative decoding work?",
)
MAX_TOKENS = 160


def decode(lm: mlx_mtp.MTPModel, prompt: list[int], draft_length: int | str) -> mlx_mtp.Generation:
    """Greedy generation."""
    result = lm.generate(prompt, MAX_TOKENS, temperature=0, draft_length=draft_length)
    assert isinstance(result, mlx_mtp.Generation)
    return result


def mlx_lm_seconds(model: object, prompt: list[int], tokens: int) -> float:
    """Seconds of mlx-lm from the first to the last of `tokens` tokens."""
    steps = generate_step(mx.array(prompt), model, max_tokens=tokens)
    next(steps)
    return seconds(lambda: list(steps))


def timed_parts(lm: mlx_mtp.MTPModel, prompt: list[int], k: int, repeats: int) -> tuple[float, float, float]:
    """Median seconds of a plain step, of a verify pass over k + 1 tokens, and of k draft steps, timed separately."""
    with lm.models() as (target, drafter):
        return _timed_parts(target, drafter, prompt, k, repeats)


def _timed_parts(
    target: Target, drafter: Drafter, prompt: list[int], k: int, repeats: int
) -> tuple[float, float, float]:
    sampler = Sampler([SamplingOptions()])
    kv, hidden = prefill(target, prompt)
    lengths = mx.array([len(prompt)], dtype=mx.int32)
    state = first_state(target, sampler, hidden, lengths)
    mx.eval(state.tokens, state.hidden)
    kv.reserve(len(prompt) + k + 1)

    def timed(width: int) -> float:
        block = mx.ones((1, width), dtype=mx.int32)
        return seconds(lambda: mx.eval(*verify(target, kv, sampler, lengths, block)))

    rounds = [
        (timed(1), timed(k + 1), seconds(lambda: mx.eval(draft(target, drafter, kv, sampler, state, k))))
        for _ in range(repeats)
    ]
    plain, block, drafts = (statistics.median(column) for column in zip(*rounds, strict=True))
    return plain, block, drafts


def main(
    repeats: Annotated[int, typer.Option(help="Repetitions of every variant.")] = 7,
    draft_length: Annotated[int, typer.Option(help="Tokens to draft a round.")] = 4,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Runs the benchmark and prints its table."""
    lm = mlx_mtp.load(dtype="float32")
    theirs = load_target(DEMO / "target", mx.float32)
    prompts = [lm.encode(text) for text in PROMPTS]

    k = draft_length
    for prompt in prompts[:2]:  # warm-up
        decode(lm, prompt, 0), decode(lm, prompt, k), mlx_lm_seconds(theirs, prompt, 20)

    plain_ratio, mtp_ratio, auto_ratio, efficiency, accepted = [], [], [], [], []
    for _ in range(repeats):
        total = dict.fromkeys(("mlx_lm", "plain", "mtp", "auto"), 0.0)
        tokens = kept = rounds = 0
        for prompt in prompts:
            plain, mtp, auto = decode(lm, prompt, 0), decode(lm, prompt, k), decode(lm, prompt, "auto")
            if not plain.tokens == mtp.tokens == auto.tokens:
                print(f"texts differ after {PROMPTS[prompts.index(prompt)]!r}", file=sys.stderr)
            if len(plain.tokens) < 2:
                continue
            total["plain"] += plain.stats.generation_seconds
            total["mtp"] += mtp.stats.generation_seconds
            total["auto"] += auto.stats.generation_seconds
            total["mlx_lm"] += mlx_lm_seconds(theirs, prompt, len(plain.tokens))
            tokens += len(plain.tokens) - 1
            kept += mtp.stats.accepted
            rounds += mtp.stats.rounds
        step, block, drafts = timed_parts(lm, prompts[0], k, 40)
        ideal = tokens / rounds * step / (block + drafts)
        plain_ratio.append(total["mlx_lm"] / total["plain"])
        mtp_ratio.append(total["plain"] / total["mtp"])
        auto_ratio.append(total["plain"] / total["auto"])
        efficiency.append(mtp_ratio[-1] / ideal)
        accepted.append(kept / rounds)

    rows = {
        "plain / mlx-lm": plain_ratio,
        f"MTP ({k} drafts) / plain": mtp_ratio,
        "MTP (auto) / plain": auto_ratio,
        "round efficiency": efficiency,
        f"accepted of {k}": accepted,
    }
    if as_json:
        print(json.dumps({name: statistics.median(values) for name, values in rows.items()} | {"blas": BLAS}))
        return
    print(f"{machine_line()}, BLAS {BLAS}, float32")
    print(f"{len(PROMPTS)} chat prompts, greedy, {repeats} repetitions; median (lowest to highest)")
    for name, values in rows.items():
        print(f"  {name:24} {Spread.of(values).text()}")


if __name__ == "__main__":
    typer.run(main)
