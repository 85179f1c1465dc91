"""Files changed in random places: a short version of scripts/fuzz_files.py, and that it notices what it looks for."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from mlx_mtp.errors import CheckpointError
from scripts import fuzz_files
from scripts.fuzz_files import run, wrong
from tests.support.fuzz_ending import ending
from tests.support.fuzz_files import Files, prepared
from tests.support.fuzz_guard import Guard


@pytest.fixture(scope="module")
def prepared_files() -> Iterator[tuple[Files, Guard]]:
    with prepared() as found:
        yield found


def test_no_case_does_more_than_raise_our_errors(prepared_files: tuple[Files, Guard]):
    files, guard = prepared_files
    results = {kind: [wrong(files, guard, kind, 5, i) for i in range(10)] for kind in files.kinds}
    assert not [(kind, it) for kind, found in results.items() for *it, _ in found if any(it)]
    assert sum(refused for found in results.values() for *_, refused in found) > 100


def without_words() -> None:
    raise CheckpointError("")


@pytest.mark.parametrize("read, problem", [
    (without_words, "several lines, or none"),
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


def test_no_file_is_read_for_the_code_of_a_template_that_python_refuses(prepared_files: tuple[Files, Guard]):
    """Python would look for the line of its error in a file of the template's name, wherever the process is."""
    files, guard = prepared_files
    path, _, read = files.kinds["template"]
    loops = b"{% for x in [1] %}" * 25 + b"{% endfor %}" * 25
    files.kinds["loops"] = path, lambda rng: loops, read
    try:
        assert wrong(files, guard, "loops", 0, 0) == ("", "", True)
    finally:
        del files.kinds["loops"]


def test_what_a_case_takes_is_noticed(prepared_files: tuple[Files, Guard], monkeypatch: pytest.MonkeyPatch):
    """The peaks and times are made up: a process that has used more memory before doesn't grow."""
    files, guard = prepared_files
    before = files.peak
    for peaks, times, exceeded in (
        ((0, 199), (5, 6), ""),
        ((0, 301), (5, 6), "takes 301 MB"),
        ((301, 301), (5, 6), ""),
        ((0, 0), (5, 8), "takes 3.0 s"),
    ):
        peak, clock = iter(before + 2**20 * n for n in peaks), iter(times)
        monkeypatch.setattr(fuzz_files, "peak_memory", lambda it=peak: next(it))
        monkeypatch.setattr(fuzz_files, "process_time", lambda it=clock: next(it))
        assert wrong(files, guard, "schema", 0, 0)[1] == exceeded


def test_cases_run_in_another_process():
    result = run(["schema", "config"], 5, range(7, 17))
    assert (result.cases, result.bad) == (10, [])
    assert 0 < result.refused < 10


def test_what_ends_the_process_is_noticed_and_the_rest_goes_on(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(fuzz_files, "_batch", ending)
    result = run(["a", "b"], 0, range(2, 9))
    assert (result.cases, result.refused) == (7, 7)
    assert result.bad == [("b", 3, "is wrong"), ("b", 5, "ends the process"), ("b", 7, "takes too much")]
