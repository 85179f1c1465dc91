"""How the oracle chooses tokens: the definitions of noise, penalties, masks and filters, written down a second time.

numpy, float64, one position at a time, the whole vocabulary each time; shares no code with mlx_mtp.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any

import numpy as np

from .oracle import Array, softmax

NEAR = 2e-6
"""Share of the largest logit by which the steps after it may move a score in float32: 17 units of its last place."""

SAME_SHARE = 1e-5
"""As NEAR, of probabilities at the edge of top-p and, as a share of themselves, of min-p."""


@dataclass(frozen=True)
class Wish:
    """How tokens are to be chosen.

    Attributes:
        temperature, top_k, top_p, min_p, seed: As in the options of a call; the seed is the row's.
        repetition, presence, frequency: Penalties; 1, 0 and 0 change nothing.
        bias: Added to logits, by token.
        suppressed: Tokens that are never chosen.
        process: Changes the logits after the penalties; gets all tokens so far.
        allowed: Says which tokens may come after the text so far, bool [vocab].
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    repetition: float = 1.0
    presence: float = 0.0
    frequency: float = 0.0
    bias: dict[int, float] = field(default_factory=dict)
    suppressed: Sequence[int] = ()
    process: Callable[[list[int], Array], Array] | None = None
    allowed: Callable[[list[int]], np.ndarray] | None = None

    @property
    def controlled(self) -> bool:
        """Whether anything happens between the model's logits and the sampler."""
        penalised = (self.repetition, self.presence, self.frequency) != (1, 0, 0)
        return penalised or bool(self.bias) or self.process is not None or self.allowed is not None


def row_seed(seed: int, row: int) -> int:
    """The seed of the i-th row of a call."""
    return seed if row == 0 else _hash(seed, row)


def noise(seed: int, position: int, vocab: int) -> Array:
    """Standard Gumbel noise of every token at a position, as mlx_mtp/decode/noise.py defines it."""
    first, second = _hash(seed) >> 32, _hash(seed) & 0xFFFFFFFF
    place = _scrambled(position)
    stream, other = _scrambled(first ^ place), _scrambled(second ^ _scrambled(place ^ 0x9E3779B9))
    tokens = np.arange(vocab, dtype=np.uint64)
    bits = _scrambled((_scrambled(tokens ^ stream) + other) & 0xFFFFFFFF)
    u = np.minimum((bits.astype(np.float32) + np.float32(0.5)) * np.float32(2**-32), 1 - 2**-24)
    return -np.log(-np.log1p(-u.astype(np.float64)))


def _scrambled(x: Any) -> Any:
    """A number of 32 bits mixed, or an array of them in 64 bits."""
    x = ((x ^ x >> 16) * 0x7FEB352D) & 0xFFFFFFFF
    x = ((x ^ x >> 15) * 0x846CA68B) & 0xFFFFFFFF
    return x ^ x >> 16


def _hash(*numbers: int) -> int:
    """The first 64 bits of BLAKE2b over each number's length and its bytes, big end first, in two's complement."""
    text = b""
    for number in numbers:
        size = number.bit_length() // 8 + 1
        text += size.to_bytes(8, "big") + number.to_bytes(size, "big", signed=True)
    return int(blake2b(text, digest_size=8).hexdigest(), 16)


def adjusted(cap: float | None, logits: Array, prompt: list[int], text: list[int], wish: Wish) -> Array:
    """Logits [vocab] after the softcap and all that a wish does to them; minus infinity for what may not come."""
    logits = logits.copy()
    logits[list(wish.suppressed)] = -np.inf
    if cap is not None:
        logits = np.where(np.isinf(logits), logits, cap * np.tanh(logits / cap))
    for token, bias in wish.bias.items():
        logits[token] += bias
    seen = np.unique([*prompt, *text])
    logits[seen] = np.where(logits[seen] > 0, logits[seen] / wish.repetition, logits[seen] * wish.repetition)
    counts = np.bincount(text, minlength=len(logits)) if text else np.zeros(len(logits))
    logits -= np.where(counts > 0, wish.presence + wish.frequency * counts, 0)
    if wish.process:
        logits = wish.process([*prompt, *text], logits)
    if wish.allowed:
        logits = np.where(wish.allowed(text), logits, -np.inf)
    return logits


def distribution(cap: float | None, logits: Array, prompt: list[int], text: list[int], wish: Wish) -> Array:
    """The probability of every token to come next, at a temperature above 0; arguments as for `adjusted`."""
    scores = adjusted(cap, logits, prompt, text, wish)
    return softmax(np.where(_kept(scores, wish), scores / wish.temperature, -np.inf))


