"""Files changed in random places: a short version of scripts/fuzz_files.py, and that it notices what it looks for."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from mlx_mtp.errors import CheckpointError
from scripts import fuzz_files
from scripts.fuzz_files import Files, Guard, prepared, wrong


@pytest.fixture(scope="module")
def prepared_files() -> Iterator[tuple[Files, Guard]]:
    with prepared() as found:
        yield found


def test_no_case_does_more_than_raise_our_errors(prepared_files: tuple[Files, Guard]):
    files, guard = prepared_files
    results = {kind: [wrong(files, guard, kind, 5, i) for i in range(6)] for kind in files.kinds}
    assert not [(kind, problem) for kind, found in results.items() for problem, _ in found if problem]
    assert sum(refused for found in results.values() for _, refused in found) > 50


def too_long() -> None:
    end = time.process_time() + 2.01
    while time.process_time() < end:
        pass


def without_words() -> None:
    raise CheckpointError("")


@pytest.mark.parametrize("read, problem", [
    (too_long, "takes 2."), (without_words, "several lines, or none"),
    (lambda: {}["a"], "KeyError comes out"), (lambda: os.system("true"), "os.system"),
    (lambda: Path("/etc/hostname").exists() and Path("/etc/hostname").read_text(), "reads '/etc/hostname'"),
    (lambda: open(os.devnull, "w").close(), "opens '/dev/null' with 'w'"),
    (lambda: __import__("evil_module"), "imports evil_module"),
])  # fmt: skip
def test_what_a_case_must_not_do_is_noticed(prepared_files: tuple[Files, Guard], read, problem: str):
    files, guard = prepared_files
    path, make, _ = files.kinds["messages"]
    files.kinds["bad"] = path, make, read
    try:
        assert problem in wrong(files, guard, "bad", 0, 0)[0]
    finally:
        del files.kinds["bad"]


def test_memory_that_a_case_takes_is_noticed(prepared_files: tuple[Files, Guard], monkeypatch: pytest.MonkeyPatch):
    """The peak is made up: a process that has used more memory before doesn't grow, nor does its child."""
    files, guard = prepared_files
    peaks = iter(range(0, 2**40, 300 * 2**20))
    monkeypatch.setattr(fuzz_files, "_peak", lambda: next(peaks))
    monkeypatch.setitem(files.kinds, "bad", (*files.kinds["messages"][:2], lambda: None))
    assert "takes 300 MB" in wrong(files, guard, "bad", 0, 0)[0]
