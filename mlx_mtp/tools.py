"""Tool calls as Gemma 4 writes them: `call:name{key:value,...}` between the tool call tokens.

Values are JSON's, except that strings stand between quote tokens, unescaped, and that keys are bare. Models slip into
what they have seen elsewhere, so that JSON's and Python's strings and constants, arguments in parentheses, a comma too
many and several calls in one block are read as well. What is not complete is no call: nothing is ever made up.

How calls are put into a prompt is the chat template's business.
"""

from __future__ import annotations

import json
import re
from array import array
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from hashlib import blake2b
from math import isinf
from typing import Any

from .errors import PromptError

CALL, CALL_END, QUOTE = "<|tool_call>", "<tool_call|>", '<|"|>'

# The characters of names in Google's grammar. Parentheses may be part of a name, or stand around the arguments.
_NAMED = re.compile(r"""\s*call:((?:(?!\bcall:)[\w\s:'"/\\.()-])+)(?=\{)""")
_NAMED_BEFORE_PARENTHESIS = re.compile(r"""\s*call:([\w\s:'"/\\.-]+)(?=\()""")
_BETWEEN_CALLS = re.compile(r"[\s,;]*")
_SPACE = re.compile(r"\s*")
_KEYS = {":": re.compile(r"[^:{}\[\],]+"), "=:": re.compile(r"[^:=(){}\[\],]+")}
"""Bare keys, by what may follow them: in braces, as the chat format has them, and in parentheses."""
_NUMBER = re.compile(r"-?\d+(\.\d+)?([eE][+-]?\d+)?")
_STRINGS = {mark: re.compile(rf"{mark}((?:[^{mark}\\]|\\.)*){mark}", re.DOTALL) for mark in "\"'"}
_WORDS = {"true": True, "false": False, "null": None, "True": True, "False": False, "None": None}
_WORD = re.compile(r"[A-Za-z]+")

_DEEPEST = 50
"""Values within values: more than any tool has, and less than Python's own stack has room for."""


def parse_calls(text: str) -> list[tuple[str, dict[str, Any]]]:
    """Reads what stands between the tool call tokens: names and arguments, of one call or more.

    Takes time that is linear in the text's length.

    Raises:
        ValueError: It is something else, or not complete; the message says in which way.
    """
    calls: list[tuple[str, dict[str, Any]]] = []
    at = 0
    while at < len(text):
        head, other = _NAMED.match(text, at), _NAMED_BEFORE_PARENTHESIS.match(text, at)
        first = head or other
        if not first:
            raise ValueError("something follows the call" if calls else "it doesn't begin like call:name{")
        if head and other and head[1].count("(") != head[1].count(")"):
            # One that is open belongs to the arguments, if these can be read so, or else to an odd name.
            with suppress(ValueError):
                call, at = _call(text, other)
                calls.append(call)
                continue
        call, at = _call(text, first)
        calls.append(call)
    if not calls:
        raise ValueError("it is empty")
    return calls


def call_id(prompt: Sequence[int], position: int, text: str) -> str:
    """The id of a call: the same for the same text after the same prompt, else another.

    Args:
        prompt: Token ids of the prompt, which is longer in every turn of a conversation.
        position: How many calls of the answer come before it.
        text: How the model wrote it.
    """
    digest = blake2b(array("q", prompt).tobytes(), digest_size=8)
    digest.update(f"{position} {text}".encode())
    return f"call_{digest.hexdigest()}"


def read_arguments(value: Any) -> Mapping[str, Any] | None:
    """Arguments of a call in a message: a dict, or JSON's text of one as OpenAI's clients send it; None for neither."""
    if value is None or value == "":
        return {}
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return None
    return value if isinstance(value, Mapping) else None


