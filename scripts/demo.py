"""Answers a few prompts with the embedded pair, with and without its drafter: same text, other speed.

Run by scripts/demo. Exits with 1 if a text differs.
"""

from __future__ import annotations

import sys

from mlx_mtp.blas import use_openblas

BLAS = use_openblas()  # before MLX is imported

import mlx.core as mx  # noqa: E402

import mlx_mtp  # noqa: E402

PROMPTS = (
    "Who are you?",
    "What is a drafter?",
    "Tell me a short story about a fox.",
    "How many minutes are 3 hours?",
    "Write a Python function that reverses a string.",
)
MAX_TOKENS = 200


def seconds(result: mlx_mtp.Generation) -> float:
    """Time from the first to the last token."""
    return result.stats.generation_seconds


def main() -> int:
    """Prints the answers and the comparison; returns the exit code."""
    print(f"mlx {mx.__version__} on {mx.default_device()}, BLAS: {BLAS or 'the one MLX comes with'}, greedy\n")
    equal = True
    plain_seconds = mtp_seconds = 0.0
    tokens = kept = rounds = 0
    with mlx_mtp.load() as lm:
        for draft_length in (0, "auto"):  # warm-up
            lm.generate(PROMPTS[0], max_tokens=40, temperature=0, draft_length=draft_length)
        for prompt in PROMPTS:
            plain = lm.generate(prompt, max_tokens=MAX_TOKENS, temperature=0, draft_length=0)
            mtp = lm.generate(prompt, max_tokens=MAX_TOKENS, temperature=0)
            same = plain.tokens == mtp.tokens
            equal = equal and same
            plain_seconds, mtp_seconds = plain_seconds + seconds(plain), mtp_seconds + seconds(mtp)
            tokens, kept, rounds = tokens + len(mtp.tokens) - 1, kept + mtp.stats.accepted, rounds + mtp.stats.rounds
            print(f"> {prompt}\n{mtp.text}\n")
            print(
                f"  [{len(mtp.tokens)} tokens; MTP off {plain.stats.generation_tps:.0f} tok/s, on "
                f"{mtp.stats.generation_tps:.0f} tok/s; {mtp.stats.accepted} of {mtp.stats.drafted} drafts accepted, "
                f"{mtp.stats.mean_accepted:.2f} a round; texts {'equal' if same else 'DIFFER'}]\n"
            )
    print(
        f"all prompts: MTP off {tokens / plain_seconds:.0f} tok/s, on {tokens / mtp_seconds:.0f} tok/s, "
        f"{plain_seconds / mtp_seconds:.2f} times as fast; {kept / rounds:.2f} drafts accepted a round; "
        f"texts {'equal' if equal else 'DIFFER'}"
    )
    return 0 if equal else 1


if __name__ == "__main__":
    sys.exit(main())
