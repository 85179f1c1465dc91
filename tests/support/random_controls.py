"""Calls with everything about the text drawn at random: for the tests and the proof of controlled texts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from random import Random
from typing import Any

import mlx.core as mx

import mlx_mtp

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "kind": {"enum": ["city", "book", "person"]},
        "year": {"type": "integer", "minimum": 1000, "maximum": 2999},
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 5}, "maxItems": 2},
    },
    "required": ["name", "kind", "year", "tags"],
    "additionalProperties": False,
}

TOOLS = [
    {"type": "function", "function": {"name": "add", "parameters": {
        "type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}}, "required": ["a"]}}},
    {"type": "function", "function": {"name": "weather", "parameters": {
        "type": "object", "properties": {"city": {"type": "string"}, "unit": {"enum": ["C", "F"]}},
        "required": ["city"]}}},
]  # fmt: skip

PROMPTS = (
    "Give me a JSON record for a book.",
    "What is the capital of France, and what is it known for?",
    "Write a Python function that reverses a string.",
    "Tell me a short story about a fox.",
    "Repeat after me: the quick brown fox jumps over the lazy dog. The quick brown fox jumps over the lazy dog.",
)


def even_tokens_first(tokens: Any, logits: mx.array) -> mx.array:
    """A processor of logits that depends on the text: even ids are likelier after an odd one, and the other way."""
    parity = (mx.arange(logits.shape[-1]) + tokens[-1]) % 2
    return logits + 0.5 * parity


def random_call(rng: Random, max_tokens: int) -> dict[str, Any]:
    """A prompt with options, as `generate_batch` takes it."""
    options: dict[str, Any] = {
        "prompt": rng.choice(PROMPTS), "max_tokens": rng.randint(2, max_tokens), "seed": rng.getrandbits(30),
        "temperature": rng.choice([0.0, 0.0, 0.7, 1.0, 1.6]), "top_k": rng.choice([0, 40]),
        "top_p": rng.choice([1.0, 0.9]), "draft_length": rng.choice(["auto", "auto", 1, 3, 7, 15]),
    }  # fmt: skip
    if rng.random() < 0.5:
        options |= {"repetition_penalty": rng.choice([1.1, 1.5, 0.8])}
    if rng.random() < 0.4:
        options |= {"presence_penalty": rng.uniform(-1, 2), "frequency_penalty": rng.uniform(-0.2, 1)}
    if rng.random() < 0.3:
        options |= {"logit_bias": {rng.randrange(300, 2000): rng.uniform(-9, 9) for _ in range(rng.randint(1, 40))}}
    if rng.random() < 0.3:
        options |= {"logprobs": rng.randint(0, 5)}
    if rng.random() < 0.2:
        options |= {"logits_processors": [even_tokens_first]}
    if rng.random() < 0.25:
        options |= {"thinking": True, "thinking_budget": rng.randint(0, 12)}
    if rng.random() < 0.3:
        options |= {"prediction": rng.choice([*PROMPTS, "Here is the JSON for a book:\n\n```json\n{\n"])}
    formats: list[dict[str, Any]] = [
        {"response_format": {"type": "json_schema", "json_schema": {"schema": SCHEMA}}},
        {"response_format": {"type": "json_object"}},
        {"response_format": {"type": "regex", "pattern": "([A-Z][a-z]+ ){1,9}[0-9]+"}},
        {"response_format": {"type": "grammar", "grammar": 'start: ("ab" | "b" | /[0-9]/)+'}},
        {"tools": TOOLS, "tool_choice": rng.choice(["auto", "none", "required", "add"])},
    ]
    if rng.random() < 0.6:
        options |= rng.choice(formats)
    return options


@dataclass(frozen=True)
class Difference:
    """A call whose text in a batch isn't the one it gets alone, without drafts."""

    call: dict[str, Any]
    expected: list[int]
    found: list[int]


def compare_at_random(lm: mlx_mtp.MTPModel, calls: int, seed: int, max_tokens: int) -> Iterator[Difference | None]:
    """Runs random calls in batches of random size, each beside its own text alone with draft length 0."""
    rng = Random(seed)
    drawn = [random_call(rng, max_tokens) for _ in range(calls)]
    while drawn:
        batch, drawn = drawn[: (size := rng.randint(1, 5))], drawn[size:]
        for call, found in zip(batch, lm.generate_batch(batch, batch_size=rng.randint(1, 5)), strict=True):
            options = {name: value for name, value in call.items() if name != "prompt"}
            alone = lm.generate(call["prompt"], **options | {"draft_length": 0, "prediction": None})
            same = alone.tokens == found.tokens and alone.text == found.text
            yield None if same else Difference(call, alone.tokens, found.tokens)
