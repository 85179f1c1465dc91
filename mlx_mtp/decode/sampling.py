"""Choosing tokens from logits, so that the same seed gives the same text with and without a drafter.

Greedy is argmax. At temperature > 0 a token is drawn by the Gumbel-max rule, argmax(logits / temperature + noise),
with noise that depends on (seed, absolute position, token id) and on nothing else. Target and drafter draw with the
same noise, which makes them agree often, and a draft is accepted only if it is the token that the target draws. So the
text is the target's own sample, independent of the drafts: Daliri, Musco, Suresh, "Coupling without communication and
drafter-invariant speculative decoding" (2024).

Filters apply in transformers' order: suppressed tokens, temperature, top-k, top-p, min-p. Each of them keeps the best
token, so temperature 0 is greedy with any filter.

Rows are independent: the tokens of one don't depend on the others.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import mlx.core as mx

from ..errors import PromptError
from ..models.elementwise import capped
from ..system.fusing import counting, fused, on_gpu
from .adjustments import Adjustment, adjust
from .limits import MAX_TEMPERATURE, is_int
from .noise import gumbel, seed_key

MOST_PATTERNS = 64
"""Most samplers remembered for ragged blocks, by their rows: a few patterns of draft lengths recur again and again."""


@dataclass(frozen=True)
class SamplingOptions:
    """How one row's tokens are chosen.

    Attributes:
        temperature: 0 for greedy, at most MAX_TEMPERATURE.
        top_k: Only the k best tokens; 0 for all.
        top_p: Only the best tokens that together reach this probability; 1 for all.
        min_p: Only tokens with at least this share of the best one's probability; 0 for all.
        seed: Any integer.

    Raises:
        PromptError: An option isn't a number, or is out of its range.
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


