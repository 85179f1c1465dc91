"""Statistics of noise and of drawn tokens, by scipy.stats: p-values of what should hold.

Tokens are drawn by the engine from a target whose logits are the same after every text, with drafters that are good,
poor or malicious; what steers a text may still make each token's distribution another one. So each token is turned into
a number that is uniform if it was drawn from the right distribution, independent of all others: the probability of the
tokens before it in the order of their ids, plus a random part of its own (the probability integral transform).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import numpy as np
from scipy import stats

from mlx_mtp.config import target_config
from mlx_mtp.control.penalties import Penalties
from mlx_mtp.control.row import Rules
from mlx_mtp.decode.adjustments import Adjustment
from mlx_mtp.decode.noise import gumbel, row_seed, seed_key
from mlx_mtp.decode.request import Request
from mlx_mtp.decode.sampling import Sampler, SamplingOptions
from mlx_mtp.decode.scheduler import Scheduler
from mlx_mtp.kv import KVBuffers
from mlx_mtp.models.target import Target

from .oracle import Array, softmax
from .oracle_choice import Wish, distribution

VOCAB, CAP = 24, 5.0
"""Size of the vocabulary, and the softcap."""

SIGNIFICANT = 1e-4
"""A p-value, of many tests as one, below which something is wrong."""

ALONG = ("token", "position", "seed", "row")
"""What noise may be looked at along."""


# Noise


def noise_along(axis: str, count: int, start: int = 0) -> Iterator[Array]:
    """Noise for `count` neighbouring tokens, positions, seeds or rows from `start` on, all else at a few low values.

    Yields:
        Numbers that should be uniform and independent, float64 [count].
    """
    numbers = mx.arange(start, start + count)
    for other in range(4):
        words = mx.array(seed_key(other), mx.uint32)
        if axis == "token":
            found = gumbel(words[0], words[1], mx.array(7 * other), numbers)
        elif axis == "position":
            found = gumbel(words[0], words[1], numbers, mx.array(other))
        else:
            seeds = range(start, start + count)
            pairs = [seed_key(seed if axis == "seed" else row_seed(other, seed)) for seed in seeds]
            keys = mx.array(np.array(pairs, np.uint32))
            found = gumbel(keys[:, 0], keys[:, 1], mx.array(other), mx.array(3))
        yield np.exp(-np.exp(-np.array(found, np.float64)))


def noise_p_values(uniform: Array, bins: int = 1024) -> dict[str, float]:
    """Tests of numbers that should be uniform on 0 to 1 and independent.

    Args:
        uniform: The numbers, at least 50 for each bin.
        bins: Classes of the test of uniformity; pairs of neighbours have their square root by their square root.
    """
    side, size = int(bins**0.5), len(uniform) // 2 * 2
    found = {"uniform": stats.chisquare(np.bincount(_classes(uniform, bins), minlength=bins)).pvalue}
    first, second = _classes(uniform[:size:2], side), _classes(uniform[1:size:2], side)
    found["pairs"] = stats.chisquare(np.bincount(first * side + second, minlength=side * side)).pvalue
    for lag in (1, 2, 3, 8, 256):
        found[f"correlation with the one {lag} later"] = stats.pearsonr(uniform[:-lag], uniform[lag:]).pvalue
    runs = np.diff(uniform) > 0  # of three numbers in a row, the middle one is the largest or smallest in two of three
    turns = int((runs[:-1] != runs[1:]).sum())
    expected, variance = 2 * (len(uniform) - 2) / 3, (16 * len(uniform) - 29) / 90
    found["turning points"] = 2 * stats.norm.sf(abs(turns - expected) / variance**0.5)
    largest = uniform[: len(uniform) // 64 * 64].reshape(-1, 64).argmax(axis=1)
    found["place of the largest"] = stats.chisquare(np.bincount(largest, minlength=64)).pvalue
    return {name: float(value) for name, value in found.items()}


def _classes(uniform: Array, count: int) -> np.ndarray:
    return np.minimum((uniform * count).astype(np.int64), count - 1)


def least_of(p_values: Sequence[float]) -> float:
    """The smallest p-value as one of so many (Sidak): uniform itself if all are right."""
    return float(-np.expm1(len(p_values) * np.log1p(-min(p_values))))


# Drawn tokens


def constant_target(logits: Array) -> Target:
    """A target with these logits [VOCAB] after every text, before the softcap CAP."""
    rope = {"rope_theta": 1e4, "rope_type": "default"}
    config = target_config({
        "model_type": "gemma4_text", "vocab_size": VOCAB, "hidden_size": 8, "num_hidden_layers": 1,
        "intermediate_size": 8, "num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 4, "global_head_dim": 4,
        "sliding_window": 8, "max_position_embeddings": 4096, "rms_norm_eps": 1e-6, "layer_types": ["full_attention"],
        "rope_parameters": {"sliding_attention": rope, "full_attention": rope}, "tie_word_embeddings": False,
        "final_logit_softcapping": CAP,
    }).text  # fmt: skip
    target = Target(config)
    target.embed_tokens.weight = mx.ones((VOCAB, 8))
    target.layers[0].self_attn.o_proj.weight *= 0
    target.layers[0].mlp.down_proj.weight *= 0
    target.lm_head.weight = mx.broadcast_to(mx.array(logits, mx.float32)[:, None] / 8, (VOCAB, 8))
    for part in target.modules():
        if hasattr(part, "prepare"):
            part.prepare()
    mx.eval(target.parameters())
    return target


class ConstantDrafter:
    """Stands in for a drafter: it has the same logits after every text, or one candidate by position.

    Attributes:
        logits: Its logits [VOCAB], or None.
    """

    def __init__(self, logits: Array | None = None, candidate: Callable[[mx.array], mx.array] | None = None) -> None:
        """Takes logits [VOCAB], or what makes candidates [B] of positions [B]."""
        self.logits = logits
        self._candidate, self._step = candidate, 0

    def shared_kv(self, kv: KVBuffers, lengths: mx.array) -> mx.array:
        """Starts a round."""
        self._step = 0
        return lengths

    def __call__(
        self, embedded: mx.array, hidden: mx.array, lent: mx.array
    ) -> tuple[mx.array, mx.array | None, mx.array]:
        """Proposes a token for each row."""
        self._step += 1
        if self._candidate:
            token = self._candidate(lent + self._step).astype(mx.int32)[:, None]
            return mx.zeros(token.shape), token, hidden
        return mx.broadcast_to(mx.array(self.logits, mx.float32), (len(embedded), VOCAB)), None, hidden


def drafters(logits: Array) -> dict[str, Any]:
    """Drafters for a target with these logits, by what they are like."""
    rng, best, worst = np.random.default_rng(5), int(logits.argmax()), int(logits.argmin())
    capped = CAP * np.tanh(logits / CAP)
    return {
        "none": None,
        "the target's own": ConstantDrafter(capped),
        "good": ConstantDrafter(capped + rng.normal(0, 0.3, VOCAB)),
        "poor": ConstantDrafter(rng.normal(0, 2, VOCAB)),
        "the other way round": ConstantDrafter(-capped),
        "always the best": ConstantDrafter(candidate=lambda at: mx.full(at.shape, best)),
        "always the worst": ConstantDrafter(candidate=lambda at: mx.full(at.shape, worst)),
        "by the noise alone": ConstantDrafter(np.zeros(VOCAB)),
        "by position": ConstantDrafter(candidate=lambda at: at % VOCAB),
    }


class OddOrEven:
    """A `RowControl` with a mask: after an even number of tokens only even ids may come, then only odd ones."""

    def __init__(self, _: Sequence[int]) -> None:
        self._length = 0

    def advance(self, tokens: Sequence[int]) -> None:
        """See `RowControl`."""
        self._length += len(tokens)

    def forced(self) -> list[int]:
        """See `RowControl`."""
        return []

    def adjustments(self, drafts: Sequence[int]) -> list[Adjustment]:
        """See `RowControl`."""
        words = [np.array([0x55555555 << (self._length + i) % 2], np.uint32) for i in range(len(drafts) + 1)]
        return [Adjustment(allowed=word) for word in words]


def odd_or_even(text: list[int]) -> np.ndarray:
    """The oracle's form of that mask."""
    return np.arange(VOCAB) % 2 == len(text) % 2


