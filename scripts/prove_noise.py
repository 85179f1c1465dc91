"""Is the noise noise, do tokens follow their distributions whatever drafts, and what does the coupling accept?

1. Noise along tokens, positions, seeds and rows, from 0 on: uniformity, pairs, correlation at several lags, turning
   points, the place of the largest of 64. The smallest p-value of each kind is given as one of so many.
2. Tokens drawn by the engine at several temperatures, filters, penalties and masks, against the distribution that the
   oracle computes for each token; and that every drafter leaves the very same tokens.
3. How often a draft is accepted, beside 1 - total variation, and beside rejection sampling.

Seeds are fixed: a result is the same in every run. Needs scipy.

    python scripts/prove_noise.py [--draws 100000000] [--samples 20000]
"""

from __future__ import annotations

from typing import Annotated

import typer

from tests.support.oracle_statistics import (
    ALONG,
    SIGNIFICANT,
    WISHES,
    acceptance,
    drafters,
    draw_with_others,
    least_of,
    noise_along,
    noise_p_values,
    some_logits,
)


def prove_noise(draws: int) -> int:
    """Prints a line for every kind of neighbours; returns how many are wrong."""
    wrong = 0
    for axis in ALONG:
        p_values = [
            (p, name) for uniform in noise_along(axis, draws // 16) for name, p in noise_p_values(uniform).items()
        ]
        least = least_of([p for p, _ in p_values])
        wrong += least < SIGNIFICANT
        count = f"{draws // 16 * 4:,} draws along the {axis}"
        print(f"{count:36} {len(p_values)} tests, least p {least:.3f} ({min(p_values)[1]})", flush=True)
    return wrong


def prove_tokens(samples: int) -> int:
    """Prints a line for every kind of choice; returns how many are wrong."""
    wrong, known, few = 0, drafters(some_logits()), max(1_000, samples // 50)
    names = [name for name, drafter in known.items() if drafter]
    for i, what in enumerate(WISHES):
        name = names[i % len(names)]
        drawn, same = draw_with_others(what, name, [*known], samples, few)
        wrong += drawn.p_value < SIGNIFICANT or drawn.impossible > 0 or not same
        share, verdict = drawn.accepted / drawn.drafted, "the same" if same else "OTHERS"
        print(f"{what:20} {len(drawn.uniform):7,} tokens, drafter {name}: accepted {share:.2f}, p {drawn.p_value:.3f}; "
              f"{len(known)} drafters, {few:,} tokens: {verdict}", flush=True)  # fmt: skip
    return wrong


def print_acceptance(samples: int) -> None:
    """Prints how often drafts are accepted."""
    print(f"{'drafter':22}{'temperature':>12}{'accepted':>10}{'formula':>9}{'bound':>7}{'rejection sampling':>20}")
    for name, drafter in drafters(some_logits()).items():
        if drafter is None or drafter.logits is None:
            continue
        for temperature in (0.5, 1.0, 2.0):
            found = acceptance(drafter.logits, temperature, samples)
            print(f"{name:22}{temperature:12}{found.measured:10.3f}{found.formula:9.3f}{found.bound:7.3f}"
                  f"{found.rejection:20.3f}", flush=True)  # fmt: skip


def main(
    draws: Annotated[int, typer.Option(help="Draws of noise in all; 0 for none.")] = 100_000_000,
    samples: Annotated[int, typer.Option(help="Tokens for every kind of choice.")] = 20_000,
    positions: Annotated[int, typer.Option(help="Positions for every line about acceptance.")] = 200_000,
) -> None:
    """Prints all three tables; exits with 1 if something is wrong."""
    wrong = (prove_noise(draws) if draws else 0) + prove_tokens(samples)
    print_acceptance(positions)
    print(f"{wrong} results below p = {SIGNIFICANT}, impossible, or not the same")
    raise SystemExit(wrong > 0)


if __name__ == "__main__":
    typer.run(main)