class Sampler:
    """Chooses tokens for a batch of rows, for each exactly as if it were alone.

    Rows whose options need the same steps are computed together. Other rows' options change neither the candidates of a
    row nor the order in which it meets equal logits.
    """

    def __init__(
        self,
        rows: Sequence[SamplingOptions],
        logit_softcap: float | None = None,
        suppress_tokens: Sequence[int] = (),
        vocab_size: int = 0,
        controlled: Sequence[bool] = (),
    ) -> None:
        """Puts the options of all rows on the device.

        Args:
            rows: The options of each row.
            logit_softcap: Softcap of the target's logits, or None. It doesn't change their order, only probabilities,
                so it is applied to the candidates alone.
            suppress_tokens: Token ids that the target never chooses (generation_config's `suppress_tokens`).
            vocab_size: Number of token ids; needed with `suppress_tokens`.
            controlled: For each row, whether its logits are adjusted (`adjustments.RowControl`); empty for none.
        """
        self._softcap = logit_softcap
        self._suppress_tokens, self._vocab_size = tuple(suppress_tokens), vocab_size
        self._biases: dict[mx.Dtype, mx.array] = {}
        self._samplers: dict[tuple[int, ...], Sampler] = {}
        self._arrange(rows, controlled or [False] * len(rows))

    def _arrange(self, rows: Sequence[SamplingOptions], controlled: Sequence[bool]) -> None:
        self._rows, self._controlled = [*rows], [*controlled]
        kinds: dict[tuple[bool, bool, int, bool], list[int]] = {}
        for i, row in enumerate(rows):
            kinds.setdefault((controlled[i], *_kind(row)), []).append(i)
        self._groups = [_Group([rows[i] for i in members]) for members in kinds.values()]
        # If there are several groups: the rows of each, and each row's index when the groups are concatenated.
        self._lists = [*kinds.values()]
        self._members = [mx.array(members, dtype=mx.int32) for members in self._lists]
        self._index = mx.argsort(mx.concatenate(self._members)) if len(self._members) > 1 else None

    def of_rows(self, rows: Sequence[int]) -> Sampler:
        """A sampler for these rows of the batch, in this order; a row may occur more than once."""
        key = tuple(rows)
        if key not in self._samplers:
            if len(self._samplers) >= MOST_PATTERNS:
                self._samplers.clear()
            other = copy.copy(self)
            other._samplers = {}
            other._arrange([self._rows[row] for row in rows], [self._controlled[row] for row in rows])
            self._samplers[key] = other
        return self._samplers[key]

    def target(
        self,
        logits: mx.array,
        positions: mx.array,
        adjustments: Sequence[Sequence[Adjustment] | None] | None = None,
    ) -> mx.array:
        """Chooses the target's tokens.

        Args:
            logits: [B, L, vocab], before the softcap.
            positions: int32 [B, L], the absolute positions of the tokens to choose.
            adjustments: By row, see `adjustments.adjust`; None, or for a row None, where there is no control.

        Returns:
            int32 [B, L].
        """
        if self._suppress_tokens:
            logits = logits + self._bias(logits.dtype)
        if self._index is None:
            return self._chosen(0, logits, positions, adjustments)
        parts = [
            self._chosen(i, logits[rows], positions[rows], adjustments and [adjustments[row] for row in self._lists[i]])
            for i, rows in enumerate(self._members)
        ]
        return mx.concatenate(parts)[self._index]

    def _chosen(
        self,
        group: int,
        logits: mx.array,
        positions: mx.array,
        adjustments: Sequence[Sequence[Adjustment] | None] | None,
    ) -> mx.array:
        cap = self._softcap
        if adjustments and any(adjustments):
            logits, cap = adjust(logits, [own or _UNCHANGED for own in adjustments], cap), None
        return self._groups[group].choose(logits, None, positions, cap)

    def _bias(self, dtype: mx.Dtype) -> mx.array:
        """[vocab], minus infinity for suppressed tokens and else 0; in the logits' dtype, so that they aren't cast."""
        if dtype not in self._biases:
            banned = mx.array(self._suppress_tokens, dtype=mx.int32)
            zeros = mx.zeros((self._vocab_size,), dtype)
            self._biases[dtype] = mx.put_along_axis(zeros, banned, mx.array(-mx.inf, dtype), axis=0)
        return self._biases[dtype]

    def draft(self, logits: mx.array, ids: mx.array | None, positions: mx.array) -> mx.array:
        """Chooses drafts, with the same noise as the target's choice at that position.

        Args:
            logits: [B, n], the drafter's.
            ids: int32 [B, n], the token of each logit; None if they are the whole vocabulary in order.
            positions: int32 [B], the absolute positions of the drafts.

        Returns:
            int32 [B].
        """
        logits, positions, ids = logits[:, None], positions[:, None], None if ids is None else ids[:, None]
        if self._index is None:
            return self._groups[0].choose(logits, ids, positions, None).squeeze(1)
        parts = [
            group.choose(logits[rows], None if ids is None else ids[rows], positions[rows], None)
            for group, rows in zip(self._groups, self._members, strict=True)
        ]
        return mx.concatenate(parts)[self._index].squeeze(1)


_UNCHANGED = (Adjustment(),)


def _kind(row: SamplingOptions) -> tuple[bool, int, bool]:
    """The steps that a row needs: whether to draw, from how many candidates (0: all), and whether to filter."""
    if row.temperature == 0:
        return False, 0, False
    return True, row.top_k, row.top_p < 1 or row.min_p > 0


