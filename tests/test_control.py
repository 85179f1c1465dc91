"""Text under control: penalties, biases, grammars, tool choices, thoughts, log-probabilities, and the host's drafts."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import jsonschema
import mlx.core as mx
import numpy as np
import pytest

import mlx_mtp
from mlx_mtp import GenerationOptions, MTPError, PromptError
from mlx_mtp.control.penalties import Penalties, PenaltyState
from mlx_mtp.decode.adjustments import Adjustment
from mlx_mtp.decode.round_cost import RoundCost
from mlx_mtp.decode.sampling import Sampler, SamplingOptions
from tests.support.command_line import run
from tests.support.random_controls import SCHEMA, TOOLS, compare_at_random

STORY = "Tell me a short story about a fox."
CODE = "Write a Python function that reverses a string."
BY_SCHEMA = {"type": "json_schema", "json_schema": {"name": "record", "schema": SCHEMA}}


@pytest.mark.parametrize("seed", range(2))
def test_random_calls_give_the_text_that_they_give_alone_without_drafts(lm: mlx_mtp.MTPModel, seed: int):
    """The small version of scripts/prove_control.py."""
    assert [it for it in compare_at_random(lm, 8, seed, 30) if it] == []


def by_hand(lm: mlx_mtp.MTPModel, prompt: list[int], count: int, options: dict[str, Any]) -> list[int]:
    """Greedy text under penalties, token by token from the target's logits, in float64."""
    text: list[int] = []
    for _ in range(count):
        logits = np.array(lm.logits([*prompt, *text])[-1], np.float64)
        for token, bias in options.get("logit_bias", {}).items():
            logits[token] += bias
        seen = np.array(sorted({*prompt, *text}))
        factor = options.get("repetition_penalty", 1.0)
        logits[seen] = np.where(logits[seen] > 0, logits[seen] / factor, logits[seen] * factor)
        for token in set(text):
            logits[token] -= options.get("presence_penalty", 0)
            logits[token] -= options.get("frequency_penalty", 0) * text.count(token)
        text.append(int(logits.argmax()))
    return text


@pytest.mark.parametrize("options", [
    {"repetition_penalty": 1.5}, {"presence_penalty": 12.0}, {"frequency_penalty": 12.0},
    {"repetition_penalty": 1.2, "presence_penalty": 0.5, "frequency_penalty": 0.4, "logit_bias": {720: -5.0, 1728: 9}},
], ids=lambda options: "+".join(options))  # fmt: skip
def test_penalties_are_what_their_formulas_say(lm: mlx_mtp.MTPModel, options: dict[str, Any]):
    prompt = lm.encode(STORY)
    expected = by_hand(lm, prompt, 14, options)
    assert lm.generate(prompt, 14, temperature=0, ignore_eos=True, **options).tokens == expected
    assert lm.generate(prompt, 14, temperature=0, ignore_eos=True).tokens != expected, "they must matter here"


def test_a_banned_token_never_comes_at_any_temperature(lm: mlx_mtp.MTPModel):
    free = lm.generate(STORY, 30, temperature=0).tokens
    banned = {token: -float("inf") for token in set(free)}
    for temperature in (0.0, 1.0, 1000.0):
        text = lm.generate(STORY, 30, temperature=temperature, seed=1, logit_bias=banned).tokens
        assert not set(text) & set(free)
    with_names = lm.generate(STORY, 30, temperature=0, logit_bias={str(token): -100 for token in set(free)})
    assert not set(with_names.tokens) & set(free), "JSON has keys of strings"


def test_suppressed_tokens_stay_out_at_any_temperature():
    """A softcap makes a finite logit of minus infinity, which a high temperature would draw from."""
    rows = [SamplingOptions(temperature=1000.0, seed=i) for i in range(64)]
    sampler = Sampler(rows, 30.0, suppress_tokens=range(6), vocab_size=8)
    chosen = sampler.target(mx.zeros((64, 4, 8)), mx.broadcast_to(mx.arange(4), (64, 4)))
    assert set(np.array(chosen).ravel().tolist()) == {6, 7}


