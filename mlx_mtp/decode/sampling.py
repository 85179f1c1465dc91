"""Choosing tokens from logits, so that the same seed gives the same text with and without a drafter.

Greedy is argmax. At temperature > 0 a token is drawn by the Gumbel-max rule, argmax(logits / temperature + noise),
with noise that depends on (seed, absolute position, token id) and on nothing else. Target and drafter draw with the
same noise, which makes them agree often, and a draft counts only if it is the very token that the target draws. So
the text is the target's sample whatever was drafted: Daliri, Musco, Suresh, "Coupling without communication and
drafter-invariant speculative decoding" (2024).

Filters apply in transformers' order: suppressed tokens, temperature, top-k, top-p, min-p. All of them keep the best
token, so temperature 0 is greedy whatever the others say.

Rows are independent: each is chosen for as if it were alone.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from hashlib import blake2b
from typing import TypeGuard

import mlx.core as mx

from ..errors import PromptError
from ..models.elementwise import softcap
from ..system.fusing import counting, fused, on_gpu
from .limits import MAX_TEMPERATURE

MOST_PATTERNS = 64
"""Samplers for rows with different numbers of tokens that are kept: the same few patterns come again and again."""


@dataclass(frozen=True)
class SamplingOptions:
    """How one row's tokens are chosen.

    Attributes:
        temperature: 0 for greedy, and at most MAX_TEMPERATURE.
        top_k: Only the k best tokens; 0 for all.
        top_p: Only the best tokens that together reach this probability; 1 for all.
        min_p: Only tokens with at least this share of the best one's probability; 0 for all.
        seed: Any integer.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("temperature", "top_p", "min_p"):
            if not isinstance(value := getattr(self, name), int | float):
                raise PromptError(f"{name} must be a number, not {value!r}")
        if not 0 <= self.temperature <= MAX_TEMPERATURE:
            raise PromptError(f"temperature must be between 0 and {MAX_TEMPERATURE:,}")
        if not is_int(self.top_k) or self.top_k < 0:
            raise PromptError(f"top_k must be 0 (off) or a larger whole number, not {self.top_k!r}")
        if not 0 < self.top_p <= 1:
            raise PromptError(f"top_p must be above 0 and at most 1, not {self.top_p}")
        if not 0 <= self.min_p <= 1:
            raise PromptError(f"min_p must be between 0 and 1, not {self.min_p}")
        if not is_int(self.seed):
            raise PromptError(f"seed must be a whole number, not {self.seed!r}")


def is_int(value: object) -> TypeGuard[int]:
    """Whether an option's value is a whole number; True and False aren't."""
    return isinstance(value, int) and not isinstance(value, bool)


