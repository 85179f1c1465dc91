"""What rounds take: measured prices of a machine, and an estimate that learns from every round."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated

import numpy as np
from annotated_types import Interval

from .limits import MAX_AUTO_LENGTH, MAX_DRAFT_LENGTH

PRIOR_SLOPE, PRIOR_DRAFT = 0.2, 0.1
"""Guesses until measured, as shares of a plain step: what a draft adds to a round, and the drafter's part of that."""
UNKNOWN_SHARE = 0.5
"""A price measured less than twice may really be this share of it: the first round also builds kernels."""
DRIFT = 0.05
"""How much an estimate may have drifted: the update step of a known price, the doubt about an old one, and the weight
of the case that texts change and any row may be the last of a batch."""
MAX_SLOWDOWN = 1.25
"""A round counts for at most this times its expected time: the machine may pause."""
MAX_AGE = 64
"""Rounds after which a price that wasn't measured again is doubted."""
WAIT_WEIGHT = 1 / 8
"""Weight of the latest round in the estimate of what a round costs more that can't be built ahead."""


@dataclass(frozen=True)
class Prices:
    """Measured seconds of the parts of a round, for one number of rows.

    Attributes:
        verify: A verify pass, by block width from 1 on (tokens of each row).
        draft: A draft step of all rows.
        packing: The extra time of a pass over rows with different block widths.
    """

    verify: Mapping[int, Annotated[float, Interval(gt=0, le=sys.float_info.max)]]
    draft: Annotated[float, Interval(ge=0, le=sys.float_info.max)]
    packing: Annotated[float, Interval(ge=0, le=sys.float_info.max)]

    def even(self) -> dict[int, float]:
        """Seconds of a round in which all rows have the same draft length, by that length."""
        return {width - 1: seconds + (width - 1) * self.draft for width, seconds in self.verify.items()}