@pytest.mark.parametrize("temperature", [0.6, 1.0])
def test_sampling_under_penalties_and_masks_has_the_right_distribution(temperature: float):
    """Chi-square over 20,000 draws of 12 tokens, of which a mask allows 9."""
    vocab, draws = 12, 20_000
    logits = np.linspace(-1, 2, vocab).astype(np.float32)
    ids, allowed = np.arange(4, dtype=np.int32), np.array([0b111101111010], np.uint32)
    rule = Adjustment(
        ids=ids, bias=np.full(4, 0.5, np.float32), factor=np.full(4, 1.3, np.float32),
        minus=np.full(4, 0.2, np.float32), allowed=allowed,
    )  # fmt: skip
    changed = logits.astype(np.float64)
    changed[:4] += 0.5
    changed[:4] = np.where(changed[:4] > 0, changed[:4] / 1.3, changed[:4] * 1.3) - 0.2
    open_ = np.array([bool(int(allowed[0]) >> i & 1) for i in range(vocab)])
    expected = np.where(open_, np.exp(changed / temperature), 0)
    expected *= draws / expected.sum()
    sampler = Sampler([SamplingOptions(temperature=temperature, seed=7)], None, (), vocab, [True])
    positions = mx.arange(draws)[None]
    chosen = sampler.target(mx.broadcast_to(mx.array(logits), (1, draws, vocab)), positions, [[rule]])
    found = np.bincount(np.array(chosen)[0], minlength=vocab)
    assert not found[~open_].any()
    chi2 = ((found - expected)[open_] ** 2 / expected[open_]).sum()
    assert chi2 < 8 + 5 * np.sqrt(2 * 8), "noise is fixed, so this is no matter of luck"


def test_what_drafts_add_to_the_counts_is_taken_back():
    state = PenaltyState(Penalties(frequency=1.0), [1, 2])
    state.advance([5])
    first, second, third = state.adjustments([5, 6])
    assert dict(zip(first.ids.tolist(), first.minus.tolist(), strict=True))[5] == 1
    assert dict(zip(second.ids.tolist(), second.minus.tolist(), strict=True))[5] == 2
    assert dict(zip(third.ids.tolist(), third.minus.tolist(), strict=True))[6] == 1
    (again,) = state.adjustments([])
    assert dict(zip(again.ids.tolist(), again.minus.tolist(), strict=True)).get(6, 0) == 0


@pytest.mark.parametrize("drafts", [0, 3, "auto"])
def test_log_probabilities_are_the_models_own(lm: mlx_mtp.MTPModel, drafts: int | str):
    prompt = lm.encode(STORY)
    options: dict[str, Any] = {"temperature": 1.0, "seed": 3, "top_k": 5, "repetition_penalty": 1.3}
    found = lm.generate(prompt, 12, draft_length=drafts, logprobs=3, **options)
    assert found.tokens == lm.generate(prompt, 12, draft_length=drafts, **options).tokens
    assert found.logprobs is not None
    assert [it.token for it in found.logprobs] == found.tokens
    logits = np.array(lm.logits([*prompt, *found.tokens])[len(prompt) - 1 : -1], np.float64)
    expected = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    for own, row in zip(found.logprobs, expected, strict=True):
        assert own.logprob == pytest.approx(row[own.token], abs=1e-3)
        best = np.argsort(-row)[:3].tolist()
        assert [token for token, _ in own.top] == best
        assert [value for _, value in own.top] == pytest.approx(row[best], abs=1e-3)


def test_log_probabilities_come_with_chunks_and_as_json(lm: mlx_mtp.MTPModel):
    chunks = list(lm.stream(STORY, 10, temperature=0, logprobs=0, stop="fox"))
    scores = [score for chunk in chunks for score in chunk.logprobs or ()]
    assert [it.token for it in scores] == [token for chunk in chunks for token in chunk.tokens]
    assert all(it.top == [] for it in scores)
    facts = json.loads(json.dumps(lm.generate(STORY, 3, temperature=0, logprobs=1).as_dict()))
    assert len(facts["logprobs"]) == 3
    assert set(facts["logprobs"][0]) == {"token", "logprob", "top"}
    assert lm.generate(STORY, 3, temperature=0).logprobs is None


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_answers_fit_their_schema(lm: mlx_mtp.MTPModel, temperature: float):
    for seed in range(3):
        answer = lm.generate(STORY, 200, temperature=temperature, seed=seed, response_format=BY_SCHEMA)
        assert answer.finish_reason == "stop"
        jsonschema.validate(json.loads(answer.text), SCHEMA)


