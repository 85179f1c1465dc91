"""Messages from a pipe, or from a terminal that can't move its cursor."""

from __future__ import annotations

import re
import sys
from contextlib import suppress
from typing import NamedTuple, Protocol

QUOTES = '"""'

_COMMAND = re.compile(r"/[A-Za-z]*(\s|$)")
"""How a command begins; a path ("/usr/bin ...") doesn't."""


class Entry(NamedTuple):
    """What the user entered.

    Attributes:
        text: A message or a command.
        command: Whether it is a command: it begins as one, and wasn't quoted.
    """

    text: str
    command: bool


class Reader(Protocol):
    """Reads what the user enters.

    Attributes:
        edits: Whether it can begin with a text that the user then edits.
    """

    edits: bool

    def read(self, begin: str = "") -> Entry | None:
        """Reads a message or a command.

        Args:
            begin: Text to begin with, if the reader `edits`.

        Returns:
            It; None if the user entered nothing, or dropped it with Ctrl-C.

        Raises:
            EOFError: There is nothing more.
        """

    def ask(self, question: str) -> str:
        """Asks a question about the answers just shown; "" if there is nobody to answer, or nothing was entered."""


def entry(text: str) -> Entry | None:
    """A text as the user meant it: without the quotes around it; None if it is empty."""
    text = text.strip()
    quoted = text.startswith(QUOTES)
    if quoted:
        text = text.removeprefix(QUOTES).rstrip().removesuffix(QUOTES).strip("\n")
    return Entry(text, not quoted and _COMMAND.match(text) is not None) if text.strip() else None


def unfinished(text: str) -> bool:
    """Whether a text goes on in the next line: it ends with a backslash, or its quotes aren't closed."""
    text = text.strip()
    if text.startswith(QUOTES):
        return not text.removeprefix(QUOTES).endswith(QUOTES)
    return text.endswith("\\")


class Lines:
    """Reads messages line by line."""

    edits = False

    def __init__(self) -> None:
        """Takes stdin; in a terminal Ctrl-C drops the text that is being entered, else it ends the program."""
        self._terminal = sys.stdin.isatty()
        self._ended = False
        if self._terminal and sys.stdout.isatty():
            with suppress(ImportError):
                import readline  # noqa: F401 - gives input() editing and history

    def read(self, begin: str = "") -> Entry | None:  # noqa: ARG002 - it can't edit
        """See `Reader.read`; joins continued lines."""
        if self._ended:
            raise EOFError
        text = ""
        try:
            text = self._line("> ")
            while unfinished(text):
                quoted = text.lstrip().startswith(QUOTES)
                text = (text if quoted else text.rstrip()[:-1]) + "\n" + self._line(". ")
        except KeyboardInterrupt:
            if not self._terminal:
                raise
            print(file=sys.stderr)
            return None
        except EOFError:
            self._ended = True  # after the text entered so far
        return entry(text)

    def ask(self, question: str) -> str:
        """See `Reader.ask`: a pipe has nobody who saw the answers."""
        return self._line(question) if self._terminal else ""

    def _line(self, prompt: str) -> str:
        if self._terminal and sys.stdout.isatty():
            return input(prompt)
        if self._terminal:  # stdout is for answers alone
            print(prompt, end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line:
            raise EOFError
        return line.rstrip("\n")
