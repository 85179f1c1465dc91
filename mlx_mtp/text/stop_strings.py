"""Finds stop strings in streamed text."""

from __future__ import annotations

from collections.abc import Sequence

from ..errors import PromptError


class StopStrings:
    """Ends a streamed text before the stop string that is completed first.

    The result doesn't depend on how the text is divided into pieces.

    Attributes:
        hit: Whether a stop string was found, which ends the text.
    """

    def __init__(self, strings: Sequence[str]) -> None:
        """Starts an empty text.

        Args:
            strings: The stop strings.

        Raises:
            PromptError: One of them is empty.
        """
        if not all(strings):
            raise PromptError("a stop string is empty: it would stop everything")
        self.hit = False
        self._strings = strings
        self._held = ""

    def push(self, text: str) -> str:
        """Adds text, and returns the part of it that can't belong to a stop string; the rest is held back."""
        if self.hit:
            return ""
        self._held += text
        found = [(at + len(s), at) for s in self._strings if (at := self._held.find(s)) >= 0]
        if found:
            self.hit = True
            _, begin = min(found)
            done, self._held = self._held[:begin], ""
            return done
        keep = max((_overlap(self._held, s) for s in self._strings), default=0)
        done, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return done

    def finish(self) -> str:
        """Returns the text that was held back; call it at the end of the text."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest suffix of the text that is a proper prefix of the stop string."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
