"""Text under control where it is easily got wrong: rows that come and go, rules that fail, odd grammars and values."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import mlx_mtp
from mlx_mtp import MTPError, PromptError
from mlx_mtp.control.grammar import Grammars
from mlx_mtp.control.penalties import Penalties
from mlx_mtp.control.row import Rules
from mlx_mtp.control.thoughts import ThoughtTokens
from mlx_mtp.control.tool_grammar import CallTokens, tool_grammar
from mlx_mtp.decode.adjustments import Adjustment
from mlx_mtp.decode.request import Request
from mlx_mtp.decode.scheduler import Scheduler
from mlx_mtp.models.drafter import Drafter
from mlx_mtp.models.target import Target
from tests.support.random_requests import alone
from tests.support.tiny_checkpoints import load_pair, make_pair


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Target, Drafter]:
    folder: Path = tmp_path_factory.mktemp("pair")
    return load_pair(*make_pair("12b", folder))


def controlled(target: Target, seed: int, max_tokens: int, **rules: Any) -> Request:
    """A request with penalties, and other rules if they are given."""
    rng, vocab = Random(seed), target.config.vocab_size
    begin = Rules(**{"vocab_size": vocab, "penalties": Penalties(repetition=1.3, frequency=0.5)} | rules).begin
    return Request([rng.randrange(vocab) for _ in range(9)], max_tokens, control=begin)


def run_all(scheduler: Scheduler, requests: Sequence[Request]) -> list[list[int]]:
    rows = [scheduler.submit(request) for request in requests]
    while not all(row.done for row in rows):
        scheduler.step()
    return [row.tokens for row in rows]


@pytest.mark.parametrize("max_rows", [1, 2])
def test_a_row_that_takes_the_place_of_another_begins_with_a_round_of_its_own(
    pair: tuple[Target, Drafter], max_rows: int
):
    """When a batch ends, its next round has begun already: it is nobody's."""
    target, drafter = pair
    requests = [controlled(target, seed, 10 + seed % 2) for seed in range(5)]
    found = run_all(Scheduler(target, drafter, max_rows=max_rows), requests)
    assert found == [alone(target, request) for request in requests]


class Failing:
    """A control that fails after some tokens, with an error of any kind."""

    def __init__(self, place: str, error: Exception):
        self.place, self.error, self.tokens = place, error, 0

    def advance(self, tokens: Sequence[int]) -> None:
        self.tokens += len(tokens)
        self.fail("advance")

    def forced(self) -> list[int]:
        return []

    def adjustments(self, drafts: Sequence[int]) -> list[Adjustment]:
        self.fail("adjustments")
        return [Adjustment(process=self.process)] * (len(drafts) + 1)

    def process(self, logits: mx.array) -> mx.array:
        self.fail("process")
        return logits[0] if self.place == "shape" and self.tokens > 3 else logits

    def fail(self, place: str) -> None:
        if place == self.place and self.tokens > 3:
            raise self.error


@pytest.mark.parametrize("place", ["advance", "adjustments", "process", "shape"])
@pytest.mark.parametrize("error", [MTPError("not today"), ValueError("not today")], ids=["ours", "other"])
def test_a_rule_that_fails_ends_its_own_row_alone(pair: tuple[Target, Drafter], place: str, error: Exception):
    target, drafter = pair
    scheduler = Scheduler(target, drafter)
    others = [controlled(target, seed, 12) for seed in range(2)]
    rows = [scheduler.submit(request) for request in others]
    failing = scheduler.submit(replace(others[0], control=lambda _: Failing(place, error)))
    while not all(row.done for row in (*rows, failing)):
        scheduler.step()
    assert isinstance(failing.error, PromptError)
    assert ("must return an array" if place == "shape" else "not today") in str(failing.error)
    assert [row.tokens for row in rows] == [alone(target, request) for request in others]


def letters(text: str) -> dict[str, Any]:
    return {"response_format": {"type": "regex", "pattern": text}}


def test_the_error_of_one_row_is_the_answer_to_its_prompt(lm: mlx_mtp.MTPModel):
    def broken(tokens: Any, logits: mx.array) -> mx.array:
        raise KeyError("lost")

    prompts: list[dict[str, Any]] = [{"prompt": "Hello!", "logits_processors": [broken]}, {"prompt": "Hello!"}]
    found = dict(lm.generate_each(prompts, max_tokens=4, temperature=0))
    assert isinstance(found[0], PromptError)
    assert "lost" in str(found[0])
    assert isinstance(found[1], mlx_mtp.Generation)
    with pytest.raises(PromptError, match="lost") as failure:
        lm.generate_batch(prompts, max_tokens=4)
    assert isinstance(failure.value.__cause__, KeyError), "it says where"


def test_a_grammar_of_which_nothing_is_possible_ends_the_text(lm: mlx_mtp.MTPModel):
    nothing = {token: -float("inf") for token in range(lm.config.text.vocab_size)}
    for options in ({"temperature": 0}, {"temperature": 1, "top_p": 0.5, "seed": 1}):
        with pytest.raises(PromptError, match="no other token was possible"):
            lm.generate("Hello!", 9, **letters("[ab]+"), logit_bias=nothing, **options)  # type: ignore[arg-type]


