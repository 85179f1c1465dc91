"""Choosing tokens: the distribution is right, noise depends on what it should, filters mean what they do elsewhere."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
import torch
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from mlx_mtp.decode.noise import gumbel, noise_of_bits, row_seed, seed_key
from mlx_mtp.decode.sampling import Sampler, SamplingOptions, best_few
from mlx_mtp.errors import PromptError

VOCAB = 50
GEMMA_VOCAB = 262_144


def logits_of(seed: int = 0, rows: int = 1, size: int = VOCAB) -> np.ndarray:
    return (3 * np.random.default_rng(seed).standard_normal((rows, size))).astype(np.float32)


def draw(options: SamplingOptions, logits: np.ndarray | mx.array, count: int, cap: float | None = None) -> np.ndarray:
    """Tokens for `count` positions with the same logits [vocab]."""
    block = mx.broadcast_to(mx.array(logits), (1, count, logits.size))
    return np.array(Sampler([options], cap).target(block, mx.arange(count)[None])[0])


def softmax(logits: np.ndarray) -> np.ndarray:
    weights = np.exp(logits - logits.max())
    return weights / weights.sum()


@pytest.mark.parametrize("options", [
    SamplingOptions(temperature=1.0),
    SamplingOptions(temperature=0.5),
    SamplingOptions(temperature=2.0, top_k=7),
    SamplingOptions(temperature=1.0, top_p=0.8),
    SamplingOptions(temperature=1.5, min_p=0.1),
    SamplingOptions(temperature=1.2, top_k=20, top_p=0.9, min_p=0.02),
])  # fmt: skip
def test_tokens_follow_the_filtered_distribution(options: SamplingOptions):
    """Against transformers' own filters, in the order in which its generate() applies them."""
    logits, count = logits_of()[0], 20_000
    scores = TemperatureLogitsWarper(options.temperature)(None, torch.tensor(logits)[None])
    if options.top_k:
        scores = TopKLogitsWarper(options.top_k)(None, scores)
    if options.top_p < 1:
        scores = TopPLogitsWarper(options.top_p)(None, scores)
    if options.min_p:
        scores = MinPLogitsWarper(options.min_p)(None, scores)
    expected = softmax(scores[0].numpy())
    found = np.bincount(draw(options, logits, count), minlength=VOCAB)
    assert not found[expected == 0].any(), "a filtered token was drawn"
    some = expected * count >= 5
    chi2 = ((found - expected * count)[some] ** 2 / (expected * count)[some]).sum()
    freedom = max(some.sum() - 1, 1)
    assert chi2 < freedom + 5 * np.sqrt(2 * freedom), "noise is fixed, so this is no matter of luck"


def test_softcap_changes_the_distribution_but_not_the_best_token():
    logits = np.array([9.0, 6.0, 0.0, -3.0], np.float32)
    count = 20_000
    found = np.bincount(draw(SamplingOptions(temperature=1), logits, count, cap=4.0), minlength=4) / count
    assert np.abs(found - softmax(4 * np.tanh(logits / 4))).max() < 0.02
    assert set(draw(SamplingOptions(), logits, 10, cap=4.0)) == {0}


def test_a_draft_equals_the_target_token_when_the_logits_are_equal():
    logits = logits_of(rows=200)
    for options in (
        SamplingOptions(temperature=1, seed=3),
        SamplingOptions(temperature=1, top_k=20, top_p=0.9, seed=4),
    ):
        sampler = Sampler([options])
        positions = mx.arange(200)
        target = sampler.target(mx.array(logits)[None], positions[None])[0]
        drafts = [sampler.draft(mx.array(logits[i : i + 1]), None, positions[i : i + 1]).item() for i in range(200)]
        assert target.tolist() == drafts
        # The same candidates in another order, as a clustered head gives them.
        order = np.random.default_rng(1).permutation(VOCAB)
        shuffled = [
            sampler.draft(mx.array(logits[i : i + 1, order]), mx.array(order[None]), positions[i : i + 1]).item()
            for i in range(200)
        ]
        assert target.tolist() == shuffled


def test_rows_have_options_of_their_own():
    rows = [
        SamplingOptions(),
        SamplingOptions(temperature=1, seed=5),
        SamplingOptions(temperature=0.7, top_k=3, seed=6),
        SamplingOptions(temperature=1, top_p=0.5, min_p=0.2, seed=7),
    ]
    logits = mx.array(logits_of(2, rows=len(rows) * 30).reshape(len(rows), 30, VOCAB))
    positions = mx.broadcast_to(mx.arange(10, 40), (len(rows), 30))
    together = Sampler(rows).target(logits, positions)
    for i, row in enumerate(rows):
        alone = Sampler([row]).target(logits[i : i + 1], positions[i : i + 1])
        assert together[i].tolist() == alone[0].tolist()


