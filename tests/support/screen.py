"""A terminal for tests: a program in a pseudo-terminal, and what its screen shows."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import signal
import struct
import subprocess
import termios
import time
from typing import Any

import pyte

SECONDS = 30
"""Longest wait, for a machine that does much else."""


class _Screen(pyte.HistoryScreen):
    """A screen that answers questions about the cursor, as terminals do."""

    def __init__(self, columns: int, lines: int, answer: Any) -> None:
        super().__init__(columns, lines, history=10_000)
        self._answer = answer

    def write_process_input(self, data: str) -> None:
        self._answer(data.encode())


class Terminal:
    """A program in a terminal.

    Attributes:
        raw: All that the program has written.
    """

    def __init__(self, arguments: list[str], columns: int = 80, lines: int = 24, **environment: str) -> None:
        self._main, other = pty.openpty()
        fcntl.ioctl(other, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))
        own = {"TERM": "xterm-256color", **environment}
        inherited = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES", "NO_COLOR")}
        self.process = subprocess.Popen(
            arguments, stdin=other, stdout=other, stderr=other, start_new_session=True, env={**inherited, **own}
        )
        os.close(other)
        self._screen = _Screen(columns, lines, lambda data: os.write(self._main, data))
        self._stream = pyte.ByteStream(self._screen)
        self.raw = b""

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._main)

    def send(self, keys: str) -> None:
        """Types keys."""
        os.write(self._main, keys.encode())

    def say(self, text: str) -> None:
        """Types a line at a new prompt."""
        self.wait_for_prompt()
        seen = len(self.raw)
        self.send(text + "\r")
        deadline = time.monotonic() + SECONDS
        while len(self.raw) == seen:  # else the old prompt would be taken for the next one
            assert time.monotonic() < deadline, f"nothing is read:\n{self.text()}"
            self._read(0.1)

    def paste(self, text: str) -> None:
        """Pastes as a terminal does that marks pastes."""
        self.send(f"\x1b[200~{text}\x1b[201~")

    def interrupt(self) -> None:
        """Does what Ctrl-C does outside the line that is edited."""
        self.process.send_signal(signal.SIGINT)

    def text(self) -> str:
        """All lines: those that have scrolled away, and those on the screen."""
        columns = range(self._screen.columns)
        above = ["".join(line[x].data for x in columns) for line in self._screen.history.top]
        return "\n".join(line.rstrip() for line in (*above, *self._screen.display)).rstrip()

    def style(self, text: str) -> set[tuple[str, bool]]:
        """Colours of a text's characters where it stands last on the screen, and whether they are underlined."""
        for y, line in reversed(list(enumerate(self._screen.display))):
            if (x := line.find(text)) >= 0:
                cells = [self._screen.buffer[y][i] for i in range(x, x + len(text))]
                return {(cell.fg, cell.underscore) for cell in cells}
        raise AssertionError(f"{text!r} isn't on the screen:\n{self.text()}")

    def wait_for(self, text: str, times: int = 1) -> None:
        """Reads until a text has been shown."""
        deadline = time.monotonic() + SECONDS
        while self.text().count(text) < times:
            assert time.monotonic() < deadline, f"{text!r} didn't come:\n{self.text()}"
            self._read(0.5)

    def wait_for_prompt(self) -> None:
        """Reads until the last line is an empty prompt, and nothing follows."""
        deadline = time.monotonic() + SECONDS
        while not (self.text().split("\n")[-1] == ">" and not self._read(0.1)):
            assert time.monotonic() < deadline, f"no prompt came:\n{self.text()}"
            self._read(0.1)

    def wait_for_end(self) -> int:
        """Reads until the program has ended, and returns its exit status."""
        deadline = time.monotonic() + SECONDS
        while self.process.poll() is None or self._read(0.0):
            assert time.monotonic() < deadline, f"it goes on:\n{self.text()}"
            self._read(0.1)
        return self.process.returncode

    def _read(self, seconds: float) -> bool:
        """Shows what comes within some time; whether anything did."""
        if not select.select([self._main], [], [], seconds)[0]:
            return False
        try:
            data = os.read(self._main, 65_536)
        except OSError:  # how Linux says that the other end is closed
            return False
        self.raw += data
        self._stream.feed(data)
        return bool(data)
