"""Tables and progress: plain where there is no terminal, in columns that fit where there is one (cli/render.py)."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest

from mlx_mtp.cli import render
from tests.support.tiny_checkpoints import make_pair

SHOW = """
from mlx_mtp.cli import render
render.show(["[b]text[/b] :tm:", render.table(["batch", "word"], [["1", "[x]"], ["12", "y"]], left=(1,))])
"""
BAR = """
from mlx_mtp.cli import render
with render.progress("[x] work", 3) as report:
    for i in range(3):
        report(i + 1)
"""


def in_terminal(*arguments: str, columns: int = 60, **environment: str) -> str:
    """What a Python command shows in a terminal of so many columns, with escape sequences."""
    master, other = pty.openpty()
    own = {"TERM": "xterm-256color", "COLUMNS": str(columns), **environment}
    running = subprocess.Popen(
        [sys.executable, *arguments], stdout=other, stderr=other, stdin=other, env={**os.environ, **own}
    )
    os.close(other)
    shown = b""
    while True:
        try:
            piece = os.read(master, 4096)
        except OSError:  # how Linux says that the other end is closed
            break
        if not piece:
            break
        shown += piece
    os.close(master)
    assert running.wait(timeout=60) == 0, shown
    return shown.decode()


def without_escapes(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text).replace("\r", "")


def piped(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **environment}
    )


def test_columns_without_a_terminal():
    rows = [["1", "2.50", "x" * 200], ["10", "12.25", "y"]]
    lines = render.plain(["above", render.table(["batch", "ms", "why"], rows, left=(2,)), "", "below"]).split("\n")
    assert lines[:2] == ["above", "batch     ms  why"]
    # Nothing is wrapped, and no spaces are left at the ends of lines.
    assert lines[2:] == [f"    1   2.50  {'x' * 200}", "   10  12.25  y", "", "below"], (
        "nothing wrapped, no spaces left"
    )
    assert render.plain([render.pairs([("a", "b [c] " + "d " * 200 + "."), ("  e", "f")])]).split("\n") == [
        "a    b [c] " + "d " * 200 + ".", "  e  f",
    ]  # fmt: skip


@pytest.mark.parametrize("environment", [{}, {"FORCE_COLOR": "1"}, {"COLUMNS": "20"}, {"TERM": "dumb"}])
def test_pipes_get_plain_text_whatever_the_environment_says(environment: dict[str, str]):
    assert piped(SHOW, **environment).stdout == "[b]text[/b] :tm:\nbatch  word\n    1  [x]\n   12  y\n"


def test_terminals_get_bold_headers_unless_told_not_to():
    coloured = in_terminal("-c", SHOW)
    assert "\x1b[1m" in coloured
    text = [line.rstrip() for line in without_escapes(coloured).split("\n")]
    assert text[:4] == ["[b]text[/b] :tm:", "batch  word", "    1  [x]", "   12  y"]
    assert not re.search(r"\x1b\[[0-9;]*3[0-9]", in_terminal("-c", SHOW, NO_COLOR="1")), "a colour"


def test_progress_is_for_terminals():
    done = piped(BAR)
    assert (done.stdout, done.stderr) == ("", "[x] work\n")
    shown = without_escapes(in_terminal("-c", BAR, columns=100))
    assert "[x] work" in shown and "3/3" in shown
    assert not re.search(r"\x1b\[[0-9;]*3[0-9]", in_terminal("-c", BAR, NO_COLOR="1")), "a colour"
    assert in_terminal("-c", BAR, TERM="dumb") == "[x] work\r\n", "which can't draw a line again"


LOADING = """
from mlx_mtp.cli import render
from mlx_mtp.checkpoint.progress import Progress
with render.loading() as report:
    for stage, model, total in (("download", "org/a", 10**6), ("load", "small", 10**6), ("load", "large", 2 * 10**9)):
        for share in range(3):
            report(Progress(stage, model, share * total // 2, total))
"""


def test_downloads_and_what_takes_long_to_load_are_shown():
    done = piped(LOADING)
    assert (done.stdout, done.stderr) == ("", "downloading org/a\n")
    shown = without_escapes(in_terminal("-c", LOADING, columns=100))
    assert re.search(r"downloading org/a.*1\.0/1\.0 MB", shown) and re.search(r"loading large.*2\.0/2\.0 GB", shown)
    assert "small" not in shown and "0/1.0 MB" in shown


def test_info_fits_a_narrow_terminal():
    shown = without_escapes(in_terminal("-m", "mlx_mtp", "info", columns=60)).rstrip("\n").split("\n")
    assert all(len(line.rstrip()) <= 60 for line in shown) and any(line.startswith("  in memory") for line in shown)
    continued = [line for line in shown if line.startswith(" " * 15)]
    assert continued, "what is wrapped goes on beside its name"


def test_a_conversion_shows_how_far_it_is(tmp_path: Path):
    source, _ = make_pair("12b", tmp_path)
    shown = in_terminal("-m", "mlx_mtp", "convert", str(source), str(tmp_path / "new"), "--no-draft", columns=100)
    text = without_escapes(shown)
    assert "new" in text and re.search(r"([\d.]+)/\1 .?[kM]B", text) and str(tmp_path / "new") in text


def test_rich_is_imported_when_something_is_shown():
    code = "import sys, mlx_mtp.cli; print('rich.table' in sys.modules, 'rich.console' in sys.modules)"
    assert piped(code).stdout == "False False\n"
