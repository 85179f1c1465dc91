"""What is believed of the next rounds, from the rounds before: which drafts will be kept, and what a round takes.

Counts and arithmetic; what is made of them is decided elsewhere (draft_length.py).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from copy import deepcopy
from math import log

import numpy as np

from .limits import MAX_AUTO_LENGTH, MAX_DRAFT_LENGTH


class Acceptance:
    """Chance that draft j is kept if those before it were, in the rows that run, with exponential forgetting.

    Counted row by row: when a text ends, the others' chances are what they were, however it fared. And a text may
    change: once fewer drafts of a row are kept than foreseen for long enough, what it had shown before no longer counts
    (a cumulative sum, E. S. Page, Continuous Inspection Schemes, 1954).

    Attributes:
        rows: Those that run, by number.
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
    # How much likelier a row's latest rounds must be where drafts are kept half as often, as a logarithm: five hundred
    # to one. Of a single round, ten to one at most: where the most predictable text takes a turn, nothing is kept
    # either.
    _CHANGED, _SAY = 6.2, log(10)
    # Rounds of a row before that, from which on its text counts as one that has changed.
    _SHOWN = 4.0
    # Rounds of a row that say enough of it.
    _TESTED = 3.0
    # See `told_apart`.
    _ERRORS = 1.5
    # [n, position]: ones up to position n.
    _UP_TO = np.tri(MAX_DRAFT_LENGTH + 2, MAX_AUTO_LENGTH, -1)

    def __init__(self, rows: Sequence[int] = ()) -> None:
        """Nothing was seen yet of these rows."""
        self.rows = [*rows]
        # The prior and texts that have ended: [tried or kept, position].
        self._past = np.zeros((2, MAX_AUTO_LENGTH))
        # The same by row, of all its rounds and of those since it is in doubt: [row, all or since, ...].
        self._counts = np.zeros((len(rows), 2, 2, MAX_AUTO_LENGTH))
        # By row, see `_CHANGED`; and how often its text has changed.
        self._doubts, self._changes = [0.0] * len(rows), [0] * len(rows)
        self._add_prior(1.0)
        self._estimate()

    def copy(self) -> Acceptance:
        """One that learns on its own from here on."""
        return deepcopy(self)

    def begin(self, rows: Collection[int]) -> None:
        """These rows run from here on; of new ones only the prior says something, and hints from those that ended."""
        if any(row not in self.rows for row in rows):
            ended = [i for i, row in enumerate(self.rows) if row not in rows]
            self._past = self._HINT * (self._past + self._counts[ended, 0].sum(axis=0))
            self._add_prior(1.0)
        self._arrange(rows)

    def anew(self) -> Acceptance:
        """One for the same rows, whose texts have all changed: what was seen of them before doesn't count."""
        other = Acceptance(self.rows)
        other._changes = [count + 1 for count in self._changes]
        return other

    def _arrange(self, rows: Collection[int]) -> None:
        """Keeps these rows, and makes place for those that are new."""
        # The last, which is added, is what is known of a new one.
        counts = np.pad(self._counts, [(0, 1), (0, 0), (0, 0), (0, 0)])
        doubts, changes = [*self._doubts, 0.0], [*self._changes, 0]
        places = [self.rows.index(row) if row in self.rows else -1 for row in rows]
        self.rows, self._counts = [*rows], counts[places]
        self._doubts, self._changes = [doubts[i] for i in places], [changes[i] for i in places]
        self._estimate()

    def _add_prior(self, weight: float) -> None:
        self._past[:, 0] += weight * self._PRIOR_WEIGHT, weight * self._PRIOR_WEIGHT * self._PRIOR

    def observe(self, drafted: Mapping[int, int], kept: Mapping[int, int], trial: bool = False) -> float:
        """Learns of a round.

        Args:
            drafted: Drafts verified, by row.
            kept: Drafts kept, by row; only these count.
            trial: Nothing is drafted otherwise, so that there is little that could become less.

        Returns:
            The share of the rows whose texts seem to have changed.
        """
        lengths = [drafted[row] if row in kept else 0 for row in self.rows]
        many = [kept.get(row, 0) for row in self.rows]
        # Draft j was put to the test only if all drafts before it were kept.
        reached = [(min(count + 1, length), count) for count, length in zip(many, lengths, strict=True)]
        tested = min(max(reached)[0], MAX_AUTO_LENGTH)
        self._past[:, :tested] *= self._FORGET
        self._counts[..., :tested] *= self._FORGET
        self._counts += self._UP_TO[reached][:, None]
        changed, sure = 0, list[int]()
        for i, (length, count) in enumerate(zip(lengths, many, strict=True)):
            if length and not trial:
                self._doubts[i] += self._say(self._own[i], length, count)
            if self._doubts[i] >= self._CHANGED:
                # Not if it was no other before: what it hasn't kept was foreseen from the rest alone.
                before = self._counts[i, 0, 0, 0] - self._counts[i, 1, 0, 0]
                self._changes[i] += bool(before >= self._SHOWN)
                self._counts[i, 0], self._doubts[i] = self._counts[i, 1], 0.0
                changed += 1
            if trial or self._doubts[i] <= 0:
                self._doubts[i] = 0.0
                sure.append(i)
        self._counts[sure, 1] = 0.0
        if changed:
            # Nor does their share of the past count, but for the prior.
            share = changed / len(self.rows)
            self._past *= 1 - share
            self._add_prior(share)
        self._told = True
        return changed / len(kept)

    def _say(self, chances: Sequence[float], drafted: int, kept: int) -> float:
        """How much likelier a row's round is if its chances are half of what they seem, as a logarithm."""
        ratio = kept * log(0.5)
        if kept < min(drafted, MAX_AUTO_LENGTH):
            chance = min(chances[kept], 1 - 1e-9)
            ratio += log((1 - 0.5 * chance) / (1 - chance))
        return min(ratio, self._SAY)

    def _estimate(self) -> None:
        """Chances and expected tokens, from the counts, which may have been told of more since."""
        tried, kept = (self._past + self._counts[:, 0].sum(axis=0)).tolist()
        mean, chance = list[float](), self._PRIOR
        for j in range(MAX_AUTO_LENGTH):
            weight = self._PRIOR_WEIGHT if j else 0.0
            chance = (kept[j] + weight * chance) / (tried[j] + weight)
            mean.append(chance)
        # A row's own counts and its share of the past's; they lean on the mean over rows. Without rows, the past's.
        own = self._counts[:, 0] + self._past / len(self.rows) if self.rows else self._past[None]
        weights, kept_own = own[:, 0] + self._LEAN, own[:, 1]
        chances = (kept_own + self._LEAN * np.array(mean)) / weights
        if len(own) > 1:
            # A row that keeps first drafts more often than the others, by odds, will so keep those after them.
            odds = _odds(np.array(mean))
            odds = odds * _odds(chances[:, :1]) / odds[0]
            chances[:, 1:] = (kept_own + self._LEAN * odds / (1 + odds))[:, 1:] / weights[:, 1:]
        self._own, self._told = chances.tolist(), False
        self._tokens = np.ones((len(own), MAX_AUTO_LENGTH + 1))
        self._tokens[:, 1:] += chances.cumprod(axis=1).cumsum(axis=1)

    def tokens(self, rows: Iterable[int]) -> np.ndarray:
        """Expected tokens of a round, the bonus token included, by row and draft length [rows, MAX_AUTO_LENGTH + 1]."""
        if self._told:
            self._estimate()
        return self._tokens[[self.rows.index(row) for row in rows]]

    def told_apart(self, rows: Iterable[int]) -> np.ndarray:
        """The same, two rows at least, with no more difference between rows than luck alone doesn't explain.

        Each row's tokens are drawn towards the mean, the more so the less they vary beyond what a few rounds' would by
        themselves (W. James and C. Stein, Estimation with Quadratic Loss, 1961): of alike rows there is always one that
        looks like the slowest. But none by more than one and a half of its own standard errors, as it may well be
        unlike them (B. Efron and C. Morris, Limiting the Risk of Bayes and Empirical Bayes Estimators, 1972).
        """
        rows, tokens = [*rows], self.tokens(rows)
        seen = self._counts[[self.rows.index(row) for row in rows], 0, 0, :1] + self._LEAN
        # A round brings n tokens or more with the chance that the n-th adds to the mean.
        more = np.diff(tokens, axis=1, prepend=0.0)
        squares = (more * (2 * np.arange(1, MAX_AUTO_LENGTH + 2) - 1)).cumsum(axis=1)
        luck = np.maximum(0.0, squares - tokens**2) / seen
        varies, most = np.maximum(tokens.var(axis=0, ddof=1), 1e-12), self._ERRORS * np.sqrt(luck)
        towards = (tokens.mean(axis=0) - tokens) * np.minimum(1.0, luck.mean(axis=0) / varies)
        return tokens + np.clip(towards, -most, most)

    def untested(self, rows: Iterable[int]) -> list[int]:
        """Rows that have hardly drafted yet, and whose first drafts were all kept."""
        counts = {row: self._counts[self.rows.index(row), 0, :, 0] for row in rows}
        return [row for row, (tried, kept) in counts.items() if tried == kept < self._TESTED]

    def changes(self, rows: Iterable[int]) -> np.ndarray:
        """How often each row's text has changed: [rows]."""
        return np.array([self._changes[self.rows.index(row)] for row in rows])


