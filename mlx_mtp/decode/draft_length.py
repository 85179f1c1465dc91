"""How many tokens to draft for each row in the next round: the lengths with the best goodput.

Goodput is expected tokens per second (SmartSpec, X. Liu et al., 2024; vLLM: adaptive verification). Draft j of a row is
a slot, which survives if it and all before it are kept. For each K, the longest length, slots are admitted across rows
in the order of survival; the K and number of slots with the most tokens for the round's time win, K = 0 included.

    survival    discounted counts by row and position (`Survival`)
    seconds     T(K, n) = verify(n tokens) + K draft + packing, if rows differ (`RoundCost`)
    value       tokens while others wait for a place; else the plain decoding that a round saves (`_saved`)
    trials      of lengths whose price or acceptance isn't known; a token bucket pays for what they lose (`_trial`)

The policy is asked for a decision a round and told of its outcome one round late, as the engine builds a
round before it has read the one before. Lengths change only speed, never the text.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated

import numpy as np
from annotated_types import Interval

from .limits import MAX_AUTO_LENGTH, MAX_DRAFT_LENGTH
from .request import Row

FAST, SLOW = 0.9, 0.98
"""What a round leaves of a row's counts: of those that follow the text, and of those that say what is usual for it."""
PRIOR, LEAN = 0.8, 2.0
"""Published acceptance of these drafters; and the drafts that any such belief is worth beside those counted."""
SLOPE, DRAFT = 0.2, 0.1
"""Of a plain step, until measured: what each draft adds to a round, and the drafter's part of that."""
UNKNOWN = 0.5
"""A price seen less than twice may be this part of what it seems: it had to pay for building kernels, or is a guess."""
SHARED = 0.25
"""Of what a row less in the batch should save by its tokens, the part counted on until fewer rows were measured."""
DRIFT = 0.05
"""How much what was learnt may have changed since: the step of a price that is known, the doubt about one that is old,
and the weight of the case that texts change and any row may be the last of a batch."""
CLIP = 1.25
"""No round counts for more than this times what was expected: the machine may pause."""
SHARE, CREDIT = 0.01, 4.0
"""What trials may lose: a share of all rounds, and the most that is saved up for them, in rounds."""
APART, STALE = 8, 64
"""Rounds between trials; and those after which a price is doubted, or a row without drafts is tried beside others."""
EVERY = 2
"""Rounds between choices in a batch: choosing takes host time. While nothing is drafted, times `APART`."""


@dataclass(frozen=True)
class Prices:
    """What rounds of a batch were measured to take, in seconds.

    Attributes:
        verify: By block width from 1 on, a pass of the target over so many tokens of each row.
        draft: A step of the drafter.
        packing: What a pass over rows of different lengths takes more than an even one over as many tokens.
    """

    verify: Mapping[int, Annotated[float, Interval(gt=0, le=sys.float_info.max)]]
    draft: Annotated[float, Interval(ge=0, le=sys.float_info.max)]
    packing: Annotated[float, Interval(ge=0, le=sys.float_info.max)]

    def even(self) -> dict[int, float]:
        """Seconds of a round by draft length, the same for all rows."""
        return {width - 1: seconds + (width - 1) * self.draft for width, seconds in self.verify.items()}


@dataclass(frozen=True)
class Decision:
    """What a round drafts; it goes with the round and comes back with its outcome.

    Attributes:
        rows: The batch.
        lengths: Tokens to draft, by row.
        trial: Whether they are tried rather than thought best.
        cost: The estimate of what rounds of such a batch take; None where nobody chose.
        best: Seconds and tokens a row that were expected of the best lengths then.
    """

    rows: Sequence[Row]
    lengths: list[int]
    trial: bool = False
    cost: RoundCost | None = None
    best: tuple[float, float] = (1.0, 1.0)