WISHES = {
    "temperature 0.5": Wish(temperature=0.5),
    "temperature 1": Wish(temperature=1.0),
    "temperature 2": Wish(temperature=2.0),
    "top-k": Wish(temperature=1.5, top_k=7),
    "top-p": Wish(temperature=1.0, top_p=0.8),
    "min-p": Wish(temperature=1.5, min_p=0.1),
    "all three": Wish(temperature=1.2, top_k=15, top_p=0.9, min_p=0.02),
    "penalties": Wish(temperature=1.0, repetition=1.3, presence=0.4, frequency=0.05, bias={2: 1.0, 5: -2.0}),
    "penalties and top-p": Wish(temperature=1.0, top_p=0.9, repetition=0.8, presence=-0.2, frequency=0.02),
    "mask": Wish(temperature=1.0, allowed=odd_or_even),
    "mask and top-k": Wish(temperature=1.0, top_k=5, allowed=odd_or_even),
}
WISHES = {name: replace(wish, seed=100_000 * i) for i, (name, wish) in enumerate(WISHES.items())}
"""What tokens are drawn by, each from seeds of its own, so that one case's luck isn't another's."""


def some_logits() -> Array:
    """Logits [VOCAB] before the softcap."""
    return np.random.default_rng(11).normal(0, 2, VOCAB)


