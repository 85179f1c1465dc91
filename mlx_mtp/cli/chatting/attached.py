"""Text files that go into a message."""

from __future__ import annotations

import re
from dataclasses import dataclass

from ...errors import MTPError
from ...files import expanded, read_bytes

_MOST_BYTES = 2**23
"""Largest file: more than the longest context of Gemma 4 holds (262,144 tokens of rarely more than 16 bytes)."""


@dataclass(frozen=True)
class Attached:
    """A text file.

    Attributes:
        name: Its name, without the folder.
        text: What it holds.
    """

    name: str
    text: str

    def __str__(self) -> str:
        """The file as a message shows it: its name, and its text in a fence that the text doesn't contain."""
        longest = max(map(len, re.findall("`{3,}", self.text)), default=2)
        fence = "`" * (longest + 1)
        return f"{self.name}:\n{fence}\n{self.text.rstrip()}\n{fence}"


def read_attached(path: str) -> Attached:
    """Reads a text file.

    Args:
        path: As the user typed it.

    Raises:
        MTPError: It can't be read, is too large, is empty, or isn't text in UTF-8.
    """
    file = expanded(path)
    try:
        size = file.stat().st_size
        if size > _MOST_BYTES:
            raise MTPError(f"{path} has {size:,} bytes: more than a model's context holds")
        content = read_bytes(file)
    except OSError as error:
        raise MTPError(f"{path} can't be read: {error.strerror}") from None
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = "\0"
    if "\0" in text:
        raise MTPError(f"{path} isn't a text file in UTF-8")
    if not text.strip():
        raise MTPError(f"{path} is empty")
    return Attached(file.name, text.replace("\r\n", "\n"))
