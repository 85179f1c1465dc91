"""Drafts that the host knows without the drafter: what a grammar forces, a given prediction, a repetition.

    grammar      the tokens that the row's control leaves no choice about
    prediction   what the caller expects the text to be, from where the text has got to (OpenAI's predicted outputs)
    prompt       what followed the last few tokens where they stood before, in the prompt or in the text (prompt
                 lookup: A. Saxena, 2023; N. Yang et al., arXiv 2304.04487)

They are verified like any drafts, so they change speed, never the text. What a source is worth is estimated from how
often its tokens were accepted; a round uses one source for a row, or the drafter, by which is expected to yield most
tokens for its time (`best_offers`). A draft of the host costs no drafter step, so it may be longer than the drafter's.
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

PRIORS = {"grammar": 1.0, "prediction": 0.9, "prompt": 0.75}
"""Chance that a source's token is accepted, before it has shown; a wrong guess costs a round or two."""

WEIGHT, FADE = 8.0, 0.9
"""Tokens that a prior is worth, and what a round leaves of the counts: a text may leave its source and come back."""


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
        self._said = _Lookup([*prompt])
        self._expected = _Lookup([*prediction]) if prediction else None
        self._counts = {source: [0.0, 0.0] for source in PRIORS}
        # Where in the prediction the text has got to; None if it has left it.
        self._place: int | None = 0

    def advance(self, tokens: Sequence[int]) -> None:
        """Takes tokens of the text."""
        self._said.extend(tokens)
        if self._expected:
            for token in tokens:
                on = self._place is not None and self._expected.at(self._place) == token
                self._place = self._place + 1 if on and self._place is not None else None
            if self._place is None:
                self._place = self._expected.after(self._said.end)

    def observe(self, offer: Offer | None, accepted: int) -> None:
        """Learns of a round: how many tokens of an offer were accepted, or that none was taken."""
        for counts in self._counts.values():
            counts[:] = [FADE * count for count in counts]
        if offer:
            counts = self._counts[offer.source]
            # Those after the first rejected one weren't put to the test.
            counts[0] += min(accepted + 1, len(offer.tokens))
            counts[1] += accepted

    def offer(self, most: int = MAX_DRAFT_LENGTH) -> Offer | None:
        """The best drafts that the host knows for the text as it is, at most so many; None if it knows none."""
        if self._control and (forced := self._control.forced()):
            return Offer("grammar", forced[:most], PRIORS["grammar"])
        found = []
        if self._expected and self._place is not None and (tokens := self._expected.slice(self._place, most)):
            found.append(Offer("prediction", tokens, self._chance("prediction")))
        place = self._said.after(self._said.end)
        if place is not None and (tokens := self._said.slice(place, most)):
            found.append(Offer("prompt", tokens, self._chance("prompt")))
        return max(found, key=lambda it: it.tokens_by_length()[-1], default=None)

    def _chance(self, source: str) -> float:
        tried, accepted = self._counts[source]
        return (accepted + WEIGHT * PRIORS[source]) / (tried + WEIGHT)


class _Lookup:
    """A text in which the latest place of every few tokens can be found."""

    def __init__(self, tokens: list[int]) -> None:
        """Takes the tokens."""
        self._tokens: list[int] = []
        # By MATCH tokens, the place after them.
        self._places: dict[tuple[int, ...], int] = {}
        self.extend(tokens)

    @property
    def end(self) -> tuple[int, ...]:
        """The last MATCH tokens."""
        return tuple(self._tokens[-MATCH:])

    def extend(self, tokens: Sequence[int]) -> None:
        """Adds tokens. The last ones are found only once others follow them."""
        for token in tokens:
            if len(self._tokens) >= MATCH:
                self._places[self.end] = len(self._tokens)
            self._tokens.append(token)

    def after(self, key: tuple[int, ...]) -> int | None:
        """The place after the latest occurrence of MATCH tokens; None if there is none."""
        return self._places.get(key)

    def at(self, place: int) -> int | None:
        """The token at a place; None past the end."""
        return self._tokens[place] if place < len(self._tokens) else None

    def slice(self, place: int, most: int) -> list[int]:
        """The tokens from a place on."""
        return self._tokens[place : place + most]


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
    for i, offer in offers.items():
        expected = offer.tokens_by_length()
        others, total = tokens - decision.best[1], sum(lengths) - lengths[i]
        steps = max((own for j, own in enumerate(lengths) if j != i and j not in taken), default=0)
        took = cost.seconds(np.array(steps), (total + np.arange(1, len(expected))) / count)
        goodput = (others + np.array(expected[1:])) / took
        best = int(goodput.argmax())
        if goodput[best] > tokens / seconds:
            taken[i] = Offer(offer.source, offer.tokens[: best + 1], offer.chance)
            lengths[i], tokens, seconds = best + 1, others + expected[best + 1], float(took[best])
    return taken