class Survival:
    """Discounted counts of drafts tried and kept, by row and position: the probability that a slot is kept.

    A row's fast counts lean on its slow ones, these on all rows' together, and those of a position on the one before
    (discounting: A. Garivier and E. Moulines, 2011). Fast counts fade with every round, also without drafts: what was
    seen long ago gives way to what is usual for the text.
    """

    def __init__(self, longest: int) -> None:
        """Nothing was seen of drafts up to this length."""
        self._longest, self._rows = longest, list[int]()
        # [row, fast or slow, tried or kept, position], and of rows that have ended: [tried or kept, position].
        self._counts, self._ended = np.zeros((0, 2, 2, longest)), np.zeros((2, longest))
        # By row, rounds since it had a draft; infinite if never.
        self.idle = np.zeros(0)
        # [n, position]: ones up to position n.
        self._first = np.tri(MAX_DRAFT_LENGTH + 2, longest, -1)

    def begin(self, rows: Sequence[int]) -> None:
        """These rows run from here on, by number, in this order; what was seen of them before stays."""
        self._ended += self._counts[[row not in rows for row in self._rows], 1].sum(axis=0)
        places = [self._rows.index(row) if row in self._rows else -1 for row in rows]
        self._counts = np.pad(self._counts, [(0, 1), (0, 0), (0, 0), (0, 0)])[places]
        self.idle, self._rows = np.append(self.idle, np.inf)[places], [*rows]

    def observe(self, drafted: Mapping[int, tuple[int, int]]) -> None:
        """Learns of a round: drafts and those kept, by row."""
        self._counts[:, 0] *= FAST
        self.idle += 1
        if places := [i for i, row in enumerate(self._rows) if row in drafted]:
            self._ended *= SLOW ** (len(places) / len(self._rows))
            self._counts[places, 1] *= SLOW
            # Draft j was put to the test only if all drafts before it were kept.
            reached = [(min(kept + 1, length), kept) for length, kept in (drafted[self._rows[i]] for i in places)]
            self._counts[places] += self._first[reached][:, None]
            self.idle[places] = 0

    def probabilities(self) -> np.ndarray:
        """Of each slot: [rows, positions]."""
        tried, kept = (self._ended + self._counts[:, 1].sum(axis=0)).tolist()
        mean, chance = list[float](), PRIOR
        for j in range(self._longest):
            chance = (kept[j] + LEAN * chance) / (tried[j] + LEAN)
            mean.append(chance)
        slow = (self._counts[:, 1, 1] + LEAN * np.array(mean)) / (self._counts[:, 1, 0] + LEAN)
        fast = (self._counts[:, 0, 1] + LEAN * slow) / (self._counts[:, 0, 0] + LEAN)
        return fast.cumprod(axis=1)


