"""How likely drafts are to be accepted, estimated online for each row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from .limits import MAX_DRAFT_LENGTH

FAST_DISCOUNT, SLOW_DISCOUNT = 0.9, 0.98
"""Discount of a row's counts in each round: of the fast counts, which follow the text, and of the slow ones, which are
its long-run average."""
PRIOR_ACCEPTANCE, PRIOR_WEIGHT = 0.8, 2.0
"""Prior acceptance, as published for these drafters; and the weight of a prior, in drafts."""


class Survival:
    """The probability that a slot survives, from discounted counts of drafts tried and accepted by row and position.

    The prior of a row's fast estimate is its slow one; of that, the mean of all rows; of the mean at a position, the
    mean at the position before (discounting: A. Garivier and E. Moulines, 2011). Fast counts fade in every round, also
    without drafts, so that the estimate returns to the text's long-run average.

    Attributes:
        idle: [rows], rounds since each row last had a draft; infinite if it never had.
    """

    def __init__(self, longest: int) -> None:
        """Begins without counts.

        Args:
            longest: Longest draft length.
        """
        self._longest, self._rows = longest, list[int]()
        # [row, fast or slow, tried or accepted, position]; summed over ended rows: [tried or accepted, position].
        self._counts, self._ended = np.zeros((0, 2, 2, longest)), np.zeros((2, longest))
        self.idle = np.zeros(0)
        # [n, position]: 1 at the first n positions, else 0.
        self._first = np.tri(MAX_DRAFT_LENGTH + 2, longest, -1)

    def set_rows(self, rows: Sequence[int]) -> None:
        """Sets the rows of the batch, in its order; rows that stay keep their counts.

        Args:
            rows: Their `Row.number`s.
        """
        ended = self._ended + self._counts[[row not in rows for row in self._rows], 1].sum(axis=0)
        index = [self._rows.index(row) if row in self._rows else -1 for row in rows]
        counts = np.pad(self._counts, [(0, 1), (0, 0), (0, 0), (0, 0)])[index]
        idle = np.append(self.idle, np.inf)[index]
        # At once: if an exception struck in between, rows and counts wouldn't fit each other ever again.
        self._ended, self._counts, self.idle, self._rows = ended, counts, idle, [*rows]

    def observe(self, drafted: Mapping[int, tuple[int, int]]) -> None:
        """Learns from a round.

        Args:
            drafted: By `Row.number`, the draft length and how many of the drafts were accepted; only rows that drafted.
        """
        self._counts[:, 0] *= FAST_DISCOUNT
        self.idle += 1
        if index := [i for i, row in enumerate(self._rows) if row in drafted]:
            self._ended *= SLOW_DISCOUNT ** (len(index) / len(self._rows))
            self._counts[index, 1] *= SLOW_DISCOUNT
            # Draft j was tested only if all drafts before it were accepted.
            outcomes = (drafted[self._rows[i]] for i in index)
            reached = [(min(accepted + 1, length), accepted) for length, accepted in outcomes]
            self._counts[index] += self._first[reached][:, None]
            self.idle[index] = 0

    def probabilities(self) -> np.ndarray:
        """The survival of each slot: float64 [rows, positions]."""
        tried, accepted = (self._ended + self._counts[:, 1].sum(axis=0)).tolist()
        mean, chance = list[float](), PRIOR_ACCEPTANCE
        for j in range(self._longest):
            chance = (accepted[j] + PRIOR_WEIGHT * chance) / (tried[j] + PRIOR_WEIGHT)
            mean.append(chance)
        slow = (self._counts[:, 1, 1] + PRIOR_WEIGHT * np.array(mean)) / (self._counts[:, 1, 0] + PRIOR_WEIGHT)
        fast = (self._counts[:, 0, 1] + PRIOR_WEIGHT * slow) / (self._counts[:, 0, 0] + PRIOR_WEIGHT)
        return fast.cumprod(axis=1)
