"""Tests the tests: changes the package in one place after the other, and sees whether a test fails.

The changes ("mutants") are those of cosmic-ray, and the removal of a statement. Of every place in the code one change
is drawn of each kind: arithmetic, comparison, constant and so on. A mutant is tried in a forked process, in which
the changed source is compiled instead of the file's; no file changes. Only tests that ran the changed lines are run,
quick ones first. Their lines and durations come from a run with coverage, which is made first:

    pytest --cov --cov-context=test --cov-report= --junit-xml=tests.xml tests/test_kv.py ...
    python -m scripts.mutate tests.xml mutants.jsonl mlx_mtp/kv mlx_mtp/decode mlx_mtp/text [--seed 0] [--share 0.3]

`mutants.jsonl` gets a line for each mutant. Mutants that it already has aren't tried again, unless they survived and
`--again` is given. Needs `pip install cosmic-ray`, which the tests' requirements don't include.
"""

from __future__ import annotations

import ast
import difflib
import json
import os
import resource
import signal
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from random import Random
from types import FunctionType
from typing import Annotated, Any
from xml.etree import ElementTree

import coverage
import parso
import pytest
import typer
from cosmic_ray.mutating import mutate_code
from cosmic_ray.operators.operator import Example, Operator
from cosmic_ray.plugins import get_operator, operator_names

NEIGHBOURS = {
    "ReplaceComparisonOperator": "Lt_LtE LtE_Lt Gt_GtE GtE_Gt Eq_NotEq NotEq_Eq Is_IsNot IsNot_Is",
    "ReplaceBinaryOperator": "Add_Sub Sub_Add Mul_FloorDiv Div_Mul FloorDiv_Mul Mod_FloorDiv Pow_Mul BitOr_BitAnd "
    "BitAnd_BitOr BitXor_BitOr LShift_RShift RShift_LShift",
}
"""What an operator becomes. Other replacements are found by any test, or, as `==` by `is`, change nothing."""

LEEWAY = 6
"""Seconds that a mutant may take for each second of processor time that it may use."""

MEMORY = 12 << 30
"""Most address space of a mutant, in bytes."""


class DropStatement(Operator):
    """Replaces a statement by `pass`; cosmic-ray has no such operator."""

    def mutation_positions(self, node: Any) -> Iterator[tuple[Any, Any]]:
        """Yields the position of a statement that does something."""
        if node.type == "simple_stmt":
            statement = node.children[0]
            kind, first, *_ = statement.type, *getattr(statement, "children", [None])
            if kind == "expr_stmt":  # a variable that is never set is missed by any test
                outlasts = any(mark in first.get_code(include_prefix=False) for mark in ".[")
                removable = outlasts or getattr(statement.children[1], "value", "=") != "="
            elif kind == "return_stmt":
                removable = node.search_ancestor("if_stmt", "for_stmt", "while_stmt") is not None
            else:
                removable = kind in ("atom_expr", "del_stmt", "raise_stmt", "yield_expr")
            if removable:
                yield node.start_pos, node.end_pos

    def mutate(self, node: Any, index: int) -> Any:  # noqa: ARG002
        """Makes it `pass`."""
        empty = parso.parse("pass\n").children[0]
        empty.get_first_leaf().prefix = node.get_first_leaf().prefix
        return empty

    @classmethod
    def examples(cls) -> tuple[Example, ...]:
        """One for cosmic-ray's own tests."""
        return (Example("x = 1\n", "pass\n"),)


@dataclass
class Mutant:
    """A change, and what became of it.

    Attributes:
        path: The changed file.
        function: The function that the change is in.
        line: First line of the changed place.
        column: Its column.
        kind: Kind of change.
        diff: Lines removed and added.
        outcome: "killed", "timeout", "survived", or "untested" if no test runs the place.
        test: The test that failed last; "" if none.
        tests: How many tests were chosen.
    """

    path: str
    function: str
    line: int
    column: int
    kind: str
    diff: str
    outcome: str = "untested"
    test: str = ""
    tests: int = 0

    @property
    def key(self) -> tuple[str, ...]:
        """What identifies the mutant, also when other lines of the file have changed."""
        return self.path, self.function, str(self.column), self.kind, self.diff