class Tools:
    """Declared tools, which calls are checked against.

    Arguments must fit a tool's JSON schema. A schema that isn't valid itself, such as one with types in capitals, is
    shown to the model but can't be checked against.
    """

    def __init__(self, declared: Sequence[Mapping[str, Any]]):
        """Takes tools as in OpenAI's interface: {"type": "function", "function": {...}}, or what is inside.

        Raises:
            PromptError: They are none.
        """
        if not isinstance(declared, Sequence) or not all(isinstance(tool, Mapping) for tool in declared):
            raise PromptError('tools must be a list of dicts like {"type": "function", "function": {...}}')
        functions = [tool.get("function", tool) for tool in declared]
        for function in functions:
            if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
                raise PromptError('a tool is a dict like {"type": "function", "function": {"name": "...", ...}}')
        self._parameters = {function["name"]: function.get("parameters") for function in functions}

    def check(self, name: str, arguments: Mapping[str, Any]) -> None:
        """Checks a call.

        Raises:
            ValueError: There is no such tool, or the arguments don't fit.
        """
        if name not in self._parameters:
            raise ValueError(f"there is no tool {name!r}")
        if validator := self._validators[name]:
            from jsonschema.exceptions import best_match

            try:
                error = best_match(validator.iter_errors(arguments))
            except Exception as failure:  # references that lead nowhere, or to themselves
                raise ValueError(f"the schema of {name} can't be used: {type(failure).__name__}") from failure
            if error:
                place = "".join(f"[{part!r}]" for part in error.absolute_path)
                raise ValueError(f"arguments{place}: {' '.join(error.message.split())[:200]}")

    @cached_property
    def _validators(self) -> dict[str, Any]:
        """By name; None where there is nothing to check against."""
        from jsonschema import Draft202012Validator
        from jsonschema.exceptions import SchemaError
        from referencing import Registry

        validators: dict[str, Any] = {}
        for name, schema in self._parameters.items():
            validators[name] = None
            if isinstance(schema, Mapping):
                try:
                    Draft202012Validator.check_schema(schema)
                except (SchemaError, RecursionError):
                    continue
                # A registry of its own: schemas that are named by an address are never fetched.
                validators[name] = Draft202012Validator(schema, registry=Registry())
        return validators


def _call(text: str, head: re.Match[str]) -> tuple[tuple[str, dict[str, Any]], int]:
    """A call after its name, and where the next one may begin."""
    reader = _Reader(text, head.end())
    arguments = reader.arguments()
    between = _BETWEEN_CALLS.match(text, reader.at)
    assert between is not None
    return (_unquoted(head[1].strip()), arguments), between.end()


def _unquoted(name: str) -> str:
    quoted = len(name) > 2 and name[0] == name[-1] and name[0] in "\"'"
    return name[1:-1] if quoted else name


class _Reader:
    """Reads values from a text, from a place that moves on. A ValueError says that there is none."""

    def __init__(self, text: str, at: int):
        self.text, self.at, self._depth = text, at, 0

    def arguments(self) -> dict[str, Any]:
        """What stands in braces or parentheses."""
        mark, end = (":", "}") if self._skip("{") else ("=:", ")")
        self._skip("(")
        return dict(self._items(end, lambda: self._field(mark)))

    def value(self) -> Any:
        """A value and all that is in it."""
        self._match(_SPACE)
        if self._skip("{"):
            return self._inside(lambda: dict(self._items("}", lambda: self._field(":"))))
        if self._skip("["):
            return self._inside(lambda: self._items("]", self.value))
        if (string := self._string()) is not None:
            return string
        if number := self._match(_NUMBER):
            if not set(number) & set(".eE"):
                return int(number)
            if isinf(value := float(number)):
                raise ValueError(f"{number} is more than JSON's readers take for a number")
            return value
        if (word := self._match(_WORD)) in _WORDS:
            return _WORDS[word]
        raise ValueError(f"there is no value at {self.text[self.at : self.at + 20]!r}")

    def _inside(self, read: Callable[[], Any]) -> Any:
        self._depth += 1
        if self._depth > _DEEPEST:
            raise ValueError(f"it has more than {_DEEPEST} values within each other")
        value = read()
        self._depth -= 1
        return value

    def _field(self, marks: str) -> tuple[str, Any]:
        key = self._string()
        if key is None:
            key = (self._match(_KEYS[marks]) or "").strip()
        self._match(_SPACE)
        if not any(self._skip(mark) for mark in marks):
            raise ValueError(f"there is no argument at {self.text[self.at : self.at + 20]!r}")
        return key, self.value()

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
            if not self._skip(",") and not self.text.startswith(end, self.at):
                raise ValueError(
                    "it isn't complete" if self.at >= len(self.text) else f"there is no comma before {end}"
                )

    def _string(self) -> str | None:
        """A string in any of the ways it may be quoted; None if there is none."""
        if self._skip(QUOTE):
            begin, end = self.at, self.text.find(QUOTE, self.at)
            if end < 0:
                raise ValueError("a string has no end")
            self.at = end + len(QUOTE)
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
        return str(json.loads(f'"{inner}"', strict=False))

    def _match(self, pattern: re.Pattern[str]) -> str | None:
        found = pattern.match(self.text, self.at)
        if found:
            self.at = found.end()
        return found[0] if found else None

    def _skip(self, token: str) -> bool:
        """Passes over a token; over nothing if it isn't there."""
        if self.text.startswith(token, self.at):
            self.at += len(token)
            return True
        return False
