"""How many tokens to draft in the next round, row by row.

`AutoLength` weighs, from what it sees while running, the tokens a round is expected to yield against the time it is
expected to take, and chooses the lengths with the best ratio, 0 (plain decoding) included. It only changes speed, never
the text.

The rows of a batch need not have the same length. Each token that is verified has its price; where a row's next draft
isn't worth it, the row has fewer of them. The drafter's steps are shared, as many as the longest length.

In a batch all tokens are worth the same while others wait for a place: a row that is done early makes room. When nobody
does, what easy rows gain leaves places empty behind them, and a round is worth the time of plain decoding that it saves
until the last row is done (`Ends`).

Knows nothing of models; it is told of finished rounds and asked for the next lengths. Its beliefs are in beliefs.py.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from math import sqrt

import numpy as np

from .beliefs import Acceptance, RoundCosts
from .limits import MAX_AUTO_LENGTH, PROBE


def alike(lengths: Sequence[int], others: Sequence[int]) -> bool:
    """Whether rounds with these draft lengths, by row, take about the same time."""
    verified = sum(lengths) + len(lengths)
    return (
        len(lengths) == len(others)
        and max(lengths) == max(others)
        and 8 * abs(sum(lengths) - sum(others)) <= verified
    )  # fmt: skip


@dataclass(frozen=True)
class Ends:
    """What is known of the ends of a batch's rows, two or more, whose places nobody waits for.

    Attributes:
        left: Tokens that each of them has to go at most, in the order in which they were named to `AutoLength.next`.
        had: Tokens that each of them has so far.
        sure: Chance that they go that far: a stop token may come first.
        plain: Seconds of a plain round by number of rows, from one to all: [rows].
    """

    left: Sequence[int]
    had: Sequence[int]
    sure: float
    plain: np.ndarray

    # Changes of its text that are taken for granted of every row, and in so many tokens.
    _CHANGES, _TOKENS = 0.001, 200

    def saved(self, gains: np.ndarray, changes: np.ndarray) -> np.ndarray:
        """Seconds of plain decoding that a round saves, by choice of draft lengths.

        Args:
            gains: Tokens that a round yields by row, in the order of `left`, and choice: [rows, choices].
            changes: How often each row's text has changed so far: [rows].
        """
        total = np.zeros(gains.shape[1])
        if self.sure > 0:
            total += self.sure * self._saved_to_limits(gains, changes)
        if self.sure < 1:
            total += (1 - self.sure) * self._saved_to_stops(gains)
        return total

    def _saved_to_limits(self, gains: np.ndarray, changes: np.ndarray) -> np.ndarray:
        """If all rows reach their limits: the mean over the rounds until the first of them does.

        That is, if the row that decides, the last to get there, goes on as it is. Where its text changes first, as it
        will the sooner the more often it has, any row may be the last, and all their tokens are worth the same. A
        single change is no sign of another: the text may stay as it has become.
        """
        left = np.array(self.left)[:, None]
        rounds = (left / gains).min(axis=0)
        # The row with the most to go pays for rounds of one row, the next for what two rows take more, and so on.
        prices = self.plain - np.concatenate([[0.0], self.plain[:-1]])
        saved = prices @ (np.sort(left, axis=0) - np.sort(left - rounds * gains, axis=0))[::-1] / rounds
        # How often each row's text is expected to change; and of what is left to it, the part before that.
        again = np.maximum(0, changes - 1)
        ahead = left[:, 0] * (self._CHANGES + again) / (self._TOKENS + np.array(self.had))
        same = ((1 - np.exp(-ahead)) / ahead)[(left / gains).argmax(axis=0)]
        return same * saved + (1 - same) * self.plain[-1] * gains.mean(axis=0)

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
    """The lengths that save the most time, against plain decoding, for the time that their round takes.

    What it believes: the seconds of a round by draft lengths (`RoundCosts`), and per row and position the chance that a
    draft is kept if those before it were (`Acceptance`). Other lengths than the best are tried, for all rows together,
    on a budget: all the time that trials have lost, against the best, stays under a small share of the time spent, in a
    batch an even smaller one. This bounds how much slower than plain decoding a useless drafter can make it.
    """

    _BUDGET = 0.007
    # However much was spent, in a batch: a trial that alone loses no more than this share of the time since the last
    # one. First rounds of short texts may have taken it all, and what they said may be wrong.
    _SELDOM = 0.002
    # In rounds of the best length, granted at the start.
    _ALLOWANCE = 4.0
    # A length's cost is measured again after this many rounds, after twice as many the next time, and so on up to the
    # second; while nothing is drafted, always after as many as that.
    _STALE, _STALE_MOST = 64, 256
    # While nothing is drafted: what a trial drafts, and the rounds between trials, so that plain ones can be timed.
    _PROBE, _APART = PROBE, 8
    # Rounds between weighings in a batch while something is drafted, once there were as many as the third says; and
    # between those while nothing is.
    _EVERY, _EVERY_OFF, _EARLY = 2, 64, 16
    # Chances of being kept below which a row's drafts may be left out.
    _DOUBTFUL = np.array([0.08, 0.15, 0.25, 0.35, 0.5, 0.65, 0.8])
    # What lengths that differ by row must promise more than one for all: of so many, some look better by luck.
    _LUCK = 0.02
    # Lengths that differ by row are kept while nothing is better by more than this share: rounds can be timed only next
    # to their like.
    _BETTER = 0.01

    def __init__(self, costs: Mapping[int, float] | None = None, longest: int = MAX_AUTO_LENGTH) -> None:
        """Begins with nothing known, or with what was measured earlier.

        Args:
            costs: Seconds of a round by draft length, the same for all rows, as a tuner's profile has them; replaced by
                what is seen.
            longest: Most drafts of a row.
        """
        self._longest = longest
        self._costs, self._acceptance = RoundCosts(costs or {}), Acceptance()
        self._rounds = 0
        # Rounds not learnt of yet: arguments of `observe`.
        self._unread: list[tuple[Mapping[int, int], Mapping[int, int], float | None]] = []
        self._trials: set[int] = set()
        self._again: dict[int, int] | None = None
        self._asked = self._tried = 0
        self._spent = self._elapsed = self._changed = 0.0
        self._due = True
        # As of the last weighing: whose lengths were chosen; the choices, of which the first are the same length for
        # all rows, from 0 on; the seconds that each takes and saves; and the best one's index.
        self._rows: Sequence[int] = ()
        self._choices = self._seconds = self._saved = np.zeros(0)
        self._best = 0
        self._now: dict[int, int] = {}

    def begin(self, rows: Collection[int], other: AutoLength | None = None) -> None:
        """The batch has changed: texts begin, or others have ended. Costs stay.

        Args:
            rows: Those that it chooses for from here on, by a number that is a row's own for as long as it runs.
            other: What has chosen so far, if the batch had another size. Its acceptance is taken over, and its costs
                say how those not measured here may compare.
        """
        self._digest()
        if other:
            other._digest()
            self._acceptance = other._acceptance.copy()
            self._costs.resemble(other._costs)
        # Next to other texts lengths may compare otherwise; where only some rows are new they hardly do, and what a
        # tuner has measured holds for the first text.
        stay = set(rows) & set(self._acceptance.rows)
        self._costs.begin(self._rounds, again=self._rounds > 0 and not stay)
        if stay:
            # A text that joins is as one that changes.
            self._changed += 1 - len(stay) / len(rows)
        self._acceptance.begin(rows)
        # Where rows stay, a round asked for before may not have been observed.
        flying = self._asked - self._rounds if stay and not other else 0
        self._trials = {number - self._rounds for number in self._trials if number > self._rounds and flying}
        self._asked, self._tried, self._rounds = flying, 0, 0
        self._again = None
        self._due = True

    def next(
        self, rows: Sequence[int], others: Sequence[int] = (), ends: Callable[[], Ends] | None = None
    ) -> dict[int, int]:
        """Tokens to draft in the next round, by row.

        Args:
            rows: Those to choose for, at least one of those it began with.
            others: Draft lengths of the batch's other rows.
            ends: Says what is known of the ends of the rows; None if others wait for their places.
        """
        self._asked += 1
        # On a CPU the host's time isn't hidden behind the device's, and a weighing, whose code and data the model's
        # weights have driven out of its caches, takes a percent of a small model's round.
        every = (self._EVERY if len(rows) > 1 else 1) if self._best else self._EVERY_OFF
        trial, self._again = self._again, None
        weighed = trial is None and (self._due or self._asked % every == 0 or self._rows != rows)
        if weighed:
            self._digest()
            self._weigh(rows, others, ends() if ends else None)
            self._due = False
        if weighed or (trial is None and self._best == 0 and self._asked % self._APART == 0):
            self._digest()
            trial = self._trial(bool(others))
            # Twice where it is about costs: the time of a round next to one of another length may be unknown. Where it
            # is about acceptance, now and then too: drafting must not stay off for what a pause has made of its cost.
            if trial and (self._best or self._costs.age(max(trial.values()), self._rounds) > self._STALE_MOST):
                self._again = trial
        if trial is None:
            return self._now
        self._tried = self._asked
        # Rounds are observed in the order in which they were asked for, one round late.
        self._trials.add(self._asked)
        return trial

    def observe(self, drafted: Mapping[int, int], kept: Mapping[int, int], seconds: float | None) -> None:
        """Learns of a finished round.

        Args:
            drafted: Draft lengths of all rows of the batch, by row.
            kept: Drafts kept, by row; rows not in it have ended, or have lengths of their own.
            seconds: Time taken; None if it couldn't be measured.
        """
        self._unread.append((drafted, kept, seconds))
        number = self._rounds + len(self._unread)
        if number < self._EARLY or number in self._trials or (self._best == 0 and max(drafted.values()) > 0):
            self._due = True

    def _digest(self) -> None:
        """Learns of the rounds not learnt of yet."""
        for drafted, kept, seconds in self._unread:
            self._learn(drafted, kept, seconds)
        self._unread.clear()

    def _learn(self, drafted: Mapping[int, int], kept: Mapping[int, int], seconds: float | None) -> None:
        """See `observe`."""
        self._rounds += 1
        steps, mean = max(drafted.values()), sum(drafted.values()) / len(drafted)
        off = self._best == 0
        if kept and self._elapsed + (seconds or 0.0):
            expected = self._costs.seconds(steps, mean)
            # Kernels that are built, or a pause of the machine, are no trial's fault.
            took = expected if seconds is None else min(seconds, 2 * expected)
            if self._rounds in self._trials or (steps == mean and drafted != self._now):
                # What new rows alone are tried with counts by what it brought: nothing was foreseen of them.
                length = min(steps, MAX_AUTO_LENGTH) if steps == mean else 0
                luck = (sum(kept.values()) + len(kept)) / self._acceptance.tokens(kept)[:, length].sum()
                self._spent = max(0.0, self._spent + took - luck * self._saved[length] / self._worth(self._best))
            self._elapsed += took
        if kept and seconds is not None:
            self._costs.observe(steps, mean, seconds, self._rounds)
        self._trials.discard(self._rounds)
        if off and kept and all(0 < drafted[row] == kept[row] for row in kept):
            # The text may have become predictable: what was seen before no longer counts.
            self._acceptance = self._acceptance.anew()
        if not any(drafted[row] for row in kept):
            return
        self._changed += self._acceptance.observe(drafted, kept, trial=off)

    def seconds(self, length: int) -> float:
        """What a round is expected to take with the same draft length for all rows."""
        self._digest()
        return self._costs.seconds(length, length)

    def token(self, rows: int) -> float:
        """Seconds that a token more is expected to take in a plain round of so many rows."""
        self._digest()
        return self._costs.verified(1) / rows

    def settled(self, length: int) -> bool:
        """Whether that was measured."""
        self._digest()
        return self._costs.settled(length)

    def _weigh(self, rows: Sequence[int], others: Sequence[int], ends: Ends | None) -> None:
        """Finds the best choice of lengths."""
        tokens = self._acceptance.told_apart(rows) if ends else self._acceptance.tokens(rows)
        last = self._lengths(self._best) if self._best > MAX_AUTO_LENGTH and self._rows == rows else None
        choices = np.broadcast_to(np.arange(MAX_AUTO_LENGTH + 1), tokens.shape)
        left_out = np.array([self._best > 0 and self._now.get(row) == 0 for row in rows])
        if len(rows) > 1:
            uneven = self._uneven(tokens)
            uneven[left_out] = np.minimum(uneven[left_out], 1)
            choices = np.concatenate([choices, uneven], axis=1)
        if last:
            choices = np.concatenate([choices, np.array([*last.values()])[:, None]], axis=1)
        choices = np.minimum(choices, self._longest)
        gains = tokens[np.arange(len(rows))[:, None], choices]
        self._rows, self._choices = rows, choices
        if ends:
            self._saved = ends.saved(gains, self._acceptance.changes(rows))
        else:
            self._saved = self.seconds(0) * gains.mean(axis=0)
        steps = np.maximum(choices.max(axis=0), max(others, default=0))
        mean = (choices.sum(axis=0) + sum(others)) / (len(rows) + len(others))
        self._seconds = self._costs.seconds_of(steps, mean)
        worth = self._saved / self._seconds
        worth[MAX_AUTO_LENGTH + 1 :] *= 1 - self._LUCK
        if left_out.any():
            # What is believed of those rows fades while nothing is drafted for them: one draft each will tell.
            worth[2 : MAX_AUTO_LENGTH + 1] = 0.0
        self._best = int(worth.argmax())
        if self._best == 0:
            # If that is because texts have changed, it may have been bad luck: two probes soon will tell.
            self._spent = max(0.0, self._spent - self._changed * 2 * self.seconds(self._PROBE))
        self._changed = 0.0
        if last and (1 + self._BETTER) * worth[-1] > worth[self._best]:
            self._best = len(worth) - 1
        self._now = self._lengths(self._best)

    def _uneven(self, tokens: np.ndarray) -> np.ndarray:
        """Choices of lengths that leave out a row's doubtful drafts: [rows, choices].

        Args:
            tokens: Expected tokens by row and length.
        """
        kept = tokens[:, 1:] - tokens[:, :-1]
        enough = (kept[:, None] >= self._DOUBTFUL[:, None]).sum(axis=2)
        return np.minimum(enough[:, None], np.arange(1, MAX_AUTO_LENGTH + 1)[:, None]).reshape(len(tokens), -1)

    def _lengths(self, choice: int) -> dict[int, int]:
        return dict(zip(self._rows, self._choices[:, choice].tolist(), strict=True))

    def _worth(self, choice: int) -> float:
        """Seconds of plain decoding that a round saves for each second that it takes."""
        return float(self._saved[choice] / self._seconds[choice])

    def _trial(self, others: bool) -> dict[int, int] | None:
        """Lengths to try, instead of the best, if some are due and can be afforded.

        Args:
            others: Whether the batch has rows that it doesn't choose for: rounds of one length can't be had then.
        """
        if self._trials or not self._elapsed:
            return None
        since = self._asked - self._tried
        if self._best == 0 and not others and since > 1:
            # What nothing is drafted for says nothing of a row that has joined.
            new = self._acceptance.untested(self._rows)
            trial = {row: self._PROBE if row in new else 0 for row in self._rows}
            if 0 < len(new) < len(self._rows):
                mean = sum(trial.values()) / len(trial)
                if self._granted(self._costs.seconds(self._PROBE, mean) - self._seconds[0], since):
                    return trial
        if self._best == 0:
            # Acceptance can't be seen while nothing is drafted. A few more may be cheaper: kernels have steps.
            probe = self._PROBE + int(self._seconds[self._PROBE : MAX_AUTO_LENGTH + 1].argmin())
            due = [probe] if since > self._APART else []
        elif others:
            due = []
        else:
            close = round(self._choices[:, self._best].mean())
            near = {0, close - 1, close, close + 1}
            due = [
                k
                for k in sorted(near - {self._best})
                if 0 <= k <= self._longest
                and self._costs.age(k, self._rounds) > min(self._STALE * self._costs.times(k), self._STALE_MOST)
                and self._may_win(k)
            ]
        if not due:
            return None
        trial = max(due, key=lambda k: self._costs.age(k, self._rounds))
        loss = (2 if self._best else 1) * (self._seconds[trial] - self._saved[trial] / self._worth(self._best))
        return self._lengths(trial) if self._granted(loss, since) else None

    def _granted(self, loss: float, since: int) -> bool:
        """Whether a trial can be afforded.

        Args:
            loss: Seconds that it is expected to lose against the best.
            since: Rounds since the last one.
        """
        allowed = self._BUDGET * self._elapsed + self._ALLOWANCE * self._seconds[self._best]
        # A round of a batch shows as much as a round of each of its rows: fewer of them tell the same.
        allowed /= sqrt(max(1, len(self._acceptance.rows)))
        if len(self._rows) > 1 and loss <= self._SELDOM * self._seconds[self._best] * since:
            return True
        return bool(self._spent + loss <= allowed)

    def _may_win(self, length: int) -> bool:
        """Whether a length would be the best if it cost half as much as was measured when it was last tried."""
        return not self._costs.settled(length) or 2 * self._worth(length) > self._worth(self._best)