class RoundCost:
    """Estimates the seconds of a round from its draft lengths, for one number of rows; learns from finished rounds.

    Prices are ratios to a prior, interpolated for lengths that were never measured. They share a scale: if rounds get
    slower with the context or with other work on the machine, lengths that weren't tried lately are scaled as well.

    A round with the host's drafts can't be built before the last one is read, so the device waits for the host. What
    that costs is an estimate of its own, added to the price of the same round built ahead; lengths that are never built
    ahead, because only the host drafts so many tokens, have it in their price.
    """

    def __init__(
        self, prices: Prices | None = None, like: RoundCost | None = None, longest: int = MAX_AUTO_LENGTH
    ) -> None:
        """Begins with measured prices or a prior.

        Args:
            prices: Measured prices; None if there are none.
            like: The estimate for another batch size, which is the prior; None for a guess.
            longest: Longest draft length that the drafter gets.
        """
        self._longest = longest
        guess = 1 + PRIOR_SLOPE * np.arange(MAX_DRAFT_LENGTH + 1)
        self._prior = np.array([like.even(k) for k in range(len(guess))]) if like else guess
        self._ratios = {k: seconds / self._prior[k] for k, seconds in prices.even().items()} if prices else {}
        # By length, how many rounds were measured, and when the last one was; a tuner's median counts as several.
        self._times_measured, self._last_measured = dict.fromkeys(self._ratios, 4), dict.fromkeys(self._ratios, 0)
        self._scale, self._rounds = 1.0, 0
        # The price of every length; None if it must be computed again.
        self._cached_line: list[float] | None = None
        self._draft: float = prices.draft if prices else like._draft if like else PRIOR_DRAFT
        self._packing: float = prices.packing if prices else like._packing if like else 0.0
        self._wait: float = like._wait if like else 0.0

    @property
    def _line(self) -> list[float]:
        if self._cached_line is not None:
            return self._cached_line
        known = sorted(self._ratios)
        settled = [k for k in known if self.settled(k)] or known
        usual = np.interp(known, settled, [self._ratios[k] for k in settled]) if known else []
        ratios = [min(self._ratios[k], ratio / UNKNOWN_SHARE) for k, ratio in zip(known, usual, strict=True)] or [1.0]
        line = np.interp(range(len(self._prior)), known or [0], ratios)
        if built_ahead := sum(k <= self._longest for k in known):
            # The wait that is in the prices of longer ones isn't in theirs.
            line[: self._longest + 1] = np.interp(range(self._longest + 1), known[:built_ahead], ratios[:built_ahead])
        self._cached_line = (line * self._prior).tolist()
        return self._cached_line

    def settled(self, length: int) -> bool:
        """Whether a length was measured more than once: in a single round, the machine may have paused."""
        return self._times_measured.get(length, 0) > 1

    def doubt(self, length: int) -> float:
        """The share by which rounds of a length may be faster than estimated."""
        if not self.settled(length):
            return UNKNOWN_SHARE
        # A price measured more often is trusted for longer.
        patience = min(4.0, max(1.0, self._times_measured[length] / 2))
        return DRIFT if self._rounds - self._last_measured[length] > MAX_AGE * patience else 0.0

    @property
    def draft_seconds(self) -> float:
        """Expected seconds of a step of the drafter."""
        return self._scale * self._draft

    def even(self, length: int) -> float:
        """Expected seconds of a round in which all rows have this draft length."""
        return self._scale * self._line[length]

    def token(self) -> float:
        """Expected seconds that one more token of each row adds to a plain step."""
        return max(0.0, self.even(1) - self.even(0) - self._scale * self._draft)

    def seconds(self, steps: np.ndarray | float, mean: np.ndarray | float) -> np.ndarray:
        """Expected seconds of rounds.

        Args:
            steps: The longest draft length of the rows, of any shape.
            mean: The mean draft length of the rows, of a shape that broadcasts with it.

        Returns:
            Of the broadcast shape.
        """
        even = np.interp(mean, range(len(self._line)), self._line)
        return np.asarray(self._scale * (even + (steps - mean) * self._draft + (steps > mean) * self._packing))

    def seconds_late(self, steps: np.ndarray | float, mean: np.ndarray | float, rows: int) -> np.ndarray:
        """Like `seconds`, of rounds with the host's drafts, where `steps` counts those of the drafter.

        Lengths that only the host's drafts reach are outside of what the drafter's rounds tell: while none of them is
        measured they are taken for as cheap as they may be, and so are tried.
        """
        known = any(self.settled(k) for k in range(self._longest + 1, MAX_DRAFT_LENGTH + 1))
        seconds, is_host_length = self.seconds(steps, mean), (mean > self._longest) & (rows == 1)
        return np.where(is_host_length, seconds * (1.0 if known else UNKNOWN_SHARE), seconds + self._wait)

    def observe_late(self, lengths: Sequence[int], steps: int, seconds: float) -> None:
        """Learns from a round with the host's drafts.

        Args:
            lengths: Draft length of each row.
            steps: Steps of the drafter.
            seconds: How long the round took.
        """
        if len(lengths) == 1 and lengths[0] > self._longest:
            self.observe(lengths, seconds + (lengths[0] - steps) * self.draft_seconds)
            return
        expected = float(self.seconds(steps, sum(lengths) / len(lengths)))
        # A pause of the machine, or the building of kernels, counts for a round at most.
        self._wait += WAIT_WEIGHT * (min(max(seconds - expected, 0.0), expected) - self._wait)

    def observe(self, lengths: Sequence[int], seconds: float) -> None:
        """Learns from a round.

        Args:
            lengths: Draft length of each row.
            seconds: How long the round took.
        """
        self._rounds += 1
        self._wait *= 1 - 1 / MAX_AGE  # so that it is measured again, if it was overestimated
        steps, mean = max(lengths), sum(lengths) / len(lengths)
        if steps > mean or not self._ratios:
            expected = float(self.seconds(np.array(steps), np.array(mean)))
            change = min(seconds / expected, MAX_SLOWDOWN) - 1
            if self._ratios:
                self._packing = max(0.0, self._packing + DRIFT * change * expected / self._scale)
            else:
                # The first round sets the scale of the prior.
                self._prior, self._draft = self._prior * seconds / expected, self._draft * seconds / expected
        if steps == mean:
            seen, ratio = self._times_measured.get(steps, 0), seconds / self._scale / self._prior[steps]
            if seen < 2:
                self._ratios[steps] = min(ratio, self._ratios.get(steps, ratio))
            else:
                change = min(ratio / self._ratios[steps], MAX_SLOWDOWN) - 1
                self._ratios[steps] *= 1 + max(1 / (2 * seen), DRIFT) * change
                self._scale *= 1 + (DRIFT * change if seen > 3 else 0.0)
            self._times_measured[steps], self._last_measured[steps] = seen + 1, self._rounds
        self._cached_line = None
