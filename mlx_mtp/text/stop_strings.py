"""Ends a text where a stop string begins, while the text streams."""

from __future__ import annotations

from collections.abc import Sequence

from ..errors import PromptError


class StopStrings:
    """Ends a streamed text before the first of some strings to be complete.

    How the text is cut into pieces makes no difference.

    Attributes:
        hit: Whether one of them has come; the text is complete then.
    """

    def __init__(self, strings: Sequence[str]):
        """Takes the strings.

        Raises:
            PromptError: One of them is empty.
        """
        if not all(strings):
            raise PromptError("a stop string is empty: it would stop everything")
        self.hit = False
        self._strings = strings
        self._held = ""

    def push(self, text: str) -> str:
        """Takes text; returns what can't be the beginning of a stop string any more."""
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
        """The held text, when none follows."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of the text that is a beginning of the stop string."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