class Sampler:
    """Chooses tokens for a batch of rows, for each exactly as if it were alone.

    Rows whose options call for the same steps are chosen together. What another row asks for can't change the
    candidates of a row, nor the order in which equal logits are met.
    """

    def __init__(
        self,
        rows: Sequence[SamplingOptions],
        logit_softcap: float | None = None,
        suppress_tokens: Sequence[int] = (),
        vocab_size: int = 0,
    ):
        """Puts the options of all rows on the device.

        Args:
            rows: The options, one a row.
            logit_softcap: Softcap of the target's logits. The chosen token depends on it only through
                probabilities, so it is applied to the candidates alone.
            suppress_tokens: Token ids that the target never chooses (generation_config's `suppress_tokens`).
            vocab_size: Needed with `suppress_tokens`.
        """
        self._softcap = logit_softcap
        self._suppress_tokens, self._vocab_size = tuple(suppress_tokens), vocab_size
        self._biases: dict[mx.Dtype, mx.array] = {}
        self._others: dict[tuple[int, ...], Sampler] = {}
        self._arrange(rows)

    def _arrange(self, rows: Sequence[SamplingOptions]) -> None:
        self._rows = [*rows]
        kinds: dict[tuple[bool, int, bool], list[int]] = {}
        for i, row in enumerate(rows):
            kinds.setdefault(_kind(row), []).append(i)
        self._groups = [_Group([rows[i] for i in members]) for members in kinds.values()]
        # For several groups: the rows of each, and where each row then lies when the groups stand in line.
        self._members = [mx.array(members, dtype=mx.int32) for members in kinds.values()]
        self._place = mx.argsort(mx.concatenate(self._members)) if len(self._members) > 1 else None

    def of_rows(self, rows: Sequence[int]) -> Sampler:
        """One that chooses for these rows, in this order; a row may be there more than once."""
        key = tuple(rows)
        if key not in self._others:
            if len(self._others) >= MOST_PATTERNS:
                self._others.clear()
            other = copy.copy(self)
            other._others = {}
            other._arrange([self._rows[row] for row in rows])
            self._others[key] = other
        return self._others[key]

    def target(self, logits: mx.array, positions: mx.array) -> mx.array:
        """Chooses the target's tokens.

        Args:
            logits: [B, L, vocab], before the softcap.
            positions: int32 [B, L], the absolute positions that the chosen tokens will have.

        Returns:
            int32 [B, L].
        """
        if self._suppress_tokens:
            logits = logits + self._bias(logits.dtype)
        return self._choose(logits, None, positions, self._softcap)

    def _bias(self, dtype: mx.Dtype) -> mx.array:
        """[vocab], minus infinity for suppressed tokens and else 0; of the logits' type, so that these aren't cast."""
        if dtype not in self._biases:
            banned = mx.array(self._suppress_tokens, dtype=mx.int32)
            zeros = mx.zeros((self._vocab_size,), dtype)
            self._biases[dtype] = mx.put_along_axis(zeros, banned, mx.array(-mx.inf, dtype), axis=0)
        return self._biases[dtype]

    def draft(self, logits: mx.array, ids: mx.array | None, positions: mx.array) -> mx.array:
        """Chooses drafts, with the noise that the target will choose with.

        Args:
            logits: [B, n].
            ids: int32 [B, n], the tokens they belong to; None for the whole vocabulary in order.
            positions: int32 [B], the position of the drafts.

        Returns:
            int32 [B].
        """
        ids = None if ids is None else ids[:, None]
        return self._choose(logits[:, None], ids, positions[:, None], None).squeeze(1)

    def _choose(self, logits: mx.array, ids: mx.array | None, positions: mx.array, cap: float | None) -> mx.array:
        if self._place is None:
            return self._groups[0].choose(logits, ids, positions, cap)
        chosen = [
            group.choose(logits[rows], None if ids is None else ids[rows], positions[rows], cap)
            for group, rows in zip(self._groups, self._members, strict=True)
        ]
        return mx.concatenate(chosen)[self._place]


def _kind(row: SamplingOptions) -> tuple[bool, int, bool]:
    """What a row's choice takes: whether it is drawn, from how many candidates (0: all), and whether with filters."""
    if row.temperature == 0:
        return False, 0, False
    return True, row.top_k, row.top_p < 1 or row.min_p > 0


