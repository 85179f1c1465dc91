"""Changes to source that a test should notice: those of cosmic-ray, and the removal of a statement.

Needs `pip install cosmic-ray`, which the tests' requirements don't include.
"""

from __future__ import annotations

import ast
import difflib
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import parso
from cosmic_ray.mutating import mutate_code
from cosmic_ray.operators.operator import Example, Operator
from cosmic_ray.plugins import get_operator, operator_names

NEIGHBOURS = {
    "ReplaceComparisonOperator": "Lt_LtE LtE_Lt Gt_GtE GtE_Gt Eq_NotEq NotEq_Eq Is_IsNot IsNot_Is",
    "ReplaceBinaryOperator": "Add_Sub Sub_Add Mul_FloorDiv Div_Mul FloorDiv_Mul Mod_FloorDiv Pow_Mul BitOr_BitAnd "
    "BitAnd_BitOr BitXor_BitOr LShift_RShift RShift_LShift",
}
"""What an operator becomes. Other replacements are found by any test, or, as `==` by `is`, change nothing."""


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
        wanted = kind not in NEIGHBOURS or change in NEIGHBOURS[kind].split()
        if wanted and not make.arguments():
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
