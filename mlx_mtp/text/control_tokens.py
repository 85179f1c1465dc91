"""Keeps control tokens that users, tools and the like have spelt out from becoming control tokens.

While a conversation goes through a chat template, the characters that control tokens begin with are replaced by
stand-ins, so that none can come of what isn't the template's own, not even of parts that it joins. When the prompt is
cut into tokens the characters are put back, and what stands between the template's tokens is encoded as text alone.

Stand-ins are lone surrogates: no text that can be encoded holds one.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from ..errors import PromptError

CHANNEL, CHANNEL_END = "<|channel>", "<channel|>"

NOT_UTF8 = "the text holds bytes that aren't UTF-8: convert it first"
_SURROGATE = re.compile("[\ud800-\udfff]")


class ControlTokens:
    """The control tokens of a vocabulary."""

    def __init__(self, names: Iterable[str]):
        """Takes their names."""
        self._names = sorted(filter(None, names), key=len, reverse=True)  # what a longer one contains is no token
        first = sorted({name[0] for name in self._names})
        self._stand_ins = [(letter, chr(0xDC00 + i)) for i, letter in enumerate(first)]
        self._pattern = re.compile(f"({'|'.join(map(re.escape, self._names))})" if self._names else "(?!)()")
        letters = re.escape("".join(first))
        longest = max(map(len, self._names), default=0)
        self._tag = re.compile(f"[{letters}][^{letters}]{{0,{longest}}}" if first else "(?!)")

    def hide(self, value: Any) -> Any:
        """A copy of a JSON value, in all of whose strings and keys no control token can be found.

        Raises:
            PromptError: A string that can't be encoded, or what JSON doesn't have.
        """
        if isinstance(value, str):
            return self._hide(_encodable(value))
        if isinstance(value, Mapping):
            return {self.hide(key): self.hide(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self.hide(item) for item in value]
        if value is None or isinstance(value, bool | int | float):
            return value
        raise PromptError(f"messages and tools hold what JSON has, not a {type(value).__name__}")

    def hide_in_answer(self, text: str) -> str:
        """The same for a text of the model's, but with its thoughts' tokens, which templates look for to drop them.

        Nor are other tags hidden, for the same reason, as long as they can't become control tokens.

        Raises:
            PromptError: It can't be encoded.
        """

        def hide(found: re.Match[str]) -> str:
            tag = found[0].rstrip()  # a template may trim what it goes on after
            if tag.startswith((CHANNEL, CHANNEL_END)):
                return found[0]
            token = any(tag.startswith(name) or name.startswith(tag) for name in self._names)
            return self._hide(found[0]) if token else found[0]

        return self._tag.sub(hide, _encodable(text))

    def hide_in_message(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """The same for a message.

        Raises:
            PromptError: As for `hide`.
        """
        hidden: dict[str, Any] = self.hide(message)
        content = message.get("content")
        if message.get("role") in ("assistant", "model"):
            if isinstance(content, str):
                hidden["content"] = self.hide_in_answer(content)
            elif isinstance(content, list):
                for part, given in zip(hidden["content"], content, strict=True):
                    if isinstance(given.get("text"), str):
                        part["text"] = self.hide_in_answer(given["text"])
        return hidden

    def show(self, text: str) -> str:
        """A text with what was hidden in it."""
        for letter, stand_in in self._stand_ins:
            text = text.replace(stand_in, letter)
        return text

    def split(self, text: str) -> list[str]:
        """Cuts a text at its control tokens; these are at the odd places."""
        return self._pattern.split(text)

    def _hide(self, text: str) -> str:
        for letter, stand_in in self._stand_ins:
            text = text.replace(letter, stand_in)
        return text


def _encodable(text: str) -> str:
    if _SURROGATE.search(text):
        raise PromptError(NOT_UTF8)
    return str(text)