class _Group:
    """Rows of one kind."""

    def __init__(self, rows: Sequence[SamplingOptions]):
        self._drawn, self._candidates, self._truncates = _kind(rows[0])

        def column(values: list[float], dtype: mx.Dtype) -> mx.array:
            return mx.array(values, dtype=dtype)[:, None, None]

        self._temperature = column([r.temperature for r in rows], mx.float32)
        self._top_p = column([r.top_p for r in rows], mx.float32)
        self._min_p = column([r.min_p for r in rows], mx.float32)
        # [B, 1, 1, 2]: a key goes with a position and a token.
        self._keys = mx.array([[[seed_key(r.seed)]] for r in rows], dtype=mx.uint32)

    def choose(self, logits: mx.array, ids: mx.array | None, positions: mx.array, cap: float | None) -> mx.array:
        """Chooses from logits [B, L, n]; see `Sampler.target` and `Sampler.draft`."""
        if not self._drawn:
            return _take_ids(ids, mx.argmax(logits, axis=-1, keepdims=True)).squeeze(-1)
        order = None
        if 0 < self._candidates < logits.shape[-1]:
            order = best_few(logits, self._candidates)
        elif self._truncates:
            order = mx.argsort(logits, axis=-1)
        if order is not None:
            logits, ids = mx.take_along_axis(logits, order, axis=-1), _take_ids(ids, order)
        if cap is None:
            logits, scaled = _scaled(logits, self._temperature)
        else:
            logits, scaled = _capped_and_scaled(logits, mx.array(cap, mx.float32), self._temperature)
        token_ids = counting(logits.shape[-1]) if ids is None else ids
        drawn = _perturbed(
            logits, self._temperature, self._keys[..., 0], self._keys[..., 1], positions[:, :, None], token_ids
        )
        if self._truncates:
            drawn = self._truncate(scaled, drawn)
        return _take_ids(ids, mx.argmax(drawn, axis=-1, keepdims=True)).squeeze(-1)

    def _truncate(self, scaled: mx.array, drawn: mx.array) -> mx.array:
        """Sets filtered tokens to -inf; all but top-k, which chose the candidates.

        Args:
            scaled: float32 [B, L, n], ascending logits by temperature.
            drawn: The logits with noise.
        """
        probabilities = mx.softmax(scaled, axis=-1)
        better = mx.cumsum(probabilities, axis=-1, reverse=True, inclusive=False)
        return _filtered(drawn, probabilities, better, probabilities[..., -1:], self._top_p, self._min_p)


@fused
def _scaled(logits: mx.array, temperature: mx.array) -> tuple[mx.array, mx.array]:
    """Logits in float32, and by temperature."""
    logits = logits.astype(mx.float32)
    return logits, logits / temperature


@fused
def _capped_and_scaled(logits: mx.array, cap: mx.array, temperature: mx.array) -> tuple[mx.array, mx.array]:
    """As `_scaled`, after the softcap."""
    return _scaled(softcap(logits.astype(mx.float32), cap), temperature)


@partial(fused, shapeless=False)
def _perturbed(
    logits: mx.array, temperature: mx.array, first: mx.array, second: mx.array, positions: mx.array, ids: mx.array
) -> mx.array:
    """Logits whose largest is drawn: argmax(l / t + g) = argmax(l + t g)."""
    return logits + temperature * gumbel(first, second, positions, ids)


@fused
def _filtered(
    drawn: mx.array, probabilities: mx.array, better: mx.array, best: mx.array, top_p: mx.array, min_p: mx.array
) -> mx.array:
    """`drawn`, or -inf where top-p or min-p leave a token out; `better` is how likely better tokens are together."""
    # Renormalising after top-p changes no ratio, so min-p may look at the probabilities from before. Nothing is better
    # than the best token, so that it is always kept.
    return mx.where((better < top_p) & (probabilities >= min_p * best), drawn, -mx.inf)