def mutants_of(path: str, share: float, seed: int) -> Iterator[tuple[Mutant, str]]:
    """Yields mutants of a file, with their sources: one for each place and kind of change.

    Args:
        path: The file.
        share: Share of the places in each function that is drawn; of each function at least one.
        seed: Chooses them. A larger share has all that a smaller one has, and more.
    """
    source = Path(path).read_text("utf-8")
    functions: dict[str, list[tuple[Any, str, list[tuple[Operator, int]]]]] = defaultdict(list)
    nodes = list(_nodes(parso.parse(source)))
    for kind, operators in _operators().items():
        choices: dict[Any, list[tuple[Operator, int]]] = defaultdict(list)
        for operator in operators:
            places = [node for node in nodes for _ in operator.mutation_positions(node)]
            for occurrence, node in enumerate(places):
                choices[node].append((operator, occurrence))
        for node, changes in choices.items():
            functions[_function(node)].append((node, kind, changes))
    seen = {_meaning(source)}
    for function, places in functions.items():
        dice = Random(f"{seed} {path} {function}")
        dice.shuffle(places)
        wanted = max(1, round(share * len(places)))
        for node, kind, changes in places:
            changed = mutate_code(source, *dice.choice(changes))
            try:
                after = _meaning(changed)
            except SyntaxError:
                continue
            if after in seen:
                continue
            seen.add(after)
            yield Mutant(path, function, *node.start_pos, kind, _diff(source, changed)), changed
            wanted -= 1
            if not wanted:
                break


def _operators() -> dict[str, list[Operator]]:
    """The operators by kind: those that replace one thing by another of its kind are one kind."""
    kinds: dict[str, list[Operator]] = defaultdict(list, DropStatement=[DropStatement()])
    for name in sorted(operator_names()):
        kind, _, change = name.removeprefix("core/").partition("_")
        make = get_operator(name)
        if not make.arguments() and change in NEIGHBOURS.get(kind, change).split():
            kinds[kind].append(make())
    return kinds


def _function(node: Any) -> str:
    """The name of the function that a node is in, with that of its class; "" outside."""
    inside = node.search_ancestor("funcdef", "classdef")
    return f"{_function(inside)}.{inside.name.value}".lstrip(".") if inside else ""


def _nodes(node: Any) -> Iterator[Any]:
    yield node
    for child in getattr(node, "children", ()):
        yield from _nodes(child)


def _meaning(source: str) -> str:
    """The program without what only readers and type checkers use."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.arg | ast.AnnAssign):
            node.annotation = ast.Constant(None)
        elif isinstance(node, ast.FunctionDef):
            node.returns = None
        if isinstance(body := getattr(node, "body", None), list):
            node.body = [it for it in body if not (isinstance(it, ast.Expr) and isinstance(it.value, ast.Constant))]
    return ast.dump(tree)


def _diff(before: str, after: str) -> str:
    lines = difflib.unified_diff(before.splitlines(), after.splitlines(), n=0, lineterm="")
    return "\n".join(line for line in lines if line[:1] in "+-" and line[:3] not in ("+++", "---"))


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
    known: dict[tuple[str, ...], Mutant] = {}
    if Path(out).exists():
        for line in Path(out).read_text("utf-8").splitlines():
            old = Mutant(**json.loads(line))
            known[old.key] = old
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
    with Path(out).open("a", encoding="utf-8") as lines:

        def log(mutant: Mutant) -> None:
            lines.write(json.dumps(asdict(mutant)) + "\n")
            lines.flush()

        pytest.main([*options, *files], [Trial(tests, mutants(), budget, jobs, log)])
    for path, its in groupby(tried, key=lambda it: it.path):
        print(path, dict(Counter(it.outcome for it in its)))


if __name__ == "__main__":
    typer.run(main)
