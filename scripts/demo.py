"""Answers some prompts with the embedded pair, with and without its drafter, and compares text and speed.

scripts/demo runs it. Exits with 1 if a text differs.
"""

from __future__ import annotations

import sys
from collections import Counter

from mlx_mtp.system.blas import use_openblas

BLAS = use_openblas()  # before MLX is imported

import mlx.core as mx

import mlx_mtp

PROMPTS = (
    "Who are you?",
    "What is a drafter?",
    "Tell me a short story about a fox.",
    "How many minutes are 3 hours?",
    "Write a Python function that reverses a string.",
)
MAX_TOKENS = 200
REPEATS = 3
"""Runs of each prompt with MTP off and on, in turn. The fastest counts, since other programs only slow a run down."""


def answer(lm: mlx_mtp.MTPModel, prompt: str, draft_length: int | str) -> mlx_mtp.Generation:
    """Generates a greedy answer."""
    result = lm.generate(prompt, max_tokens=MAX_TOKENS, temperature=0, draft_length=draft_length)
    assert isinstance(result, mlx_mtp.Generation)
    return result


def seconds(result: mlx_mtp.Generation) -> float:
    """Time from the first to the last token."""
    return result.stats.generation_seconds


def by_position(accepted: list[int], draft_lengths: dict[int, int]) -> str:
    """Share of the first, second, ... drafts of the rounds that were accepted."""
    drafted = [sum(n for k, n in draft_lengths.items() if k > j) for j in range(max(draft_lengths, default=0))]
    accepted = accepted + [0] * (len(drafted) - len(accepted))
    return " ".join(f"{k / n:.0%}" for k, n in zip(accepted, drafted, strict=True) if n) or "nothing drafted"


def main() -> int:
    """Prints the answers and the comparison; returns the exit code."""
    print(f"mlx {mx.__version__} on {mx.default_device()}, BLAS: {BLAS or 'the one MLX comes with'}; greedy, the best")
    print(f"of {REPEATS} runs each with MTP off (draft length 0) and on (draft length auto)\n")
    equal = True
    off_seconds = on_seconds = 0.0
    tokens = 0
    accepted: Counter[int] = Counter()
    draft_lengths: Counter[int] = Counter()
    with mlx_mtp.load() as lm:
        for draft_length in (0, "auto"):  # warm-up
            answer(lm, PROMPTS[0], draft_length)
        for prompt in PROMPTS:
            runs = [(answer(lm, prompt, 0), answer(lm, prompt, "auto")) for _ in range(REPEATS)]
            off, on = (min(results, key=seconds) for results in zip(*runs, strict=True))
            same = all(result.tokens == off.tokens for pair in runs for result in pair)
            equal = equal and same
            off_seconds, on_seconds = off_seconds + seconds(off), on_seconds + seconds(on)
            tokens += len(on.tokens) - 1
            accepted.update(dict(enumerate(on.stats.accepted_by_position)))
            draft_lengths.update(on.stats.draft_lengths)
            print(f"> {prompt}\n{on.text}\n")
            print(
                f"  [{len(on.tokens)} tokens; MTP off {off.stats.generation_tps:.0f} tok/s, on "
                f"{on.stats.generation_tps:.0f} tok/s: {seconds(off) / seconds(on):.2f} times as fast\n"
                f"   {on.stats.accepted} of {on.stats.drafted} drafts accepted, {on.stats.mean_accepted:.2f} a round; "
                f"by position {by_position(on.stats.accepted_by_position, on.stats.draft_lengths)}\n"
                f"   texts {'equal' if same else 'DIFFER'}]\n"
            )
    rounds = sum(n for k, n in draft_lengths.items() if k)
    print(
        f"all prompts: MTP off {tokens / off_seconds:.0f} tok/s, on {tokens / on_seconds:.0f} tok/s: "
        f"{off_seconds / on_seconds:.2f} times as fast\n"
        f"{sum(accepted.values()) / max(rounds, 1):.2f} drafts accepted a round; "
        f"by position {by_position([accepted[j] for j in range(len(accepted))], draft_lengths)}\n"
        f"texts {'equal' if equal else 'DIFFER'}"
    )
    if not equal:
        print("on a GPU two tokens with nearly equal scores may swap: `mlx-mtp verify` says whether that is all")
    return 0 if equal else 1


if __name__ == "__main__":
    sys.exit(main())
