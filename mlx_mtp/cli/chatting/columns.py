"""Shows several answers side by side in a wide terminal."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import TYPE_CHECKING

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from ..render import harmless
from .markdown import Line, Painter, Rendered

if TYPE_CHECKING:
    from ...session.answer import Chunk
    from .screen import Terminal

_REFRESH_SECONDS = 0.1


class Columns:
    """Answers side by side: their ends while they grow, in the end the whole of them."""

    def __init__(self, screen: Terminal, n: int) -> None:
        """Begins at the left edge of the terminal's last line.

        Args:
            screen: The terminal.
            n: Number of answers.
        """
        self._screen, self._console, self._n = screen, screen.console, n
        self._painter = Painter(screen.console)
        self._texts, self._thoughts = [""] * n, [0] * n
        self._width = (self._console.width - 1) // n - 2

    def show(self, chunks: Iterable[tuple[int, Chunk]]) -> None:
        """Shows the answers as they come.

        Args:
            chunks: Numbers of answers, from 0, and their chunks.
        """
        due = 0.0
        try:
            for i, chunk in chunks:
                self._screen.status.clear()
                self._texts[i] += harmless(chunk.text)
                self._thoughts[i] += len(chunk.tokens) if chunk.reasoning else 0
                if (now := time.monotonic()) >= due:
                    due = now + _REFRESH_SECONDS
                    self._painter.paint([], self._lines([self._end(text) for text in self._texts]))
        finally:
            self._painter.paint(self._lines([self._whole(text) for text in self._texts]), [])

    def _lines(self, cells: list[RenderableType]) -> list[Line]:
        grid = Table.grid(padding=(0, 2, 0, 0))
        for _ in cells:
            grid.add_column(width=self._width, overflow="fold")
        heads = (f"answer {i + 1}" + self._thought(i) for i in range(self._n))
        grid.add_row(*(Text(head, style="bold") for head in heads))
        grid.add_row(*cells)
        return self._console.render_lines(grid, pad=False)

    def _thought(self, i: int) -> str:
        return f", thought for {self._thoughts[i]:,} tokens" if self._thoughts[i] else ""

    def _end(self, text: str) -> RenderableType:
        """The last lines of a text, as many as the screen has room for."""
        room = max(self._console.height - 3, 1)
        lines = Text(text[-room * self._width :]).wrap(self._console, self._width)
        return Text("\n").join(lines[-room:])

    def _whole(self, text: str) -> RenderableType:
        return Rendered(text) if self._screen.markdown else Text(text)
