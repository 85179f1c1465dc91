"""Records a chat with the embedded pair in a terminal, as an animated SVG: the picture in the README.

The program runs in a real terminal, 88 columns wide; what its screen shows is read while it works, and every change
becomes a frame. Nothing is added: text, colours and speed are the program's own.

    python scripts/record_chat.py docs/chat.svg
"""

from __future__ import annotations

import codecs
import os
import pty
import select
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated
from xml.sax.saxutils import escape

import pyte
import typer

COLUMNS, LINES = 88, 24
CELL, LINE = 8.4, 19
"""Width and height of a character in the picture."""
FRAME = 0.08
"""Seconds between two looks at the screen."""
SAID = ("What is a drafter?", "Write a Python function that reverses a string.", "How many minutes are 3 hours?")
TYPING, READING, ANSWERING = 0.05, 2.0, 20.0
"""Seconds for a key, for a look at an answer, and for an answer at most."""
COLOURS = {
    "default": "#d8dee9", "black": "#4c566a", "red": "#bf616a", "green": "#a3be8c", "brown": "#ebcb8b",
    "blue": "#81a1c1", "magenta": "#b48ead", "cyan": "#88c0d0", "white": "#e5e9f0", "brightblack": "#7b88a1",
}  # fmt: skip

Frame = tuple[float, list[str]]
"""When, and every line of the screen as SVG."""


class Terminal:
    """A program in a terminal, and the frames of its screen."""

    def __init__(self, command: Sequence[str]) -> None:
        """Starts the program."""
        self.screen = pyte.Screen(COLUMNS, LINES)
        self._stream = pyte.Stream(self.screen)
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        master, slave = pty.openpty()
        environment = os.environ | {"TERM": "xterm-256color", "COLUMNS": str(COLUMNS), "LINES": str(LINES)}
        environment.pop("NO_COLOR", None)
        self._process = subprocess.Popen(command, stdin=slave, stdout=slave, stderr=slave, env=environment)
        os.close(slave)
        self._master, self._begun = master, time.monotonic()
        self.frames: list[Frame] = []

    def watch(self, seconds: float, until: str | None = None) -> None:
        """Reads the screen for some seconds, or until a text is new on it."""
        end, before = time.monotonic() + seconds, self.text().count(until) if until else 0
        while time.monotonic() < end and not (until and self.text().count(until) > before):
            while select.select([self._master], [], [], FRAME)[0]:
                try:
                    data = os.read(self._master, 65536)
                except OSError:  # the program has ended
                    return
                self._stream.feed(self._decoder.decode(data))
                if b"\x1b[6n" in data:  # where is the cursor?
                    os.write(self._master, f"\x1b[{self.screen.cursor.y + 1};{self.screen.cursor.x + 1}R".encode())
                if data.endswith(b"\n"):
                    break
            picture = drawn(self.screen)
            if not self.frames or self.frames[-1][1] != picture:
                self.frames.append((time.monotonic() - self._begun, picture))

    def text(self) -> str:
        """What the screen shows."""
        return "\n".join(self.screen.display)

    def say(self, text: str) -> None:
        """Types a line, as people do."""
        for key in text:
            os.write(self._master, key.encode())
            self.watch(TYPING)
        os.write(self._master, b"\r")

    def end(self) -> None:
        """Ends the program."""
        os.write(self._master, b"\x04")
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        os.close(self._master)


def drawn(screen: pyte.Screen) -> list[str]:
    """The lines of a screen as SVG texts, one text for each run of characters that look the same."""
    lines = []
    for y in range(LINES):
        runs: list[tuple[int, str, str]] = []
        for x in range(COLUMNS):
            cell = screen.buffer[y][x]
            colour = COLOURS.get(cell.fg, f"#{cell.fg}" if len(cell.fg) == 6 else COLOURS["default"])
            style = f'fill="{colour}"' + (' font-weight="bold"' if cell.bold else "")
            style += ' font-style="italic"' if cell.italics else ""
            if runs and runs[-1][2] == style:
                runs[-1] = (runs[-1][0], runs[-1][1] + cell.data, style)
            else:
                runs.append((x, cell.data, style))
        texts = [
            f'<text x="{x * CELL + 12:.1f}" y="{y * LINE + 28}" {style}>{escape(text.rstrip())}</text>'
            for x, text, style in runs
            if text.strip()
        ]
        lines.append("".join(texts))
    return lines


def animated(frames: Sequence[Frame]) -> str:
    """An SVG that shows the frames again and again, each line for as long as it stayed as it was."""
    begun, total = frames[0][0], frames[-1][0] - frames[0][0] + READING
    starts = [100 * (when - begun) / total for when, _ in frames] + [100.0]
    rules, groups = [], []
    for y in range(LINES):
        first = 0
        for i in range(1, len(frames) + 1):
            line = frames[first][1][y]
            if i < len(frames) and frames[i][1][y] == line:
                continue
            if line:
                number = len(groups)
                before = f"0%{{visibility:hidden}}{starts[first]:.2f}%" if first else "0%"
                after = f"{starts[i]:.2f}%,100%{{visibility:hidden}}" if i < len(frames) else ""
                rules.append(f"@keyframes k{number}{{{before}{{visibility:visible}}{after}}}")
                groups.append(f'<g style="animation:k{number} {total:.1f}s step-end infinite">{line}</g>')
            first = i
    width, height = round(COLUMNS * CELL + 24), LINES * LINE + 24
    font = "text{font:14px Menlo,Consolas,'DejaVu Sans Mono',monospace;white-space:pre}g{visibility:hidden}"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}">'
        f"<style>{''.join(rules)}{font}</style>"
        f'<rect width="100%" height="100%" rx="8" fill="#2e3440"/>{"".join(groups)}</svg>\n'
    )


def main(output: Annotated[Path, typer.Argument(help="The SVG to write.")]) -> None:
    """Records, and writes the picture."""
    command = [sys.executable, "-m", "mlx_mtp", "chat", "--show-drafts", "--temperature", "0", "--no-history"]
    terminal = Terminal(command)
    terminal.watch(60, "> ")
    terminal.watch(0.5)
    terminal.frames = terminal.frames[-1:]
    for text in SAID:
        terminal.say(text)
        terminal.watch(ANSWERING, "tok/s")
        terminal.watch(READING)
    terminal.end()
    output.write_text(animated(terminal.frames), "utf-8")
    print(f"{len(terminal.frames)} frames, {output.stat().st_size / 1024:.0f} KiB in {output}")


if __name__ == "__main__":
    typer.run(main)
