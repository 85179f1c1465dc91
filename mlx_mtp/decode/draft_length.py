"""How many tokens to draft in the next round.

`FixedLength` is what the user asked for. `AutoLength` weighs, from what it sees while running, the tokens a round is
expected to yield against the time it is expected to take, and chooses the length with the best ratio, 0 (plain
decoding) included. Both only change speed, never the text.

Knows nothing of models; it is told of finished rounds and asked for the next length.
"""

from __future__ import annotations

from itertools import accumulate
from operator import mul
from typing import Protocol

MAX_DRAFT_LENGTH = 15
"""Longest draft that can be asked for."""

MAX_AUTO_LENGTH = 7
"""Longest draft chosen here: with the newest token, the 8 rows that the fused attention kernels on Metal take."""


class DraftLength(Protocol):
    """Chooses draft lengths."""

    def next(self) -> int:
        """Tokens to draft in the next round."""
        ...

    def observe(self, drafted: int, kept: int, seconds: float | None) -> None:
        """Learns of a finished round: drafts made, drafts kept, time taken (None if it couldn't be measured)."""
        ...


class FixedLength:
    """Always the same length."""

    def __init__(self, length: int):
        self._length = length

    def next(self) -> int:
        """See `DraftLength`."""
        return self._length

    def observe(self, drafted: int, kept: int, seconds: float | None) -> None:
        """See `DraftLength`."""


class AutoLength:
    """The length with the best expected tokens per second.

    Acceptance is tracked per position (the chance that draft j is kept if those before it were), cost as a straight
    line over the draft length, both with exponential forgetting. A length other than the best is tried now and then,
    since a line can't be fitted through one point, and acceptance can't be seen at length 0.
    """

    _FORGET = 0.97
    _PROBE_EVERY = 16
    _PROBE_EVERY_WHEN_OFF = 32
    # Before anything is measured: the published acceptance of these drafters, and a draft step at a fifth of a
    # target step.
    _PRIOR_ACCEPTANCE = 0.75
    _PRIOR_SLOPE = 0.2
    _PRIOR_WEIGHT = 4.0

    def __init__(self) -> None:
        n = MAX_AUTO_LENGTH
        self._tried = [self._PRIOR_WEIGHT] * n
        self._kept = [self._PRIOR_WEIGHT * self._PRIOR_ACCEPTANCE] * n
        # Weighted sums for the least-squares line seconds = base + slope * drafted.
        self._w = self._x = self._xx = self._y = self._xy = 0.0
        self._rounds = 0

    def next(self) -> int:
        """See `DraftLength`."""
        self._rounds += 1
        best = self._best()
        if best == 0:
            return 2 if self._rounds % self._PROBE_EVERY_WHEN_OFF == 0 else 0
        if self._rounds % self._PROBE_EVERY == 0:
            return best - 1 if best == MAX_AUTO_LENGTH or self._rounds // self._PROBE_EVERY % 2 else best + 1
        return best

    def observe(self, drafted: int, kept: int, seconds: float | None) -> None:
        """See `DraftLength`."""
        # Draft j was put to the test only if all drafts before it were kept.
        for j in range(min(drafted, kept + 1, MAX_AUTO_LENGTH)):
            self._tried[j] = self._tried[j] * self._FORGET + 1
            self._kept[j] = self._kept[j] * self._FORGET + (j < kept)
        if seconds is None:
            return
        if self._w and seconds > 4 * self._seconds(drafted):
            return  # a pause of the machine, not the price of a round
        self._w, self._x, self._xx, self._y, self._xy = (
            total * self._FORGET + new
            for total, new in (
                (self._w, 1.0),
                (self._x, drafted),
                (self._xx, drafted * drafted),
                (self._y, seconds),
                (self._xy, drafted * seconds),
            )
        )

    def _line(self) -> tuple[float, float]:
        """Base and slope of the cost; the slope leans on the prior until lengths have varied."""
        if not self._w:
            return 1.0, self._PRIOR_SLOPE
        mean_x, mean_y = self._x / self._w, self._y / self._w
        spread = self._xx / self._w - mean_x * mean_x
        covariance = self._xy / self._w - mean_x * mean_y
        prior_base = mean_y / (1 + self._PRIOR_SLOPE * mean_x)
        trust = 0.25  # in squared tokens: how much the lengths must vary for the fit to outweigh the prior
        slope = max(0.0, (covariance + trust * self._PRIOR_SLOPE * prior_base) / (spread + trust))
        return max(mean_y - slope * mean_x, 0.1 * mean_y), slope

    def _seconds(self, drafted: int) -> float:
        base, slope = self._line()
        return base + slope * drafted

    def _best(self) -> int:
        chances = accumulate((k / t for k, t in zip(self._kept, self._tried, strict=True)), mul)
        tokens = accumulate(chances, initial=1.0)
        base, slope = self._line()
        speeds = [expected / (base + slope * k) for k, expected in enumerate(tokens)]
        return speeds.index(max(speeds))