ENDLESS: list[dict[str, Any]] = [
    {"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]},
    {"type": "array", "items": {"$ref": "#"}, "minItems": 1},
    {"type": "object", "properties": {"a": {"$ref": "#/$defs/a"}}, "$defs": {"a": {"$ref": "#/$defs/a"}}},
    {"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"anyOf": [{"$ref": "#/$defs/a"}]}}, "items": {"$ref": "#/$defs/b"}},
    {"allOf": [{"type": "object"}, {"$ref": "#"}]},
]
"""Schemas with a part that no finite value fits."""

ENDING: list[dict[str, Any]] = [
    {"type": "object", "properties": {"a": {"$ref": "#"}}}, {"type": "array", "items": {"$ref": "#"}},
    {"type": "object", "properties": {"a": {"anyOf": [{"$ref": "#"}, {"type": "null"}]}}, "required": ["a"]},
    {"type": ["object", "null"], "properties": {"a": {"$ref": "#"}}, "required": ["a"]},
    {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"enum": [1]}}},
]  # fmt: skip
"""Schemas that refer to themselves or to a chain of parts, with an end."""


@pytest.mark.parametrize("asked", [
    letters("[^\\s\\S]")["response_format"], letters("\ud800")["response_format"],
    {"type": "grammar", "grammar": 'start: "\ud800"'}, {"type": "grammar", "grammar": "start: start"},
    *({"type": "json_schema", "json_schema": {"schema": schema}} for schema in (
        True, {"$ref": "#"}, {"enum": ["\ud800"]}, json.loads('{"items":' * 300 + "{}" + "}" * 300), *ENDLESS)),
], ids=range(8 + len(ENDLESS)))  # fmt: skip
def test_formats_that_nothing_fits_are_refused_at_once(lm: mlx_mtp.MTPModel, asked: dict[str, Any]):
    answers = dict(lm.generate_each([{"prompt": "Hello!", "response_format": asked}], max_tokens=4))
    assert isinstance(answers[0], PromptError)
    assert "response_format" in str(answers[0])
    with pytest.raises(PromptError, match="response_format"):
        lm.stream("Hello!", response_format=format)


def test_a_grammar_may_name_the_token_that_ends_a_turn(lm: mlx_mtp.MTPModel):
    named = lm.generate("Hello!", 9, response_format={"type": "grammar", "grammar": 'start: "yes" <turn|>'})
    assert (named.text, named.finish_reason) == ("yes", "stop")


def ids(lm: mlx_mtp.MTPModel, *names: str) -> list[int]:
    found = [lm.tokenizer.token_id(name) for name in names] if lm.tokenizer else []
    return [token for token in found if token is not None]


def test_a_budget_holds_for_a_thought_after_the_grammars_end(lm: mlx_mtp.MTPModel):
    """With ignore_eos the text goes on; what drafts are verified by is what holds without drafts."""
    assert lm.tokenizer
    begin, end, stop, word = ids(lm, "<|channel>", "<channel|>", "<turn|>", "a")
    grammars = Grammars(lm.tokenizer.library, lm.config.text.vocab_size, [stop])
    rules = Rules(
        vocab_size=lm.config.text.vocab_size,
        matcher=grammars.matcher({"type": "regex", "pattern": "a"}),
        thoughts=ThoughtTokens(begin=begin, end=end, special=frozenset({begin, end, stop})),
        thinking_budget=1,
    )
    text = [word, stop, word, begin, word, end, word]
    drafted, grown = rules.begin([stop]).adjustments(text), rules.begin([stop])
    for token, mask in zip([*text, None], drafted, strict=True):
        (alone,) = grown.adjustments([])
        assert np.array_equal(mask.allowed, alone.allowed) if alone.allowed is not None else mask.allowed is None
        grown.advance([] if token is None else [token])
    assert drafted[5].allowed is not None


def lured(lm: mlx_mtp.MTPModel, tokens: dict[int, str], **options: Any) -> list[str]:
    """Names of the tokens of a text that is drawn to given ones at some places, if the rules allow them."""
    known = lm.tokenizer
    assert known is not None
    begin: list[int] = []

    def lure(text: Sequence[int], logits: mx.array) -> mx.array:
        begin[:] = begin or [len(text)]
        name = tokens.get(len(text) - begin[0])
        return logits + 1000.0 * (mx.arange(logits.shape[-1]) == known.token_id(name)) if name else logits

    found = lm.generate("Hello!", 20, temperature=0, thinking=True, logits_processors=[lure], **options)
    return [known.library.id_to_token(token) or "" for token in found.tokens]


BEGIN, END, CALL = "<|channel>", "<channel|>", "<|tool_call>"


