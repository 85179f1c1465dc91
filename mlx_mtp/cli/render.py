"""Prints tables on stdout and progress on stderr, both with rich, and makes text of any origin safe for a terminal.

If a stream isn't a terminal, tables have no colours and are never wrapped, and no progress bar is drawn, so that the
output doesn't depend on the environment. In a terminal, NO_COLOR switches colours off.

Rich is imported only when something is printed, so that `--help` is fast.
"""

from __future__ import annotations

import io
import os
import sys
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import IO, TYPE_CHECKING, Any, Union

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from ..checkpoint.progress import Progress

Part = Union[str, "Table"]
"""A paragraph, or a table made by `table` or `pairs`."""

_HARMLESS = {
    **{code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t\r"},  # Unicode's pictures of them
    ord("\r"): None,
    0x7F: 0x2421,
    **dict.fromkeys(range(0x80, 0xA0), 0xFFFD),
}
"""What is shown for control characters, which could move the cursor, recolour the screen or write to the clipboard."""

_ENDLESS = 100_000
"""Width of a console that never wraps."""

_REFRESH_SECONDS = 0.1

_LARGE = 10**9
"""Bytes of a model from which `loading` shows a bar; an SSD reads less than that in a second."""


def table(headers: Sequence[str], rows: Iterable[Sequence[str]], left: Collection[int] = ()) -> Table:
    """A table of figures.

    Args:
        headers: Headers of the columns.
        rows: Cells.
        left: Indices of columns that hold words: flush left, and wrapped in a narrow terminal.
    """
    made = _grid(show_header=True)
    for i, header in enumerate(headers):
        made.add_column(header, justify="left" if i in left else "right", no_wrap=i not in left, overflow="fold")
    for row in rows:
        made.add_row(*row)
    return made


def pairs(rows: Iterable[tuple[str, str]], width: int = 0) -> Table:
    """A table of names and their descriptions.

    Args:
        rows: Pairs of name and description; descriptions are wrapped in a narrow terminal.
        width: Least width of the names, in characters.
    """
    made = _grid(show_header=False)
    made.add_column(no_wrap=True, min_width=width)
    made.add_column(overflow="fold")
    for row in rows:
        made.add_row(*row)
    return made


def harmless(text: str) -> str:
    """Text of any origin as a terminal may show it: without control characters but newlines and tabs."""
    return text.translate(_HARMLESS)


def plain(parts: Iterable[Part]) -> str:
    """The parts as text, as they are printed if stdout isn't a terminal."""
    stream = io.StringIO()
    _write(console(stream, terminal=False), parts)
    return "\n".join(line.rstrip() for line in stream.getvalue().rstrip("\n").split("\n"))


def show(parts: Iterable[Part]) -> None:
    """Prints the parts to stdout."""
    if sys.stdout.isatty():
        _write(console(sys.stdout, terminal=True), parts)
    else:
        print(plain(parts))


@contextmanager
def progress(
    label: str, total: float, *, in_bytes: bool = False, announce: bool = True
) -> Iterator[Callable[[float], None]]:
    """Shows a progress bar on stderr if that is a terminal that can redraw a line (TERM isn't "dumb").

    No thread is used: the bar is redrawn in the calls that report progress, at most ten times a second.

    Args:
        label: Name of the work.
        total: Amount of work.
        in_bytes: Whether `total` is a number of bytes.
        announce: Whether to print the label where there is no bar.

    Yields:
        A function to call with the amount of work done so far.
    """
    if not sys.stderr.isatty() or os.environ.get("TERM") == "dumb":
        if announce:
            print(label, file=sys.stderr, flush=True)
        yield lambda _: None
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
    with rich.Progress(*columns, console=console(sys.stderr, terminal=True), auto_refresh=False) as bar:
        task, drawn = bar.add_task(label, total=total), 0.0

        def report(done: float) -> None:
            nonlocal drawn
            now = time.monotonic()
            due = now - drawn >= _REFRESH_SECONDS or done >= total
            bar.update(task, completed=done, refresh=due)
            drawn = now if due else drawn

        bar.refresh()
        yield report


@contextmanager
def loading() -> Iterator[Callable[[Progress], None]]:
    """Shows downloads, and the loading of large models, as `progress` does.

    Yields:
        A callback for `api.load`.
    """
    bar, shown = ExitStack(), ("", "")
    done: Callable[[float], None] = lambda _: None  # noqa: E731

    def report(it: Progress) -> None:
        nonlocal done, shown
        if it.stage == "load" and it.total < _LARGE:
            return
        if shown != (it.stage, it.model):
            bar.close()
            shown = it.stage, it.model
            label = f"{'downloading' if it.stage == 'download' else 'loading'} {it.model}"
            done = bar.enter_context(progress(label, it.total, in_bytes=True, announce=it.stage == "download"))
        done(it.done)

    with bar:
        yield report


def _grid(show_header: bool) -> Table:
    from rich.table import Table

    return Table(box=None, show_header=show_header, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")


def console(stream: IO[str], terminal: bool) -> Console:
    """A rich console that takes text as it is; without a terminal, one that neither colours nor wraps."""
    from rich.console import Console

    # Without markup, because brackets may occur in names of files and models.
    return Console(
        file=stream, force_terminal=terminal, width=None if terminal else _ENDLESS, markup=False, highlight=False,
        emoji=False, no_color=None if terminal else True,
    )  # fmt: skip


def _write(on: Console, parts: Iterable[Part]) -> None:
    for part in parts:
        on.print(part, soft_wrap=isinstance(part, str))