def best_few(logits: mx.array, k: int) -> mx.array:
    """Indices of the k largest entries along the last axis, the largest last: uint32 [..., k].

    Large vocabularies are searched in two steps, because selecting from 262,144 entries means sorting them on a GPU.
    The k best entries lie in the k blocks with the largest maxima.
    """
    size, block = logits.shape[-1], 64
    if size % block or size < 4 * k * block:
        return _best_of_few(logits, k)
    blocks = mx.unflatten(logits, -1, (-1, block))
    chosen = _best_of_few(blocks.max(axis=-1), k)
    within = mx.take_along_axis(blocks, chosen[..., None], axis=-2).flatten(-2)
    place = _best_of_few(within, k)
    return _in_block(mx.take_along_axis(chosen, place // block, axis=-1), place, mx.array(block, mx.uint32))


@fused
def _in_block(blocks: mx.array, place: mx.array, size: mx.array) -> mx.array:
    return blocks * size + place % size


def _best_of_few(logits: mx.array, k: int) -> mx.array:
    """As `best_few`, in one step."""
    if on_gpu():
        return mx.argsort(logits, axis=-1)[..., -k:]  # which is what a partition is there
    best = mx.argpartition(logits, kth=-k, axis=-1)[..., -k:]
    order = mx.argsort(mx.take_along_axis(logits, best, axis=-1), axis=-1)
    return mx.take_along_axis(best, order, axis=-1)


def gumbel(first: mx.array, second: mx.array, positions: mx.array, token_ids: mx.array) -> mx.array:
    """Standard Gumbel noise as a pure function of its arguments, which broadcast against each other.

    A counter-based generator: only the candidates' noise is ever computed, and its bits are the same on every backend.

    Args:
        first, second: uint32, the two words of a row's key, see `seed_key`.
        positions: int32, absolute positions.
        token_ids: int32 or uint32.

    Returns:
        float32 of the broadcast shape, finite.
    """
    positions = _scramble(positions.astype(mx.uint32))
    # Two words for each position, so that all 64 bits of the key reach every token's noise.
    stream = _scramble(first ^ positions)
    other = _scramble(second ^ _scramble(positions ^ mx.array(0x9E3779B9, mx.uint32)))
    return noise_of_bits(_scramble(_scramble(token_ids.astype(mx.uint32) ^ stream) + other))


def noise_of_bits(bits: mx.array) -> mx.array:
    """Standard Gumbel noise, float32, from uniform bits, uint32: -log(-log(1 - u)) with u = (bits + 0.5) / 2**32.

    Large noise, which decides what is drawn, comes from small u, where a float32 has all digits: it goes up to
    log(2**33) = 22.9, in steps that shrink with its probability. -log(-log(u)) would have its largest values where u
    is nearly 1, in steps of 2**-24, and infinity among them: a token that is drawn whatever its logit.
    """
    u = (bits.astype(mx.float32) + 0.5) * 2**-32
    # The 128 largest integers are rounded to 2**32, and 1 would be minus infinity.
    return -mx.log(-mx.log1p(-mx.minimum(u, 1 - 2**-24)))


def row_seed(seed: int, row: int) -> int:
    """The seed of row `row` when one seed is given for several rows: row 0 keeps it, the others get 64 bits of a hash.

    Raises:
        PromptError: The seed is no whole number.
    """
    if not is_int(seed):
        raise PromptError(f"seed must be a whole number, not {seed!r}")
    return seed if row == 0 else _hash(seed, row)


def _scramble(x: mx.array) -> mx.array:
    """A bijection of uint32 that spreads every input bit over the output (Wellons' "lowbias32" constants)."""
    x = (x ^ (x >> 16)) * mx.array(0x7FEB352D, mx.uint32)
    x = (x ^ (x >> 15)) * mx.array(0x846CA68B, mx.uint32)
    return x ^ (x >> 16)


def seed_key(seed: int) -> tuple[int, int]:
    """The key of a seed of any size, as two words of 32 bits."""
    mixed = _hash(seed)
    return mixed >> 32, mixed & 0xFFFFFFFF


def _hash(*numbers: int) -> int:
    """64 bits that depend on every bit of some whole numbers, equal for others by chance only."""
    digest = blake2b(digest_size=8)
    for number in numbers:
        data = number.to_bytes(number.bit_length() // 8 + 1, "big", signed=True)
        digest.update(len(data).to_bytes(8, "big") + data)
    return int.from_bytes(digest.digest(), "big")


def _take_ids(ids: mx.array | None, index: mx.array) -> mx.array:
    """The token ids at index [B, L, n]; None for ids stands for all tokens in order."""
    if ids is None:
        return index.astype(mx.int32)
    return mx.take_along_axis(mx.broadcast_to(ids, (*index.shape[:2], ids.shape[-1])), index, axis=-1)
