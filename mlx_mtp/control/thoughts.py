"""Where a row's thought begins and ends, and the budget for it.

Gemma 4 thinks between two channel tokens, before it answers. Grammars hold for the answer alone, and a budget ends the
thought by allowing nothing but the closing token, which is how the chat format ends one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class ThoughtTokens:
    """The tokens of the chat format that matter here.

    Attributes:
        begin: Opens a thought.
        end: Closes it.
        call: Begins a tool call, which ends a thought too; None if there is no such token.
        special: All special tokens; the last one in a prompt tells whether it ends within a thought.
    """

    begin: int
    end: int
    call: int | None = None
    special: frozenset[int]


class Thoughts:
    """Follows a row's tokens through its thought.

    Attributes:
        inside: Whether the text so far ends within a thought.
        length: Tokens of all thoughts so far, their opening and closing ones not counted.
        opened: Whether there has been a thought.
        begun: Whether anything was said outside of thoughts.
    """

    def __init__(self, tokens: ThoughtTokens | None, prompt: Sequence[int] = ()) -> None:
        """Begins after a prompt; without tokens there are no thoughts."""
        self._tokens = tokens
        last = next((t for t in reversed(prompt) if t in tokens.special), None) if tokens else None
        self.inside = tokens is not None and last == tokens.begin
        self.length, self.opened, self.begun = 0, self.inside, False

    def copy(self) -> Thoughts:
        """One that can go on by itself."""
        other = Thoughts(self._tokens)
        other.inside, other.length, other.opened, other.begun = self.inside, self.length, self.opened, self.begun
        return other

    def push(self, token: int) -> bool:
        """Takes a token; returns whether it belongs to the answer."""
        tokens = self._tokens
        if tokens is not None:
            if not self.inside and token == tokens.begin:
                self.inside = self.opened = True
                return False
            if self.inside and token != tokens.call:
                self.inside = token != tokens.end
                self.length += self.inside
                return False
        self.inside, self.begun = False, True
        return True