def test_other_formats(lm: mlx_mtp.MTPModel):
    whole = lm.generate(
        STORY, 40, temperature=1, seed=2, response_format={"type": "regex", "pattern": "[a-f]{3,9}-[0-9]"}
    )
    assert re.fullmatch("[a-f]{3,9}-[0-9]", whole.text)
    assert whole.finish_reason == "stop"
    lark = lm.generate(STORY, 40, temperature=0, response_format={"type": "grammar", "grammar": 'start: "yes" | "no"'})
    assert lark.text in ("yes", "no")
    anything = lm.generate(STORY, 40, temperature=0, response_format={"type": "json_object"})
    assert anything.text.startswith("{")
    free = lm.generate(STORY, 10, temperature=0, response_format={"type": "text"})
    assert free.tokens == lm.generate(STORY, 10, temperature=0).tokens


def test_beside_others_a_constrained_row_changes_nobody(lm: mlx_mtp.MTPModel):
    calls: list[dict[str, Any]] = [
        {"prompt": STORY, "response_format": BY_SCHEMA, "max_tokens": 60},
        {"prompt": CODE, "max_tokens": 60},
        {"prompt": STORY, "max_tokens": 60, "temperature": 1, "seed": 5},
        {"prompt": CODE, "max_tokens": 5, "repetition_penalty": 1.3},
    ]
    together = lm.generate_batch([{"temperature": 0, **call} for call in calls])
    for call, found in zip(calls, together, strict=True):
        options = {"temperature": 0, **{name: value for name, value in call.items() if name != "prompt"}}
        assert found.tokens == lm.generate(call["prompt"], draft_length=0, **options).tokens


def test_thoughts_end_at_their_budget_and_grammars_begin_after_them(lm: mlx_mtp.MTPModel):
    free = lm.generate(STORY, 60, temperature=0, thinking=True)
    assert len(lm.encode(free.reasoning, chat_template=False)) > 8, "there must be something to cut"
    cut = lm.generate(STORY, 60, temperature=0, thinking=True, thinking_budget=6)
    assert cut.reasoning
    assert free.reasoning.startswith(cut.reasoning)
    assert cut.tokens.index(lm.tokenizer.token_id("<channel|>")) == 7  # type: ignore[union-attr]
    both = lm.generate(STORY, 200, temperature=0, thinking=True, thinking_budget=6, response_format=BY_SCHEMA)
    assert both.reasoning == cut.reasoning
    jsonschema.validate(json.loads(both.text), SCHEMA)
    assert lm.generate(STORY, 20, temperature=0, thinking=True, thinking_budget=0).reasoning == ""


@pytest.mark.parametrize("choice, name", [
    ("add", "add"), ({"type": "function", "function": {"name": "weather"}}, "weather"),
])  # fmt: skip
def test_a_tool_that_is_chosen_is_called(lm: mlx_mtp.MTPModel, choice: Any, name: str):
    # A small model would never end a number, or a string, by itself.
    bias = {lm.encode(str(digit), chat_template=False)[-1]: -4.0 for digit in range(10)}
    bias[lm.tokenizer.token_id('<|"|>')] = 60.0  # type: ignore[union-attr, index]
    found = lm.generate(
        "Hello!", 150, temperature=1, seed=4, tools=TOOLS, tool_choice=choice, logit_bias=bias, frequency_penalty=1.5
    )
    assert found.tool_errors == []
    assert {call["function"]["name"] for call in found.tool_calls} == {name}


def test_calls_that_are_not_wanted_cannot_begin(lm: mlx_mtp.MTPModel):
    call = lm.tokenizer.token_id("<|tool_call>")  # type: ignore[union-attr]
    lured: dict[str, Any] = {"tools": TOOLS, "logit_bias": {call: 50.0}, "temperature": 0, "max_tokens": 4}
    assert lm.generate("Hello!", **lured).tokens[0] == call
    assert call not in lm.generate("Hello!", tool_choice="none", **lured).tokens
    either = lm.generate("Hello!", response_format=BY_SCHEMA, **lured)
    assert either.tokens[0] == call, "a format is for answers, not for calls"


def test_processors_see_the_text_and_change_logits(lm: mlx_mtp.MTPModel):
    prompt, seen = lm.encode(STORY), []

    def only(tokens: Any, logits: mx.array) -> mx.array:
        seen.append(list(tokens))
        return mx.where(mx.arange(logits.shape[-1]) == 300 + len(tokens) - len(prompt), logits, -mx.inf)

    for drafts in (0, 4):
        seen.clear()
        assert lm.generate(prompt, 5, draft_length=drafts, logits_processors=[only]).tokens == [300, 301, 302, 303, 304]
        assert prompt in seen
        assert [*prompt, 300, 301] in seen

    def broken(tokens: Any, logits: mx.array) -> mx.array:
        raise MTPError("not today")

    with pytest.raises(MTPError, match="not today"):
        lm.generate(prompt, 5, logits_processors=[broken])
    assert lm.generate(prompt, 5, temperature=0).tokens, "nobody else is hurt"


