"""Parses tool calls in Gemma 4's format, `call:name{key:value,...}` between the tool call tokens.

Values are written as in JSON, except that strings stand between quote tokens, without escapes, and that keys have no
quotes. Models also write other forms, so the parser accepts strings and constants of JSON and Python, arguments in
parentheses, a string after "=", a trailing comma, and several calls in one block. It refuses strings without quotes,
whose end is ambiguous, and incomplete calls; it never completes one.

Not here: writing calls into a prompt, which the chat template does.
"""

from __future__ import annotations

import json
import re
from array import array
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from hashlib import blake2b
from math import isfinite
from typing import Any, NamedTuple

from ..errors import PromptError
from ..files import parse_json

CALL, CALL_END, QUOTE = "<|tool_call>", "<tool_call|>", '<|"|>'

QUOTE_MARK = "\ud800"
"""Stands for the quote token in the input of `parse_calls`. It is a lone surrogate, which decoded text can't contain:
so the quote token's name in a string (a quoted web page, for example) doesn't end the string."""

# The characters that Google's grammar allows in names. A parenthesis may belong to the name or begin the arguments.
_NAMED = re.compile(r"""\s*call:((?:(?!(?<![\w:])call:)[\w\s:'"/\\.()-])+)(?=\{)""")
_NAMED_BEFORE_PARENTHESIS = re.compile(r"""\s*call:([\w\s:'"/\\.-]+)(?=\()""")
_BETWEEN_CALLS = re.compile(r"[\s,;]*")
_SPACE = re.compile(r"\s*")
_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?")
_SURROGATE = re.compile("[\ud800-\udfff]")
_STRINGS = {mark: re.compile(rf"{mark}((?:[^{mark}\\]|\\.)*){mark}", re.DOTALL) for mark in "\"'"}
_WORDS = {"true": True, "false": False, "null": None, "True": True, "False": False, "None": None}
_WORD = re.compile(r"[A-Za-z]+")

_DEEPEST = 50
"""Deepest nesting of values: more than tools need, and safe for Python's stack."""


class _Fields(NamedTuple):
    """Syntax of a list of fields: the pattern of unquoted keys, and the closing bracket."""

    key: re.Pattern[str]
    end: str


# In braces, where the chat format has colons, a key may hold "=", unless a string follows the "=".
_IN_BRACES = _Fields(re.compile(rf"(?:[^:={{}}\[\],{QUOTE_MARK}]|=(?!\s*[\"'{QUOTE_MARK}]))+"), "}")
_IN_PARENTHESES = _Fields(re.compile(rf"[^:=(){{}}\[\],{QUOTE_MARK}]+"), ")")
_SEPARATOR = re.compile(r"\s*[:=]")


def parse_calls(text: str, closed: bool = False) -> list[tuple[str, dict[str, Any]]]:
    """Parses the text between the tool call tokens: one or more calls. Takes time linear in its length.

    Args:
        text: The text, with QUOTE_MARK for the quote token.
        closed: Whether the closing token follows. Then the last bracket may be missing, if the value before it is
            complete.

    Returns:
        Pairs of name and arguments.

    Raises:
        ValueError: The text isn't a call or isn't complete; the message says why.
    """
    calls: list[tuple[str, dict[str, Any]]] = []
    at = 0
    while at < len(text):
        head, other = _NAMED.match(text, at), _NAMED_BEFORE_PARENTHESIS.match(text, at)
        first = head or other
        if not first:
            raise ValueError("something follows the call" if calls else "it doesn't begin like call:name{")
        if head and other and head[1].count("(") != head[1].count(")"):
            # An unbalanced parenthesis begins the arguments, or, if they can't be parsed that way, belongs to the name.
            with suppress(ValueError):
                call, at = _call(text, other, closed)
                calls.append(call)
                continue
        call, at = _call(text, first, closed)
        calls.append(call)
    if not calls:
        raise ValueError("it is empty")
    return calls


class CallIds:
    """Ids for the calls of an answer: hashes of the prompt, the text of the calls and their number.

    The same calls after the same prompt have the same ids. Within a conversation ids differ, because every turn has a
    longer prompt.
    """

    def __init__(self, prompt: Sequence[int]) -> None:
        """Takes the token ids of the prompt."""
        self._prompt, self._count = prompt, 0

    def of(self, written: str, count: int) -> list[str]:
        """Ids for the next calls, in time linear in the length of their text.

        Args:
            written: The text of the calls.
            count: The number of calls in it.
        """
        self._so_far.update(f"{len(written)} {written}".encode())
        ids = []
        for _ in range(count):
            self._count += 1
            digest = self._so_far.copy()
            digest.update(f" {self._count}".encode())
            ids.append(f"call_{digest.hexdigest()}")
        return ids

    @cached_property
    def _so_far(self) -> blake2b:
        return blake2b(array("q", self._prompt).tobytes(), digest_size=8)


