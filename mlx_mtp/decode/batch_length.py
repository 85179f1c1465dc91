"""Draft lengths for a batch whose rows come and go: an `AutoLength` for each number of rows.

What a round costs depends on how many rows share it and on their exactness; it is learnt once for all requests. When
the batch gets another size, the next policy takes over what the last one saw of the rows that stay.

Not here: how a length is chosen (draft_length.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from .draft_length import AutoLength, Ends
from .limits import MAX_AUTO_LENGTH
from .request import Row

Costs = Callable[[int], Mapping[int, float]]
"""For a number of rows, the seconds of a round by draft length, as they were measured earlier."""

_GUESS = 0.25
"""Of what fewer rows are expected to save, the part that is counted on until it was measured."""

_ANSWER = 300
"""Tokens until a stop token comes, in the mean, before any text has shown it: an answer of a chat."""


class BatchLength:
    """Chooses draft lengths for the rows that ask for "auto"."""

    def __init__(self, costs: Costs | None = None, longest: int = MAX_AUTO_LENGTH):
        """Begins with nothing known, or with measured costs of "fast" rounds.

        Args:
            costs: Those costs; they tell by themselves up to where longer drafts pay.
            longest: Most drafts of a row where nothing was measured, at least `limits.PROBE`.
        """
        self._costs, self._longest = costs, longest
        self._policies: dict[tuple[int, str], AutoLength] = {}
        self._used: AutoLength | None = None
        self._rows: set[int] = set()
        self._stops, self._tokens = 1, _ANSWER

    def next(
        self, rows: Sequence[Row], others: Sequence[int] = (), waiting: bool = False
    ) -> tuple[dict[int, int], AutoLength]:
        """Tokens to draft in the next round, and the policy that must be told of it (`AutoLength.observe`).

        Args:
            rows: Those that ask for "auto", at least one.
            others: Draft lengths of the batch's other rows.
            waiting: Whether others wait for the places of rows that are done.

        Returns:
            Draft lengths by the row's number, and the policy.
        """
        exactness = rows[0].request.exactness
        policy, numbers = self._policy(len(rows) + len(others), exactness), [row.number for row in rows]
        if policy is not self._used or not self._rows.issuperset(numbers):
            policy.begin(numbers, self._used if self._used is not policy else None)
        self._used, self._rows = policy, {*numbers}
        # Rows with a length of their own go on at a pace that nobody chooses.
        known = len(rows) > 1 and not others and not waiting
        return policy.next(numbers, others, (lambda: self._ends(rows)) if known else None), policy

    def done(self, row: Row) -> None:
        """A row has reached its end."""
        if row.request.stop_tokens:
            self._stops += row.remaining > 0
            self._tokens += len(row.tokens)

    def _policy(self, size: int, exactness: str) -> AutoLength:
        key = size, exactness
        if key not in self._policies:
            known = self._costs(size) if self._costs and exactness == "fast" else None
            self._policies[key] = AutoLength(known, MAX_AUTO_LENGTH if known else self._longest)
        return self._policies[key]

    def _ends(self, rows: Sequence[Row]) -> Ends:
        """What is known of the ends of all rows of the batch."""
        # A stop token comes at any place with the same chance.
        sure = [math.exp(-row.remaining * self._stops / self._tokens) if row.request.stop_tokens else 1 for row in rows]
        all_sizes = range(1, len(rows) + 1)
        policies = {size: self._policy(size, rows[0].request.exactness) for size in all_sizes}
        known = {size: policies[size].seconds(0) for size in all_sizes if policies[size].settled(0)}
        if not known:
            known = {len(rows): policies[len(rows)].seconds(0)}
        if 1 not in known:
            # A row less is a token less to verify; and what all rows share is a part of it.
            fewest, seconds = next(iter(known.items()))
            less = _GUESS * (fewest - 1) * policies[fewest].token(fewest)
            known = {1: max(seconds / fewest, seconds - less), **known}
        plain = np.interp(all_sizes, [*known], [*known.values()])
        left, had = [max(1, row.remaining) for row in rows], [len(row.tokens) for row in rows]
        return Ends(left, had, sum(sure) / len(sure), plain)
