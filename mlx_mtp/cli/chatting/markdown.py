"""Draws Markdown in a terminal while it streams.

The text is cut into its top-level blocks. What is complete is written once and scrolls away as any output does; only
the lines of the last block are written over as it grows. If it outgrows the screen, its first lines are let scroll too.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from itertools import pairwise
from typing import ClassVar

from markdown_it import MarkdownIt
from markdown_it.token import Token
from rich.console import Console, ConsoleOptions, JustifyMethod, RenderResult
from rich.markdown import CodeBlock, Heading, Markdown, MarkdownElement
from rich.segment import Segment, Segments
from rich.syntax import Syntax
from rich.theme import Theme

from ..render import harmless

Line = list[Segment]

_THEME = Theme({"markdown.code": "bold cyan"})  # rich's own has a black background

_SHARE = 5
"""Drawing takes one part in this many of the time, at most: the model may decode on the same cores."""

_REFRESH_SECONDS = 0.05

# HTML and definitions of links as text: rich's renderer drops them.
_PARSER = MarkdownIt("commonmark", {"html": False}).enable(["strikethrough", "table"]).disable("reference")


class _Heading(Heading):
    LEVEL_ALIGN: ClassVar[dict[str, JustifyMethod]] = {}  # all flush left


class _Code(CodeBlock):
    """Code at the left edge, in the terminal's own colours and without background: so it can be copied as it is."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield Syntax(str(self.text).rstrip(), self.lexer_name, theme="ansi_dark", word_wrap=True)


class Rendered(Markdown):
    """Rich's renderer for tokens of `_PARSER`. Links show where they lead; a line that the text breaks stays broken."""

    elements: ClassVar[dict[str, type[MarkdownElement]]] = {
        **Markdown.elements,
        "heading_open": _Heading,
        "fence": _Code,
        "code_block": _Code,
    }

    def __init__(self, text: str) -> None:
        super().__init__("", hyperlinks=False)
        self.parsed = _PARSER.parse(text)
        for token in self.parsed:
            for child in token.children or ():
                if child.type == "softbreak":
                    child.type = "hardbreak"

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        with console.use_theme(_THEME):
            yield from super().__rich_console__(console, options)


class MarkdownStream:
    """Markdown that grows at the end of the terminal's output."""

    def __init__(self, console: Console) -> None:
        """Begins at the left edge of the terminal's last line."""
        self._painter = Painter(console)
        self._console = console
        self._text = ""  # from the first block on that isn't completely above
        self._above = 0  # lines of that block which are
        self._begun = False
        self._due = 0.0

    def push(self, text: str) -> None:
        """Adds text; draws it if the last drawing was long enough ago."""
        self._text += harmless(text)
        if time.monotonic() >= self._due:
            self._draw()

    def finish(self) -> None:
        """Draws what is left and ends its line."""
        if self._text.strip():
            self._painter.paint(self._lines(self._text)[self._above :], [])

    def _draw(self) -> None:
        began = time.monotonic()
        done: list[Line] = []
        whole, rest = _split(self._text)
        if whole:
            done = self._lines(whole)[self._above :]
            if done or self._above:
                done.append([])
            self._text, self._above = rest, 0
        tail = self._lines(self._text)[self._above :]
        # The cursor stays behind the last line, and a line is left for the terminal's own use.
        if (over := len(tail) - max(self._console.height - 1, 1)) > 0:
            done, tail, self._above = done + tail[:over], tail[over:], self._above + over
        self._painter.paint(done, tail)
        now = time.monotonic()
        self._due = now + max(_REFRESH_SECONDS, (now - began) * (_SHARE - 1))

    def _lines(self, text: str) -> list[Line]:
        """The lines of some blocks, with an empty one between two."""
        lines: list[Line] = []
        for block in _blocks(text):
            # A column narrower, so that no line wraps by itself.
            options = self._console.options.update(width=max(self._console.width - 1, 1))
            drawn = [_trimmed(line) for line in self._console.render_lines(Rendered(block), options, pad=False)]
            while drawn and not drawn[0]:
                del drawn[0]
            while drawn and not drawn[-1]:
                del drawn[-1]
            lines += [[], *drawn] if lines and drawn else drawn
        return lines


def _trimmed(line: Line) -> Line:
    """A line without the spaces that fill it up, which would be copied with it."""
    while line and not line[-1].text.strip():
        line = line[:-1]
    return [*line[:-1], Segment(line[-1].text.rstrip(), line[-1].style)] if line else []


def _starts(text: str) -> list[int]:
    """The lines in which the top-level blocks of a text begin."""
    tokens: Iterable[Token] = _PARSER.parse(text)
    return [token.map[0] for token in tokens if token.level == 0 and token.nesting >= 0 and token.map]


def _blocks(text: str) -> list[str]:
    """The top-level blocks of a text."""
    lines = text.split("\n")
    starts = _starts(text)
    return ["\n".join(lines[a:b]) for a, b in pairwise([*starts, len(lines)])]


def _split(text: str) -> tuple[str, str]:
    """The blocks that are complete, and the rest.

    The first line of the rest is complete too: until then it might belong to the block above ("1" may become "1. ").
    """
    lines = text.split("\n")
    starts = _starts(text)
    if len(starts) < 2 or starts[-1] >= len(lines) - 1:
        return "", text
    return "\n".join(lines[: starts[-1]]), "\n".join(lines[starts[-1] :])


class Painter:
    """Writes lines at the end of the terminal's output, over those that it wrote last.

    Everything goes out in one piece, and lines are cleared behind their text, so that nothing flickers.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._widths: list[int] = []  # of the lines that may be written over

    def paint(self, done: list[Line], tail: list[Line]) -> None:
        """Writes lines.

        Args:
            done: Lines that stay.
            tail: Lines below them, which the next call writes over; the cursor stays behind them.
        """
        columns = self._console.width
        # If the window has become narrower, the terminal has wrapped them.
        rows = sum(max(1, -(-width // columns)) for width in self._widths)
        out = "\r" + (f"\x1b[{rows - 1}A" if rows > 1 else "")
        lines = [f"{self._styled(line)}\x1b[K" for line in (*done, *tail)]
        out += "\r\n".join(lines) + ("" if tail or not done else "\r\n") + "\x1b[J"
        self._widths = [Segment.get_line_length(line) for line in tail]
        self._console.file.write(out)
        self._console.file.flush()

    def _styled(self, line: Line) -> str:
        with self._console.capture() as captured:
            self._console.print(Segments(line), end="")
        return captured.get()
