"""Drafts that the host knows without the drafter: what a grammar forces, a given prediction, a repetition.

    grammar      the tokens that the row's control leaves no choice about
    prediction   what the caller expects the text to be, from where the text has got to (OpenAI's predicted outputs)
    prompt       what followed the last few tokens where they stood before, in the prompt or in the text (prompt
                 lookup: A. Saxena, 2023; N. Yang et al., arXiv 2304.04487)

They are verified like any drafts, so they change speed, never the text. How likely a source's tokens are to be accepted
is estimated from how often it would have been right so far, used or not; a round uses one source for a row, or the
drafter, by which is expected to yield most tokens for its time (`best_offers`). A draft of the host's costs no drafter
step, so it may be longer than the drafter's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from .adjustments import RowControl
from .limits import MAX_DRAFT_LENGTH

if TYPE_CHECKING:
    from .draft_length import Decision

MATCH = 4
"""Tokens that must repeat for what followed them to be drafted: fewer repeat by chance."""

PRIORS = {"prediction": 0.9, "prompt": 0.75}
"""Probability that a source's token is accepted, before it has shown."""

WEIGHT, FADE = 4.0, 0.95
"""Tokens that a prior is worth, and what every token leaves of the counts: a text may leave its source, and return."""


NEIGHBOURS_LOSS = 0.02
"""The share by which drafts of the host's may make a round longer for rows that have none: they gain nothing by it."""


@dataclass(frozen=True)
class Offer:
    """Drafts for a row.

    Attributes:
        source: Where they come from.
        tokens: The drafts, at most MAX_DRAFT_LENGTH.
        chance: That each is accepted if those before it were.
    """

    source: str
    tokens: Sequence[int]
    chance: float

    def tokens_by_length(self) -> list[float]:
        """Expected tokens of a round, bonus token included, for 0 drafts, 1 draft, and so on."""
        expected, survival = [1.0], 1.0
        for _ in self.tokens:
            survival *= self.chance
            expected.append(expected[-1] + survival)
        return expected


class HostDrafts:
    """The host's drafts for one row, whose text grows."""

    def __init__(self, prompt: Sequence[int], prediction: Sequence[int], control: RowControl | None) -> None:
        """Begins after a prompt."""
        self._control = control
        # The text itself comes last: it grows, and a source asks it where the text has got to.
        self._text = _Source("prompt", prompt)
        self._sources = [_Source("prediction", prediction, 0)] if prediction else []

    def advance(self, tokens: Sequence[int]) -> None:
        """Takes tokens of the text."""
        for token in tokens:
            for source in (*self._sources, self._text):
                source.observe(token)
            self._text.append(token)
            for source in (*self._sources, self._text):
                source.find(self._text.end)

    def offer(self, most: int = MAX_DRAFT_LENGTH) -> Offer | None:
        """The best drafts that the host knows for the text as it is, at most so many; None if it knows none."""
        if self._control and (forced := self._control.forced()):
            return Offer("grammar", forced[:most], 1.0)
        found = [offer for source in (*self._sources, self._text) if (offer := source.offer(most))]
        return max(found, key=lambda it: it.tokens_by_length()[-1], default=None)


class _Source:
    """Tokens that the text may go on with, from where it has got to in them."""

    def __init__(self, name: str, tokens: Sequence[int], place: int | None = None) -> None:
        """Takes the tokens; `place` is where the text is to begin, None if that is to be found."""
        self._name, self._place = name, place
        self._tokens: list[int] = []
        # By MATCH tokens, the place after their latest occurrence.
        self._places: dict[tuple[int, ...], int] = {}
        self._tried = self._accepted = 0.0
        for token in tokens:
            self.append(token)

    @property
    def end(self) -> tuple[int, ...]:
        """The last MATCH tokens."""
        return tuple(self._tokens[-MATCH:])

    def append(self, token: int) -> None:
        """Adds a token. The last ones are found only once others follow them."""
        if len(self._tokens) >= MATCH:
            self._places[self.end] = len(self._tokens)
        self._tokens.append(token)

    def observe(self, token: int) -> None:
        """Goes on with the text's next token, and counts whether it was the one that the source has."""
        if self._place is None or self._place >= len(self._tokens):
            self._place = None
            return
        right = self._tokens[self._place] == token
        self._tried, self._accepted = FADE * self._tried + 1, FADE * self._accepted + right
        self._place = self._place + 1 if right else None

    def find(self, end: tuple[int, ...]) -> None:
        """Looks for the place of the text's last MATCH tokens, if the text isn't followed already."""
        if self._place is None:
            self._place = self._places.get(end)

    def offer(self, most: int) -> Offer | None:
        """The next tokens, at most so many."""
        if self._place is None or not (tokens := self._tokens[self._place : self._place + most]):
            return None
        return Offer(self._name, tokens, (self._accepted + WEIGHT * PRIORS[self._name]) / (self._tried + WEIGHT))


def best_offers(decision: Decision, offers: Mapping[int, Offer]) -> dict[int, Offer]:
    """The offers that a round should take in place of the drafter's drafts, each cut to its best length.

    Args:
        decision: What the policy chose for the drafter; its `cost` says what rounds take.
        offers: By index of the row.
    """
    cost, count = decision.cost, len(decision.rows)
    if cost is None:
        return {}
    lengths, taken = [*decision.lengths], dict[int, Offer]()
    tokens, seconds = decision.best[1] * count, decision.best[0]
    longest = seconds * (1 + NEIGHBOURS_LOSS) if len(offers) < count else np.inf
    for i, offer in offers.items():
        expected = offer.tokens_by_length()
        others, total = tokens - decision.best[1], sum(lengths) - lengths[i]
        steps = max((own for j, own in enumerate(lengths) if j != i and j not in taken), default=0)
        took = cost.seconds_late(steps, (total + np.arange(1, len(expected))) / count, count)
        goodput = np.where(took <= longest, (others + np.array(expected[1:])) / took, 0.0)
        best = int(goodput.argmax())
        if goodput[best] > tokens / seconds:
            taken[i] = Offer(offer.source, offer.tokens[: best + 1], offer.chance)
            lengths[i], tokens, seconds = best + 1, others + expected[best + 1], float(took[best])
    return taken