def test_seed_and_position_matter():
    logits = logits_of()[0]
    a = draw(SamplingOptions(temperature=1, seed=1), logits, 50)
    assert (a == draw(SamplingOptions(temperature=1, seed=1), logits, 50)).all()
    assert (a != draw(SamplingOptions(temperature=1, seed=2), logits, 50)).any()
    assert len(set(a.tolist())) > 3
    for one, other in ((0, 2**32), (1, -1), (7, 2**64 + 7), (0, -(2**32))):
        first, second = (draw(SamplingOptions(temperature=1, seed=s), logits, 50) for s in (one, other))
        assert (first != second).any(), f"seeds {one} and {other} give the same text"


def test_suppressed_tokens_are_never_chosen():
    logits = logits_of()[0]
    best = int(logits.argmax())
    for options in (SamplingOptions(), SamplingOptions(temperature=1)):
        sampler = Sampler([options], suppress_tokens=[best], vocab_size=VOCAB)
        block = mx.broadcast_to(mx.array(logits), (1, 500, VOCAB))
        assert best not in sampler.target(block, mx.arange(500)[None])[0].tolist()


def test_noise_is_standard_gumbel():
    key = mx.array(9, mx.uint32), mx.array(10, mx.uint32)
    noise = np.sort(np.array(gumbel(*key, mx.arange(200)[:, None], mx.arange(500)[None])).ravel())
    cdf = np.exp(-np.exp(-noise))
    uniform = (np.arange(noise.size) + 0.5) / noise.size
    assert np.abs(cdf - uniform).max() < 1.63 / np.sqrt(noise.size), "Kolmogorov-Smirnov at 1 %"


def test_noise_has_all_its_digits_for_every_bits():
    ends = [*range(300), *range(2**32 - 300, 2**32), *(2**n + d for n in range(9, 32) for d in (-1, 0, 1))]
    bits = np.array(ends, np.uint64)
    exact = -np.log(-np.log1p(-(bits + 0.5) / 2**32))
    noise = np.array(noise_of_bits(mx.array(bits.astype(np.uint32))))
    assert np.isfinite(noise).all()
    small = bits < 2**31
    np.testing.assert_allclose(noise[small], exact[small], rtol=1e-5, atol=1e-6)
    # Low noise as good as never wins: few digits are enough. It ends at -2.81 instead of -3.13.
    assert np.abs(noise - exact)[~small].max() < 0.32


def test_the_tail_of_the_noise():
    """How often 2**26 noises exceed a bound, which decides how often unlikely tokens are drawn."""
    bounds = np.array([0.0, 4.0, 8.0, 10.0, 12.0, 14.0, 15.5])
    above, ids = np.zeros(len(bounds)), mx.arange(GEMMA_VOCAB)[None]
    for begin in range(0, 256, 16):
        noise = gumbel(*mx.array([3, 141], mx.uint32), mx.arange(begin, begin + 16)[:, None], ids)
        assert mx.isfinite(noise).all().item()
        above += np.array([(noise > bound).sum().item() for bound in bounds.tolist()])
    expected = -np.expm1(-np.exp(-bounds)) * 2**26
    assert (np.abs(above - expected) < 5 * np.sqrt(expected) + 5).all(), above


def test_a_certain_token_of_a_large_vocabulary_is_drawn():
    """Noise that is infinite once in 2**24 candidates would draw others here, four of 256 times."""
    logits = mx.where(mx.arange(GEMMA_VOCAB) == 7, 0.0, -30.0)
    for seed in range(16):
        drawn = draw(SamplingOptions(temperature=1.0, seed=seed), logits, 16)
        assert set(drawn.tolist()) == {7}, "its probability is 1 - 2.5e-8"


def test_filtered_tokens_of_a_large_vocabulary_are_no_numbers_to_compare():
    """Most candidates are at minus infinity: sums with the noise must stay so, and never become nan."""
    logits = logits_of(5, size=GEMMA_VOCAB)[0]
    best = np.argsort(-logits)[:64]
    sampler = Sampler([SamplingOptions(temperature=1.0, top_p=1e-6)], suppress_tokens=best[:3].tolist(),
                      vocab_size=GEMMA_VOCAB)  # fmt: skip
    block = mx.broadcast_to(mx.array(logits), (1, 16, GEMMA_VOCAB))
    assert set(sampler.target(block, mx.arange(16)[None])[0].tolist()) == {int(best[3])}