@dataclass(frozen=True)
class Drawn:
    """Tokens that were drawn.

    Attributes:
        texts: The texts.
        uniform: For each token a number that is uniform if all is right.
        drafted: How many drafts there were.
        accepted: How many of them were accepted.
        impossible: Tokens whose probability is 0.
    """

    texts: list[list[int]]
    uniform: Array
    drafted: int
    accepted: int
    impossible: int

    @property
    def p_value(self) -> float:
        """Of the chi-square test of uniformity in 64 classes, and of neighbours in 8 by 8."""
        classes, pairs = _classes(self.uniform, 64), _classes(self.uniform, 8)
        size = len(pairs) // 2 * 2
        tests = [np.bincount(classes, minlength=64), np.bincount(pairs[:size:2] * 8 + pairs[1:size:2], minlength=64)]
        return least_of([float(stats.chisquare(counts).pvalue) for counts in tests])


def draw(wish: Wish, drafter: Any, samples: int, length: int = 50, draft_length: int = 5) -> Drawn:
    """Has the engine write texts of `length` tokens, 32 at a time, with seeds from the wish's own on."""
    logits, prompt = some_logits(), [1, 2, 3]
    scheduler = Scheduler(constant_target(logits), drafter, max_rows=32, cache_bytes=0)
    sampling = SamplingOptions(wish.temperature, wish.top_k, wish.top_p, wish.min_p)
    penalties = Penalties(
        repetition=wish.repetition, presence=wish.presence, frequency=wish.frequency, bias=wish.bias
    )  # fmt: skip
    control = OddOrEven if wish.allowed else Rules(vocab_size=VOCAB, penalties=penalties).begin if penalties else None
    rows = [
        scheduler.submit(
            Request(prompt, length, replace(sampling, seed=seed), draft_length if drafter else 0, control=control)
        )
        for seed in range(wish.seed, wish.seed - (-samples // length))
    ]
    while not all(row.done for row in rows):
        scheduler.step()
    rng, uniform, impossible = np.random.default_rng(wish.seed), [], 0
    for row in rows:
        shares = distribution(CAP, logits, prompt, [], wish)
        for i, token in enumerate(row.tokens):
            if wish.controlled:
                shares = distribution(CAP, logits, prompt, row.tokens[:i], wish)
            impossible += shares[token] == 0
            uniform.append(shares[:token].sum() + rng.random() * shares[token])
    counts = [row.stats for row in rows]
    drafted, accepted = sum(it.drafted for it in counts), sum(it.accepted for it in counts)
    return Drawn([row.tokens for row in rows], np.array(uniform), drafted, accepted, impossible)


def draw_with_others(what: str, who: str, others: Sequence[str], samples: int, few: int) -> tuple[Drawn, bool]:
    """Has tokens drawn with a drafter, and `few` of them again with others.

    Args:
        what: One of WISHES.
        who: One of `drafters`.
        others: Some more of them.
        samples: Number of tokens.
        few: Number of tokens for each of the others.

    Returns:
        The tokens, and whether all drafters leave the same texts.
    """
    known = drafters(some_logits())
    drawn = draw(WISHES[what], known[who], samples)
    texts = [draw(WISHES[what], known[other], few).texts for other in others]
    return drawn, all(own == drawn.texts[: len(own)] for own in texts)


# How often a draft is accepted


@dataclass(frozen=True)
class Acceptance:
    """How often drafts are accepted, as shares.

    Attributes:
        measured: By the package's sampler, which draws target and draft with the same noise.
        formula: The same by `coupled_share`.
        bound: The most that any method can accept, 1 - total variation.
        rejection: By rejection sampling, measured.
    """

    measured: float
    formula: float
    bound: float
    rejection: float


def acceptance(drafter: Array, temperature: float, samples: int) -> Acceptance:
    """How often the drafts of a drafter with these logits [VOCAB] are accepted, at so many positions."""
    logits = some_logits()
    p, q = softmax(CAP * np.tanh(logits / CAP) / temperature), softmax(drafter / temperature)
    return Acceptance(
        agreement(logits, drafter, temperature, samples),
        coupled_share(p, q),
        bound(p, q),
        rejection_share(p, q, samples),
    )


def agreement(target: Array, drafter: Array, temperature: float, positions: int) -> float:
    """How often the sampler draws the same token from a target's logits and a drafter's, at so many positions."""
    options, at = [SamplingOptions(temperature=temperature, seed=5)], mx.arange(positions)[None]

    def drawn(logits: Array, cap: float | None) -> mx.array:
        block = mx.broadcast_to(mx.array(logits, mx.float32), (1, positions, len(logits)))
        return Sampler(options, cap).target(block, at)

    return float((drawn(target, CAP) == drawn(drafter, None)).mean().item())


def coupled_share(target: Array, drafter: Array) -> float:
    """How often two draws with the same Gumbel noise agree, from distributions [n] without zeros.

    For token i the formula is 1 / sum over j of max(p_j / p_i, q_j / q_i): both draws are i if its exponential clock
    rings first in both races.
    """
    worse = np.maximum(target[None] / target[:, None], drafter[None] / drafter[:, None])
    return float((1 / worse.sum(axis=1)).sum())


def bound(target: Array, drafter: Array) -> float:
    """The largest share with which draws from two distributions can agree: 1 - total variation.

    It is what plain rejection sampling accepts: a draft x with probability min(1, p(x) / q(x)).
    """
    return float(np.minimum(target, drafter).sum())


def rejection_share(target: Array, drafter: Array, samples: int) -> float:
    """The same by experiment: how many drafts rejection sampling accepts."""
    rng = np.random.default_rng(23)
    drafts = rng.choice(len(drafter), samples, p=drafter)
    return float((rng.random(samples) < (target / drafter)[drafts]).mean())
