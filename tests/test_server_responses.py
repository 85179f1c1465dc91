"""OpenAI's responses, through OpenAI's own client."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest

import mlx_mtp

CAPITAL = "What is the capital of France?"
ASK: dict[str, Any] = {"model": "demo", "max_output_tokens": 60, "temperature": 0}
LIGHTS = {
    "type": "function",
    "name": "lights",
    "description": "Switches the lights",
    "parameters": {"type": "object", "properties": {"on": {"type": "boolean"}}, "required": ["on"]},
    "strict": True,
}


@pytest.fixture(scope="module")
def client(address: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as made:
        yield made


def test_a_text_is_that_of_the_same_call_in_python(client: openai.OpenAI, lm: mlx_mtp.MTPModel):
    messages = [{"role": "system", "content": "Answer briefly."}, {"role": "user", "content": CAPITAL}]
    direct = lm.generate(messages, max_tokens=60, temperature=0)
    response = client.responses.create(input=CAPITAL, instructions="Answer briefly.", **ASK)
    assert response.output_text == direct.text
    assert response.status == "completed"
    assert response.usage.output_tokens == direct.stats.generated_tokens
    parts = [{"role": "user", "content": [{"type": "input_text", "text": CAPITAL}]}]
    assert client.responses.create(input=parts, instructions="Answer briefly.", **ASK).output_text == direct.text


def test_a_stream_tells_of_thought_and_text_and_ends_with_the_response(client: openai.OpenAI, lm: mlx_mtp.MTPModel):
    direct = lm.generate(CAPITAL, max_tokens=60, temperature=0, thinking=True)
    events = list(client.responses.create(input=CAPITAL, reasoning={"effort": "low"}, stream=True, **ASK))
    assert [it.sequence_number for it in events] == list(range(len(events)))
    kinds = [it.type for it in events]
    assert kinds[:2] == ["response.created", "response.in_progress"]
    texts = {
        kind: "".join(it.delta for it in events if it.type == f"response.{kind}.delta")
        for kind in ("reasoning_text", "output_text")
    }
    assert texts == {"reasoning_text": direct.reasoning, "output_text": direct.text}
    assert kinds.count("response.output_item.added") == kinds.count("response.output_item.done") == 2
    ended = events[-1]
    assert ended.type == "response.completed"
    assert ended.response.output_text == direct.text
    assert ended.response.output[0].content[0].text == direct.reasoning
    added = [it.item.id for it in events if it.type == "response.output_item.added"]
    assert added == [it.id for it in ended.response.output]


def test_an_answer_that_is_cut_off_is_incomplete(client: openai.OpenAI):
    response = client.responses.create(input=CAPITAL, **ASK | {"max_output_tokens": 2})
    assert response.status == "incomplete"
    assert response.incomplete_details.reason == "max_output_tokens"


@pytest.mark.parametrize("stream", [False, True])
def test_a_function_is_called_and_its_output_taken(client: openai.OpenAI, stream: bool):
    history: list[Any] = [{"role": "user", "content": "Switch the lights on."}]
    ask = ASK | {"tools": [LIGHTS]}
    response = client.responses.create(input=history, tool_choice="required", stream=stream, **ask)
    if stream:
        events = list(response)
        assert any(it.type == "response.function_call_arguments.done" for it in events)
        response = events[-1].response
    call = next(item for item in response.output if item.type == "function_call")
    assert call.name == "lights"
    assert isinstance(json.loads(call.arguments)["on"], bool)
    history += [call, {"type": "function_call_output", "call_id": call.call_id, "output": "done"}]
    assert client.responses.create(input=history, **ask).status


def test_an_answer_keeps_to_a_json_schema(client: openai.OpenAI):
    yes = {"type": "object", "properties": {"yes": {"type": "boolean"}}, "required": ["yes"]}
    form = {"type": "json_schema", "name": "answer", "schema": yes | {"additionalProperties": False}, "strict": True}
    response = client.responses.create(input="Is the sky blue?", text={"format": form}, **ASK)
    assert isinstance(json.loads(response.output_text)["yes"], bool)


@pytest.mark.parametrize("stream", [False, True])
def test_log_probabilities_are_those_of_the_text(client: openai.OpenAI, lm: mlx_mtp.MTPModel, stream: bool):
    direct = lm.generate(CAPITAL, max_tokens=60, temperature=0, thinking=True, logprobs=2)
    ask = ASK | {"include": ["message.output_text.logprobs"], "top_logprobs": 2, "reasoning": {"effort": "low"}}
    response = client.responses.create(input=CAPITAL, stream=stream, **ask)
    if stream:
        events = list(response)
        streamed = [score for it in events if it.type == "response.output_text.delta" for score in it.logprobs]
        done = next(it for it in events if it.type == "response.output_text.done")
        response = events[-1].response
    thought, said = response.output
    scores = said.content[0].logprobs
    assert thought.content[0].text
    assert "".join(it.token for it in scores) == said.content[0].text == direct.text
    own = [it.logprob for it in direct.logprobs]
    assert [it.logprob for it in scores] == own[-len(scores) - 1 : -1]  # the last one is the end of the turn
    assert all(len(it.top_logprobs) == 2 for it in scores)
    if stream:
        assert [it.logprob for it in streamed] == [it.logprob for it in done.logprobs] == [it.logprob for it in scores]


def test_without_asking_there_are_no_log_probabilities(client: openai.OpenAI):
    (said,) = client.responses.create(input=CAPITAL, include=["reasoning.encrypted_content"], **ASK).output
    assert said.content[0].logprobs == []


@pytest.mark.parametrize(
    "change, message",
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"tools": [{"type": "web_search"}]}, "aren't supported"),
        ({"include": ["message.output_text.logprobs"], "top_logprobs": 21}, "logprobs must be a whole number"),
        ({"input": [{"type": "item_reference", "id": "msg_1"}]}, "item_reference"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "data:,"}]}]}, "reads text only"),
    ],
)
def test_a_request_that_cannot_be_used_says_why(client: openai.OpenAI, change: dict[str, Any], message: str):
    with pytest.raises(openai.BadRequestError, match=message):
        client.responses.create(**{"input": CAPITAL, **ASK, **change})
