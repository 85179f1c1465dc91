"""Shows answers: in a terminal as Markdown or plain text, through a pipe as they are."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Protocol

from .. import options as o
from ..render import console, harmless

if TYPE_CHECKING:
    from rich.console import Console

    from ...session.answer import Chunk

_LONG_PREFILL = 512
"""Tokens of a prompt that are still to be read from which on one sees how far it is; fewer take a moment."""

_REFRESH_SECONDS = 0.1


class Screen(Protocol):
    """Shows answers.

    Attributes:
        thoughts: Whether reasoning is shown, else only how long it was.
        drafts: Whether the tokens that came from drafts have a shade of their own, where the screen can show one.
    """

    thoughts: bool
    drafts: bool

    @property
    def styled(self) -> bool:
        """Whether it has styles, and a cursor that can move."""

    def show(self, chunks: Iterable[Chunk]) -> None:
        """Shows an answer as it comes, and ends its last line, also if it is interrupted."""

    def prefill(self, done: int, total: int) -> None:
        """Shows how many tokens of the prompt are prefilled; called in the model's thread."""

    def note(self, text: str) -> None:
        """Shows a line that is no answer, on stderr."""


def screen(markdown: bool) -> Screen:
    """The screen for this process's streams.

    Args:
        markdown: Whether Markdown is rendered where that is possible.
    """
    if not sys.stdout.isatty():
        return Pipe()
    return Terminal(markdown) if can_move() else Pipe()


def can_move() -> bool:
    """Whether the terminal can move its cursor."""
    return os.environ.get("TERM", "dumb") not in ("", "dumb", "unknown")


class Pipe:
    """Answers as they are on stdout, reasoning on stderr; a dumb terminal gets them without control characters."""

    def __init__(self) -> None:
        """Shows reasoning, which a pipe has apart from the answer."""
        self.thoughts, self.drafts, self.styled = True, False, False

    def show(self, chunks: Iterable[Chunk]) -> None:
        """See `Screen.show`."""
        try:
            o.show(chunks if self.thoughts else self._folded(chunks))
        finally:
            print(flush=True)

    def _folded(self, chunks: Iterable[Chunk]) -> Iterator[Chunk]:
        tokens = 0
        for chunk in chunks:
            tokens += len(chunk.tokens) if chunk.reasoning else 0
            if chunk.text and tokens:
                self.note(f"[thought for {tokens:,} tokens]")
                tokens = 0
            yield replace(chunk, reasoning="")

    def prefill(self, done: int, total: int) -> None:
        """See `Screen.prefill`: there is no line to show it in."""

    def note(self, text: str) -> None:
        """See `Screen.note`."""
        print(harmless(text), file=sys.stderr)


class Terminal:
    """Answers in a terminal: thoughts folded, drafts in another shade, Markdown as it streams."""

    def __init__(self, markdown: bool) -> None:
        """Takes stdout.

        Args:
            markdown: Whether Markdown is rendered; while drafts are shown, it isn't.
        """
        self.console = console(sys.stdout, terminal=True)
        self.thoughts = self.drafts = self.hinted = False
        self.styled = True
        self._errors = console(sys.stderr, terminal=True) if sys.stderr.isatty() else None
        self.markdown = markdown
        self.status = _Status(self.console)

    def show(self, chunks: Iterable[Chunk]) -> None:
        """See `Screen.show`."""
        thought, body = _Thought(self), self._body()
        begun = False
        with silent_keys(), self.status:
            try:
                for chunk in chunks:
                    if chunk.reasoning:
                        thought.push(chunk)
                    if chunk.text:
                        if not begun:
                            thought.finish()
                        begun = True
                        body.push(chunk)
            finally:
                if not begun:
                    thought.finish()
                body.finish()

    def prefill(self, done: int, total: int) -> None:
        """See `Screen.prefill`."""
        if total - done >= _LONG_PREFILL or self.status.shown:
            self.status.show(f"reading the prompt: {done:,} of {total:,} tokens")

    def note(self, text: str) -> None:
        """See `Screen.note`."""
        if self._errors is None:
            print(harmless(text), file=sys.stderr)
        else:
            self._errors.print(harmless(text), style="dim")

    def _body(self) -> _Plain | _Rendered:
        return _Rendered(self.console) if self.markdown and not self.drafts else _Plain(self.console, self.drafts)