@pytest.fixture
def steady_prices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounds take what was guessed before the first: what drafts are worth isn't this machine's business."""
    monkeypatch.setattr(RoundCost, "observe", lambda *_: None)


@pytest.mark.usefixtures("steady_prices")
@pytest.mark.parametrize("drafter", [True, False])
def test_the_hosts_drafts_are_used_and_counted_apart(drafter: bool):
    with mlx_mtp.load(drafter=None if drafter else False) as lm:
        known = lm.generate(CODE, 120, temperature=0, draft_length=0)
        found = lm.generate(CODE, 120, temperature=0, prediction=known.text)
        assert found.tokens == known.tokens
        assert found.stats.accepted_by_source["prediction"] > 10
        by_parts = {"type": "content", "content": [{"type": "text", "text": known.text}]}
        assert lm.generate(CODE, 120, temperature=0, prediction=by_parts).stats.accepted_by_source["prediction"] > 10
        wrong = lm.generate(CODE, 120, temperature=0, prediction="Once upon a time there was a fox in a wood.")
        assert wrong.tokens == known.tokens
        record = lm.generate(CODE, 200, temperature=0, response_format=BY_SCHEMA)
        assert record.tokens == lm.generate(CODE, 200, temperature=0, response_format=BY_SCHEMA, draft_length=0).tokens
        assert record.stats.accepted_by_source["grammar"] == record.stats.drafted_by_source["grammar"] > 0
        stats = record.stats
        assert sum(stats.drafted_by_source.values()) == stats.drafted
        assert sum(stats.accepted_by_source.values()) == stats.accepted


@pytest.mark.usefixtures("steady_prices")
def test_a_text_that_repeats_itself_is_looked_up():
    with mlx_mtp.load() as lm:  # one that has measured nothing yet
        line = lm.encode(" the quick brown fox jumps over the lazy dog and runs away;", chat_template=False)
        again: dict[str, Any] = {
            "temperature": 0, "max_tokens": 80, "ignore_eos": True,
            "logits_processors": [lambda tokens, logits: mx.where(
                mx.arange(logits.shape[-1]) == line[(len(tokens) - len(prompt)) % len(line)], logits, -mx.inf)],
        }  # fmt: skip
        prompt = lm.encode(STORY)
        found = lm.generate(prompt, **again)
        assert found.tokens == lm.generate(prompt, draft_length=0, **again).tokens
        assert found.stats.accepted_by_source["prompt"] > 10


@pytest.mark.parametrize("options, message", [
    ({"repetition_penalty": 0}, "above 0"),
    ({"repetition_penalty": "1"}, "must be a number"),
    ({"presence_penalty": float("nan")}, "must be a number"),
    ({"frequency_penalty": True}, "must be a number"),
    ({"logit_bias": [1]}, "must be a dict"),
    ({"logit_bias": {1: "x"}}, "must hold numbers"),
    ({"logit_bias": {1: float("inf")}}, "must hold numbers"),
    ({"logit_bias": {10**9: 1.0}}, "isn't a token id below"),
    ({"logit_bias": {"x": 1.0}}, "isn't a token id below"),
    ({"logprobs": 21}, "0 to 20"),
    ({"logprobs": True}, "0 to 20"),
    ({"response_format": "json"}, "must be a dict"),
    ({"response_format": {"type": "xml"}}, "must have a type of"),
    ({"response_format": {"type": "json_schema"}}, "needs a dict"),
    ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"x": {1, 2}}}}}, "isn't JSON"),
    ({"response_format": {"type": "regex"}}, 'needs a string "pattern"'),
    ({"response_format": {"type": "regex", "pattern": "(ab"}}, "unclosed group"),
    ({"response_format": {"type": "grammar", "grammar": "start: nothing"}}, "unknown name"),
    ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "object", "properties": {
        "a": {"type": "object", "properties": {"b": {"type": "strin"}}}}}}}}, r"at properties\.a\.properties\.b can't"),
    ({"tool_choice": "required"}, "needs a tool"),
    ({"tools": TOOLS, "tool_choice": "subtract"}, "needs a tool of that name"),
    ({"tools": TOOLS, "tool_choice": {"type": "function"}}, "looks like"),
    ({"tools": TOOLS, "tool_choice": 5}, "must be auto"),
    ({"tools": TOOLS, "tool_choice": "add", "response_format": {"type": "json_object"}}, "exclude each other"),
    ({"thinking_budget": -1}, "whole number from 0"),
    ({"logits_processors": [5]}, "functions"),
    ({"prediction": [10**9]}, "token ids below"),
    ({"prediction": 5}, "token ids below"),
])  # fmt: skip
def test_what_cannot_be_used_is_said(lm: mlx_mtp.MTPModel, options: dict[str, Any], message: str):
    with pytest.raises(PromptError, match=message):
        lm.generate("Hello!", 3, **options)


def test_without_the_package_a_grammar_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with mlx_mtp.load() as lm:
        with pytest.raises(MTPError, match=r"mlx-mtp\[structured\]"):
            lm.generate("Hello!", 3, response_format={"type": "json_object"})
        assert lm.generate("Hello!", 3, repetition_penalty=1.2).tokens


def test_options_keep_their_place_in_a_conversation(lm: mlx_mtp.MTPModel):
    chat = lm.chat()
    answer = "".join(
        chunk.text for chunk in chat.send("A book, please.", response_format=BY_SCHEMA, max_tokens=200, temperature=0)
    )
    jsonschema.validate(json.loads(answer), SCHEMA)
    options = GenerationOptions(repetition_penalty=1.4, temperature=0, max_tokens=20)
    assert "".join(chunk.text for chunk in chat.send("And now a story.", options=options))


@pytest.mark.usefixtures("steady_prices")
def test_the_command_line_has_them_too(tmp_path: Path):
    schema, lark, tools = tmp_path / "schema.json", tmp_path / "answer.lark", tmp_path / "tools.json"
    schema.write_text(json.dumps(SCHEMA))
    lark.write_text('start: "yes" | "no"')
    tools.write_text(json.dumps(TOOLS))
    common = ("--temperature", "0", "--max-tokens", "200")
    jsonschema.validate(json.loads(run("generate", "A book.", "--response-format", schema, *common).stdout), SCHEMA)
    assert run("generate", "A book.", "--response-format", lark, *common).stdout in ("yes\n", "no\n")
    assert run("generate", "A book.", "--response-format", "regex:[0-9]{3}", *common).stdout[:3].isdecimal()
    known = json.loads(run("generate", CODE, "--json", *common, "--logprobs", "1").stdout)
    assert len(known["logprobs"]) == len(known["tokens"])
    text = tmp_path / "text.txt"
    text.write_text(known["text"])
    again = json.loads(run("generate", CODE, "--json", *common, "--prediction", text).stdout)
    assert again["tokens"] == known["tokens"]
    assert again["stats"]["accepted_by_source"]["prediction"] > 0
    banned = ",".join(f"{token}=-100" for token in {*known["tokens"]})
    other = json.loads(run("generate", CODE, "--json", *common, "--logit-bias", banned).stdout)
    assert not {*other["tokens"]} & {*known["tokens"]}
    end = str(known["tokens"][4])
    assert len(json.loads(run("generate", CODE, "--json", *common, "--stop-token-ids", end).stdout)["tokens"]) <= 5
    chosen = run("generate", "Hi", "--tools", tools, "--tool-choice", "add", "--max-tokens", "4", "--temperature", "0")
    assert "call:" in chosen.stdout


@pytest.mark.parametrize("options, culprit", [
    (("--logit-bias", "5=x"), "TOKEN=NUMBER"),
    (("--stop-token-ids", "x"), "token ids"),
    (("--response-format", "xml"), "expected json, regex:PATTERN"),
    (("--response-format", "nothing.json"), "nothing.json"),
    (("--prediction", "nothing.txt"), "nothing.txt"),
    (("--repetition-penalty", "0"), "above 0"),
    (("--tools", "nothing.json"), "nothing.json"),
    (("--logprobs", "21"), "20"),
])  # fmt: skip
def test_wrong_options_of_the_command_line(options: tuple[str, ...], culprit: str):
    refused = run("generate", "Hello!", *options)
    assert refused.returncode == 2
    assert culprit in refused.stderr
