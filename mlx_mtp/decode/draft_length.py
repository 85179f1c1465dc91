"""How many tokens to draft for each row in the next round: the lengths with the best goodput.

Goodput is expected tokens per second (SmartSpec, X. Liu et al., 2024; vLLM: adaptive verification). Draft j of a row is
a slot, which survives if it and all drafts before it are accepted. For each K, the longest draft length, slots are
admitted across rows in the order of survival. The K and number of slots with the best goodput win; K = 0 is a choice.

    survival    probability that a slot survives, from discounted counts by row and position (survival.py)
    seconds     T(K, n) = verify(n tokens) + K draft steps + packing, if rows differ (`RoundCost`)
    value       tokens, if requests wait for a place; else the time of plain decoding that a round saves (`_saved`)
    trials      rounds with lengths of unknown price or acceptance; a token bucket limits their cost (`_trial`)

The policy makes one decision per round and learns its outcome one round late, because the engine builds a round before
it has read the one before. Draft lengths change only speed, never the text.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from ..config import TextConfig
from ..models.attention import longest_fused
from ..system.fusing import on_gpu
from .host_drafts import Offer
from .limits import MAX_AUTO_LENGTH
from .request import Row
from .round_cost import DRIFT, MAX_AGE, Prices, RoundCost
from .survival import Survival

ROW_SAVING = 0.25
"""The share of a row's estimated token cost that a batch of one row less is assumed to save, until that is measured."""
TRIAL_SHARE, MAX_CREDIT = 0.01, 4.0
"""The token bucket of trials: their cost may be this share of all rounds, and this many rounds can be saved up."""
TRIAL_INTERVAL = 8
"""Rounds between trials; and without drafts, those after which they are tried again."""
CHOICE_INTERVAL = 2
"""Rounds between choices in a batch, since choosing takes host time; times TRIAL_INTERVAL while nothing is drafted."""


@dataclass(frozen=True)
class Decision:
    """The draft lengths of a round; `DraftLengthPolicy.observe` gets it back with the outcome.

    Attributes:
        rows: The rows of the batch.
        lengths: Draft length of each row.
        trial: Whether the lengths are a trial, not the best known ones.
        cost: The cost estimate of such a batch; None without a drafter.
        best: Expected seconds of a round with the best known lengths, and its expected tokens per row.
        given: By index of the row, drafts of the host's that the round takes in place of the drafter's.
    """

    rows: Sequence[Row]
    lengths: list[int]
    trial: bool = False
    cost: RoundCost | None = None
    best: tuple[float, float] = (1.0, 1.0)
    given: Mapping[int, Offer] = field(default_factory=dict)

    @property
    def steps(self) -> int:
        """Steps of the drafter: the longest draft length of the rows that have its drafts."""
        return max((length for i, length in enumerate(self.lengths) if i not in self.given), default=0)


def longest_auto(config: TextConfig) -> int:
    """Longest draft length that "auto" chooses for a pair without a profile.

    On a GPU the verify block must fit the fused attention kernel: E2B, with 8 query heads per KV head, gets 3 drafts,
    the other models 7. Wider blocks take clearly longer, and only a measurement can tell whether they pay.
    """
    return max(1, min(MAX_AUTO_LENGTH, longest_fused(config) - 1)) if on_gpu() else MAX_AUTO_LENGTH


