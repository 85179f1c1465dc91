"""How many tokens to draft in the next round.

`AutoLength` weighs, from what it sees while running, the tokens a round is expected to yield a row against the time
it is expected to take, and chooses the length with the best ratio, 0 (plain decoding) included. It only changes
speed, never the text.

Knows nothing of models; it is told of finished rounds and asked for the next length.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from itertools import accumulate
from operator import mul

MAX_DRAFT_LENGTH = 15
"""Longest draft that can be asked for."""

MAX_AUTO_LENGTH = 7
"""Longest draft chosen here: with the newest token, the 8 rows that the fused attention kernels on Metal take."""


class AutoLength:
    """The length with the best expected tokens per second.

    What it believes: the seconds of a round by draft length (`_Costs`), and per position the chance that a draft is
    kept if those before it were (`_Acceptance`). Other lengths than the best are tried on a budget: all the time that
    trials have lost, against the best length, stays under a small share of the time spent. This bounds how much
    slower than plain decoding a useless drafter can make it.
    """

    _BUDGET = 0.01
    # In rounds of the best length, granted at the start.
    _ALLOWANCE = 4.0
    # A length's cost is measured again after this many rounds; more of them while nothing is drafted.
    _STALE = 64
    _STALE_OFF = 256
    # While nothing is drafted: what a trial drafts, and the rounds between trials, so that plain ones can be timed.
    _PROBE, _APART = 2, 8
    # Chance of rounds in a row that keep no draft, under which the past is forgotten.
    _UNLIKELY = 0.002
    # Least chance of such a round in any text: where the most predictable text takes a turn, nothing is kept either.
    _STUMBLES = 0.1

    def __init__(self, costs: Mapping[int, float] | None = None) -> None:
        """Begins with nothing known, or with what was measured earlier.

        Args:
            costs: Seconds of a round by draft length, as a tuner's profile has them; replaced by what is seen.
        """
        self._costs, self._acceptance = _Costs(costs or {}), _Acceptance()
        self._rounds = 0
        self._trials: set[int] = set()
        self._again: int | None = None
        self._asked = self._tried = 0
        self._luck = 1.0
        self._spent = self._elapsed = 0.0
        self._best = self._choose()

    def begin(self, rows: Collection[int], other: AutoLength | None = None) -> None:
        """The batch has changed: texts begin, or others have ended. Costs stay.

        Args:
            rows: Those that it chooses for from here on, see `observe`.
            other: What has chosen so far, if the batch had another size. Its acceptance is taken over, and its costs
                say how those not measured here may compare.
        """
        if other:
            self._acceptance = other._acceptance.copy()
            self._costs.resemble(other._costs)
        self._acceptance.begin(rows)
        self._asked = self._tried = self._rounds = 0
        self._luck, self._again = 1.0, None
        self._trials.clear()
        self._costs.begin()
        self._best = self._choose()

    def next(self) -> int:
        """Tokens to draft in the next round."""
        best, self._asked = self._best, self._asked + 1
        trial = self._again if self._again is not None else self._trial(best)
        if trial is None:
            return best
        # Twice where it is about costs: the time of a round next to one of another length may be unknown. Where it is
        # about acceptance, now and then too: drafting must not stay off for what a pause has made of its cost.
        costs = best or self._costs.age(trial, self._rounds) > self._STALE_OFF
        self._again = trial if costs and self._again is None else None
        self._tried = self._asked
        # Rounds are observed in the order in which they were asked for, one round late.
        self._trials.add(self._asked)
        return trial

    def observe(self, drafted: int, kept: Mapping[int, int], seconds: float | None) -> None:
        """Learns of a finished round.

        Args:
            drafted: Drafts made a row.
            kept: Drafts kept, by a number that is a row's own for as long as it runs; rows not in it have ended.
            seconds: Time taken; None if it couldn't be measured.
        """
        self._rounds += 1
        off = self._best == 0
        if kept and self._elapsed + (seconds or 0.0):
            took = self._costs.seconds(drafted) if seconds is None else seconds
            if self._rounds in self._trials or drafted != self._best:
                self._spent += max(0.0, took - (sum(kept.values()) / len(kept) + 1) / self._rate(self._best))
            self._elapsed += took
        if kept and seconds is not None:
            self._costs.observe(drafted, seconds, self._rounds)
        self._trials.discard(self._rounds)
        if off and drafted and kept and min(kept.values()) == drafted:
            # The text may have become predictable: what was seen before no longer counts.
            self._acceptance = _Acceptance()
        if any(kept.values()):
            self._luck = 1.0
        elif drafted:
            self._luck *= max(1 - self._acceptance.first(), self._STUMBLES) ** len(kept)
            if self._luck < self._UNLIKELY:
                # The same the other way round; with a few such rounds, so that the prior doesn't say the contrary.
                self._luck, self._acceptance = 1.0, _Acceptance()
                for _ in range(4):
                    self._acceptance.observe(drafted, dict.fromkeys(kept, 0))
                # It may have been bad luck after all: two probes soon will tell.
                self._spent = max(0.0, self._spent - 2 * self._costs.seconds(self._PROBE))
        if kept:
            self._acceptance.observe(drafted, kept)
        self._best = self._choose()

    def _rate(self, length: int) -> float:
        return self._acceptance.tokens(length) / self._costs.seconds(length)

    def _choose(self) -> int:
        return max(range(MAX_AUTO_LENGTH + 1), key=self._rate)

    def _trial(self, best: int) -> int | None:
        """A length to try instead of the best, if one is due and can be afforded."""
        if best == 0:
            # Acceptance can't be seen while nothing is drafted.
            due = [self._PROBE] if self._asked - self._tried > self._APART else []
        else:
            near = (k for k in (0, best - 1, best + 1) if 0 <= k <= MAX_AUTO_LENGTH)
            due = [k for k in near if self._costs.age(k, self._rounds) > self._STALE and self._may_win(k)]
        if not due or self._trials or not self._elapsed:
            return None
        trial = max(due, key=lambda k: self._costs.age(k, self._rounds))
        loss = (2 if best else 1) * (self._costs.seconds(trial) - self._acceptance.tokens(trial) / self._rate(best))
        allowed = self._BUDGET * self._elapsed + self._ALLOWANCE * self._costs.seconds(best)
        return trial if self._spent + loss <= allowed else None

    def _may_win(self, length: int) -> bool:
        """Whether a length would be the best if it cost half as much as was measured when it was last tried."""
        return not self._costs.settled(length) or 2 * self._rate(length) > self._rate(self._best)


class _Acceptance:
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

    def __init__(self) -> None:
        # By row, [tried, kept] for each position. None for the prior and texts that have ended.
        self._counts: dict[int | None, list[list[float]]] = {None: _nothing()}
        self._chances: list[float] = []
        self._add_prior()
        self._pool()

    def copy(self) -> _Acceptance:
        """One that learns on its own from here on."""
        other = _Acceptance()
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

    def first(self) -> float:
        """Chance that the first draft is kept."""
        return self.tokens(1) - 1

    def tokens(self, length: int) -> float:
        """Expected tokens of a round, the bonus token included."""
        return 1 + sum(accumulate(self._chances[:length], mul))


def _nothing() -> list[list[float]]:
    return [[0.0, 0.0] for _ in range(MAX_AUTO_LENGTH)]


class _Costs:
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

    def resemble(self, other: _Costs) -> None:
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