class _Group:
    """Rows that need the same steps, see `_kind`."""

    def __init__(self, rows: Sequence[SamplingOptions]) -> None:
        self._drawn, self._candidates, self._truncates = _kind(rows[0])

        def column(values: list[float], dtype: mx.Dtype) -> mx.array:
            return mx.array(values, dtype=dtype)[:, None, None]

        self._temperature = column([r.temperature for r in rows], mx.float32)
        self._top_p = column([r.top_p for r in rows], mx.float32)
        self._min_p = column([r.min_p for r in rows], mx.float32)
        # [B, 1, 1, 2]: broadcasts over positions and tokens.
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
        """Sets the tokens that top-p and min-p leave out to -inf; top-k has chosen the candidates before.

        Args:
            scaled: float32 [B, L, n], logits / temperature, ascending.
            drawn: float32 [B, L, n], the logits with noise, in the same order.
        """
        probabilities = mx.softmax(scaled, axis=-1)
        better = mx.cumsum(probabilities, axis=-1, reverse=True, inclusive=False)
        return _filtered(drawn, probabilities, better, probabilities[..., -1:], self._top_p, self._min_p)


@fused
def _scaled(logits: mx.array, temperature: mx.array) -> tuple[mx.array, mx.array]:
    """Logits in float32, and the same divided by the temperature."""
    logits = logits.astype(mx.float32)
    return logits, logits / temperature


@fused
def _capped_and_scaled(logits: mx.array, cap: mx.array, temperature: mx.array) -> tuple[mx.array, mx.array]:
    """As `_scaled`, after the softcap."""
    return _scaled(capped(logits.astype(mx.float32), cap), temperature)


@partial(fused, shapeless=False)
def _perturbed(
    logits: mx.array, temperature: mx.array, first: mx.array, second: mx.array, positions: mx.array, ids: mx.array
) -> mx.array:
    """Logits with noise, whose argmax is the drawn token: argmax(l / t + g) = argmax(l + t g)."""
    return logits + temperature * gumbel(first, second, positions, ids)


@fused
def _filtered(
    drawn: mx.array, probabilities: mx.array, better: mx.array, best: mx.array, top_p: mx.array, min_p: mx.array
) -> mx.array:
    """`drawn`, or -inf where top-p or min-p leave a token out; `better` is the total probability of better tokens."""
    # Renormalising after top-p changes no ratio, so min-p may use the probabilities from before. For the best token
    # `better` is 0, so it always stays.
    return mx.where((better < top_p) & (probabilities >= min_p * best), drawn, -mx.inf)


def best_few(logits: mx.array, k: int) -> mx.array:
    """Indices of the k largest entries along the last axis, the largest last.

    Large vocabularies are searched in two steps: on a GPU a selection is a sort, and sorting 262,144 entries is slow.
    The k best entries lie in the k blocks with the largest maxima.

    Args:
        logits: [..., n], n at least k.
        k: At least 1.

    Returns:
        uint32 [..., k].
    """
    size, block = logits.shape[-1], 64
    if size % block or size < 4 * k * block:
        return _best_of_few(logits, k)
    blocks = mx.unflatten(logits, -1, (-1, block))
    chosen = _best_of_few(blocks.max(axis=-1), k)
    within = mx.take_along_axis(blocks, chosen[..., None], axis=-2).flatten(-2)
    index = _best_of_few(within, k)
    return _in_block(mx.take_along_axis(chosen, index // block, axis=-1), index, mx.array(block, mx.uint32))


@fused
def _in_block(blocks: mx.array, index: mx.array, size: mx.array) -> mx.array:
    return blocks * size + index % size


def _best_of_few(logits: mx.array, k: int) -> mx.array:
    """As `best_few`, in one step."""
    if on_gpu():
        return mx.argsort(logits, axis=-1)[..., -k:]  # on a GPU MLX's argpartition sorts as well
    best = mx.argpartition(logits, kth=-k, axis=-1)[..., -k:]
    order = mx.argsort(mx.take_along_axis(logits, best, axis=-1), axis=-1)
    return mx.take_along_axis(best, order, axis=-1)


def _take_ids(ids: mx.array | None, index: mx.array) -> mx.array:
    """The token ids at index [B, L, n]; ids None means all tokens in order."""
    if ids is None:
        return index.astype(mx.int32)
    return mx.take_along_axis(mx.broadcast_to(ids, (*index.shape[:2], ids.shape[-1])), index, axis=-1)
