"""Runs chat templates, which are untrusted programs, with bounded time and memory.

Jinja's sandbox keeps templates away from everything but their variables. This module adds a budget of characters and
list elements for each rendering. Every loop step, call, filter and operator is charged for its result; where a small
input can give a large result, it is charged beforehand. So every single step is bounded. The time limit is checked
between steps: a rendering ends at most one step after it.
"""

from __future__ import annotations

import datetime
import functools
import json
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from jinja2 import Template, TemplateError, nodes
from jinja2.ext import Extension
from jinja2.filters import make_attrgetter
from jinja2.nodes import Node
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace, pass_environment
from jinja2.visitor import NodeTransformer

MOST = 1 << 26
"""Budget of a rendering, in characters: some ten times a prompt that fills the longest context."""

SECONDS = 10.0
"""Time limit of a rendering. A conversation that fills the longest context takes about one second."""

_MOST_PARTS = 1 << 18
"""Most values within a value, counting repeated ones: more than a conversation that fills the longest context has."""

_ELEMENT = 8
"""Charge for a list element, in characters: the bytes of a reference."""

_MOST_WIDTH = 10_000
"""Largest number that string filters and methods accept, such as a width to pad to; also bits of an integer."""

_NOT_ASCII = re.compile("[^\x00-\x7f\ud800-\udfff]")
_WIDE = re.compile(r"\d{5}|\*|\{[^}]*\{")
"""Field widths of a format that are large, or given by an argument."""

_REMOVED_FILTERS = ("pprint", "urlize", "wordwrap", "xmlattr")
"""Filters that chats don't need, and whose results are hard to bound beforehand."""


class BudgetError(TemplateError):
    """A template exceeds its budget of time or memory."""


