"""Runs chat templates, which are untrusted programs, with bounded time and memory.

Jinja's sandbox keeps templates away from everything but their variables. This module adds a budget of characters and
list elements for each rendering. Every loop step, call, filter, test, comparison and operator is charged for what it
reads and makes; where a small input can give a large result, or take long, it is charged beforehand
(template_costs.py). So every single step is bounded. The time limit is checked between steps: a rendering ends at most
one step after it. It counts the processor's time, so a busy machine makes no difference.
"""

from __future__ import annotations

import datetime
import functools
import json
import os
import re
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import CodeType, GeneratorType
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

from .template_costs import ELEMENT, MOST_WIDTH, BudgetError, cost_of, printed_length, size

CHARACTERS, CHARACTERS_EACH = 1 << 23, 32
"""Budget of a rendering, in characters, and more for each character of the conversation: Gemma 4's template copies each
about ten times."""

SECONDS, SECONDS_A_PAIR, MOST_SECONDS = 1.0, 2e-6, 10.0
"""Time limit of a rendering: for a short conversation, which takes milliseconds; more for each pair of messages, since
Gemma 4's template looks back from each message at those before it; and at most."""

LONGEST_TEMPLATE = 1 << 17
"""Longest template, in characters: Gemma 4's has 17,000, and Jinja takes 5 microseconds to compile each."""

_LOOK_SECONDS = 0.005
"""How often the processor's time is asked for, which takes much longer than to ask for the clock's."""

_NOT_ASCII = re.compile("[^\x00-\x7f\ud800-\udfff]")

_REMOVED_FILTERS = ("pprint", "striptags", "urlize", "wordwrap", "xmlattr")
"""Filters that chats don't need, and whose results or times are hard to bound beforehand."""


class Budget:
    """What a rendering may still spend."""

    def __init__(self, conversation: Sequence[Any] = (), tools: Any = None) -> None:
        """A budget for a conversation of these messages and tools."""
        characters = printed_length([conversation, tools])
        self._all = self.left = CHARACTERS + CHARACTERS_EACH * characters
        self._seconds = min(SECONDS + SECONDS_A_PAIR * len(conversation) ** 2, MOST_SECONDS)
        self._end, self._look = time.thread_time() + self._seconds, 0.0

    def spend(self, amount: int) -> None:
        """Takes something from the budget, in characters.

        Raises:
            BudgetError: It isn't there, or the time is over.
        """
        self.left -= amount
        if self.left < 0:
            raise BudgetError(f"it makes more than {self._all:,} characters")
        if (now := time.monotonic()) > self._look:
            self._look = now + _LOOK_SECONDS
            if time.thread_time() > self._end:
                raise BudgetError(f"it takes more than {self._seconds:.1f} seconds")