def read_arguments(value: Any) -> Mapping[str, Any] | None:
    """Arguments of a call in a message as a dict; None if they can't be read.

    Args:
        value: A mapping, the JSON text of one (the form of OpenAI's clients), or None or "" for no arguments.
    """
    if value is None or value == "":
        return {}
    if isinstance(value, str):
        try:
            value = parse_json(value, parse_float=_finite, parse_constant=_finite)
        except ValueError:
            return None
    return value if isinstance(value, Mapping) else None


class Tools:
    """Declared tools, against which calls are checked.

    Arguments must fit a tool's JSON schema. Unambiguous differences of form are corrected: a number or a boolean in a
    string where the schema wants the value, an integer written as 3.0, and a name with a namespace ("google:mcp:pdf"
    for "pdf"). A tool whose schema is invalid, for example with types in capitals, accepts any arguments.
    """

    def __init__(self, declared: Sequence[Mapping[str, Any]]) -> None:
        """Takes tool declarations.

        Args:
            declared: Declarations as in OpenAI's interface: {"type": "function", "function": {...}}, or only the
                inner dict.

        Raises:
            PromptError: A declaration has another form, or a name that can't be read from a call.
        """
        if not isinstance(declared, Sequence) or not all(isinstance(tool, Mapping) for tool in declared):
            raise PromptError('tools must be a list of dicts like {"type": "function", "function": {...}}')
        functions = [tool.get("function", tool) for tool in declared]
        for function in functions:
            if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
                raise PromptError('a tool is a dict like {"type": "function", "function": {"name": "...", ...}}')
            if not _readable(function["name"]):
                raise PromptError(f"{function['name']!r} can't be a tool's name: use letters, digits, _, - and .")
        self._parameters = {function["name"]: function.get("parameters") for function in functions}

    def fitted(self, name: str, arguments: dict[str, Any]) -> tuple[str, dict[str, Any]]:
        """A call with its name and arguments corrected, see the class.

        Raises:
            ValueError: There is no such tool, or the arguments don't fit; the message says why.
        """
        if name not in self._parameters:
            meant = [declared for declared in self._parameters if name.endswith(f":{declared}")]
            if len(meant) != 1:
                raise ValueError(f"there is no tool {name!r}")
            name = meant[0]
        if not (validator := self._validators[name]):
            return name, arguments
        from jsonschema.exceptions import best_match

        try:
            arguments = _fitted(arguments, validator.schema)
            error = best_match(validator.iter_errors(arguments))
        except Exception as failure:  # references that are unresolvable or circular
            raise ValueError(f"the schema of {name} can't be used: {type(failure).__name__}") from failure
        if error:
            place = "".join(f"[{part!r}]" for part in error.absolute_path)
            raise ValueError(f"arguments{place}: {error.message}")
        return name, arguments

    @cached_property
    def _validators(self) -> dict[str, Any]:
        """Validators by tool name; None for tools without a valid schema."""
        from jsonschema import Draft202012Validator
        from jsonschema.validators import validator_for
        from referencing import Registry

        validators: dict[str, Any] = {}
        for name, schema in self._parameters.items():
            validators[name] = None
            if isinstance(schema, Mapping):
                try:
                    kind = validator_for(schema, default=Draft202012Validator)
                    kind.check_schema(dict(schema))
                except Exception:  # noqa: S112 - an invalid schema may raise anything, and isn't an error here
                    continue
                # With an empty registry, schemas that are referred to by URL are never fetched.
                validators[name] = kind(schema, registry=Registry())
        return validators


def _fitted(value: Any, schema: Any) -> Any:
    """A value with its form corrected to a valid schema, see `Tools`."""
    if not isinstance(schema, Mapping):
        return value
    if isinstance(value, dict):
        fields = schema.get("properties", {})
        return {key: _fitted(item, fields.get(key)) for key, item in value.items()}
    if isinstance(value, list):
        return [_fitted(item, schema.get("items")) for item in value]
    kinds = schema.get("type", ())
    kind = {kinds} if isinstance(kinds, str) else set(kinds) - {"null"}
    if isinstance(value, str) and kind in ({"integer"}, {"number"}) and _NUMBER.fullmatch(value):
        with suppress(ValueError):
            value = _number(value)
    elif isinstance(value, str) and kind == {"boolean"}:
        value = {"true": True, "false": False}.get(value.lower(), value)
    if isinstance(value, float) and kind == {"integer"} and value.is_integer():
        value = int(value)
    return value