class Environment(ImmutableSandboxedEnvironment):
    """A sandbox with the extensions of transformers' renderer, and with a budget."""

    intercepted_binops = frozenset(("+", "*", "**", "%"))

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _Generation])
        self._budget = threading.local()
        self.globals |= {"raise_exception": _refuse, "strftime_now": _now, "namespace": _Namespace}
        del self.globals["lipsum"]
        # Jinja's own tojson escapes HTML.
        self.filters |= {"tojson": _to_json, "join": _join, "sum": _sum}
        self.filters = {
            name: self._bounded(name, f) for name, f in self.filters.items() if name not in _REMOVED_FILTERS
        }
        self.filters |= {
            "_charged_steps": self._charged_steps,
            "_charged": self._charged,
            "_charged_slice": self._charged_slice,
        }

    def compiled(self, source: str) -> Template:
        """Compiles a template.

        Raises:
            Exception: Any, if the template is malformed.
        """
        self._begin()
        return self.from_string(source)

    def run(self, template: Template, variables: Mapping[str, Any]) -> str:
        """Renders a template.

        Raises:
            BudgetError: It exceeds its budget.
            Exception: Any, raised by the template.
        """
        self._begin()
        return template.render(variables)

    def _begin(self) -> None:
        self._budget.left, self._budget.deadline = MOST, time.monotonic() + SECONDS

    def _spend(self, amount: int) -> None:
        self._budget.left -= amount
        if self._budget.left < 0 or time.monotonic() > self._budget.deadline:
            raise BudgetError(f"it takes more than {SECONDS:g} seconds or makes more than {MOST:,} characters")

    def _charged(self, value: Any) -> Any:
        """Charges for a value; refuses one that would be too long in print, such as nested lists of repeated lists."""
        if isinstance(value, str | bytes):
            self._spend(len(value))
        elif isinstance(value, list | tuple | dict):
            self._spend(_ELEMENT * len(value))
            _printed_length(value)
        return value

    def _charged_slice(self, value: Any) -> Any:
        self._spend(len(value) if hasattr(value, "__len__") else 1)
        return value

    def _charged_steps(self, values: Iterable[Any]) -> Iterator[Any]:
        for value in values:
            self._spend(1)
            yield value

    def concat(self, parts: Iterable[str]) -> str:
        """Joins the pieces of a rendering; Jinja calls this."""
        charged = []
        for part in parts:
            self._spend(len(part))
            charged.append(part)
        return "".join(charged)

    def _bounded(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """A filter that is charged for its result."""
        skipped = 1 if hasattr(function, "jinja_pass_arg") else 0  # the environment or context before the value

        @functools.wraps(function)
        def bounded(*args: Any, **kwargs: Any) -> Any:
            given = args[skipped:]
            if given and name not in ("default", "d"):
                self._charge_ahead(name, given[0], given[1:], kwargs)
            return self._charged(function(*args, **kwargs))

        return bounded

    def _charge_ahead(self, name: str, value: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Charges beforehand for a filter or a method whose result may be much larger than the value."""
        value, *given = (
            it.decode("latin-1") if isinstance(it, bytes) else it for it in (value, *args, *kwargs.values())
        )
        width = max((abs(arg) for arg in given if isinstance(arg, int)), default=0)
        if width > _MOST_WIDTH:
            raise BudgetError(f"{name} with {width} is too much")
        if isinstance(value, str):
            self._spend(_text_result(name, value, given, width))
        elif name in ("list", "sort", "batch", "slice", "unique", "reverse") and hasattr(value, "__len__"):
            self._spend(_ELEMENT * len(value))
        else:
            self._spend(1)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Evaluates an operator whose result may be much larger than its operands."""
        self._spend(1)
        if operator == "%" and isinstance(left, str | bytes):
            self._charge_ahead("%", left, (list(right) if isinstance(right, tuple) else right,), {})
        elif isinstance(left, int | float) and isinstance(right, int | float):
            if isinstance(left, int) and isinstance(right, int) and operator in ("*", "**"):
                power = max(right, 1) if operator == "**" else 1
                if (left.bit_length() + 1) * power > _MOST_WIDTH:
                    raise BudgetError("a number is too large")
        elif operator == "*":
            times, value = (left, right) if isinstance(left, int) else (right, left)
            if isinstance(times, int) and hasattr(value, "__len__"):
                self._spend((1 if isinstance(value, str | bytes) else _ELEMENT) * len(value) * max(times, 0))
        elif operator == "+" and hasattr(left, "__len__") and hasattr(right, "__len__"):
            self._spend(len(left) + len(right))
        return self._charged(super().call_binop(context, operator, left, right))

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805 - Jinja's way
        """Calls a macro, a function, or a method of a value."""
        owner = getattr(__obj, "__self__", None)
        __self._spend(1)
        _printed_length([args, kwargs])  # a macro can print them
        if isinstance(owner, str | bytes | int):
            if __obj.__name__ == "join" and args:
                args = (list(__self._charged_steps(args[0])), *args[1:])
            __self._charge_ahead(__obj.__name__, owner, args, kwargs)
        return __self._charged(super().call(__context, __obj, *args, **kwargs))

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """The sandbox's `format` method of strings, charged; templates don't reach it through `call` alone."""
        safe = super().wrap_str_format(value)
        if safe is None:
            return None

        @functools.wraps(safe)
        def bounded(*args: Any, **kwargs: Any) -> str:
            self._charge_ahead("format", value.__self__, args, kwargs)
            text: str = self._charged(safe(*args, **kwargs))
            return text

        return bounded

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree: nodes.Template = _Budgeted().visit(super()._parse(source, name, filename))
        return tree


class _Budgeted(NodeTransformer):
    """Inserts charging filters where a template loops or makes values without a call."""

    def visit_For(self, node: nodes.For) -> Node:  # noqa: N802 - Jinja's way
        self.generic_visit(node)
        node.iter = _filtered(node.iter, "_charged_steps")
        return node

    def visit_Concat(self, node: nodes.Concat) -> Node:  # noqa: N802
        self.generic_visit(node)
        return _filtered(nodes.List(node.nodes, lineno=node.lineno), "join")

    def visit_Getitem(self, node: nodes.Getitem) -> Node:  # noqa: N802
        self.generic_visit(node)
        return _filtered(node, "_charged_slice") if isinstance(node.arg, nodes.Slice) else node

    def visit_List(self, node: nodes.List) -> Node:  # noqa: N802
        self.generic_visit(node)
        return _filtered(node, "_charged")

    def visit_Dict(self, node: nodes.Dict) -> Node:  # noqa: N802
        self.generic_visit(node)
        return _filtered(node, "_charged")

    def visit_Tuple(self, node: nodes.Tuple) -> Node:  # noqa: N802
        self.generic_visit(node)
        return _filtered(node, "_charged") if node.ctx == "load" else node


def _text_result(name: str, value: str, given: list[Any], width: int) -> int:
    """Upper bound, in characters, of what a filter or a method makes of a text.

    Args:
        name: Of the filter or method.
        value: The text.
        given: The arguments; bytes as text.
        width: The largest number among them.

    Raises:
        BudgetError: There is no useful bound.
    """
    lengths = [len(arg) for arg in given if isinstance(arg, str)]
    first = given[0] if given and isinstance(given[0], str) else None
    if name in ("list", "sort", "batch", "slice", "unique", "reverse"):
        return _ELEMENT * len(value)
    if name in ("indent", "expandtabs"):
        return (1 + value.count("\n") + value.count("\t")) * max([8, width, *lengths])
    if name == "replace" and first is not None and len(lengths) > 1:
        return value.count(first) * lengths[1]
    if name in ("split", "rsplit", "splitlines"):
        return _ELEMENT * (value.count(first) if first else len(value) // 2)
    if name == "join" and given:
        parts = given[0] if hasattr(given[0], "__len__") else ()
        return len(value) * len(parts) + _printed_length(list(parts))
    if name in ("format", "format_map", "%"):
        if _WIDE.search(value):
            raise BudgetError("a format with wide fields is too much")
        fields = value.count("%") + value.count("{")
        return len(value) + fields * (_MOST_WIDTH + _printed_length(given))
    if name == "translate":
        raise BudgetError("translate may make too much")
    return 1


def _filtered(node: Node, name: str) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


def _printed_length(value: Any) -> int:
    """Length of a value in print, roughly, in characters.

    Raises:
        BudgetError: It exceeds MOST, or the value has more than _MOST_PARTS parts.
    """
    amount, parts, waiting = 0, 0, [value]
    while waiting:
        it = waiting.pop()
        parts += 1
        if isinstance(it, Mapping):
            waiting += [*it.keys(), *it.values()]
        elif isinstance(it, list | tuple):
            waiting += it
        amount += len(it) if isinstance(it, str | bytes) else _ELEMENT
        if amount > MOST or parts + len(waiting) > _MOST_PARTS:
            raise BudgetError(f"a value has more than {MOST:,} characters or {_MOST_PARTS:,} parts")
    return amount


class _Namespace(Namespace):
    """Jinja's namespace, which here doesn't print its contents: it could contain itself."""

    def __repr__(self) -> str:
        return "<namespace>"


class _Generation(Extension):
    """The tag `{% generation %}`, which marks what fine-tuning learns; it has no effect on rendering."""

    tags = frozenset({"generation"})  # type: ignore[assignment]  # Jinja only reads it

    def parse(self, parser: Parser) -> list[Node]:
        """Returns the statements between the tags."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _refuse(message: str) -> None:
    raise TemplateError(message)


def _now(form: str) -> str:
    return datetime.datetime.now().strftime(form)  # noqa: DTZ005 - templates print the user's local date


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    text = json.dumps(value, ensure_ascii=False, indent=indent, separators=separators, sort_keys=sort_keys)
    # An escaped stand-in for a hidden character couldn't be restored (see control_tokens.py).
    return _NOT_ASCII.sub(lambda found: json.dumps(found[0])[1:-1], text) if ensure_ascii else text


@pass_environment
def _join(environment: Environment, value: Iterable[Any], d: str = "", attribute: str | int | None = None) -> str:
    """Jinja's filter, charged step by step."""
    get = make_attrgetter(environment, attribute) if attribute is not None else lambda it: it
    texts = [environment._charged(str(get(it))) for it in environment._charged_steps(value)]
    environment._spend(len(texts) * len(d))
    return d.join(texts)


@pass_environment
def _sum(environment: Environment, iterable: Iterable[Any], attribute: str | int | None = None, start: Any = 0) -> Any:
    """Jinja's filter, charged step by step."""
    get = make_attrgetter(environment, attribute) if attribute is not None else lambda it: it
    total = start
    for it in environment._charged_steps(iterable):
        total = environment.call_binop(None, "+", total, get(it))  # type: ignore[arg-type]  # the context isn't used
    return total
