"""Grammars that a text keeps to: JSON schemas, regular expressions, Lark grammars; llguidance follows them.

A compiled grammar is kept, and each row follows a copy of it. For a verify block a row's copy takes the drafts one by
one, says after each what may follow, and goes back. The package is the extra `structured`, imported when it is used.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import tokenizers

from ..decode.adjustments import Bits
from ..errors import MTPError, PromptError
from .endless import endless_part

if TYPE_CHECKING:
    from llguidance import LLMatcher

KINDS = ("json_object", "json_schema", "regex", "grammar")
"""Types of a response format, next to "text", which asks for nothing."""

_STYLE: Any = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""JSON in one line, as most of what models have read: what stands between values is forced, and costs no decision."""

_KEPT = 64
"""Compiled grammars that are kept: an app asks for the same few again and again."""


class Grammars:
    """Compiles grammars for a vocabulary."""

    def __init__(self, tokenizer: tokenizers.Tokenizer, vocab_size: int, stop_tokens: Collection[int]) -> None:
        """Reads a vocabulary, which takes seconds for a published one.

        Args:
            tokenizer: The tokenizer.
            vocab_size: Of the model; may be more than the tokenizer has.
            stop_tokens: What ends a text: allowed where the grammar may end, and nowhere else.

        Raises:
            MTPError: llguidance isn't installed.
            PromptError: It can't use the tokenizer.
        """
        try:
            from llguidance import LLTokenizer
        except ImportError:
            raise MTPError("grammars need the package llguidance: pip install 'mlx-mtp[structured]'") from None
        try:
            self._tokenizer = LLTokenizer(tokenizer.to_str(), n_vocab=vocab_size, eos_token=sorted(stop_tokens))
        except ValueError as error:
            raise PromptError(f"grammars can't be used with this tokenizer: {error}") from error
        self._vocab, self._stop_tokens = vocab_size, frozenset(stop_tokens)
        self._compiled = lru_cache(maxsize=_KEPT)(self._compile)

    def matcher(self, response_format: Mapping[str, Any]) -> Matcher:
        """Follows the grammar of a response format.

        Raises:
            PromptError: It isn't one, or can't be compiled; says where.
        """
        matcher = self._compiled(*_source(response_format)).deep_copy()
        return Matcher(matcher, self._stop_tokens, self._vocab)

    def _compile(self, kind: str, source: str) -> LLMatcher:
        from llguidance import LLMatcher

        try:
            grammar = _grammar(kind, source)
            message = _problem(grammar, self._tokenizer)
            place = _place(json.loads(source), self._tokenizer) if message and kind == "json_schema" else ""
        except ValueError as error:  # half a character, or nested too deeply
            message, place = str(error), ""
        if not message:
            matcher = LLMatcher(self._tokenizer, grammar, log_level=0)
            begun = matcher.deep_copy()
            begun.compute_bitmask()
            if not begun.is_error():
                return matcher
            message = f"no text fits it, or it is too complex: {begun.get_error()}"
        raise PromptError(f"response_format: the {kind}{place} can't be used: {_line(message)}")


