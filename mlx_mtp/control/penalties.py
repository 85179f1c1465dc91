"""Penalties on tokens that a row has had, and biases on any.

    logits + bias
    / or * repetition_penalty   where the token is in the prompt or the text (transformers' meaning and reach)
    - presence_penalty          where the token is in the text (OpenAI's meaning: the prompt doesn't count)
    - frequency_penalty n       for a token that the text has n times (OpenAI's)

in this order, which is mlx-lm's as well; only there the three penalties reach back no more than 20 tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from ..decode.adjustments import Adjustment


@dataclass(frozen=True, kw_only=True)
class Penalties:
    """What is asked for.

    Attributes:
        repetition: Factor for tokens of the prompt and the text, above 0; 1 for none.
        presence: Subtracted once from the logit of a token that is in the text; 0 for none.
        frequency: Subtracted for each time that a token is in the text; 0 for none.
        bias: Added, by token id.
    """

    repetition: float = 1.0
    presence: float = 0.0
    frequency: float = 0.0
    bias: Mapping[int, float] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return self.counts or bool(self.bias)

    @property
    def counts(self) -> bool:
        """Whether it matters which tokens the text has."""
        return self.repetition != 1 or self.presence != 0 or self.frequency != 0


class PenaltyState:
    """The penalties of one row, whose text grows."""

    def __init__(self, penalties: Penalties, prompt: Sequence[int]) -> None:
        """Begins with a prompt."""
        self._penalties = penalties
        repeated = dict.fromkeys(prompt) if penalties.repetition != 1 else {}
        # Every token that has a place here, and the place; counts and biases are by place.
        self._places = {token: i for i, token in enumerate(dict.fromkeys([*penalties.bias, *repeated]))}
        self._in_prompt = np.array([token in repeated for token in self._places], bool)
        self._counts = np.zeros(len(self._places), np.int64)

    def advance(self, tokens: Sequence[int]) -> None:
        """Counts tokens of the text."""
        if self._penalties.counts:
            places = self._placed(tokens)  # first: new tokens make the counts longer
            np.add.at(self._counts, places, 1)

    def adjustments(self, drafts: Sequence[int]) -> list[Adjustment]:
        """For the position after the text, and after each of the drafts."""
        asked = self._penalties
        drafted = self._placed(drafts) if asked.counts else []
        if not self._places:
            return [Adjustment()] * (len(drafts) + 1)
        ids = np.fromiter(self._places, np.int32, len(self._places))
        bias = np.array([asked.bias.get(token, 0.0) for token in self._places], np.float32)
        found, counts = [], self._counts.copy()
        for i in range(len(drafts) + 1):
            had = counts > 0
            factor = np.where(had | self._in_prompt, asked.repetition, 1.0).astype(np.float32)
            minus = (asked.presence * had + asked.frequency * counts).astype(np.float32)
            found.append(Adjustment(ids=ids, bias=bias, factor=factor, minus=minus))
            if i < len(drafted):
                counts[drafted[i]] += 1
        return found

    def _placed(self, tokens: Sequence[int]) -> list[int]:
        """The places of tokens, which get one if they have none."""
        for token in tokens:
            if token not in self._places:
                self._places[token] = len(self._places)
        grown = len(self._places) - len(self._counts)
        self._counts, self._in_prompt = np.pad(self._counts, (0, grown)), np.pad(self._in_prompt, (0, grown))
        return [self._places[token] for token in tokens]
