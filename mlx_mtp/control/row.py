"""The rules of a request, and of one row: what they say of the positions of a verify block."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import mlx.core as mx
import numpy as np

from ..decode.adjustments import Adjustment, Bits
from ..errors import PromptError
from .grammar import Matcher, with_token
from .penalties import Penalties, PenaltyState
from .thoughts import Thoughts, ThoughtTokens

Processor = Callable[[Sequence[int], mx.array], mx.array]
"""Takes the token ids so far, the prompt's included, and float32 logits [1, vocab]; returns such logits."""


@dataclass(frozen=True, kw_only=True)
class Rules:
    """What a request asks for; `begin` makes the control of a row.

    Attributes:
        vocab_size: Of the model.
        penalties: Penalties and biases.
        processors: Called for every position, in turn, after the penalties.
        matcher: At the beginning of the answer's grammar; None for no grammar.
        openers: Tokens that may begin the text in place of what the grammar wants: a thought's, once, or a tool call's,
            which may end a thought as well.
        call: Of these, the one that begins a tool call, which the grammar isn't for; None for none.
        thoughts: Tokens that enclose thoughts, if the vocabulary has them.
        thinking_budget: Most tokens of thought; None for any number.
    """

    vocab_size: int
    penalties: Penalties = field(default_factory=Penalties)
    processors: Sequence[Processor] = ()
    matcher: Matcher | None = None
    openers: frozenset[int] = frozenset()
    call: int | None = None
    thoughts: ThoughtTokens | None = None
    thinking_budget: int | None = None

    def __bool__(self) -> bool:
        constrained = self.matcher is not None or self.thinking_budget is not None
        return bool(self.penalties) or bool(self.processors) or constrained

    def begin(self, prompt: Sequence[int]) -> RuledRow:
        """The control of a row after its prompt."""
        return RuledRow(self, prompt)


class RuledRow:
    """A `RowControl` that follows `Rules`."""

    def __init__(self, rules: Rules, prompt: Sequence[int]) -> None:
        """Begins after a prompt."""
        self._rules = rules
        self._penalties = PenaltyState(rules.penalties, prompt) if rules.penalties else None
        self._tokens = [*prompt] if rules.processors else []
        self._matcher = rules.matcher.copy() if rules.matcher else None
        self._thoughts = Thoughts(rules.thoughts, prompt)

    def advance(self, tokens: Sequence[int]) -> None:
        """See `RowControl`."""
        for token in tokens:
            if not self._thoughts.begun and token == self._rules.call:
                self._matcher = None
            if self._thoughts.push(token) and self._matcher and not self._matcher.push(token):
                self._matcher.allowed()  # if the grammar has become too complex, this says so
                raise PromptError(
                    f"the grammar can't be followed: token {token} isn't allowed here, and no other token was possible"
                )
        if self._penalties:
            self._penalties.advance(tokens)
        if self._rules.processors:
            self._tokens += tokens

    def adjustments(self, drafts: Sequence[int]) -> list[Adjustment]:
        """See `RowControl`."""
        positions = len(drafts) + 1
        found = self._penalties.adjustments(drafts) if self._penalties else [Adjustment()] * positions
        if self._rules.processors:
            found = [replace(it, process=self._processed(drafts[:i])) for i, it in enumerate(found)]
        if self._matcher or self._rules.thinking_budget is not None:
            found = [replace(it, allowed=bits) for it, bits in zip(found, self._allowed(drafts), strict=True)]
        return found

    def forced(self) -> list[int]:
        """The tokens that must come next, as far as the grammar leaves no choice."""
        free = self._thoughts.inside or (not self._thoughts.begun and self._rules.openers)
        return self._matcher.forced() if self._matcher and not free else []

    def _allowed(self, drafts: Sequence[int]) -> list[Bits | None]:
        """What may follow the text and each beginning of the drafts; None for anything."""
        thoughts, matcher, taken = self._thoughts.copy(), self._matcher, 0
        masks = [self._mask(thoughts, matcher)]
        for draft in drafts:
            if not thoughts.begun and draft == self._rules.call:
                matcher = None
            if thoughts.push(draft) and matcher and not matcher.done:
                if not matcher.push(draft):
                    break
                taken += 1
            masks.append(self._mask(thoughts, matcher))
        if taken and self._matcher:
            self._matcher.pop(taken)
        return masks + [None] * (len(drafts) + 1 - len(masks))

    def _mask(self, thoughts: Thoughts, matcher: Matcher | None) -> Bits | None:
        rules = self._rules
        if thoughts.inside and rules.thoughts:
            nothing = np.zeros(-(-rules.vocab_size // 32), np.uint32)
            if rules.thinking_budget is not None and thoughts.length >= rules.thinking_budget:
                return with_token(nothing, rules.thoughts.end)
            call = rules.thoughts.call
            if call is None or call in rules.openers or not matcher or matcher.done:
                return None
            return ~with_token(nothing, call)  # it would end the thought, and the grammar has none
        if not matcher or matcher.done:
            return None
        openers = () if thoughts.begun else rules.openers
        again = rules.thoughts.begin if rules.thoughts and thoughts.opened else None
        return with_token(matcher.allowed(), *(token for token in openers if token != again))

    def _processed(self, drafts: Sequence[int]) -> Callable[[mx.array], mx.array]:
        tokens = [*self._tokens, *drafts]

        def process(logits: mx.array) -> mx.array:
            for processor in self._rules.processors:
                logits = processor(tokens, logits)
            return logits

        return process
