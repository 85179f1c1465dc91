"""Tests the tests: changes the package in one place after the other, and sees whether a test fails.

Of every place in the code one change is drawn of each kind (mutants.py): arithmetic, comparison, constant and so on. A
mutant is tried in a forked process, which gives the modules in memory the changed code; no file changes. Only tests
that ran the changed line are run, some of each file that has such tests, quick ones first. Their lines and durations
come from a run with coverage, which is made first:

    pytest --cov --cov-context=test --cov-report= --junit-xml=tests.xml tests/test_kv.py ...
    python -m scripts.mutate mutants.jsonl mlx_mtp/kv mlx_mtp/decode mlx_mtp/text --report tests.xml --share 0.2

`mutants.jsonl` gets a line for each mutant. Mutants that it has aren't tried again, except with `--again` those that
survived; a larger `--budget` then gives them to more tests.
"""

from __future__ import annotations

import ast
import json
import os
import resource
import signal
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from types import FunctionType
from typing import Annotated, Any
from xml.etree import ElementTree

import coverage
import pytest
import typer

from .mutants import Mutant, mutants_of

LEEWAY = 6
"""Seconds that a mutant may take for each second of processor time that it may use."""

MEMORY = 12 << 30
"""Most address space of a mutant, in bytes."""


class Tests:
    """Which tests run which lines, and how long they take."""

    def __init__(self, reports: Iterable[str]) -> None:
        """Reads pytest's reports and coverage's data."""
        self.seconds = {
            f"{case.attrib['classname'].replace('.', '/')}.py::{case.attrib['name']}": float(case.attrib["time"])
            for report in reports
            for case in ElementTree.parse(report).iter("testcase")  # noqa: S314 - the tests' own
            if "classname" in case.attrib and not len(case)  # else it failed
        }
        data = coverage.CoverageData()
        data.read()
        self._lines: dict[str, dict[int, set[str]]] = {}
        for file in data.measured_files():
            contexts = data.contexts_by_lineno(file)
            lines = {line: {it.split("|")[0] for it in by} & {*self.seconds, ""} for line, by in contexts.items()}
            self._lines[os.path.relpath(file)] = lines

    def of(self, path: str, line: int, budget: float) -> list[str]:
        """The tests that run a line: of each file in turn the quickest, as many as take `budget` seconds together.

        What runs when the module is imported is tested by the tests of its function or class, of the module, or by any.
        """
        lines = self._lines.get(path, {})
        tests: set[str] = set()
        for first, last in _spans(Path(path).read_text("utf-8"), line):
            tests = set().union(*(lines.get(it, set()) for it in range(first, last + 1)))
            if tests != {""}:
                break
        tests = tests - {""} if tests != {""} else set(self.seconds)
        files: dict[str, list[str]] = defaultdict(list)
        for test in sorted(tests, key=lambda it: (self.seconds[it], it)):
            files[test.split("::")[0]].append(test)
        in_turn = sorted((i, self.seconds[test], test) for file in files.values() for i, test in enumerate(file))
        chosen, total = [], 0.0
        for _, seconds, test in in_turn:
            if not chosen or total + seconds < budget:
                chosen.append(test)
                total += seconds + 0.02  # what pytest does between two tests
        return chosen


def _spans(source: str, line: int) -> list[tuple[int, int]]:
    """The lines of what surrounds a line, from a simple statement or a header to the whole module."""
    spans = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.stmt | ast.ExceptHandler):
            body = getattr(node, "body", None)
            whole = node.lineno, node.end_lineno or node.lineno
            parts = [whole, (node.lineno, max(node.lineno, body[0].lineno - 1))] if body else [whole]
            spans += [part for part in parts if part[0] <= line <= part[1]]
    return [*sorted(spans, key=lambda it: it[1] - it[0]), (1, source.count("\n"))]