def chosen(cap: float | None, logits: Array, prompt: list[int], text: list[int], wish: Wish) -> int:
    """The token that must come next.

    Args:
        cap: The softcap of the model's logits, or None.
        logits: [vocab], after prompt and text, before the softcap.
        prompt: Token ids.
        text: Token ids generated so far.
        wish: How to choose.
    """
    scores = _scores(cap, logits, prompt, text, wish)
    if wish.temperature == 0:
        return int(scores.argmax())
    drawn = scores + wish.temperature * noise(wish.seed, len(prompt) + len(text), len(logits))
    return int(np.where(_kept(scores, wish), drawn, -np.inf).argmax())


def possible(
    cap: float | None, logits: Array, prompt: list[int], text: list[int], wish: Wish, rounding: float
) -> set[int]:
    """All tokens that could come next if the logits were wrong by no more than `rounding`; else as `chosen`."""
    scores = _scores(cap, logits, prompt, text, wish)
    finite = scores[np.isfinite(scores)]
    near = 2 * (rounding * max(wish.repetition, 1 / wish.repetition) + NEAR * max(1.0, float(np.abs(finite).max())))
    if wish.temperature == 0:
        return set(np.flatnonzero(scores >= scores.max() - near).tolist())
    near += 2 * NEAR * wish.temperature
    drawn = scores + wish.temperature * noise(wish.seed, len(prompt) + len(text), len(logits))
    surely, perhaps = _surely_and_perhaps_kept(scores, near, wish)
    best = np.where(surely, drawn, -np.inf).max()  # minus infinity if none is sure
    return set(np.flatnonzero(perhaps & (drawn >= best - near)).tolist())


def _scores(cap: float | None, logits: Array, prompt: list[int], text: list[int], wish: Wish) -> Array:
    """What is compared: greedy texts are chosen before the softcap, which changes no order but hides differences."""
    if wish.temperature > 0 or wish.controlled:
        return adjusted(cap, logits, prompt, text, wish)
    scores = logits.copy()
    scores[list(wish.suppressed)] = -np.inf
    return scores


def _kept(scores: Array, wish: Wish) -> np.ndarray:
    """Which tokens the filters leave, in transformers' order: temperature, top-k, top-p, min-p."""
    order = np.argsort(-scores, kind="stable")[: wish.top_k or None]
    shares = softmax(scores[order] / wish.temperature)
    before = np.concatenate([[0.0], np.cumsum(shares)[:-1]])
    kept = np.zeros(len(scores), bool)
    kept[order] = (before < wish.top_p) & (shares >= wish.min_p * shares[0])
    return kept


def _surely_and_perhaps_kept(scores: Array, near: float, wish: Wish) -> tuple[np.ndarray, np.ndarray]:
    """Which tokens the filters leave whatever the rounding, and which they leave with some rounding."""
    finite = scores > -np.inf
    best = float(scores.max())
    surely = perhaps = finite
    if 0 < wish.top_k < len(scores):
        edge = np.sort(scores)[-wish.top_k]
        surely, perhaps = surely & (scores > edge + near), perhaps & (scores >= edge - near)
    weights = np.where(perhaps, np.exp((scores - best) / wish.temperature), 0)
    shares = weights / weights.sum()
    sure_total = weights[surely].sum() / weights.sum() if surely.any() else 1.0
    if wish.top_p < 1:
        least = np.array([shares[scores > score + near].sum() for score in scores])
        most = np.array([shares[scores > score - near].sum() for score in scores]) - shares
        # With tokens at the edge of top-k the total is uncertain, and with it every share.
        slack = SAME_SHARE + (1 - sure_total)
        # And scores that are wrong by half of `near` change the odds of what lies before a token by that factor.
        odds, factor = wish.top_p / (1 - wish.top_p), math.exp(near / wish.temperature)
        low, high = odds / (odds + factor), odds / (odds + 1 / factor)
        surely, perhaps = surely & (most < low - slack), perhaps & (least < high + slack)
    if wish.min_p > 0:
        edge = math.log(wish.min_p) * wish.temperature + best
        slack = near + SAME_SHARE * wish.temperature
        surely, perhaps = surely & (scores > edge + slack), perhaps & (scores >= edge - slack)
    top = finite & (scores >= best - near)
    # Filters keep the best token; but which one that is isn't sure if another is as near.
    return surely | top if top.sum() == 1 else surely, perhaps | top
