"""Bodies of requests that are nearly right: valid ones in which a value is replaced by another, seeded."""

from __future__ import annotations

import copy
import json
from random import Random
from typing import Any

USER = {"role": "user", "content": "What is a drafter?"}
_PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
_FUNCTION = {"name": "weather", "description": "The weather.", "parameters": _PARAMETERS}
_CALL = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Bern"}'}}
_CALLED = [USER, {"role": "assistant", "content": None, "tool_calls": [_CALL]}]
_SAMPLING = {"temperature": 0.7, "top_p": 0.9, "seed": 3, "max_tokens": 3, "stop": ["end"], "logit_bias": {"5": 1.5}}
_BEYOND = {"top_k": 5, "min_p": 0.1, "repetition_penalty": 1.1, "draft_length": 2, "n": 2, "stop_token_ids": [1]}
_STREAM = {"stream": True, "stream_options": {"include_usage": True}}

VALID: list[tuple[str, dict[str, Any]]] = [
    ("/v1/chat/completions", {"model": "demo", "messages": [USER], **_SAMPLING, **_BEYOND}),
    ("/v1/chat/completions", {"messages": [USER], "max_tokens": 2, "logprobs": True, "top_logprobs": 2, **_STREAM}),
    ("/v1/chat/completions", {
        "messages": [*_CALLED, {"role": "tool", "tool_call_id": "call_1", "content": "sunny"}],
        "max_tokens": 2, "tools": [{"type": "function", "function": _FUNCTION}], "tool_choice": "auto",
    }),
    ("/v1/chat/completions", {
        "messages": [{"role": "user", "content": [{"type": "text", "text": "Hello"}]}], "max_tokens": 2,
        "response_format": {"type": "json_schema", "json_schema": {"name": "place", "schema": _PARAMETERS}},
        "prediction": {"type": "content", "content": "Hello"},
    }),
    ("/v1/completions", {"prompt": ["One", "Two"], "logprobs": 2, **_SAMPLING, **_STREAM}),
    ("/v1/completions", {"prompt": [[2, 10, 11]], "max_tokens": 2, "presence_penalty": 0.5, "frequency_penalty": 0.1}),
    ("/v1/responses", {
        "input": [USER, {"type": "function_call", "call_id": "c", "name": "weather", "arguments": "{}"},
                  {"type": "function_call_output", "call_id": "c", "output": "sunny"}],
        "instructions": "Be brief.", "max_output_tokens": 2, "tools": [{"type": "function", **_FUNCTION}],
        "temperature": 0.5, "top_p": 0.9,
    }),
    ("/v1/responses", {"input": "Hello", "max_output_tokens": 2, "stream": True, "text": {"format": {"type": "text"}}}),
    ("/v1/messages", {
        "model": "demo", "max_tokens": 2, "system": [{"type": "text", "text": "Be brief."}], "messages": [
            USER, {"role": "assistant", "content": [{"type": "tool_use", "id": "t", "name": "weather", "input": {}}]},
            {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t", "content": "sunny"}]},
        ],
        "tools": [{"name": "weather", "input_schema": _PARAMETERS}], "tool_choice": {"type": "auto"},
    }),
    ("/v1/messages", {
        "model": "demo", "max_tokens": 2, "messages": [USER], "stop_sequences": ["end"], "stream": True,
        "thinking": {"type": "enabled", "budget_tokens": 1024},
    }),
    ("/v1/messages/count_tokens", {"model": "demo", "messages": [USER]}),
]  # fmt: skip
"""Paths and bodies that use most fields of each interface."""

_ODD: list[Any] = [
    None, True, 0, 1, -1, 2**31, -(2**63), 10**30, 0.5, -0.5, 1e308, float("inf"), float("nan"), "", " ",
    "\ud800", "\0", "a" * 5000, "<bos>", "none", "text", "auto", "5", [], {}, [[]], [None], ["a"], [1, 2], {"a": 1},
    {"type": "text"},
    {"\ud800": "\udfff"}, {"type": "function"}, [{"type": "text", "text": None}], {"$ref": "#"}, {"pattern": "("},
    {"type": "object", "properties": []}, {"enum": []}, {"minLength": -1},
]  # fmt: skip


def nearly_right(dice: Random) -> tuple[str, str]:
    """A path, and a body for it as JSON text, with one to three values replaced, removed, or added."""
    path, valid = dice.choice(VALID)
    body = copy.deepcopy(valid)
    for _ in range(dice.randint(1, 3)):
        places = list(_places(body))
        if not places:
            break
        holder, key = dice.choice(places)
        what = dice.random()
        if what < 0.1:
            del holder[key]
        elif what < 0.2 and isinstance(holder, dict):
            holder[dice.choice(("type", "extra", "\ud800", ""))] = dice.choice(_ODD)
        elif what < 0.25:
            nested: Any = holder[key]
            for _ in range(dice.choice((50, 900, 3000))):
                nested = [nested] if dice.random() < 0.5 else {"a": nested}
            return path, _dumped(body, holder, key, nested)
        else:
            holder[key] = copy.deepcopy(dice.choice(_ODD))
    return path, json.dumps(body)


def _dumped(body: Any, holder: Any, key: Any, nested: Any) -> str:
    """JSON of a body with a value that is too deep for Python's own encoder."""
    holder[key] = "@@"
    opening, closing = [], []
    while isinstance(nested, list | dict) and nested and (isinstance(nested, list) or [*nested] == ["a"]):
        opening.append("[" if isinstance(nested, list) else '{"a":')
        closing.append("]" if isinstance(nested, list) else "}")
        nested = nested[0] if isinstance(nested, list) else nested["a"]
    return json.dumps(body).replace('"@@"', "".join(opening) + "1" + "".join(reversed(closing)))


def _places(value: Any) -> Any:
    """Every container in a JSON value with each of its keys."""
    if isinstance(value, dict | list):
        for key in [*value] if isinstance(value, dict) else range(len(value)):
            yield value, key
            yield from _places(value[key])