class _Plain:
    """An answer's text as it is."""

    def __init__(self, terminal: Console, drafts: bool) -> None:
        self._console = terminal
        # Without colours, a line under it.
        self._shade = ("underline" if terminal.no_color else "green") if drafts else ""
        self._end = ""

    def push(self, chunk: Chunk) -> None:
        for text, drafted in chunk.spans:
            self._console.print(harmless(text), style=self._shade if drafted else None, end="", soft_wrap=True)
        self._end = chunk.text[-1:] or self._end
        self._console.file.flush()

    def finish(self) -> None:
        if self._end not in ("", "\n"):
            print(flush=True)


class _Rendered:
    """An answer's text as Markdown."""

    def __init__(self, terminal: Console) -> None:
        from .markdown import MarkdownStream

        self._stream = MarkdownStream(terminal)

    def push(self, chunk: Chunk) -> None:
        self._stream.push(chunk.text)

    def finish(self) -> None:
        self._stream.finish()


class _Thought:
    """Reasoning: dimmed, or folded into a line that counts its tokens."""

    def __init__(self, terminal: Terminal) -> None:
        self._terminal, self._tokens, self._end = terminal, 0, "\n"

    def push(self, chunk: Chunk) -> None:
        self._tokens += len(chunk.tokens)
        if self._terminal.thoughts:
            self._terminal.status.clear()
            self._terminal.console.print(harmless(chunk.reasoning), style="dim", end="", soft_wrap=True)
            self._terminal.console.file.flush()
            self._end = chunk.reasoning[-1:]
        else:
            self._terminal.status.show(f"thinking: {self._tokens:,} tokens")

    def finish(self) -> None:
        self._terminal.status.clear()
        if self._tokens:
            if self._end != "\n":
                print()
            hint = "" if self._terminal.thoughts or self._terminal.hinted else "; /thoughts shows it"
            self._terminal.hinted = True
            self._terminal.console.print(f"[thought for {self._tokens:,} tokens{hint}]", style="dim")


class _Status:
    """A line at the end of the output that is written over, until the `with` statement ends.

    Attributes:
        shown: Whether there is such a line now.
    """

    def __init__(self, terminal: Console) -> None:
        self._console = terminal
        self._lock = threading.Lock()  # the model's thread reports the prefill
        self._active = self.shown = False
        self._due = 0.0

    def __enter__(self) -> None:
        self._active, self._due = True, 0.0

    def __exit__(self, *_: object) -> None:
        self.clear()
        with self._lock:
            self._active = False

    def show(self, text: str) -> None:
        """Shows a text, if the last change was long enough ago."""
        with self._lock:
            now = time.monotonic()
            if not self._active or now < self._due:
                return
            self._due, self.shown = now + _REFRESH_SECONDS, True
            with self._console.capture() as captured:
                self._console.print(text[: self._console.width - 1], style="dim", end="", soft_wrap=True)
            self._console.file.write(f"\r{captured.get()}\x1b[K")
            self._console.file.flush()

    def clear(self) -> None:
        """Takes the line away."""
        with self._lock:
            if self.shown:
                self._console.file.write("\r\x1b[K")
                self.shown = False


@contextmanager
def silent_keys() -> Iterator[None]:
    """Keys that are typed meanwhile aren't shown, where they would stand in the answer; the next line gets them."""
    import termios  # not on every system that can import this module

    if not sys.stdin.isatty():
        yield
        return
    before = termios.tcgetattr(sys.stdin)
    silent = [*before[:3], before[3] & ~termios.ECHO, *before[4:]]
    with suppress(termios.error):
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, silent)
    try:
        yield
    finally:
        with suppress(termios.error):
            termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)
