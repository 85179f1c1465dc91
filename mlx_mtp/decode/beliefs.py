"""What is believed of the next rounds, from the rounds before: which drafts will be kept, and what a round takes.

Counts and arithmetic; what is made of them is decided elsewhere (draft_length.py).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from itertools import accumulate
from math import log
from operator import mul

MAX_DRAFT_LENGTH = 15
"""Longest draft that can be asked for."""

MAX_AUTO_LENGTH = 7
"""Longest draft chosen by itself: with the newest token, the 8 rows that the fused attention kernels on Metal take."""


class Acceptance:
    """Chance that draft j is kept if those before it were, in the rows that run, with exponential forgetting.

    Counted row by row: when a text ends, the others' chances are what they were, however it fared.
    """

    # What is left of a count after a round. (Of a round, not of a row: a large batch would remember two of them.)
    _FORGET = 0.95
    # What is left of the counts of texts that have ended when another begins.
    _HINT = 0.2
    # Published acceptance of these drafters, worth as much as this many rounds, and forgotten like them; each further
    # position leans on the one before with the same weight.
    _PRIOR, _PRIOR_WEIGHT = 0.8, 1.5
    # What the mean over all rows is worth in the chances of one of them, in rounds.
    _LEAN = 2.0

    def __init__(self) -> None:
        # By row, [tried, kept] for each position. None for the prior and texts that have ended.
        self._counts: dict[int | None, list[list[float]]] = {None: _nothing()}
        self._chances: list[float] = []
        # The same by row.
        self._own: dict[int, list[float]] = {}
        # Expected tokens of a round by draft length: the mean over rows, and by row.
        self._mean: list[float] = []
        self._each: dict[int, list[float]] = {}
        self._add_prior()
        self._pool()

    def copy(self) -> Acceptance:
        """One that learns on its own from here on."""
        other = Acceptance()
        other._counts = {row: [list(count) for count in counts] for row, counts in self._counts.items()}
        return other

    def begin(self, rows: Collection[int]) -> None:
        """These rows run from here on; of new ones only the prior says something, and hints from those that ended."""
        ended = [self._counts.pop(row) for row in [*self._counts] if row is not None and row not in rows]
        if any(row not in self._counts for row in rows):
            past = self._counts[None]
            for count, *others in zip(past, *ended, strict=True):
                count[:] = (self._HINT * sum(values) for values in zip(count, *others, strict=True))
            self._add_prior()
        for row in rows:
            self._counts.setdefault(row, _nothing())
        self._pool()

    def _add_prior(self) -> None:
        first = self._counts[None][0]
        first[:] = first[0] + self._PRIOR_WEIGHT, first[1] + self._PRIOR_WEIGHT * self._PRIOR

    def observe(self, drafted: int, kept: Mapping[int, int]) -> None:
        """Learns of a round, by row."""
        # Draft j was put to the test only if all drafts before it were kept.
        tested = min(drafted, max(kept.values()) + 1, MAX_AUTO_LENGTH)
        for counts in self._counts.values():
            for count in counts[:tested]:
                count[:] = self._FORGET * count[0], self._FORGET * count[1]
        for row, many in kept.items():
            counts = self._counts.setdefault(row, _nothing())
            for j, count in enumerate(counts[: min(tested, many + 1)]):
                count[0] += 1
                count[1] += many > j
        self._pool()

    def _pool(self) -> None:
        """The chances in the mean over all rows."""
        chance = self._PRIOR
        self._chances = []
        for position in zip(*self._counts.values(), strict=True):
            tried, kept = map(sum, zip(*position, strict=True))
            weight = self._PRIOR_WEIGHT if self._chances else 0.0
            chance = (kept + weight * chance) / (tried + weight)
            self._chances.append(chance)
        self._mean = _tokens(self._chances)
        self._own = {row: self._chances_of(row) for row in self._counts if row is not None}
        self._each = {row: _tokens(chances) for row, chances in self._own.items()}

    def _chances_of(self, row: int) -> list[float]:
        """A row's chances, from its own counts and its share of the past's; they lean on the mean over rows."""
        share, chances = 1 / (len(self._counts) - 1), []
        for own, past, mean in zip(self._counts[row], self._counts[None], self._chances, strict=True):
            tried, kept = own[0] + share * past[0], own[1] + share * past[1]
            chances.append((kept + self._LEAN * mean) / (tried + self._LEAN))
        return chances

    def doubt(self, drafted: int, kept: Mapping[int, int]) -> float:
        """How much likelier a round is where drafts are kept half as often as here, as a logarithm (Page's test).

        A row has a say of ten to one at most: where the most predictable text takes a turn, nothing is kept either.
        """
        total = 0.0
        for row, many in kept.items():
            ratio = many * log(0.5)
            if many < min(drafted, MAX_AUTO_LENGTH):
                chance = self._own.get(row, self._chances)[many]
                ratio += log((1 - 0.5 * chance) / (1 - chance)) if chance < 1 else log(10)
            total += min(ratio, log(10))
        return total

    def tokens(self, length: int) -> float:
        """Expected tokens of a round for a row, the bonus token included: the mean over rows."""
        return self._mean[min(length, MAX_AUTO_LENGTH)]

    def tokens_of(self, row: int, length: int) -> float:
        """The same for one of them."""
        return self._each.get(row, self._mean)[min(length, MAX_AUTO_LENGTH)]


def _tokens(chances: Sequence[float]) -> list[float]:
    """Expected tokens of a round by draft length."""
    return [1.0, *(1 + kept for kept in accumulate(accumulate(chances, mul)))]


def _nothing() -> list[list[float]]:
    return [[0.0, 0.0] for _ in range(MAX_AUTO_LENGTH)]


class RoundCosts:
    """Seconds of a round by draft length; lengths never tried lie on the line through those that were.

    Rounds of all lengths become dearer together as the context grows, or when the machine has other work. So a length's
    seconds are its price times a scale that all share: a length long not tried keeps its place among the others.
    """

    # Of what a round took more or less than expected, the part that goes into the scale.
    _COMMON = 0.2
    # The part that goes into the length's own price: the first over the rounds it was seen, but never less than the
    # second.
    _OWN, _OWN_LEAST = 0.5, 0.03
    # The machine may pause: no round counts for more than this times what was expected, and a length's only round for
    # no more than this times what shorter ones let expect.
    _MOST, _MOST_ONCE = 1.25, 1.5
    # Rounds of a length after which its price is known well enough to tell the scale by it.
    _KNOWN = 4
    # Of the seconds of a plain step, for each draft, until measured.
    _PRIOR_SLOPE = 0.2

    def __init__(self, known: Mapping[int, float]) -> None:
        self._prices, self._scale = dict(known), 1.0
        self._prior = [1 + self._PRIOR_SLOPE * k for k in range(MAX_DRAFT_LENGTH + 1)]
        self._seen = dict.fromkeys(known, self._KNOWN)
        self._measured = dict.fromkeys(known, 0)

    def observe(self, drafted: int, seconds: float, now: int) -> None:
        """Learns of a round."""
        seen, price = self._seen.get(drafted, 0), seconds / self._scale
        if seen < 2:
            # The first round of a kind may pay for building kernels, and any may have met a pause of the machine.
            self._prices[drafted] = min(price, self._prices.get(drafted, price))
        else:
            change = min(price / self._prices[drafted], self._MOST)
            self._prices[drafted] *= 1 + max(self._OWN / seen, self._OWN_LEAST) * (change - 1)
            if seen >= self._KNOWN:
                self._scale *= 1 + self._COMMON * (change - 1)
        self._seen[drafted] = seen + 1
        # A length measured only once counts as never measured for `age`.
        self._measured[drafted] = now if drafted in self._measured else -1

    def begin(self) -> None:
        """The count of rounds starts again; lengths measured before are due."""
        self._measured = dict.fromkeys(self._measured, -(10**3))

    def resemble(self, other: RoundCosts) -> None:
        """What was never measured is expected to compare as it does in a batch of another size."""
        self._prior = [other.seconds(k) for k in range(len(self._prior))]

    def settled(self, length: int) -> bool:
        """Whether a length was measured more than once: a single round may have met a pause of the machine."""
        return self._seen.get(length, 0) > 1

    def age(self, length: int, now: int) -> float:
        """Rounds since a length was last measured."""
        return now - self._measured.get(length, -(10**6))

    def seconds(self, length: int) -> float:
        """Expected seconds of a round."""
        return self._scale * self._price(length)

    def _price(self, length: int) -> float:
        if length not in self._prices:
            return self._line(length)
        if self.settled(length):
            return self._prices[length]
        # More drafts never take less time, and a few more not a multiple of it.
        bounds = [price for k, price in self._prices.items() if k >= length]
        if shorter := [k for k in self._prices if k < length]:
            bounds.append(self._MOST_ONCE * self._by_prior(max(shorter), length))
        return min(bounds)

    def _by_prior(self, known: int, length: int) -> float:
        return self._price(known) * self._prior[length] / self._prior[known]

    def _line(self, length: int) -> float:
        """The price of a length that wasn't measured."""
        below = [k for k in sorted(self._prices) if k < length]
        above = [k for k in sorted(self._prices) if k > length]
        if not below and not above:
            return self._prior[length]
        if len(below) + len(above) == 1:
            return self._by_prior((below or above)[0], length)
        if below and above:
            one, two = below[-1], above[0]
        else:
            one, two = below[-2:] or above[:2]
        low, high = self._price(one), self._price(two)
        line = low + (length - one) / (two - one) * (high - low)
        # Past the last, no less than that one; before the first, no less than a fraction of it.
        return max(line, high) if not above else max(line, 0.1 * low)
