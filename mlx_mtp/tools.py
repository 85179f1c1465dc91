"""Tool calls as Gemma 4 writes them: `call:name{key:value,...}` between the tool call tokens.

Values are JSON's, except that strings stand between quote tokens, unescaped, and that keys are bare. How calls are
put into a prompt is the chat template's business.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from math import isinf
from typing import Any

CALL, CALL_END, QUOTE = "<|tool_call>", "<tool_call|>", '<|"|>'
_HEAD = re.compile(r"\s*call:([\w.-]+)(?=\{)")
_KEY = re.compile(r"[^:{}\[\],]+")
_NUMBER = re.compile(r"\s*-?\d+(\.\d+)?([eE][+-]?\d+)?")
_WORDS = {"true": True, "false": False, "null": None}


def parse_call(text: str) -> dict[str, Any] | None:
    """Reads what stands between the tool call tokens.

    Returns:
        The call as messages have it, {"type": "function", "function": {"name": ..., "arguments": {...}}}; None if
        the text is none.
    """
    head = _HEAD.match(text)
    if not head:
        return None
    reader = _Reader(text, head.end())
    try:
        arguments = reader.value()
    except (ValueError, RecursionError):
        return None
    if text[reader.at :].strip():
        return None
    return {"type": "function", "function": {"name": head[1], "arguments": arguments}}


class _Reader:
    """Reads values from a text, from a place that moves on. A ValueError says that there is none."""

    def __init__(self, text: str, at: int):
        self.text, self.at = text, at

    def value(self) -> Any:
        if self._skip(QUOTE):
            return self._until_quote()
        if self._skip("{"):
            return dict(self._items("}", self._field))
        if self._skip("["):
            return self._items("]", self.value)
        if number := self._match(_NUMBER):
            if not set(number) & set(".eE"):
                return int(number)
            if isinf(value := float(number)):
                raise ValueError(f"{number.strip()} is more than JSON's readers take for a number")
            return value
        for word, value in _WORDS.items():
            if self._skip(word):
                return value
        raise ValueError(f"no value at {self.at}")

    def _field(self) -> tuple[str, Any]:
        key = self._until_quote() if self._skip(QUOTE) else (self._match(_KEY) or "").strip()
        if not self._skip(":"):
            raise ValueError(f"no colon at {self.at}")
        return key, self.value()

    def _items(self, end: str, read: Callable[[], Any]) -> list[Any]:
        items: list[Any] = []
        while not self._skip(end):
            if items and not self._skip(","):
                raise ValueError(f"no comma at {self.at}")
            items.append(read())
        return items

    def _until_quote(self) -> str:
        begin, end = self.at, self.text.index(QUOTE, self.at)
        self.at = end + len(QUOTE)
        return self.text[begin:end]

    def _match(self, pattern: re.Pattern[str]) -> str | None:
        found = pattern.match(self.text, self.at)
        if found:
            self.at = found.end()
        return found[0] if found else None

    def _skip(self, token: str) -> bool:
        """Passes over spaces and a token; over nothing if it isn't there."""
        found = re.compile(r"\s*" + re.escape(token)).match(self.text, self.at)
        if found:
            self.at = found.end()
        return bool(found)