class DraftLengthPolicy:
    """Chooses the draft lengths of the rows that ask for "auto"."""

    def __init__(self, prices: Callable[[int], Prices] | None = None, longest: int = MAX_AUTO_LENGTH) -> None:
        """Begins without observations.

        Args:
            prices: Gives the measured prices of "fast" rounds for a number of rows; None if nothing was measured.
            longest: Longest draft length to choose, at least 1.
        """
        self._prices, self._longest, self._survival = prices, longest, Survival(longest)
        self._costs: dict[tuple[int, str], RoundCost] = {}
        self._cost, self._rows = RoundCost(), list[Row]()
        # Of the last choice: tokens by row and length, the best lengths, and their seconds and tokens per row.
        self._tokens, self._lengths, self._best = np.zeros((0, 0)), list[int](), (1.0, 1.0)
        self._repeat: list[int] | None = None
        # The token bucket, in rounds; rounds since the last trial, and rounds until the next choice.
        self._credit, self._rounds_since_trial, self._rounds_to_choice = MAX_CREDIT, 0, 0

    def next(self, rows: Sequence[Row], waiting: bool = False, drafting: bool = True) -> Decision:
        """Decides the draft lengths of the next round.

        Args:
            rows: The rows of the batch, at least one.
            waiting: Whether requests wait for a place in the batch.
            drafting: Whether there is a drafter.
        """
        if not drafting:
            cost = self._cost_of(len(rows), rows[0].request.exactness)
            return Decision(rows, [0] * len(rows), cost=cost, best=(cost.even(0), 1.0))
        given = [0 if row.done else row.draft_length for row in rows]
        others = [length for length in given if length is not None]
        auto = [row for row, length in zip(rows, given, strict=True) if length is None] if others else [*rows]
        cost = self._cost_of(len(rows), rows[0].request.exactness)
        if auto != self._rows or cost is not self._cost:
            self._rows, self._cost, self._repeat, self._rounds_to_choice = auto, cost, None, 0
            self._survival.set_rows([row.number for row in auto])
        trial, self._repeat = self._repeat, None
        self._credit = min(MAX_CREDIT, self._credit + TRIAL_SHARE)
        self._rounds_since_trial += 1
        self._rounds_to_choice -= 1
        if auto and trial is None and self._rounds_to_choice <= 0:
            self._choose(others, waiting)
            trial = self._trial(others)
        chosen = iter(trial or self._lengths)
        wanted = [next(chosen) if length is None else length for length in given]
        # The round in flight adds at least one token to each row, so this one can add at most the rest.
        lengths = [length and max(0, min(length, row.remaining - 1)) for row, length in zip(rows, wanted, strict=True)]
        return Decision(rows, lengths, trial is not None, cost, self._best)

    def observe(self, decision: Decision, accepted: Sequence[int | None], seconds: float | None) -> None:
        """Learns from a finished round.

        Args:
            decision: What `next` returned for it.
            accepted: Accepted drafts of each row, without the bonus token; None for rows that were done before.
            seconds: How long the round took; None if it couldn't be measured.
        """
        cost, lengths = decision.cost, decision.lengths
        assert cost
        if seconds is not None and decision.given:
            cost.observe_late(lengths, decision.steps, seconds)
        elif seconds is not None:
            cost.observe(lengths, seconds)
        outcome = [
            (row.number, length, count)
            for i, (row, length, count) in enumerate(zip(decision.rows, lengths, accepted, strict=True))
            if count is not None and row.draft_length is None and i not in decision.given
        ]
        if decision.trial and outcome:
            took = float(cost.seconds(np.max(lengths), float(np.mean(lengths))))
            tokens = 1 + sum(count for _, _, count in outcome) / len(outcome)
            self._credit -= took / decision.best[0] - tokens / decision.best[1]
            self._rounds_to_choice = 0
        self._survival.observe({number: (length, count) for number, length, count in outcome if length})

    def _cost_of(self, size: int, exactness: str) -> RoundCost:
        if (size, exactness) not in self._costs:
            prices = self._prices(size) if self._prices and exactness == "fast" else None
            self._costs[size, exactness] = RoundCost(prices, self._cost if self._costs else None, self._longest)
        return self._costs[size, exactness]

    def _choose(self, others: Sequence[int], waiting: bool) -> None:
        """Finds the lengths with the best goodput.

        Args:
            others: Draft lengths of the rows that don't ask for "auto".
            waiting: See `next`.
        """
        cost, survival = self._cost, self._survival.probabilities()
        rows, size, longest = len(survival), len(survival) + len(others), self._longest
        self._tokens = tokens = np.ones((rows, longest + 1))
        tokens[:, 1:] += survival.cumsum(axis=1)
        if size == 1:
            goodput = [many / cost.even(k) for k, many in enumerate(tokens[0].tolist())]
            self._lengths = [k] = [goodput.index(max(goodput))]
            self._best = cost.even(k), float(tokens[0, k])
            self._rounds_to_choice = 1 if k else CHOICE_INTERVAL * TRIAL_INTERVAL
            return
        greedy, drafts, most = waiting or bool(others), sum(others), max(others, default=0)
        # [K, slots by falling survival]: which slots are among their row's first K drafts, and running sums of their
        # number and tokens.
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
        self._rounds_to_choice = CHOICE_INTERVAL if any(self._lengths) else CHOICE_INTERVAL * TRIAL_INTERVAL

    def _saved(self, tokens: np.ndarray) -> np.ndarray:
        """Seconds of plain decoding that a round saves: rollout with plain decoding as the base policy.

        Used when no request waits, so that a batch shrinks as its rows end. A row with stop tokens may end anywhere.
        The last row to end decides how often the batch's fixed cost is paid; the chance to be the last is inversely
        proportional to a row's tokens per round. Rows without stop tokens run to their limits.

        Args:
            tokens: Tokens that a round yields: [rows, choices].

        Returns:
            [choices].
        """
        rows, plain = len(tokens), self._plain(len(tokens))
        each = (plain[-1] - plain[0]) / (rows - 1)
        to_stops = (plain[-1] - rows * each) * rows / (1 / tokens).sum(axis=0) + each * tokens.sum(axis=0)
        left = np.array([[max(1, row.remaining)] for row in self._rows])
        rounds = (left / tokens).min(axis=0)
        # The row with the most tokens left pays for rounds of one row, the next one for the extra of two rows, etc.
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
        alone = max(own / rows, own - ROW_SAVING * self._cost.token() * (rows - 1) / rows)
        known = {1: alone} | {size: it.even(0) for size, it in found.items() if it and it.settled(0)} | {rows: own}
        return np.interp(sizes, [*known], [*known.values()])

    def _trial(self, others: Sequence[int]) -> list[int] | None:
        """Lengths to try instead of the best known ones; None if a trial isn't promising or is too expensive now.

        A row that has had no draft for long is promising: all its drafts might be accepted. Among lengths with an
        unsettled price, plain decoding comes first, since all others are compared with it; then the longest, which says
        most about those in between. Each is tried twice: a round's time can be measured only if the next round has
        about the same lengths.

        Args:
            others: Draft lengths of the rows that don't ask for "auto".
        """
        if self._rounds_since_trial < TRIAL_INTERVAL:
            return None
        cost, (seconds, tokens), off = self._cost, self._best, not any(self._lengths)
        rate, lengths = tokens / seconds, range(self._longest, 0, -1)
        idle = self._survival.idle >= (TRIAL_INTERVAL if off else MAX_AGE)
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
        if loss > self._credit and self._credit < MAX_CREDIT:
            return None
        self._rounds_since_trial, self._repeat = 0, trial if twice else None
        return trial