def _call(text: str, head: re.Match[str], closed: bool) -> tuple[tuple[str, dict[str, Any]], int]:
    """Parses a call after its name; returns the call and the index after it."""
    reader = _Reader(text, head.end(), closed)
    arguments = reader.arguments()
    between = _BETWEEN_CALLS.match(text, reader.at)
    assert between is not None
    return (_unquoted(head[1].strip()), arguments), between.end()


def _readable(name: str) -> bool:
    """Whether `parse_calls` finds a tool's name in a call of it."""
    with suppress(ValueError):
        return parse_calls(f"call:{name}{{}}") == [(name, {})]
    return False


def _unquoted(name: str) -> str:
    quoted = len(name) > 2 and name[0] == name[-1] and name[0] in "\"'"
    return name[1:-1] if quoted else name


def _number(text: str) -> int | float:
    return _finite(text) if set(text) & set(".eE") else int(text)


def _shown(text: str, at: int = 0) -> str:
    """A short piece of the text, for messages."""
    return repr(text[at : at + 30].replace(QUOTE_MARK, QUOTE))


def _finite(text: str) -> float:
    if not isfinite(value := float(text)):
        raise ValueError(f"{text} is too large for a number")
    return value


class _Reader:
    """A recursive-descent parser of values at a moving index; raises ValueError where the text doesn't fit.

    Attributes:
        text: The text.
        at: Index of the next character.
    """

    def __init__(self, text: str, at: int, closed: bool) -> None:
        self.text, self.at, self._closed, self._depth = text, at, closed, 0

    def arguments(self) -> dict[str, Any]:
        """Parses the fields in braces or parentheses."""
        fields = _IN_BRACES if self._skip("{") else _IN_PARENTHESES
        self._skip("(")
        return self._fields(fields)

    def value(self) -> Any:
        """Parses a value."""
        self._match(_SPACE)
        if self._skip("{"):
            return self._inside(lambda: self._fields(_IN_BRACES))
        if self._skip("["):
            return self._inside(lambda: self._items("]", self.value))
        if (string := self._string()) is not None:
            return string
        if number := self._match(_NUMBER):
            return _number(number)
        if (word := self._match(_WORD)) in _WORDS:
            return _WORDS[word]
        raise ValueError(f"there is no value at {_shown(self.text, self.at)}")

    def _inside(self, read: Callable[[], Any]) -> Any:
        self._depth += 1
        if self._depth > _DEEPEST:
            raise ValueError(f"its values are nested more than {_DEEPEST} deep")
        value = read()
        self._depth -= 1
        return value

    def _fields(self, form: _Fields) -> dict[str, Any]:
        def field() -> tuple[str, Any]:
            key = self._string()
            if key is None:
                key = (self._match(form.key) or "").strip()
            if self._match(_SEPARATOR) is None:
                raise ValueError(f"there is no argument at {_shown(self.text, self.at)}")
            return key, self.value()

        return dict(self._items(form.end, field))

    def _items(self, end: str, read: Callable[[], Any]) -> list[Any]:
        items: list[Any] = []
        while True:
            self._match(_SPACE)
            if self._skip(end):
                return items
            if self.at >= len(self.text):
                raise ValueError("it isn't complete")
            items.append(read())
            self._match(_SPACE)
            if self._skip(",") or self.text.startswith(end, self.at):
                continue
            if self.at < len(self.text):
                raise ValueError(f"there is no comma before {end}")
            if self._closed and self._depth == 0:
                return items

    def _string(self) -> str | None:
        """Parses a string in any of the accepted quotes; None if there is no quote here."""
        if self._skip(QUOTE_MARK):
            begin, end = self.at, self.text.find(QUOTE_MARK, self.at)
            if end < 0:
                raise ValueError("a string has no end")
            self.at = end + 1
            return self.text[begin:end]
        mark = self.text[self.at : self.at + 1]
        if mark not in _STRINGS:
            return None
        found = _STRINGS[mark].match(self.text, self.at)
        if not found:
            raise ValueError("a string has no end")
        self.at = found.end()
        inner = found[1]
        if mark == "'":
            inner = re.sub(r"\\(.)|\"", lambda m: m[0] if m[1] not in (None, "'") else m[1] or '\\"', inner)
        try:
            string = str(json.loads(f'"{inner}"', strict=False))
        except ValueError:
            raise ValueError(f"a string has escapes that JSON doesn't have: {_shown(found[0])}") from None
        if _SURROGATE.search(string):
            raise ValueError(f"a string has half a character or another quote: {_shown(found[0])}")
        return string

    def _match(self, pattern: re.Pattern[str]) -> str | None:
        found = pattern.match(self.text, self.at)
        if found:
            self.at = found.end()
        return found[0] if found else None

    def _skip(self, token: str) -> bool:
        """Skips a token if it is next; returns whether it was."""
        if self.text.startswith(token, self.at):
            self.at += len(token)
            return True
        return False
