"""How many tokens to draft in the next round.

`AutoLength` weighs, from what it sees while running, the tokens a round is expected to yield a row against the time
it is expected to take, and chooses the length with the best ratio, 0 (plain decoding) included. It only changes
speed, never the text.

In a batch all tokens are worth the same while others wait for a place: a row that is done early makes room. When nobody
does, what easy rows gain leaves places empty behind them, and a round is worth the time of plain decoding that it saves
until the last row is done (`Ends`).

Knows nothing of models; it is told of finished rounds and asked for the next length. What it believes is in beliefs.py.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from math import sqrt

import numpy as np

from .beliefs import Acceptance, RoundCosts
from .limits import MAX_AUTO_LENGTH


@dataclass(frozen=True)
class Ends:
    """What is known of the ends of a batch's rows, two or more, whose places nobody waits for.

    Attributes:
        left: Tokens that each of them has to go at most; by its number, see `AutoLength.observe`.
        sure: Chance that they go that far: a stop token may come first.
        plain: Seconds of a plain round by number of rows, from one to all: [rows].
    """

    left: Mapping[int, int]
    sure: float
    plain: np.ndarray

    def saved(self, gains: np.ndarray) -> np.ndarray:
        """Seconds of plain decoding that a round saves, by draft length.

        Args:
            gains: Tokens that a round yields by row, in the order of `left`, and draft length: [rows, lengths].
        """
        total = np.zeros(gains.shape[1])
        if self.sure > 0:
            total += self.sure * self._saved_to_limits(gains)
        if self.sure < 1:
            total += (1 - self.sure) * self._saved_to_stops(gains)
        return total

    def _saved_to_limits(self, gains: np.ndarray) -> np.ndarray:
        """If all rows reach their limits: the mean over the rounds until the first of them does."""
        left = np.array([*self.left.values()])[:, None]
        rounds = (left / gains).min(axis=0)
        # The row with the most to go pays for rounds of one row, the next for what two rows take more, and so on.
        prices = self.plain - np.concatenate([[0.0], self.plain[:-1]])
        return prices @ (np.sort(left, axis=0) - np.sort(left - rounds * gains, axis=0))[::-1] / rounds

    def _saved_to_stops(self, gains: np.ndarray) -> np.ndarray:
        """If each row may end anywhere.

        The slower one is, the more likely it is the last, which alone decides how often the batch's fixed cost is paid:
        the chance of it goes as one over the gain, which makes the harmonic mean of them.
        """
        rows = len(gains)
        each = (self.plain[-1] - self.plain[0]) / (rows - 1)
        fixed = self.plain[-1] - rows * each
        return fixed * rows / (1 / gains).sum(axis=0) + each * gains.sum(axis=0)


class AutoLength:
    """The length that saves the most time, against plain decoding, for the time that its round takes.

    What it believes: the seconds of a round by draft length (`RoundCosts`), and per position the chance that a draft is
    kept if those before it were (`Acceptance`). Other lengths than the best are tried on a budget: all the time that
    trials have lost, against the best length, stays under a small share of the time spent, in a batch an even smaller
    one. This bounds how much slower than plain decoding a useless drafter can make it.
    """

    _BUDGET = 0.007
    # In rounds of the best length, granted at the start.
    _ALLOWANCE = 4.0
    # A length's cost is measured again after this many rounds; more of them while nothing is drafted.
    _STALE = 64
    _STALE_OFF = 256
    # While nothing is drafted: what a trial drafts, and the rounds between trials, so that plain ones can be timed.
    _PROBE, _APART = 2, 8

    def __init__(self, costs: Mapping[int, float] | None = None) -> None:
        """Begins with nothing known, or with what was measured earlier.

        Args:
            costs: Seconds of a round by draft length, as a tuner's profile has them; replaced by what is seen.
        """
        self._costs, self._acceptance = RoundCosts(costs or {}), Acceptance()
        self._rounds = 0
        self._trials: set[int] = set()
        self._again: int | None = None
        self._asked = self._tried = 0
        self._spent = self._elapsed = 0.0
        # The best length, and what a round saves by length, as of the last choice.
        self._best, self._saved, self._learnt = 0, list[float](), True

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
        self._again = None
        self._trials.clear()
        self._costs.begin()
        self._learnt = True

    def next(self, ends: Callable[[], Ends] | None = None) -> int:
        """Tokens to draft in the next round.

        Args:
            ends: Says what is known of the ends of the rows; None if others wait for their places.
        """
        self._asked += 1
        # On a CPU the host's time isn't hidden behind the device's: while nothing is drafted, there is little to learn.
        if self._best or self._learnt or self._asked % self._APART == 0:
            self._saved, self._learnt = self._saved_by_length(ends() if ends else None), False
            self._best = max(range(MAX_AUTO_LENGTH + 1), key=self._worth)
        best = self._best
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
        self._learnt |= drafted > 0
        off = self._best == 0
        if kept and self._elapsed + (seconds or 0.0):
            took = self.seconds(drafted) if seconds is None else seconds
            if self._rounds in self._trials or drafted != self._best:
                length = min(drafted, MAX_AUTO_LENGTH)
                luck = (sum(kept.values()) / len(kept) + 1) / self._acceptance.tokens[length]
                lost = took - luck * self._saved[length] / self._worth(self._best)
                self._spent = max(0.0, self._spent + lost)
            self._elapsed += took
        if kept and seconds is not None:
            self._costs.observe(drafted, seconds, self._rounds)
        self._trials.discard(self._rounds)
        if off and drafted and kept and min(kept.values()) == drafted:
            # The text may have become predictable: what was seen before no longer counts.
            self._acceptance = Acceptance(self._acceptance.rows)
        if not drafted or not kept:
            return
        changed = self._acceptance.observe(drafted, kept, trial=off)
        # It may have been bad luck after all: two probes soon will tell.
        self._spent = max(0.0, self._spent - changed * 2 * self.seconds(self._PROBE))

    def seconds(self, drafted: int) -> float:
        """What a round is expected to take."""
        return self._costs.seconds(drafted)

    def settled(self, drafted: int) -> bool:
        """Whether that was measured."""
        return self._costs.settled(drafted)

    def _saved_by_length(self, ends: Ends | None) -> list[float]:
        """Seconds of plain decoding that a round saves."""
        saved = ends.saved(self._acceptance.tokens_of(ends.left)) if ends else self.seconds(0) * self._acceptance.tokens
        return saved.tolist()  # type: ignore[no-any-return]

    def _worth(self, length: int) -> float:
        """Seconds of plain decoding that a round saves for each second that it takes."""
        return self._saved[length] / self.seconds(length)

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
        loss = (2 if best else 1) * (self.seconds(trial) - self._saved[trial] / self._worth(best))
        allowed = self._BUDGET * self._elapsed + self._ALLOWANCE * self.seconds(best)
        # A round of a batch shows as much as a round of each of its rows: fewer of them tell the same.
        allowed /= sqrt(max(1, len(self._acceptance.rows)))
        return trial if self._spent + loss <= allowed else None

    def _may_win(self, length: int) -> bool:
        """Whether a length would be the best if it cost half as much as was measured when it was last tried."""
        return not self._costs.settled(length) or 2 * self._worth(length) > self._worth(self._best)