def _odds(chances: np.ndarray) -> np.ndarray:
    chances = np.clip(chances, 1e-6, 1 - 1e-6)
    return chances / (1 - chances)


class RoundCosts:
    """Seconds of a round by draft length; lengths never tried lie on the line through those that were.

    Where rows have different lengths, as many tokens are verified as with their mean, and more drafted: a round takes
    what one of the mean length does, and for each step of the drafter that it has more, a price of its own. Sorting out
    which tokens are whose has its price as well, once a round.

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
    _MOST, _MOST_ONCE = 1.25, 2.0
    # Rounds of a length after which its price is known well enough to tell the scale by it.
    _KNOWN = 4
    # Of the seconds of a plain step, for each draft, until measured; and the drafter's part of it.
    _PRIOR_SLOPE, _PRIOR_DRAFT = 0.2, 0.1
    # Of what a round of different lengths took more or less than expected: the least part that goes into the prices of
    # such rounds alone, and the part that goes into the scale. Little, since they are known only roughly, and plain
    # rounds, of which there may be none for long, must not seem dearer for it.
    _UNEVEN_LEAST, _UNEVEN_COMMON = 0.1, 0.02

    def __init__(self, known: Mapping[int, float]) -> None:
        self._prices, self._scale = dict(known), 1.0
        self._prior = np.array([1 + self._PRIOR_SLOPE * k for k in range(MAX_DRAFT_LENGTH + 1)])
        self._seen = dict.fromkeys(known, self._KNOWN)
        self._measured = dict.fromkeys(known, 0)
        # In plain steps: of a step of the drafter, and of rows having different lengths. Rounds that told of them.
        self._draft, self._sorting, self._seen_uneven = self._PRIOR_DRAFT, 0.0, 0
        # The price of every length, once it was asked for; None if something was learnt since.
        self._line: list[float] | None = None

    def observe(self, steps: int, mean: float, seconds: float, now: int) -> None:
        """Learns of a round.

        Args:
            steps: The drafter's, which is the longest draft length.
            mean: Drafts verified a row.
            seconds: What it took.
            now: The round's number.
        """
        if steps > mean:
            self._observe_uneven(steps, mean, seconds)
        else:
            self._observe_even(steps, seconds, now)

    def _observe_uneven(self, steps: int, mean: float, seconds: float) -> None:
        expected, line = self.seconds(steps, mean), self._prices_of_all()
        if not self._prices:
            self._scale *= seconds / expected
            return
        change = min(seconds / expected, self._MOST) - 1
        self._seen_uneven += 1
        # Both prices at once, each by its weight in the sum (normalised least mean squares); that of the drafter's
        # steps has none where the sum has reached its bound.
        extra = steps - mean
        if np.interp(mean, range(len(line)), line) + extra * self._draft * line[0] >= line[steps]:
            extra = 0.0
        part = max(1 / self._seen_uneven, self._UNEVEN_LEAST) * change * expected / (self._scale * line[0])
        part /= 1 + extra**2
        self._sorting = max(0.0, self._sorting + part)
        self._draft = max(0.0, self._draft + part * extra)
        self._scale *= 1 + self._UNEVEN_COMMON * change

    def _observe_even(self, drafted: int, seconds: float, now: int) -> None:
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
        self._line = None

    def begin(self, now: int, again: bool) -> None:
        """The count of rounds, which was at `now`, starts again; with `again` all lengths are due to be measured."""
        self._measured = {length: -(10**3) if again else last - now for length, last in self._measured.items()}

    def resemble(self, other: RoundCosts) -> None:
        """What was never measured is expected to compare as it does in a batch of another size."""
        self._prior = np.array([other.seconds(k, k) for k in range(len(self._prior))])
        self._draft, self._sorting = other._draft, other._sorting
        self._line = None

    def settled(self, length: int) -> bool:
        """Whether a length was measured more than once: a single round may have met a pause of the machine."""
        return self._seen.get(length, 0) > 1

    def times(self, length: int) -> int:
        """How often a length was measured, by two rounds each time; at least 1."""
        return max(1, self._seen.get(length, 0) // 2)

    def age(self, length: int, now: int) -> float:
        """Rounds since a length was last measured."""
        return now - self._measured.get(length, -(10**6))

    def verified(self, drafts: int) -> float:
        """Seconds that verifying so many drafts in every row is expected to add to a plain round."""
        line = self._prices_of_all()
        return self._scale * max(0.0, line[drafts] - (1 + drafts * self._draft) * line[0])

    def seconds(self, steps: int, mean: float) -> float:
        """Expected seconds of a round with so many steps of the drafter and so many drafts verified a row."""
        if steps == mean:
            return self._scale * self._prices_of_all()[steps]
        return float(self.seconds_of(np.array(steps), np.array(mean)))

    def seconds_of(self, steps: np.ndarray, mean: np.ndarray) -> np.ndarray:
        """The same for arrays of them."""
        line, lengths = self._prices_of_all(), range(len(self._prior))
        even = np.interp(mean, lengths, line)
        # Sorting apart, no dearer than if all rows had the longest length.
        most = np.interp(steps, lengths, line)
        price = np.minimum(even + (steps - mean) * self._draft * line[0], np.maximum(most, even))
        return self._scale * (price + (steps > mean) * self._sorting * line[0])

    def _prices_of_all(self) -> list[float]:
        """The price of every length, measured or not."""
        if self._line is None:
            self._line = self._estimate()
        return self._line

    def _estimate(self) -> list[float]:
        known, lengths = sorted(self._prices), range(len(self._prior))
        if not known:
            return self._prior.tolist()
        prices = list[float]()
        for k in known:
            # More drafts never take less time, and a few more not a multiple of it.
            bounds = [self._prices[k]]
            if not self.settled(k):
                bounds += [self._prices[longer] for longer in known if longer > k]
                if prices:
                    before = known[len(prices) - 1]
                    bounds.append(self._MOST_ONCE * prices[-1] * self._prior[k] / self._prior[before])
            prices.append(min(bounds))
        if len(known) == 1:
            return (prices[0] / self._prior[known[0]] * self._prior).tolist()
        line = np.interp(lengths, known, prices).tolist()
        # Before the first, no less than a fraction of it; past the last, no less than that one.
        slope = (prices[1] - prices[0]) / (known[1] - known[0])
        for k in range(known[0]):
            line[k] = max(0.1 * prices[0], prices[0] + (k - known[0]) * slope)
        slope = (prices[-1] - prices[-2]) / (known[-1] - known[-2])
        for k in range(known[-1] + 1, len(line)):
            line[k] = prices[-1] + max(0.0, (k - known[-1]) * slope)
        return line
