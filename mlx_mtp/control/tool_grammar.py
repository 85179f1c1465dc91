"""The grammar of Gemma 4's tool calls, for tools that are declared: what `tool_choice` holds a model to.

    <|tool_call>call:NAME{key:value,...}<tool_call|>

Values are JSON's, but strings stand between quote tokens and keys are bare. Objects have the properties that their
schema names, in its order; those that aren't required may be left out. What a schema says beyond types, properties,
items, alternatives and constants (lengths, patterns, bounds) isn't part of the grammar: `text.tool_calls.Tools`
checks it afterwards.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import PromptError
from .endless import endless_part, referred


@dataclass(frozen=True, kw_only=True)
class CallTokens:
    """Ids of the special tokens that calls are made of.

    Attributes:
        begin: Opens a call.
        end: Closes it.
        quote: Stands on both sides of a string.
    """

    begin: int
    end: int
    quote: int


def tool_grammar(functions: Sequence[Mapping[str, Any]], tokens: CallTokens) -> str:
    """A Lark grammar, with llguidance's way of writing special tokens, of one call or more of these functions.

    Args:
        functions: Their "name" and "parameters", a JSON schema of an object.
        tokens: See there.

    Raises:
        PromptError: A reference in a schema leads nowhere, no finite value fits it, or it is nested too deeply or has
            values that aren't JSON's.
    """
    rules = _Rules(tokens)
    try:
        return _grammar(functions, rules, tokens)
    except RecursionError:
        raise PromptError("a tool's schema is nested too deeply") from None
    except TypeError as error:
        raise PromptError(f"a tool's schema isn't JSON: {error}") from None


def _grammar(functions: Sequence[Mapping[str, Any]], rules: _Rules, tokens: CallTokens) -> str:
    calls = [
        f"{_quoted('call:' + function['name'])} {rules.arguments(function.get('parameters'))}" for function in functions
    ]
    start = f"start: (<[{tokens.begin}]> ({' | '.join(calls)}) <[{tokens.end}]>)+"
    return "\n".join([start, *rules.lines, *_VALUES.format(quote=f"<[{tokens.quote}]>").splitlines()])


_VALUES = """
value: string | NUMBER | "true" | "false" | "null" | object | array
string: {quote} TEXT? {quote}
object: "{{" (field ("," field)*)? "}}"
field: KEY ":" value
array: "[" (value ("," value)*)? "]"
TEXT: /(?s:.+)/
KEY: /[A-Za-z_][A-Za-z0-9_.-]*/
NUMBER: /-?(0|[1-9][0-9]*)(\\.[0-9]+)?([eE][+-]?[0-9]+)?/
INTEGER: /-?(0|[1-9][0-9]*)/
"""
"""What any value may be, for schemas that don't say."""

_TYPES = {
    "string": "string",
    "integer": "INTEGER",
    "number": "NUMBER",
    "boolean": '("true" | "false")',
    "null": '"null"',
    "object": "object",
    "array": "array",
}


class _Rules:
    """Writes the rules of schemas."""

    def __init__(self, tokens: CallTokens) -> None:
        self.lines: list[str] = []
        self._quote = f"<[{tokens.quote}]>"
        self._root: Mapping[str, Any] = {}
        self._known: dict[str, str] = {}

    def arguments(self, schema: Any) -> str:
        """The arguments of a function; references are looked up in its schema. What isn't one allows any arguments."""
        self._root, self._known = schema if isinstance(schema, Mapping) else {}, {}
        if (endless := endless_part({"type": "object", **self._root})) is not None:
            raise PromptError(f"no call fits a tool's schema: its part {endless!r} needs itself, without an end")
        return self._of({"type": "object", **self._root})

    def _of(self, schema: Any) -> str:
        """An expression for the values that a schema allows."""
        if not isinstance(schema, Mapping):
            return "value"
        if isinstance(reference := schema.get("$ref"), str):
            return self._referred(reference)
        for way in ("anyOf", "oneOf"):
            if isinstance(schema.get(way), Sequence) and schema[way]:
                return self._any([self._of(part) for part in schema[way]])
        constants = [schema["const"]] if "const" in schema else schema.get("enum")
        if isinstance(constants, Sequence) and constants:
            return self._any([self._constant(value) for value in constants])
        kinds = schema.get("type")
        kinds = kinds if isinstance(kinds, Sequence) and not isinstance(kinds, str) and kinds else [kinds]
        return self._any([self._typed(str(kind).lower(), schema) for kind in kinds])

    def _typed(self, kind: str, schema: Mapping[str, Any]) -> str:
        if kind == "object" and isinstance(fields := schema.get("properties"), Mapping) and fields:
            required = schema.get("required")
            return self._object(fields, required if isinstance(required, Sequence) else ())
        if kind == "array" and "items" in schema:
            # A rule, since it is needed twice: written out, arrays of arrays would double with each level.
            item = self._item(schema["items"])
            return f'"[" ({item} ("," {item})*)? "]"'
        return _TYPES.get(kind, "value")

    def _item(self, schema: Any) -> str:
        """A rule for the items of an array."""
        at = len(self.lines)
        self.lines.append("")  # its place is taken first, so that rules within it get other names
        self.lines[at] = f"item_{at}: {self._of(schema)}"
        return f"item_{at}"

    def _object(self, fields: Mapping[str, Any], required: Sequence[Any]) -> str:
        """An object: each rule takes the fields from one on, with a comma before it if others came before."""
        first = f"fields_{len(self.lines)}_"
        count = len(fields)
        # Their places are taken first, so that the rules of objects within this one get other names.
        begin = len(self.lines)
        self.lines += [""] * (2 * count + 2)
        for i, (name, schema) in enumerate(fields.items()):
            field = f"{_quoted(name + ':')} {self._of(schema)} {first}{i + 1}_more"
            for j, (rule, comma) in enumerate((("", ""), ("_more", '"," '))):
                skip = "" if name in required else f" | {first}{i + 1}{rule}"
                self.lines[begin + 2 * i + j] = f"{first}{i}{rule}: {comma}{field}{skip}"
        self.lines[begin + 2 * count] = f'{first}{count}: ""'
        self.lines[begin + 2 * count + 1] = f'{first}{count}_more: ""'
        return f'"{{" {first}0 "}}"'

    def _referred(self, reference: str) -> str:
        """The rule of a part of the schema, which may refer to itself."""
        if reference not in self._known:
            part = referred(self._root, reference)
            if part is None:
                raise PromptError(f"a tool's schema refers to {reference!r}, which isn't in it")
            name = self._known[reference] = f"part_{len(self.lines)}"
            at = len(self.lines)
            self.lines.append("")
            self.lines[at] = f"{name}: {self._of(part)}"
        return self._known[reference]

    def _constant(self, value: Any) -> str:
        if isinstance(value, str):
            return f"{self._quote} {_quoted(value)} {self._quote}" if value else f"{self._quote} {self._quote}"
        return _quoted(json.dumps(value))

    @staticmethod
    def _any(ways: Sequence[str]) -> str:
        return ways[0] if len(ways) == 1 else f"({' | '.join(ways)})"


def _quoted(text: str) -> str:
    """A Lark string."""
    return json.dumps(text, ensure_ascii=False)
