"""Markdown as it streams into a terminal (cli/chatting/markdown.py)."""

from __future__ import annotations

from random import Random

import pyte
import pytest
from rich.console import Console

from mlx_mtp.cli.chatting import markdown
from mlx_mtp.cli.chatting.markdown import MarkdownStream

TEXT = """# A heading

A paragraph with **bold**, *italic*, `code` and a [link](http://example.com/x), which is long enough to be wrapped.
A line that the text broke.

1. First
2. Second, with so many words that it is wrapped in a terminal of sixty columns
   - nested

3. Third

```python
def f(x):
    return x
""" + "".join(f"line{i} = {i}\n" for i in range(40)) + """```

| a | b |
|---|--:|
| 1 | two |

> quote

<div>html</div>

[1]: http://example.com/definition

---

The end: 日本語. Bad: \x1b[2J\x07.
"""  # fmt: skip

PIECES = [
    "# ", "\n", "\n\n", "- ", "1. ", "```", "|", "| a | b |\n|---|---|\n", "> ", "**", "_", "`", "[x](y)", "![i](u)",
    "<b>", "    ", "\t", "---\n", "===\n", "word ", "~~", "&amp;", "\\", "[", "](", "日本", "\u200b", "\x1b[2J",
    "[a]: http://x\n", "  \n",
]  # fmt: skip


class Screen:
    """A file that is a terminal."""

    encoding = "utf-8"

    def __init__(self, columns: int, lines: int) -> None:
        self._screen = pyte.HistoryScreen(columns, lines, history=10_000)
        self._screen.set_mode(pyte.modes.LNM)
        self._stream = pyte.Stream(self._screen)

    def write(self, text: str) -> int:
        self._stream.feed(text)
        return len(text)

    def flush(self) -> None: ...

    def isatty(self) -> bool:
        return True

    def text(self) -> str:
        columns = range(self._screen.columns)
        above = ["".join(line[x].data for x in columns) for line in self._screen.history.top]
        return "\n".join(line.rstrip() for line in (*above, *self._screen.display)).rstrip()


def shown(pieces: list[str], columns: int, lines: int) -> str:
    screen = Screen(columns, lines)
    console = Console(file=screen, force_terminal=True, width=columns, height=lines)  # type: ignore[arg-type]
    stream = MarkdownStream(console)
    for piece in pieces:
        stream.push(piece)
    stream.finish()
    return screen.text()


@pytest.fixture(autouse=True)
def _always_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(markdown, "_REFRESH_SECONDS", 0)
    monkeypatch.setattr(markdown, "_SHARE", 1)


def test_markdown_is_rendered_and_loses_nothing():
    text = shown([TEXT], 60, 30)
    for line in (
        "A heading", "A line that the text broke.", " 1 First", "    • nested", " 3 Third", "    return x", "▌ quote",
        "line39 = 39", "<div>html</div>", "[1]: http://example.com/definition", "The end: 日本語. Bad: ␛[2J␇.",
    ):  # fmt: skip
        assert line in text.split("\n"), text
    assert "**" not in text and "```" not in text and "(http://example.com/x)" in text


@pytest.mark.parametrize("columns, lines, seed", [(60, 20, 0), (33, 6, 1), (100, 50, 2)])
def test_a_stream_ends_as_the_whole_text_looks(columns: int, lines: int, seed: int):
    rng, pieces, begin = Random(seed), [], 0
    while begin < len(TEXT):
        size = rng.choice((2, 5, 9, 20))
        pieces.append(TEXT[begin : begin + size])
        begin += size
    assert shown(pieces, columns, lines) == shown([TEXT], columns, 300)


def test_whatever_is_written_is_shown_the_same_however_it_comes():
    rng = Random(3)
    for _ in range(12):
        pieces = rng.choices(PIECES, k=30)
        assert shown(pieces, 40, 12) == shown(["".join(pieces)], 40, 200), pieces
