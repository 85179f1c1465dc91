"""Runs chat templates, which are programs from strangers.

Jinja's own sandbox keeps them from all but text. Here is what keeps them from taking all time and memory: a rendering
has a budget, in characters and elements, of which every loop step, call, filter and operator takes what it makes,
before it makes it where one step can make much of little. What single steps take is bounded through that; the time is
looked at between steps, so a rendering ends within its limit and one such step more.
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
"""Characters that a rendering may make all in all: some ten times a prompt that fills the longest context."""

SECONDS = 10.0
"""Time that a rendering may take. Conversations as long as the longest context take one."""

_MOST_PARTS = 1 << 18
"""Values that a value may hold, counted as often as it holds them: more than a conversation as long as a context."""

_ELEMENT = 8
"""Characters that an element of a list counts for: the bytes of a reference."""

_MOST_WIDTH = 10_000
"""Largest number that filters and methods of texts may be given, such as a width to fill."""

_NOT_ASCII = re.compile("[^\x00-\x7f\ud800-\udfff]")
_WIDE = re.compile(r"\d{5}|\*|\{[^}]*\{")
"""Widths in formats that are large, or come from a value."""

_LEFT_OUT = ("pprint", "urlize", "wordwrap", "xmlattr")
"""Filters that no chat needs and that are hard to foresee."""


class TooMuch(TemplateError):
    """A template wants more than it may have."""


class Environment(ImmutableSandboxedEnvironment):
    """A sandbox with what transformers' renderer has besides Jinja's own, and with a budget."""

    intercepted_binops = frozenset(("+", "*", "**", "%"))

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _Generation])
        self._spent = threading.local()
        self.concat = self._concat
        self.globals |= {"raise_exception": _refuse, "strftime_now": _now, "namespace": _Namespace}
        del self.globals["lipsum"]
        # Jinja's own tojson escapes HTML.
        self.filters |= {"tojson": _to_json, "join": _join, "sum": _sum}
        self.filters = {name: self._bounded(name, f) for name, f in self.filters.items() if name not in _LEFT_OUT}
        self.filters |= {"_steps": self._steps, "_made": self._made, "_cut": self._cut}

    def compiled(self, source: str) -> Template:
        """A template's program.

        Raises:
            Exception: Any, from a template that is none.
        """
        self._begin()
        return self.from_string(source)

    def run(self, template: Template, variables: Mapping[str, Any]) -> str:
        """What a template makes of its variables.

        Raises:
            Exception: Any, from the template.
        """
        self._begin()
        return template.render(variables)

    def _begin(self) -> None:
        self._spent.left, self._spent.deadline = MOST, time.monotonic() + SECONDS

    def _spend(self, amount: int) -> None:
        self._spent.left -= amount
        if self._spent.left < 0 or time.monotonic() > self._spent.deadline:
            raise TooMuch(f"it takes more than {SECONDS:g} seconds or makes more than {MOST:,} characters")

    def _made(self, value: Any) -> Any:
        """Spends what a value takes; refuses what would be too long in print, such as lists that hold another often."""
        if isinstance(value, str | bytes):
            self._spend(len(value))
        elif isinstance(value, list | tuple | dict):
            self._spend(_ELEMENT * len(value))
            _printed(value)
        return value

    def _cut(self, value: Any) -> Any:
        self._spend(len(value) if hasattr(value, "__len__") else 1)
        return value

    def _steps(self, values: Iterable[Any]) -> Iterator[Any]:
        for value in values:
            self._spend(1)
            yield value

    def _concat(self, parts: Iterable[str]) -> str:
        kept = []
        for part in parts:
            self._spend(len(part))
            kept.append(part)
        return "".join(kept)

    def _bounded(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """A filter that spends what it makes."""
        skipped = 1 if hasattr(function, "jinja_pass_arg") else 0  # an environment or a context, and then the value

        @functools.wraps(function)
        def bounded(*args: Any, **kwargs: Any) -> Any:
            given = args[skipped:]
            if given and name not in ("default", "d"):
                self._foresee(name, given[0], given[1:], kwargs)
            return self._made(function(*args, **kwargs))

        return bounded

    def _foresee(self, name: str, value: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Spends what a filter or a method is going to make of a value, where it may be much."""
        given = [*args, *kwargs.values()]
        widths = [abs(arg) for arg in given if isinstance(arg, int)]
        if max(widths, default=0) > _MOST_WIDTH:
            raise TooMuch(f"{name} with {max(widths)} is too much")
        texts = [len(arg) for arg in given if isinstance(arg, str | bytes)]
        amount = 1
        if name in ("list", "sort", "batch", "slice", "unique", "reverse") and hasattr(value, "__len__"):
            amount = _ELEMENT * len(value)
        elif not isinstance(value, str | bytes):
            amount = 1
        elif name in ("indent", "expandtabs"):
            newline, tab = ("\n", "\t") if isinstance(value, str) else (b"\n", b"\t")
            amount = (1 + value.count(newline) + value.count(tab)) * max([8, *widths, *texts])  # type: ignore[arg-type]
        elif name == "replace" and len(given) > 1 and isinstance(given[0], type(value)) and len(texts) > 1:
            amount = value.count(given[0]) * texts[1]
        elif name in ("split", "rsplit", "splitlines"):
            known = bool(given) and isinstance(given[0], type(value)) and bool(given[0])
            amount = _ELEMENT * (value.count(given[0]) if known else len(value) // 2)
        elif name == "join" and given:
            parts = given[0] if hasattr(given[0], "__len__") else ()
            amount = len(value) * len(parts) + _printed(list(parts))
        elif name in ("format", "format_map", "%"):
            fields = value.count("%" if isinstance(value, str) else b"%") + str(value).count("{")  # type: ignore[arg-type]
            if _WIDE.search(str(value)):
                raise TooMuch("a format with wide fields is too much")
            amount = len(value) + fields * (_MOST_WIDTH + _printed(given))
        elif name == "translate":
            raise TooMuch("translate may make too much")
        self._spend(amount)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """An operator that may make much of little."""
        self._spend(1)
        if operator == "%" and isinstance(left, str | bytes):
            self._foresee("%", left, (list(right) if isinstance(right, tuple) else right,), {})
        elif isinstance(left, int | float) and isinstance(right, int | float):
            ints = isinstance(left, int) and isinstance(right, int)
            factor = right if operator == "**" else 1
            if ints and operator in ("*", "**") and (left.bit_length() + 1) * max(factor, 1) > _MOST_WIDTH:  # type: ignore[union-attr]
                raise TooMuch("a number is too large")
        elif operator == "*":
            times, value = (left, right) if isinstance(left, int) else (right, left)
            if isinstance(times, int) and hasattr(value, "__len__"):
                self._spend((1 if isinstance(value, str | bytes) else _ELEMENT) * len(value) * max(times, 0))
        elif operator == "+" and hasattr(left, "__len__") and hasattr(right, "__len__"):
            self._spend(len(left) + len(right))
        return self._made(super().call_binop(context, operator, left, right))

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805 - Jinja's way
        """A call, of a text's method among others."""
        of = getattr(__obj, "__self__", None)
        __self._spend(1)
        _printed([args, kwargs])  # a macro finds them as values
        if isinstance(of, str | bytes | int):
            if __obj.__name__ == "join" and args:
                args = (list(__self._steps(args[0])), *args[1:])
            __self._foresee(__obj.__name__, of, args, kwargs)
        return __self._made(super().call(__context, __obj, *args, **kwargs))

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """The sandbox's own `format` of a text, which calls of it reach by other ways than `call` too."""
        safe = super().wrap_str_format(value)
        if safe is None:
            return None

        @functools.wraps(safe)
        def bounded(*args: Any, **kwargs: Any) -> str:
            self._foresee("format", value.__self__, args, kwargs)
            text: str = self._made(safe(*args, **kwargs))
            return text

        return bounded

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree: nodes.Template = _Budgeted().visit(super()._parse(source, name, filename))
        return tree


class _Budgeted(NodeTransformer):
    """Puts filters of ours where a program makes loops and values without calling anything."""

    def visit_For(self, node: nodes.For) -> Node:  # noqa: N802 - Jinja's way
        self.generic_visit(node)
        node.iter = _filtered(node.iter, "_steps")
        return node

    def visit_Concat(self, node: nodes.Concat) -> Node:  # noqa: N802
        self.generic_visit(node)
        return _filtered(nodes.List(node.nodes, lineno=node.lineno), "join")

    def visit_Getitem(self, node: nodes.Getitem) -> Node:  # noqa: N802
        self.generic_visit(node)
        return _filtered(node, "_cut") if isinstance(node.arg, nodes.Slice) else node

    def visit_List(self, node: nodes.List) -> Node:  # noqa: N802
        self.generic_visit(node)
        return _filtered(node, "_made")

    def visit_Dict(self, node: nodes.Dict) -> Node:  # noqa: N802
        self.generic_visit(node)
        return _filtered(node, "_made")

    def visit_Tuple(self, node: nodes.Tuple) -> Node:  # noqa: N802
        self.generic_visit(node)
        return _filtered(node, "_made") if node.ctx == "load" else node


def _filtered(node: nodes.Expr, name: str) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


def _printed(value: Any) -> int:
    """Characters of a value when it is printed, roughly.

    Raises:
        TooMuch: More than a rendering may make, or more parts.
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
            raise TooMuch(f"a value has more than {MOST:,} characters or {_MOST_PARTS:,} parts")
    return amount


class _Namespace(Namespace):
    """Jinja's, which printed what it holds, and thus without end what holds others."""

    def __repr__(self) -> str:
        return "<namespace>"


class _Generation(Extension):
    """`{% generation %}`, between which and its end fine-tuning says what is learnt: no difference here."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> list[Node]:
        """The statements in between."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _refuse(message: str) -> None:
    raise TemplateError(message)


def _now(form: str) -> str:
    return datetime.datetime.now().strftime(form)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    text = json.dumps(value, ensure_ascii=False, indent=indent, separators=separators, sort_keys=sort_keys)
    # Written out, what stands for a hidden character would be lost.
    return _NOT_ASCII.sub(lambda found: json.dumps(found[0])[1:-1], text) if ensure_ascii else text


@pass_environment
def _join(environment: Environment, value: Iterable[Any], d: str = "", attribute: str | int | None = None) -> str:
    """Jinja's filter, in steps."""
    get = make_attrgetter(environment, attribute) if attribute is not None else lambda it: it
    texts = [environment._made(str(get(it))) for it in environment._steps(value)]
    environment._spend(len(texts) * len(d))
    return d.join(texts)


@pass_environment
def _sum(environment: Environment, iterable: Iterable[Any], attribute: str | int | None = None, start: Any = 0) -> Any:
    """Jinja's filter, in steps."""
    get = make_attrgetter(environment, attribute) if attribute is not None else lambda it: it
    total = start
    for it in environment._steps(iterable):
        total = environment.call_binop(None, "+", total, get(it))  # type: ignore[arg-type]
    return total