class RoundCost:
    """Seconds of a round of a batch by its drafts, learnt from rounds.

    Prices are ratios to a prior; of lengths never seen they lie on lines between the others. All have a common scale:
    when rounds become dearer with the context or other work, a length long not tried keeps its place among the others.
    """

    def __init__(self, prices: Prices | None = None, like: RoundCost | None = None) -> None:
        """Begins with what was measured, or else with the estimate for a batch of another size as a prior."""
        guess = 1 + SLOPE * np.arange(MAX_DRAFT_LENGTH + 1)
        self._prior = np.array([like.even(k) for k in range(len(guess))]) if like else guess
        self._ratios = {k: seconds / self._prior[k] for k, seconds in prices.even().items()} if prices else {}
        # Rounds that told of a length, and the round of the last one; a tuner's medians are worth several.
        self._seen, self._last = dict.fromkeys(self._ratios, 4), dict.fromkeys(self._ratios, 0)
        self._scale, self._now = 1.0, 0
        # The price of every length; None if something was learnt since it was asked for.
        self._known_line: list[float] | None = None
        self._draft: float = prices.draft if prices else like._draft if like else DRAFT
        self._packing: float = prices.packing if prices else like._packing if like else 0.0

    @property
    def _line(self) -> list[float]:
        if self._known_line is not None:
            return self._known_line
        known = sorted(self._ratios)
        settled = [k for k in known if self.settled(k)] or known
        usual = np.interp(known, settled, [self._ratios[k] for k in settled]) if known else []
        ratios = [min(self._ratios[k], ratio / UNKNOWN) for k, ratio in zip(known, usual, strict=True)] or [1.0]
        line = np.interp(range(len(self._prior)), known or [0], ratios) * self._prior
        self._known_line = line.tolist()
        return self._known_line

    def settled(self, length: int) -> bool:
        """Whether a length was measured more than once: a single round may have met a pause of the machine."""
        return self._seen.get(length, 0) > 1

    def doubt(self, length: int) -> float:
        """The share by which rounds of a length may be cheaper than they seem."""
        if not self.settled(length):
            return UNKNOWN
        # The more often it was measured, the longer that holds.
        patience = min(4.0, max(1.0, self._seen[length] / 2))
        return DRIFT if self._now - self._last[length] > STALE * patience else 0.0

    def even(self, length: int) -> float:
        """Expected seconds of a round with this draft length for all rows."""
        return self._scale * self._line[length]

    def token(self) -> float:
        """Expected seconds that a token more of each row adds to a plain round."""
        return max(0.0, self.even(1) - self.even(0) - self._scale * self._draft)

    def seconds(self, steps: np.ndarray | float, mean: np.ndarray | float) -> np.ndarray:
        """Expected seconds by longest and mean draft length of the rows, any shape."""
        even = np.interp(mean, range(len(self._line)), self._line)
        return np.asarray(self._scale * (even + (steps - mean) * self._draft + (steps > mean) * self._packing))

    def observe(self, lengths: Sequence[int], seconds: float) -> None:
        """Learns what a round with these lengths took."""
        self._now += 1
        steps, mean = max(lengths), sum(lengths) / len(lengths)
        if steps > mean or not self._ratios:
            expected = float(self.seconds(np.array(steps), np.array(mean)))
            change = min(seconds / expected, CLIP) - 1
            if self._ratios:
                self._packing = max(0.0, self._packing + DRIFT * change * expected / self._scale)
            else:
                # The first round says what a plain step is.
                self._prior, self._draft = self._prior * seconds / expected, self._draft * seconds / expected
        if steps == mean:
            seen, ratio = self._seen.get(steps, 0), seconds / self._scale / self._prior[steps]
            if seen < 2:
                self._ratios[steps] = min(ratio, self._ratios.get(steps, ratio))
            else:
                change = min(ratio / self._ratios[steps], CLIP) - 1
                self._ratios[steps] *= 1 + max(1 / (2 * seen), DRIFT) * change
                self._scale *= 1 + (DRIFT * change if seen > 3 else 0.0)
            self._seen[steps], self._last[steps] = seen + 1, self._now
        self._known_line = None


