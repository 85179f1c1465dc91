"""Anthropic's interface, through Anthropic's own client; and the figures for Prometheus."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import anthropic
import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

import mlx_mtp

# Older clients have an argument for the temperature.
ASK: dict[str, Any] = {"model": "demo", "max_tokens": 60, "extra_body": {"temperature": 0}}
CAPITAL: list[Any] = [{"role": "user", "content": "What is the capital of France?"}]
LIGHTS = {
    "name": "lights",
    "description": "Switches the lights",
    "input_schema": {"type": "object", "properties": {"on": {"type": "boolean"}}, "required": ["on"]},
}


@pytest.fixture(scope="module")
def client(address: str) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=address, api_key="none", max_retries=0) as made:
        yield made


def test_a_text_is_that_of_the_same_call_in_python(client: anthropic.Anthropic, lm: mlx_mtp.MTPModel):
    messages = [{"role": "system", "content": "Answer briefly."}, *CAPITAL]
    direct = lm.generate(messages, max_tokens=60, temperature=0)
    answer = client.messages.create(system="Answer briefly.", messages=CAPITAL, **ASK)
    assert [(it.type, it.text) for it in answer.content] == [("text", direct.text)]
    assert answer.stop_reason == "end_turn"
    usage = answer.usage
    assert usage.input_tokens + usage.cache_read_input_tokens == direct.stats.prompt_tokens
    assert usage.output_tokens == direct.stats.generated_tokens


def test_a_stream_builds_the_same_message(client: anthropic.Anthropic, lm: mlx_mtp.MTPModel):
    direct = lm.generate(CAPITAL, max_tokens=60, temperature=0, thinking=True)
    with client.messages.stream(messages=CAPITAL, thinking={"type": "enabled", "budget_tokens": 1024}, **ASK) as stream:
        text = "".join(stream.text_stream)
        message = stream.get_final_message()
    thought, said = message.content
    assert (thought.type, thought.thinking) == ("thinking", direct.reasoning)
    assert text == said.text == direct.text
    assert message.usage.output_tokens == direct.stats.generated_tokens
    again = [*CAPITAL, {"role": "assistant", "content": message.content}, {"role": "user", "content": "And of Spain?"}]
    assert client.messages.create(messages=again, **ASK).content[0].text


def test_limits_and_stop_sequences_are_named(client: anthropic.Anthropic):
    assert client.messages.create(messages=CAPITAL, **ASK | {"max_tokens": 3}).stop_reason == "max_tokens"
    stopped = client.messages.create(messages=CAPITAL, stop_sequences=["Rome", "Paris"], **ASK)
    assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", "Paris")
    assert "Paris" not in stopped.content[0].text


@pytest.mark.parametrize("stream", [False, True])
def test_a_tool_is_called_and_its_result_taken(client: anthropic.Anthropic, stream: bool):
    messages: list[Any] = [{"role": "user", "content": "Switch the lights on."}]
    choice = {"type": "tool", "name": "lights"}
    if stream:
        with client.messages.stream(messages=messages, tools=[LIGHTS], tool_choice=choice, **ASK) as events:
            message = events.get_final_message()
    else:
        message = client.messages.create(messages=messages, tools=[LIGHTS], tool_choice=choice, **ASK)
    used = next(block for block in message.content if block.type == "tool_use")
    assert used.name == "lights"
    assert isinstance(used.input["on"], bool)
    assert message.stop_reason in ("tool_use", "max_tokens")  # the demo pair may not know when to end
    result = {"type": "tool_result", "tool_use_id": used.id, "content": [{"type": "text", "text": "done"}]}
    messages += [{"role": "assistant", "content": [used]}, {"role": "user", "content": [result]}]
    assert client.messages.create(messages=messages, tools=[LIGHTS], **ASK).stop_reason


def test_tokens_are_counted_as_they_are_used(client: anthropic.Anthropic, lm: mlx_mtp.MTPModel):
    counted = client.messages.count_tokens(model="demo", messages=CAPITAL)
    assert counted.input_tokens == len(lm.encode(CAPITAL))
    asked = client.messages.count_tokens(model="demo", messages=CAPITAL, system="Answer briefly.", tools=[LIGHTS])
    assert asked.input_tokens > counted.input_tokens


def test_an_answer_keeps_to_a_json_schema(client: anthropic.Anthropic):
    yes = {"type": "object", "properties": {"yes": {"type": "boolean"}}, "required": ["yes"]}
    schema = yes | {"additionalProperties": False}
    answer = client.messages.create(
        messages=CAPITAL, output_config={"format": {"type": "json_schema", "schema": schema}}, **ASK
    )
    assert isinstance(json.loads(answer.content[0].text)["yes"], bool)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"messages": [{"role": "king", "content": "Hi"}]}, "the role 'king'"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]}, "reads text only"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "aren't supported"),
        ({"tool_choice": {"type": "some"}}, "tool_choice is a dict"),
        ({"max_tokens": None}, "max_tokens: Field required"),
        ({"colour": 1}, "unknown field: colour"),
    ],
)
def test_a_request_that_cannot_be_used_says_why(address: str, change: dict[str, Any], message: str):
    answer = httpx.post(
        f"{address}/v1/messages", json={"model": "demo", "max_tokens": 9, "messages": CAPITAL, **change}
    )
    assert answer.status_code == 400
    assert answer.json()["type"] == "error"
    assert answer.json()["error"]["type"] == "invalid_request_error"
    assert message in answer.json()["error"]["message"]


def test_an_unknown_model_is_an_error_of_the_client(client: anthropic.Anthropic):
    with pytest.raises(anthropic.NotFoundError, match="no model 'claude'"):
        client.messages.create(messages=CAPITAL, **ASK | {"model": "claude"})


def test_metrics_count_what_was_generated_and_drafted(address: str, client: anthropic.Anthropic):
    def read() -> dict[str, float]:
        families = text_string_to_metric_families(httpx.get(f"{address}/metrics").text)
        totals: dict[str, float] = {}
        for sample in (sample for family in families for sample in family.samples):
            totals[sample.name] = totals.get(sample.name, 0) + sample.value
        return totals

    before = read()
    usage = client.messages.create(messages=CAPITAL, **ASK).usage
    after = read()
    assert (
        after["mlx_mtp_generated_tokens_total"] - before.get("mlx_mtp_generated_tokens_total", 0) == usage.output_tokens
    )
    assert after["mlx_mtp_accepted_tokens_total"] > 0
    assert after["mlx_mtp_first_token_seconds_count"] == before.get("mlx_mtp_first_token_seconds_count", 0) + 1
    assert after["mlx_mtp_answers"] == 0
    assert after["mlx_mtp_model_loaded"] == 1