def put_in(path: str, source: str) -> None:
    """Gives an imported module the functions and constants of another source, wherever they have gone."""
    module = sys.modules[path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")]
    changed = dict(vars(module))
    exec(compile(source, path, "exec", dont_inherit=True), changed)  # noqa: S102 - the package's own source
    ours = [vars(it) for name, it in list(sys.modules.items()) if name.split(".")[0] in ("mlx_mtp", "tests")]
    done: set[int] = set()
    for name, old in list(vars(module).items()):
        new = changed.get(name)
        if not name.startswith("__") and not _become(old, new, done):
            for names in ours:
                if names.get(name) is old:
                    names[name] = new


def _become(old: Any, new: Any, done: set[int]) -> bool:
    """Gives a function or a class the code of another; returns whether that was possible.

    Args:
        old: What others hold.
        new: Its counterpart.
        done: Identities of what has been given its code.
    """
    if old is new or id(old) in done:
        return True
    if type(old) is not type(new):
        return False
    done.add(id(old))
    if isinstance(old, FunctionType):
        if old.__code__.co_freevars != new.__code__.co_freevars:
            return False
        old.__code__, old.__defaults__, old.__kwdefaults__ = new.__code__, new.__defaults__, new.__kwdefaults__
        for cell, other in zip(old.__closure__ or (), new.__closure__ or (), strict=True):
            if not _become(cell.cell_contents, other.cell_contents, done):
                cell.cell_contents = other.cell_contents
        return True
    if isinstance(old, type):
        for name, value in list(vars(new).items()):
            changeable = isinstance(value, FunctionType) or not name.startswith("__")
            if not _become(vars(old).get(name), value, done) and changeable:
                setattr(old, name, value)
        return True
    inner = next((it for it in ("__wrapped__", "__func__", "fget", "func") if hasattr(old, it)), None)
    return inner is not None and _become(getattr(old, inner), getattr(new, inner), done)


class Trial:
    """A pytest plugin that runs the collected tests on mutants, in forked processes."""

    def __init__(
        self,
        tests: Tests,
        mutants: Iterable[tuple[Mutant, str]],
        budget: float,
        jobs: int,
        log: Callable[[Mutant], object],
    ) -> None:
        """Prepares trials.

        Args:
            tests: What chooses the tests.
            mutants: What to try.
            budget: Seconds of tests for each mutant.
            jobs: How many to try at a time.
            log: Called with each mutant once its outcome is known.
        """
        self._tests, self._mutants, self._budget, self._jobs = tests, mutants, budget, jobs
        self._log = log
        self._failed = ""
        self._running: dict[int, tuple[Mutant, int, float]] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Notes a test that fails."""
        if report.failed:
            self._failed = report.nodeid

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        """Tries all mutants."""
        items = {item.nodeid: item for item in session.items}
        for mutant, source in self._mutants:
            chosen = [items[test] for test in self._tests.of(mutant.path, mutant.line, self._budget) if test in items]
            mutant.tests = len(chosen)
            if chosen:
                self._start(mutant, source, chosen)
            else:
                self._log(mutant)
            self._wait(self._jobs)
        self._wait(1)
        return True

    def _start(self, mutant: Mutant, source: str, items: list[pytest.Item]) -> None:
        reading, writing = os.pipe()
        seconds = 20 + int(4 * sum(self._tests.seconds[item.nodeid] for item in items))
        child = os.fork()
        if child:
            os.close(writing)
            self._running[child] = mutant, reading, time.monotonic() + LEEWAY * seconds
            return
        try:
            os.setsid()
            resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
            resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
            silent = os.open(os.devnull, os.O_RDWR)
            for stream in (0, 1, 2):
                os.dup2(silent, stream)
            put_in(mutant.path, source)
            for item, following in zip(items, [*items[1:], None], strict=True):
                item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
                if self._failed:
                    break
        except BaseException as error:
            self._failed = repr(error)
        finally:
            os.write(writing, self._failed.encode())
            os._exit(bool(self._failed))

    def _wait(self, places: int) -> None:
        """Waits until fewer than `places` mutants run."""
        while len(self._running) >= places:
            time.sleep(0.05)
            for child, (mutant, pipe, end) in list(self._running.items()):
                done, status = os.waitpid(child, os.WNOHANG)
                if not done and time.monotonic() < end:
                    continue
                with suppress(ProcessLookupError):
                    os.killpg(child, signal.SIGKILL)  # with all that it started
                if not done:
                    _, status = os.waitpid(child, 0)
                mutant.outcome = "timeout" if os.WIFSIGNALED(status) else "killed" if status else "survived"
                mutant.test = os.read(pipe, 10_000).decode("utf-8", "replace")
                os.close(pipe)
                del self._running[child]
                self._log(mutant)


def files_in(paths: Iterable[str]) -> list[str]:
    """The Python files at and under paths."""
    return [
        str(file) for path in paths for file in ([path] if path.endswith(".py") else sorted(Path(path).rglob("*.py")))
    ]


def main(
    out: Annotated[str, typer.Argument(help="The file that gets a line for each mutant.")],
    paths: Annotated[list[str], typer.Argument(help="Files and folders to change.")],
    report: Annotated[list[str], typer.Option(help="What pytest's --junit-xml wrote.")],
    seed: int = 0,
    share: Annotated[float, typer.Option(help="Share of the mutants that is tried.")] = 1.0,
    budget: Annotated[float, typer.Option(help="Seconds of tests for each mutant, as measured without.")] = 3.0,
    jobs: Annotated[int, typer.Option(help="How many mutants to try at a time.")] = 1,
    again: Annotated[bool, typer.Option(help="Try those that survived again.")] = False,
) -> None:
    """Tries mutants, and prints those that survive and the numbers by file."""
    lines = Path(out).read_text("utf-8").splitlines() if Path(out).exists() else []
    known = {mutant.key: mutant for mutant in (Mutant(**json.loads(line)) for line in lines)}
    tests, tried = Tests(report), list[Mutant]()

    def mutants() -> Iterator[tuple[Mutant, str]]:
        for path in files_in(paths):
            for mutant, source in mutants_of(path, share, seed):
                old = known.get(mutant.key)
                tried.append(mutant if not old or (again and old.outcome in ("survived", "untested")) else old)
                if tried[-1] is mutant:
                    yield mutant, source

    options = ["-q", "-s", "-p", "no:cacheprovider", "-p", "no:cov", "-p", "no:xdist"]
    files = sorted({test.split("::")[0] for test in tests.seconds})
    with Path(out).open("a", encoding="utf-8") as file:

        def log(mutant: Mutant) -> None:
            file.write(json.dumps(asdict(mutant)) + "\n")
            file.flush()

        pytest.main([*options, *files], [Trial(tests, mutants(), budget, jobs, log)])
    for it in (it for it in tried if it.outcome in ("survived", "untested")):
        print(f"{it.path}:{it.line}: {it.outcome}, {it.tests} tests\n{it.diff}")
    for path, its in groupby(tried, key=lambda it: it.path):
        print(path, dict(Counter(it.outcome for it in its)))


if __name__ == "__main__":
    typer.run(main)
