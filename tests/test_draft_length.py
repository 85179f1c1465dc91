"""The automatic draft length, on a simulated clock: no machine's speed has a say here (decode/draft_length.py)."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import pytest

from mlx_mtp.decode.draft_length import MAX_AUTO_LENGTH, AutoLength

# Relative seconds of a round by draft length: verify and drafts.
COSTS: dict[str, Callable[[int], float]] = {
    "flat": lambda k: 1 + (0.15 + 0.08 * k if k else 0),
    "linear": lambda k: 1 + 0.36 * k,
    # Published price of 4-bit matmuls on Metal at 1, 2, 4 and 8 rows, the rest interpolated, and a drafter's tenth.
    "steep": lambda k: [1, 1.83, 2.5, 3.26, 4, 4.7, 5.4, 6.12][k] + 0.1 * k,
    # 16-bit: twice the price for more than one row, however many.
    "step": lambda k: 2 + 0.1 * k if k else 1,
}
# Chance that draft j is kept, at a position of the text.
TEXTS: dict[str, Callable[[int, int], float]] = {
    "wrong": lambda position, j: 0.0,
    "right": lambda position, j: 1.0,
    "even": lambda position, j: 0.5,
    "published": lambda position, j: [0.92, 0.85, 0.86, 0.85, 0.85, 0.85, 0.85][j],
    "changing": lambda position, j: 0.97 if position // 200 % 2 == 0 else 0.05,
}


class FixedLength:
    """Always the same length."""

    def __init__(self, length: int):
        self.next = lambda: length

    def observe(self, drafted: int, kept: Sequence[int], seconds: float | None) -> None:
        """Doesn't matter."""


Policy = AutoLength | FixedLength


def speed(policy: Policy, cost: Callable[[int], float], chance: Callable[[int, int], float], seed: int) -> float:
    """Tokens per second over 2,000 tokens, with 5 % noise and a pause now and then."""
    rng = random.Random(seed)
    seconds, position, next_length = 0.0, 0, policy.next()
    while position < 2000:
        # As in the engine: the next length is chosen before this round's result is known.
        length, next_length = next_length, policy.next()
        kept = next((j for j in range(length) if rng.random() >= chance(position, j)), length)
        taken = cost(length) * (1 + 0.05 * rng.gauss(0, 1)) * (5 if rng.random() < 0.01 else 1)
        seconds, position = seconds + taken, position + kept + 1
        # As in the engine as well: next to a round of another length the time isn't known.
        policy.observe(length, [kept], taken if length == next_length else None)
    return position / seconds


def mean_speed(make: Callable[[], Policy], cost: str, text: str) -> float:
    return sum(speed(make(), COSTS[cost], TEXTS[text], seed) for seed in range(8)) / 8


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("cost", COSTS)
def test_close_to_the_best_fixed_length_and_to_plain_decoding(cost: str, text: str):
    fixed = [mean_speed(lambda k=k: FixedLength(k), cost, text) for k in range(MAX_AUTO_LENGTH + 1)]
    auto = mean_speed(AutoLength, cost, text)
    assert auto >= 0.97 * fixed[0]
    assert auto >= (1.0 if text == "changing" and max(fixed) > fixed[0] else 0.94) * max(fixed)


def test_many_short_texts_cost_no_more_than_a_long_one():
    """What was learnt of costs, and the budget for trials, outlive a text."""
    policy, cost = AutoLength(), COSTS["linear"]
    plain = taken = 0.0
    for _ in range(40):
        policy.begin()
        for _ in range(50):
            length = policy.next()
            policy.observe(length, [0], cost(length))
            taken, plain = taken + cost(length), plain + cost(0)
    assert plain / taken >= 0.95


def test_unmeasured_rounds_are_no_reason_to_stop():
    policy = AutoLength()
    for _ in range(100):
        length = policy.next()
        policy.observe(length, [length], None)
    assert policy.next() > 0