class Environment(ImmutableSandboxedEnvironment):
    """A sandbox with the extensions of transformers' renderer, and with a budget."""

    intercepted_binops = frozenset(("+", "*", "**", "%"))

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _Generation])
        self._local = threading.local()
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
            "_read": self._read,
        }
        self.tests = {name: self._bounded_test(test) for name, test in self.tests.items()}

    def compiled(self, source: str) -> Template:
        """Compiles a template.

        Raises:
            BudgetError: It is too long, or what it computes from constants exceeds the budget.
            Exception: Any, if the template is malformed.
        """
        if len(source) > LONGEST_TEMPLATE:
            raise BudgetError(f"it has more than {LONGEST_TEMPLATE:,} characters")
        self._local.budget = Budget()
        return self.from_string(source)

    def run(self, template: Template, variables: Mapping[str, Any]) -> str:
        """Renders a template.

        Args:
            template: As `compiled` returns it.
            variables: Its variables, "messages" and "tools" among them.

        Raises:
            BudgetError: It exceeds its budget.
            Exception: Any, raised by the template.
        """
        self._local.budget = Budget(variables["messages"], variables["tools"])
        return template.render(variables)

    def _spend(self, amount: int) -> None:
        self._local.budget.spend(amount)

    def _charged(self, value: Any) -> Any:
        """Charges for a value; refuses one that would be too long in print, such as nested lists of repeated lists."""
        if isinstance(value, str | bytes):
            self._spend(len(value))
        elif isinstance(value, list | tuple | dict):
            self._spend(ELEMENT * len(value))
            printed_length(value, self._local.budget.left)
        elif isinstance(value, GeneratorType):
            return self._charged_steps(value)
        return value

    def _read(self, value: Any) -> Any:
        """Charges for reading a value."""
        self._spend(size(value))
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
        """A filter that is charged beforehand, and for its result."""
        skipped = 1 if hasattr(function, "jinja_pass_arg") else 0  # the environment or context before the value

        @functools.wraps(function)
        def bounded(*args: Any, **kwargs: Any) -> Any:
            given = args[skipped:]
            if given and name not in ("default", "d"):
                self._charge_ahead(name, given[0], given[1:], kwargs)
            return self._charged(function(*args, **kwargs))

        return bounded

    def _bounded_test(self, test: Any) -> Any:
        """A test that is charged for what it reads: filters can apply it to many values in one step."""

        @functools.wraps(test)
        def bounded(*args: Any, **kwargs: Any) -> Any:
            self._spend(sum(map(size, args)))
            return test(*args, **kwargs)

        return bounded

    def _charge_ahead(self, name: str, value: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Charges beforehand for a filter or a method."""
        self._spend(cost_of(name, value, [*args, *kwargs.values()], self._local.budget.left))

    def getattr(self, obj: Any, attribute: str) -> Any:
        """An attribute, or an item, of a value.

        Jinja's own is slow for namespaces, which templates ask again and again as they look back over a conversation.
        """
        if type(obj) is _Namespace and not attribute.startswith("_"):
            values = object.__getattribute__(obj, "_Namespace__attrs")
            if attribute in values:
                return values[attribute]
        return super().getattr(obj, attribute)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Evaluates an operator whose result may be much larger than its operands."""
        self._spend(1)
        if operator == "%" and isinstance(left, str | bytes):
            self._charge_ahead("%", left, (list(right) if isinstance(right, tuple) else right,), {})
        elif isinstance(left, int | float) and isinstance(right, int | float):
            if isinstance(left, int) and isinstance(right, int) and operator in ("*", "**"):
                power = max(right, 1) if operator == "**" else 1
                if (left.bit_length() + 1) * power > MOST_WIDTH:
                    raise BudgetError("a number is too large")
        elif operator == "*":
            times, value = (left, right) if isinstance(left, int) else (right, left)
            if isinstance(times, int) and hasattr(value, "__len__"):
                self._spend((1 if isinstance(value, str | bytes) else ELEMENT) * len(value) * max(times, 0))
        elif operator == "+" and hasattr(left, "__len__") and hasattr(right, "__len__"):
            self._spend(len(left) + len(right))
        return self._charged(super().call_binop(context, operator, left, right))

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805 - Jinja's way
        """Calls a macro, a function, or a method of a value."""
        owner = getattr(__obj, "__self__", None)
        __self._spend(1)
        printed_length([args, kwargs], __self._local.budget.left)  # a macro can print them
        if isinstance(owner, str | bytes | int | list | tuple):
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

    def _compile(self, source: str, filename: str) -> CodeType:  # noqa: ARG002 - a hook of Jinja
        """Compiles what Jinja has written, without Python's warnings: only a template's author could heed them.

        The code is said to come from a file without lines: for an error's message, Python would read `filename`.
        """
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=SyntaxWarning, module=re.escape(os.devnull))
            return super()._compile(source, os.devnull)

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
        return _filtered(node, "_read") if isinstance(node.arg, nodes.Slice) else node

    def visit_Compare(self, node: nodes.Compare) -> Node:  # noqa: N802
        self.generic_visit(node)
        node.expr = _filtered(node.expr, "_read")
        for operand in node.ops:
            if operand.op in ("in", "notin"):
                operand.expr = _filtered(operand.expr, "_read")
        return node

    def visit_List(self, node: nodes.List) -> Node:  # noqa: N802
        self.generic_visit(node)
        return _filtered(node, "_charged")

    def visit_Dict(self, node: nodes.Dict) -> Node:  # noqa: N802
        self.generic_visit(node)
        return _filtered(node, "_charged")

    def visit_Tuple(self, node: nodes.Tuple) -> Node:  # noqa: N802
        self.generic_visit(node)
        return _filtered(node, "_charged") if node.ctx == "load" else node


def _filtered(node: Node, name: str) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


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