@pytest.mark.parametrize("options, size, count", [
    (SamplingOptions(temperature=1.0, seed=1), 65_536, 1024),
    (SamplingOptions(temperature=1.0, seed=2, top_k=64, top_p=0.95), GEMMA_VOCAB, 4096),
    (SamplingOptions(temperature=0.8, seed=3, top_p=0.9), 32_768, 1024),
])  # fmt: skip
def test_tokens_of_large_vocabularies_follow_the_distribution(options: SamplingOptions, size: int, count: int):
    logits = logits_of(6, size=size)[0] / 2
    order = np.argsort(-logits, kind="stable")
    weights = softmax(logits[order].astype(np.float64) / options.temperature)
    weights[options.top_k or size :] = 0
    weights /= weights.sum()
    weights[np.cumsum(weights) - weights >= options.top_p] = 0
    expected = count * weights / weights.sum()
    drawn = np.concatenate([
        np.array(Sampler([options]).target(mx.broadcast_to(mx.array(logits), (1, 64, size)), positions[None])[0])
        for positions in mx.split(mx.arange(count), count // 64)
    ])  # fmt: skip
    place = np.empty(size, np.int64)
    place[order] = np.arange(size)
    found = np.bincount(place[drawn], minlength=size)
    assert not found[expected == 0].any(), "a filtered token was drawn"
    # Tokens in falling probability, cut into classes of which at least 20 draws are expected.
    classes = np.floor((np.cumsum(expected) - expected) / 20).astype(np.int64)
    classes = np.unique(np.where(expected > 0, classes, classes[expected > 0].max()), return_inverse=True)[1]
    wanted, got = np.bincount(classes, expected), np.bincount(classes, found)
    assert len(wanted) > 20
    chi2 = ((got - wanted) ** 2 / wanted).sum()
    freedom = len(wanted) - 1
    assert chi2 < freedom + 5 * np.sqrt(2 * freedom), "noise is fixed, so this is no matter of luck"


@pytest.mark.parametrize("size", [100, 2048, 262_144])
def test_best_few_are_the_best(size: int):
    logits = mx.array(logits_of(4, rows=3, size=size))
    for k in (1, 8, 64):
        found = np.array(best_few(logits, k))
        for row in range(3):
            assert set(found[row]) == set(np.argsort(-np.array(logits[row]))[:k])


@pytest.mark.parametrize("seed", [1.0, True, "1", None])
def test_a_seed_of_several_rows_must_be_a_whole_number(seed: object):
    for row in range(2):
        with pytest.raises(PromptError, match="seed must be a whole number"):
            row_seed(seed, row)  # type: ignore[arg-type]


def test_row_seeds_and_keys_collide_by_chance_only():
    assert [row_seed(seed, 0) for seed in (0, 1, -5, 2**70)] == [0, 1, -5, 2**70]
    keys = [seed_key(row_seed(seed, row)) for row in (0, 1, 2, 3, 8) for seed in range(100_000)]
    assert len(set(keys)) == len(keys), "chance expects 1e-8 equal pairs of 64 bits"
    for word in zip(*keys, strict=True):
        # Of 500,000 keys 29 pairs share a word of 32 bits by chance.
        assert len(keys) - len(set(word)) < 60
        assert abs(np.mean(np.array(word) >= 2**31) - 0.5) < 0.005
    far = [row_seed(seed, row) for seed in (0, 1, -1, 2**32, 2**40, -(2**64), 1 << 3_000_000) for row in range(50)]
    assert len(set(far)) == len(far)


def test_rows_with_the_same_seed_have_texts_of_their_own():
    logits = logits_of()[0]
    texts = {
        tuple(draw(SamplingOptions(temperature=1, seed=row_seed(seed, row)), logits, 12))
        for seed in range(60) for row in range(3)
    }  # fmt: skip
    assert len(texts) == 180


def test_the_softcap_comes_before_the_filters():
    logits, cap, count = 4 * np.array([3.0, 2.5, 2.0, 1.0, -1.0], np.float32), 4.0, 20_000
    capped = softmax(cap * np.tanh(logits / cap))
    expected = np.where(np.cumsum(capped) - capped < 0.7, capped, 0)
    found = np.bincount(draw(SamplingOptions(temperature=1, top_p=0.7), logits, count, cap), minlength=5) / count
    assert np.abs(found - expected / expected.sum()).max() < 0.02


@pytest.mark.parametrize("wrong", [
    {"temperature": -0.1}, {"temperature": float("nan")}, {"temperature": float("inf")}, {"temperature": 1e38},
    {"temperature": 10**400}, {"top_k": -1}, {"top_p": 0.0},
    {"top_p": 1.1}, {"min_p": -0.1}, {"min_p": 1.5},
])  # fmt: skip
def test_options_out_of_range(wrong: dict[str, float]):
    with pytest.raises(PromptError, match=next(iter(wrong))):
        SamplingOptions(**wrong)