class DraftLengthPolicy:
    """Chooses draft lengths for the rows that ask for "auto"."""

    def __init__(self, prices: Callable[[int], Prices] | None = None, longest: int = MAX_AUTO_LENGTH) -> None:
        """Begins with nothing seen.

        Args:
            prices: For a number of rows, what rounds of "fast" requests were measured to take.
            longest: Longest draft that it chooses, at least 1.
        """
        self._prices, self._longest, self._survival = prices, longest, Survival(longest)
        self._costs: dict[tuple[int, str], RoundCost] = {}
        self._cost, self._rows = RoundCost(), list[Row]()
        # As of the last choice: tokens by row and length, the best lengths, and their seconds and tokens a row.
        self._tokens, self._lengths, self._best = np.zeros((0, 0)), list[int](), (1.0, 1.0)
        self._again: list[int] | None = None
        # What trials may lose, in rounds; rounds since the last one, and until the next choice.
        self._bucket, self._since, self._until = CREDIT, 0, 0

    def next(self, rows: Sequence[Row], waiting: bool = False) -> Decision:
        """What the next round drafts.

        Args:
            rows: The batch, one row at least.
            waiting: Whether others wait for the places of rows that are done.
        """
        given = [0 if row.done else row.draft_length for row in rows]
        others = [length for length in given if length is not None]
        auto = [row for row, length in zip(rows, given, strict=True) if length is None] if others else [*rows]
        cost = self._cost_of(len(rows), rows[0].request.exactness)
        if auto != self._rows or cost is not self._cost:
            self._rows, self._cost, self._again, self._until = auto, cost, None, 0
            self._survival.begin([row.number for row in auto])
        trial, self._again = self._again, None
        self._bucket, self._since = min(CREDIT, self._bucket + SHARE), self._since + 1
        self._until -= 1
        if auto and trial is None and self._until <= 0:
            self._choose(others, waiting)
            trial = self._trial(others)
        chosen = iter(trial or self._lengths)
        wanted = [next(chosen) if length is None else length for length in given]
        # The round in flight may yield no more than one token a row.
        lengths = [length and max(0, min(length, row.remaining - 1)) for row, length in zip(rows, wanted, strict=True)]
        return Decision(rows, lengths, trial is not None, cost, self._best)

    def observe(self, decision: Decision, kept: Sequence[int | None], seconds: float | None) -> None:
        """Learns of a finished round.

        Args:
            decision: What `next` said.
            kept: Drafts kept, by row; None for those that had ended before.
            seconds: What the round took; None if it couldn't be measured.
        """
        assert decision.cost
        if seconds is not None:
            decision.cost.observe(decision.lengths, seconds)
        outcome = [
            (row.number, length, count)
            for row, length, count in zip(decision.rows, decision.lengths, kept, strict=True)
            if count is not None and row.draft_length is None
        ]
        if decision.trial and outcome:
            took = float(decision.cost.seconds(np.max(decision.lengths), float(np.mean(decision.lengths))))
            tokens = 1 + sum(count for _, _, count in outcome) / len(outcome)
            self._bucket -= took / decision.best[0] - tokens / decision.best[1]
            self._until = 0
        self._survival.observe({number: (length, count) for number, length, count in outcome if length})

    def _cost_of(self, size: int, exactness: str) -> RoundCost:
        if (size, exactness) not in self._costs:
            prices = self._prices(size) if self._prices and exactness == "fast" else None
            self._costs[size, exactness] = RoundCost(prices, self._cost if self._costs else None)
        return self._costs[size, exactness]

    def _choose(self, others: Sequence[int], waiting: bool) -> None:
        """Finds the lengths with the best goodput, beside rows with lengths of their own."""
        cost, survival = self._cost, self._survival.probabilities()
        rows, size, longest = len(survival), len(survival) + len(others), self._longest
        self._tokens = tokens = np.ones((rows, longest + 1))
        tokens[:, 1:] += survival.cumsum(axis=1)
        if size == 1:
            goodput = [many / cost.even(k) for k, many in enumerate(tokens[0].tolist())]
            self._lengths = [k] = [goodput.index(max(goodput))]
            self._best, self._until = (cost.even(k), float(tokens[0, k])), 1 if k else EVERY * APART
            return
        greedy, drafts, most = waiting or bool(others), sum(others), max(others, default=0)
        # By K and place in the order of slots: those that are short enough, how many they are, and their tokens.
        order, ks = np.argsort(-survival, axis=None, kind="stable"), np.arange(longest + 1)[:, None]
        allowed = order % longest < ks
        gains = (allowed * survival.ravel()[order]).cumsum(axis=1)
        goodput = (size + gains) / cost.seconds(np.maximum(ks, most), (allowed.cumsum(axis=1) + drafts) / size)
        last, best_k = goodput.argmax(axis=1), int(goodput.max(axis=1).argmax())
        lengths = np.array([
            np.bincount(order[: last[k] + 1][allowed[k, : last[k] + 1]] // longest, minlength=rows)
            for k in ([best_k] if greedy else range(longest + 1))
        ])  # fmt: skip
        if not greedy:
            lengths = np.concatenate([lengths, np.broadcast_to(ks, lengths.shape)])
        many = tokens[np.arange(rows), lengths]
        seconds = cost.seconds(np.maximum(lengths.max(axis=1), most), (lengths.sum(axis=1) + drafts) / size)
        best = 0 if greedy else int((self._saved(many.T) / seconds).argmax())
        self._lengths, self._best = lengths[best].tolist(), (float(seconds[best]), float(many[best].mean()))
        self._until = EVERY if any(self._lengths) else EVERY * APART

    def _saved(self, tokens: np.ndarray) -> np.ndarray:
        """Plain seconds that a round saves when nobody waits: rollout with plain decoding as the base policy.

        Rows with stop tokens may end anywhere: the chance to be the last, which decides how often the batch's fixed
        cost is paid, goes as one over a row's tokens. The others go on to their limits as they are.

        Args:
            tokens: Tokens that a round yields: [rows, choices].
        """
        rows, plain = len(tokens), self._plain(len(tokens))
        each = (plain[-1] - plain[0]) / (rows - 1)
        to_stops = (plain[-1] - rows * each) * rows / (1 / tokens).sum(axis=0) + each * tokens.sum(axis=0)
        left = np.array([[max(1, row.remaining)] for row in self._rows])
        rounds = (left / tokens).min(axis=0)
        # The row with the most to go pays for rounds of one row, the next for what two rows take more, and so on.
        after = np.sort(left - rounds * tokens, axis=0)
        to_limits = np.diff(plain, prepend=0.0) @ (np.sort(left, axis=0) - after)[::-1] / rounds
        to_limits += DRIFT * (plain[-1] * tokens.mean(axis=0) - to_limits)
        stops = sum(bool(row.request.stop_tokens) for row in self._rows) / rows
        return np.asarray(stops * to_stops + (1 - stops) * to_limits)

    def _plain(self, rows: int) -> np.ndarray:
        """Seconds of a plain step by number of rows, from one to all: [rows]."""
        exactness = self._rows[0].request.exactness
        sizes = range(1, rows + 1)
        if self._prices and exactness == "fast":
            return np.array([self._cost_of(size, exactness).even(0) for size in sizes])
        own, found = self._cost.even(0), {size: self._costs.get((size, exactness)) for size in sizes}
        alone = max(own / rows, own - SHARED * self._cost.token() * (rows - 1) / rows)
        known = {1: alone} | {size: it.even(0) for size, it in found.items() if it and it.settled(0)} | {rows: own}
        return np.interp(sizes, [*known], [*known.values()])

    def _trial(self, others: Sequence[int]) -> list[int] | None:
        """Lengths to try instead of the best, if something may be better, and what it is expected to lose can be paid.

        Nothing is known of rows that have had no draft for long: all their drafts may be kept. Of lengths with an
        unsettled price plain decoding comes first, as all others are measured by it, then the longest, which tells most
        of those between; each twice, as a round next to one of another length may have no time of its own.
        """
        if self._since < APART:
            return None
        cost, (seconds, tokens), off = self._cost, self._best, not any(self._lengths)
        rate, lengths = tokens / seconds, range(self._longest, 0, -1)
        idle = self._survival.idle >= (APART if off else STALE)
        new = [own == 0 and bool(it) for own, it in zip(self._lengths, idle, strict=True)]
        if any(new):
            k, alone = 1, all(new) and not others
            if alone:
                k = min(reversed(lengths), key=cost.even)
                if max((k + 1) / cost.even(k) / (1 - cost.doubt(k)) for k in lengths) <= rate:
                    return None
            trial = [k if it else own for it, own in zip(new, self._lengths, strict=True)]
            loss = float(cost.seconds(np.max([*trial, *others]), float(np.mean([*trial, *others])))) / seconds - 1
            twice = alone and cost.doubt(k) > 0
        else:
            mean = self._tokens.mean(axis=0).tolist()
            for k in () if others else (0, *lengths):
                doubt, trial = cost.doubt(k), [k] * len(self._rows)
                if doubt and trial != self._lengths and mean[k] / (cost.even(k) * (1 - doubt)) > rate:
                    break
            else:
                return None
            loss, twice = 2 * (cost.even(k) / seconds - mean[k] / tokens), True
        if loss > self._bucket and self._bucket < CREDIT:
            return None
        self._since, self._again = 0, trial if twice else None
        return trial