def test_a_call_may_follow_a_thought_or_end_it(lm: mlx_mtp.MTPModel):
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}]
    after = lured(lm, {0: BEGIN, 2: END, 3: CALL}, tools=tools, **letters("[ab]+"))
    assert after[3] == CALL
    unlikely = dict.fromkeys(ids(lm, END), -99.0)
    ending = lured(lm, {0: BEGIN, 2: CALL}, tools=tools, thinking_budget=4, logit_bias=unlikely, **letters("[ab]+"))
    assert ending[2] == CALL
    assert END not in ending, "the budget is for thoughts"
    required = lured(lm, {0: BEGIN, 2: CALL}, tools=tools, tool_choice="required")
    assert "".join(required[2:8]).startswith("<|tool_call>call:f{")
    without = lured(lm, {0: BEGIN, 2: CALL, 4: END}, **letters("[ab]+"))
    assert CALL not in without, "the format allows no call"
    assert without[4] == END


def test_thoughts_are_not_begun_again_and_again(lm: mlx_mtp.MTPModel):
    text = lured(lm, dict.fromkeys(range(20), BEGIN), thinking_budget=0, **letters("[ab]{3}"))
    assert text[:2] == [BEGIN, END]
    assert BEGIN not in text[2:]


def tool(parameters: Any) -> list[dict[str, Any]]:
    return [{"type": "function", "function": {"name": "f", "parameters": parameters}}]


def boolean(**more: Any) -> dict[str, Any]:
    return {"type": "object", "properties": {"a": {"type": "boolean", **more}}, "required": ["a"]}


def arrays(depth: int) -> dict[str, Any]:
    """Arguments with a boolean within so many arrays."""
    schema: dict[str, Any] = {"type": "boolean"}
    for _ in range(depth):
        schema = {"type": "array", "items": schema}
    return {"type": "object", "properties": {"a": schema}, "required": ["a"]}


def test_the_grammar_of_arrays_of_arrays_grows_with_their_depth_alone():
    tokens = CallTokens(begin=1, end=2, quote=3)
    ten, forty = (len(tool_grammar([{"name": "f", "parameters": arrays(depth)}], tokens)) for depth in (10, 40))
    assert forty < 5 * ten


@pytest.mark.parametrize("parameters, expected", [
    ([1], None), ("x", None), (boolean() | {"required": 5}, bool), (boolean() | {"required": [["a"]]}, bool),
    (boolean(type=5), None), (boolean(type=[]), None), (boolean(anyOf=[]), bool),
    ({"properties": {"a": {"$ref": "#/$defs/x~1y"}}, "required": ["a"], "$defs": {"x/y": {"type": "boolean"}}}, bool),
], ids=range(8))  # fmt: skip
def test_odd_schemas_of_tools_allow_what_they_can(lm: mlx_mtp.MTPModel, parameters: Any, expected: type | None):
    bias = dict.fromkeys(ids(lm, '<|"|>', "}"), 50.0)
    found = lm.generate(
        "Hello!", 60, temperature=0, tools=tool(parameters), tool_choice="required", logit_bias=bias,
        frequency_penalty=1.0,
    )  # fmt: skip
    (call, *_) = found.tool_calls
    assert call["function"]["name"] == "f"
    for value in call["function"]["arguments"].values() if expected else ():
        assert isinstance(value, expected)


@pytest.mark.parametrize("schema", ENDING, ids=range(len(ENDING)))
def test_schemas_that_refer_to_themselves_and_end_can_be_used(lm: mlx_mtp.MTPModel, schema: dict[str, Any]):
    asked = {"type": "json_schema", "json_schema": {"schema": schema}}
    assert lm.generate("Hello!", 3, temperature=0, response_format=asked).text
    assert lm.generate("Hello!", 3, tools=tool(schema), tool_choice="f").stats.generated_tokens


@pytest.mark.parametrize("parameters, message", [
    ({"properties": {5: {}}}, "isn't JSON"), (arrays(300), "nested too deeply"),
    *((schema, "needs itself") for schema in ENDLESS),
], ids=range(2 + len(ENDLESS)))  # fmt: skip
def test_tools_that_no_grammar_can_be_made_of(lm: mlx_mtp.MTPModel, parameters: Any, message: str):
    with pytest.raises(PromptError, match=message):
        lm.generate("Hello!", 3, tools=tool(parameters), tool_choice="f")


@pytest.mark.parametrize("options", [
    {"presence_penalty": 10**400}, {"frequency_penalty": -(10**5000)}, {"repetition_penalty": 1e300},
    {"repetition_penalty": 1e-300}, {"logit_bias": {5: 10**400}}, {"logit_bias": {5: 1e300}},
    {"logit_bias": {"9" * 5000: 1}},
], ids=range(7))  # fmt: skip
def test_numbers_that_no_logit_can_hold_are_refused(lm: mlx_mtp.MTPModel, options: dict[str, Any]):
    answers = dict(lm.generate_each([{"prompt": "Hello!", **options}], max_tokens=3))
    assert isinstance(answers[0], PromptError)
    assert next(iter(options)) in str(answers[0])


def test_a_penalty_may_be_any_whole_number_that_is_allowed(lm: mlx_mtp.MTPModel):
    options: dict[str, Any] = {"max_tokens": 6, "temperature": 0}
    large = lm.generate("Hi", presence_penalty=2**64, frequency_penalty=2**70, **options)
    assert large.tokens == lm.generate("Hi", presence_penalty=2.0**64, frequency_penalty=2.0**70, **options).tokens
