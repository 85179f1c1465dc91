"""Keeps the names of control tokens in user text ("<turn|>") from being encoded as control tokens.

Before messages and tools are put into a chat template, every character that begins a control token's name is replaced
by a stand-in. So only the template's own text can contain such names, even where the template joins pieces of messages.
When the prompt is tokenized, it is cut at the control tokens; in the text between them the characters are restored, and
that text is encoded without special tokens.

Stand-ins are lone surrogates, which no valid Unicode text contains.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from ..errors import PromptError

CHANNEL, CHANNEL_END = "<|channel>", "<channel|>"

NOT_UTF8 = "the text holds bytes that aren't UTF-8: convert it first"
_SURROGATE = re.compile("[\ud800-\udfff]")

FIELDS = frozenset(("role", "content", "name", "reasoning", "tool_calls", "tool_responses", "tool_call_id"))
"""Fields of messages, which templates and this package look for. Nothing is hidden in their names, even if a control
token begins with one of their letters."""


class ControlTokens:
    """Hides and finds the names of a vocabulary's control tokens in text."""

    def __init__(self, names: Iterable[str]) -> None:
        """Takes the names of the control tokens."""
        # Longest first: where one name contains another, the longer one is the token.
        self._names = sorted(filter(None, names), key=len, reverse=True)
        first = sorted({name[0] for name in self._names})
        self._stand_ins = [(letter, chr(0xDC00 + i)) for i, letter in enumerate(first)]
        self._pattern = re.compile(f"({'|'.join(map(re.escape, self._names))})" if self._names else "(?!)()")
        letters = re.escape("".join(first))
        longest = max(map(len, self._names), default=0)
        self._tag = re.compile(f"[{letters}][^{letters}]{{0,{longest}}}" if first else "(?!)")

    def hide(self, value: Any) -> Any:
        """A copy of a JSON value with control tokens hidden in all strings and keys.

        Raises:
            PromptError: A string can't be encoded as UTF-8, or a value isn't JSON.
        """
        if isinstance(value, str):
            return self._hide(_encodable(value))
        if isinstance(value, Mapping):
            return {self.hide(key): self.hide(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self.hide(item) for item in value]
        if value is None or isinstance(value, bool | int | float):
            return value
        raise PromptError(f"messages and tools may hold JSON values only, not a {type(value).__name__}")

    def hide_in_answer(self, text: str) -> str:
        """As `hide`, for text that the model generated.

        The tokens around reasoning stay visible, because templates look for them in order to drop reasoning. So do
        other tags that can't be control tokens.

        Raises:
            PromptError: The text can't be encoded as UTF-8.
        """

        def hide(found: re.Match[str]) -> str:
            tag = found[0].rstrip()  # a template may strip white space
            if tag.startswith((CHANNEL, CHANNEL_END)):
                return found[0]
            token = any(tag.startswith(name) or name.startswith(tag) for name in self._names)
            return self._hide(found[0]) if token else found[0]

        return self._tag.sub(hide, _encodable(text))

    def hide_in_message(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """As `hide`, for a message; the content of an assistant's goes through `hide_in_answer`.

        Raises:
            PromptError: As for `hide`.
        """
        hidden = {key if key in FIELDS else self.hide(key): self.hide(item) for key, item in message.items()}
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
        """A text with its hidden characters restored."""
        for letter, stand_in in self._stand_ins:
            text = text.replace(stand_in, letter)
        return text

    def split(self, text: str) -> list[str]:
        """Splits a text at its control tokens, which are the items at odd indices."""
        return self._pattern.split(text)

    def _hide(self, text: str) -> str:
        for letter, stand_in in self._stand_ins:
            text = text.replace(letter, stand_in)
        return text


def _encodable(text: str) -> str:
    if _SURROGATE.search(text):
        raise PromptError(NOT_UTF8)
    return str(text)
