"""What a text with a response format may go on with, worked out from the beginning of the text at every position.

Which token may come is llguidance's word, as in the package: where a grammar leaves one string only, it allows one way
to write it and no other. But here it compiles the grammar at every position and is given the text token by token, with
nothing kept, copied or taken back. The text is judged by others: one that has ended must match its expression, or be
valid by `jsonschema`; any other text must begin a match, as the package `regex` says.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from random import Random
from typing import Any

import jsonschema
import llguidance
import numpy as np
import regex

Json = dict[str, Any]


class Constraints:
    """Judges the texts of one model.

    Attributes:
        pieces: The bytes of every token; b"" of those that write nothing.
    """

    def __init__(self, tokenizer: Path, pieces: Mapping[int, bytes], stops: Collection[int], vocab: int) -> None:
        """Takes a tokenizer.json, the bytes of its tokens, what ends a text, and the size of the vocabulary."""
        self.pieces, self._stops, self._vocab = pieces, sorted(stops), vocab
        self._tokenizer = llguidance.LLTokenizer(tokenizer.read_text(), n_vocab=vocab, eos_token=self._stops)

    def allowed(self, form: Json, text: list[int]) -> np.ndarray:
        """Which tokens may follow a text, bool [vocab]."""
        matcher = llguidance.LLMatcher(self._tokenizer, _grammar(form), log_level=0)
        found = np.zeros(self._vocab, bool)
        if not all(matcher.consume_token(token) for token in text):
            return found  # the text itself isn't allowed
        if not matcher.is_stopped():
            tokens = np.arange(self._vocab, dtype=np.uint32)
            words = np.frombuffer(matcher.compute_bitmask(), np.uint32)
            found = (words[tokens // 32] >> tokens % 32 & 1).astype(bool)
        found[self._stops] = matcher.is_accepting()
        return found

    def wrong(self, form: Json, text: str, ended: bool) -> str:
        """What is wrong with a text; "" if nothing is. `ended` says whether a stop token has ended it."""
        if form["type"] == "regex":
            right = regex.fullmatch(form["pattern"], text, partial=not ended)
            return "" if right else f"{text!r} doesn't match {form['pattern']}"
        try:
            if ended:
                jsonschema.validate(json.loads(text), _schema(form))
        except (ValueError, jsonschema.ValidationError) as error:
            return f"{text!r} doesn't fit its schema: {error}"
        return ""


def _grammar(form: Json) -> str:
    if form["type"] == "regex":
        return llguidance.LLMatcher.grammar_from_regex(form["pattern"])
    # As docs/control.md says of JSON: one line, with a space after each comma and colon.
    style = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
    return llguidance.LLMatcher.grammar_from_json_schema(json.dumps(_schema(form)), overrides=style)


def _schema(form: Json) -> Json:
    schema: Json = {"type": "object"} if form["type"] == "json_object" else form["json_schema"]["schema"]
    return schema


def random_form(rng: Random) -> Json:
    """A response format: a regular expression, a JSON schema, or any object."""
    kind = rng.choice(["regex", "regex", "json_schema", "json_schema", "json_object"])
    if kind == "regex":
        return {"type": kind, "pattern": _pattern(rng, 3)}
    if kind == "json_schema":
        properties = {name: _value(rng, 1) for name in rng.sample(["a", "be", "when", "x y"], rng.randint(1, 3))}
        required = [name for name in properties if rng.random() < 0.7]
        schema = {"type": "object", "properties": properties, "required": required, "additionalProperties": False}
        return {"type": kind, "json_schema": {"schema": schema}}
    return {"type": kind}


def _pattern(rng: Random, depth: int) -> str:
    kind = rng.choice(["class", "word", "all", "either", "again"] if depth else ["class", "word"])
    if kind == "class":
        least = rng.randint(0, 20)
        return rng.choice(["[a-h]", "[^a-m]", "[a-z ]", r"\d", r"\w"]) + f"{{{least},{least + rng.randint(0, 30)}}}"
    if kind == "word":
        return rng.choice(["hello", "he", "ab", "well ", "x"])
    parts = [_pattern(rng, depth - 1) for _ in range(rng.randint(2, 3))]
    if kind == "all":
        return "".join(parts)
    return f"({'|'.join(parts)})" + ("" if kind == "either" else rng.choice(["*", "+", "{2,5}", "?"]))


def _value(rng: Random, depth: int) -> Json:
    kind = rng.choice(["string", "integer", "boolean", "enum", "array", "object"] if depth else ["string", "integer"])
    return {
        "string": lambda: {"type": "string", "maxLength": rng.randint(0, 9)},
        "integer": lambda: {"type": "integer", "minimum": rng.randint(-50, 9), "maximum": rng.randint(9, 5000)},
        "boolean": lambda: {"type": "boolean"},
        "enum": lambda: {"enum": rng.sample(["one", "two", "twenty", 3, None, True], 3)},
        "array": lambda: {"type": "array", "items": _value(rng, 0), "maxItems": rng.randint(0, 3)},
        "object": lambda: {"type": "object", "properties": {"q": _value(rng, 0)}, "required": ["q"],
                           "additionalProperties": False},
    }[kind]()  # fmt: skip
