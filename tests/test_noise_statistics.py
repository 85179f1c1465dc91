"""Noise and drawn tokens as statistics: a small version of scripts/prove_noise.py.

Seeds are fixed, so that a test that passes always passes; and they can fail: each test has a wrong case beside it.
"""

from __future__ import annotations

from unittest import mock

import numpy as np
import pytest

from tests.support import oracle_statistics
from tests.support.oracle_choice import distribution
from tests.support.oracle_statistics import (
    ALONG,
    SIGNIFICANT,
    WISHES,
    acceptance,
    drafters,
    draw,
    draw_with_others,
    least_of,
    noise_along,
    noise_p_values,
    some_logits,
)


@pytest.mark.parametrize("axis", ALONG)
def test_noise_is_uniform_and_its_neighbours_are_independent(axis: str):
    count = 2**16 if axis in ("token", "position") else 2**14  # keys of seeds are hashed one by one
    p_values = [p for uniform in noise_along(axis, count) for p in noise_p_values(uniform, 256).values()]
    assert least_of(p_values) > SIGNIFICANT


@pytest.mark.parametrize("spoil", [
    lambda x: x**1.02,  # not uniform
    lambda x: np.where(np.arange(x.size) % 2, x, np.roll(x, 1)) * 0.2 + 0.8 * x,  # neighbours have something in common
    lambda x: np.resize(x[:4096], x.size),  # repeats
])  # fmt: skip
def test_bad_noise_is_noticed(spoil):
    uniform = spoil(next(noise_along("token", 2**18)))
    assert least_of(list(noise_p_values(uniform, 256).values())) < SIGNIFICANT


@pytest.mark.parametrize("what, who", [
    ("temperature 1", "good"), ("all three", "good"), ("penalties", "always the best"), ("mask and top-k", "poor"),
])  # fmt: skip
def test_tokens_follow_their_distribution_whatever_drafts(what: str, who: str):
    drawn, same = draw_with_others(what, who, ("none", "by the noise alone"), 800, 200)
    assert drawn.p_value > SIGNIFICANT and not drawn.impossible and len(drawn.uniform) == 800
    assert same


def test_tokens_of_another_distribution_are_noticed():
    """The same tokens, judged as if the softcap had been twice as high."""
    wrong = mock.patch.object(oracle_statistics, "distribution", lambda cap, *rest: distribution(2 * cap, *rest))
    with wrong:
        assert draw(WISHES["temperature 0.5"], None, 6_000).p_value < SIGNIFICANT


@pytest.mark.parametrize("who", ["the target's own", "good", "poor", "the other way round"])
def test_drafts_are_accepted_as_often_as_the_formula_says(who: str):
    found = acceptance(drafters(some_logits())[who].logits, 1.0, 100_000)
    assert abs(found.measured - found.formula) < 0.006
    assert found.bound / (2 - found.bound) - 1e-9 <= found.formula <= found.bound + 1e-9, (
        "the least that the coupling is known to give"
    )
    assert abs(found.rejection - found.bound) < 0.006