class Matcher:
    """Follows a text through a grammar.

    Attributes:
        done: Whether a stop token has ended the text; then anything is allowed.
    """

    def __init__(self, matcher: LLMatcher, stop_tokens: frozenset[int], vocab_size: int) -> None:
        """Takes a matcher of its own, and what ends a text."""
        self._matcher, self._stop_tokens, self._vocab = matcher, stop_tokens, vocab_size
        self.done = False

    def copy(self) -> Matcher:
        """Another one at the same place."""
        other = Matcher(self._matcher.deep_copy(), self._stop_tokens, self._vocab)
        other.done = self.done
        return other

    def push(self, token: int) -> bool:
        """Takes a token; returns whether the grammar allows it. One that isn't allowed changes nothing."""
        if self.done:
            return True
        if token in self._stop_tokens:  # where the grammar may end, or where it names this token itself
            self.done = bool(int(self.allowed()[token // 32]) >> token % 32 & 1)
            return self.done
        return self._matcher.try_consume_tokens([token]) == 1

    def pop(self, count: int) -> None:
        """Forgets the last tokens that were allowed."""
        self._matcher.rollback(count - self.done)
        self.done = False

    def allowed(self) -> Bits:
        """The tokens that may follow: uint32 [ceil(vocab / 32)], a bit for each.

        Raises:
            PromptError: The grammar is too complex to be followed here.
        """
        bits = np.zeros(-(-self._vocab // 32), np.uint32)
        if self._matcher.is_stopped() and not self._matcher.is_error():
            return with_token(bits, *self._stop_tokens)
        found = np.frombuffer(self._matcher.compute_bitmask(), np.uint32)
        if self._matcher.is_error():
            raise PromptError(f"the grammar can't be followed: {_line(self._matcher.get_error())}")
        bits[: len(found)] = found[: len(bits)]
        return bits

    def forced(self) -> list[int]:
        """The tokens that must follow, as far as there is no choice."""
        return [] if self.done or self._matcher.is_stopped() else self._matcher.compute_ff_tokens()


def with_token(bits: Bits, *tokens: int) -> Bits:
    """Allows some tokens as well, in place."""
    for token in tokens:
        bits[token // 32] |= np.uint32(1 << (token % 32))
    return bits


def _line(message: str) -> str:
    """A message of llguidance's in one line, without the dump of its state."""
    return " ".join(message.split("<state>")[0].split())[:300]


def _source(response_format: Mapping[str, Any]) -> tuple[str, str]:
    """Kind and source of a response format, spelt so that equal ones are equal.

    Raises:
        PromptError: It isn't one.
    """
    kind = response_format.get("type")
    if kind == "json_object":
        return "json_schema", '{"type": "object"}'
    if kind == "json_schema":
        given = response_format.get("json_schema")
        schema = given.get("schema", given) if isinstance(given, Mapping) else given
        if not isinstance(schema, Mapping):
            raise PromptError('response_format of type "json_schema" needs a dict "json_schema" with a "schema"')
        try:
            text, endless = json.dumps(schema), endless_part(schema)
        except (TypeError, ValueError, RecursionError) as error:
            raise PromptError(f"response_format: the schema isn't JSON: {error}") from error
        if endless is not None:
            raise PromptError(
                f"response_format: no text fits the schema: its part {endless!r} needs itself, without an end"
            )
        return kind, text
    name = {"regex": "pattern", "grammar": "grammar"}.get(str(kind), "")
    if name and isinstance(source := response_format.get(name), str):
        return str(kind), source
    if name:
        raise PromptError(f'response_format of type "{kind}" needs a string "{name}"')
    raise PromptError(f"response_format must have a type of {', '.join(KINDS)} or text, not {kind!r}")


def _grammar(kind: str, source: str) -> str:
    from llguidance import LLMatcher

    make: Any = {
        "json_schema": lambda text: LLMatcher.grammar_from_json_schema(text, overrides=_STYLE),
        "regex": LLMatcher.grammar_from_regex,
        "grammar": LLMatcher.grammar_from_lark,
    }[kind]
    return str(make(source))


def _problem(grammar: str, tokenizer: Any) -> str:
    """Why a grammar can't be compiled; "" if it can."""
    from llguidance import LLMatcher

    failed, messages = LLMatcher.validate_grammar_with_warnings(grammar, tokenizer)
    return messages[0] if failed else ""


def _place(schema: Any, tokenizer: Any) -> str:
    """Where the part of a schema that can't be compiled is: the smallest one that can't be by itself."""
    path: list[str] = []
    if not isinstance(schema, Mapping):
        return ""
    definitions = {key: schema[key] for key in ("$defs", "definitions") if key in schema}
    while True:
        for way, part in _parts(schema):
            if _problem(_grammar("json_schema", json.dumps({**definitions, **part})), tokenizer):
                path += way
                schema = part
                break
        else:
            return f" at {'.'.join(path)}" if path else ""


def _parts(schema: Any) -> Iterator[tuple[list[str], Mapping[str, Any]]]:
    """The schemas within a schema, and the way to each."""
    for key, value in schema.items():
        if key in ("properties", "patternProperties", "$defs", "definitions") and isinstance(value, Mapping):
            yield from (([key, name], part) for name, part in value.items() if isinstance(part, Mapping))
        elif key in ("items", "additionalProperties", "not") and isinstance(value, Mapping):
            yield [key], value
        elif key in ("anyOf", "oneOf", "allOf", "prefixItems") and isinstance(value, Sequence):
            yield from (([key, str(i)], part) for i, part in enumerate(value) if isinstance(part, Mapping))
