"""What commands show to people: tables on stdout and progress on stderr, both through rich.

Where a stream is no terminal, tables keep their columns at any width, without colours, and no bar is drawn: what pipes
and tests read stays the same. NO_COLOR switches colours off in a terminal too.

Rich is imported when something is shown, so that `--help` is quick.
"""

from __future__ import annotations

import io
import sys
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import IO, TYPE_CHECKING, Any, Union

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

Part = Union[str, "Table"]
"""A paragraph, or a table of `table` or `pairs`."""

_ENDLESS = 100_000
"""Columns where nothing is wrapped."""

_REFRESH_SECONDS = 0.1


def table(headers: Sequence[str], rows: Iterable[Sequence[str]], left: Collection[int] = ()) -> Table:
    """A table of figures, flush right but for the columns `left`, which hold words."""
    made = _grid(show_header=True)
    for i, header in enumerate(headers):
        made.add_column(header, justify="left" if i in left else "right", no_wrap=i not in left, overflow="fold")
    for row in rows:
        made.add_row(*row)
    return made


def pairs(rows: Iterable[tuple[str, str]], width: int = 0) -> Table:
    """A list of names, of `width` characters at least, and what is said of each, wrapped beside its name."""
    made = _grid(show_header=False)
    made.add_column(no_wrap=True, min_width=width)
    made.add_column(overflow="fold")
    for row in rows:
        made.add_row(*row)
    return made


def plain(parts: Iterable[Part]) -> str:
    """The parts as they look where there is no terminal."""
    stream = io.StringIO()
    _write(_console(stream, terminal=False), parts)
    return "\n".join(line.rstrip() for line in stream.getvalue().rstrip("\n").split("\n"))


def show(parts: Iterable[Part]) -> None:
    """Prints the parts to stdout."""
    if sys.stdout.isatty():
        _write(_console(sys.stdout, terminal=True), parts)
    else:
        print(plain(parts))


@contextmanager
def progress(
    label: str, total: float, *, in_bytes: bool = False, announce: bool = True
) -> Iterator[Callable[[float], None]]:
    """Shows on stderr how far something has come, if that is a terminal.

    Nothing runs beside the work: the bar is drawn when it moves, ten times a second at most.

    Args:
        label: What is done.
        total: Where it ends.
        in_bytes: Whether that is a number of bytes.
        announce: Whether the label is printed where there is no terminal.

    Yields:
        What is to be told how far it has come.
    """
    if not sys.stderr.isatty():
        if announce:
            print(label, file=sys.stderr, flush=True)
        yield lambda done: None
        return
    from rich import progress as rich

    figures: list[Any] = (
        [rich.DownloadColumn(), rich.TransferSpeedColumn()] if in_bytes else [rich.MofNCompleteColumn()]
    )
    columns = [
        rich.TextColumn("{task.description}", markup=False),
        rich.BarColumn(),
        *figures,
        rich.TimeRemainingColumn(),
    ]
    with rich.Progress(*columns, console=_console(sys.stderr, terminal=True), auto_refresh=False) as bar:
        task, drawn = bar.add_task(label, total=total), 0.0

        def report(done: float) -> None:
            nonlocal drawn
            now = time.monotonic()
            due = now - drawn >= _REFRESH_SECONDS or done >= total
            bar.update(task, completed=done, refresh=due)
            drawn = now if due else drawn

        bar.refresh()
        yield report


def _grid(show_header: bool) -> Table:
    from rich.table import Table

    return Table(box=None, show_header=show_header, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")


def _console(stream: IO[str], terminal: bool) -> Console:
    from rich.console import Console

    # What is shown holds names of files and models, in which nothing is markup.
    return Console(
        file=stream, force_terminal=terminal, width=None if terminal else _ENDLESS, markup=False, highlight=False,
        emoji=False, no_color=None if terminal else True,
    )  # fmt: skip


def _write(console: Console, parts: Iterable[Part]) -> None:
    for part in parts:
        console.print(part, soft_wrap=isinstance(part, str))
