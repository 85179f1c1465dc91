"""OpenAI's interface, through OpenAI's own client for JavaScript."""

from __future__ import annotations

import json
from typing import Any

import pytest

import mlx_mtp
from tests.support.node import play
from tests.support.server import LIGHTS, PROMPTS, SCHEMA, wait_until


def ask(text: str, **more: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": text}]
    return {"model": "demo", "messages": messages, "max_tokens": 60, "temperature": 0} | more


def test_a_stream_brings_the_text_its_drafts_and_the_usage(address: str, lm: mlx_mtp.MTPModel):
    direct = lm.generate(PROMPTS[1], max_tokens=60, temperature=0)
    seen = play(address, "stream", ask(PROMPTS[1]))
    assert "".join(seen["pieces"]) == direct.text
    assert len(seen["pieces"]) > 2
    assert seen["reason"] == direct.finish_reason
    assert seen["usage"]["completion_tokens"] == direct.stats.generated_tokens
    accepted = seen["usage"]["completion_tokens_details"]["accepted_prediction_tokens"]
    assert 0 < len(seen["drafted"]) <= accepted


def test_parallel_requests_get_the_texts_that_they_get_alone(address: str, lm: mlx_mtp.MTPModel):
    alone = [lm.generate(it, max_tokens=20, temperature=0).text for it in PROMPTS]
    assert play(address, "parallel", ask("", max_tokens=20), PROMPTS * 2) == alone * 2


def test_a_tool_is_called_and_its_answer_taken(address: str):
    seen = play(address, "tools", ask("Switch the lights on.", tools=[LIGHTS], tool_choice="required"))
    call = seen["calls"][0]
    assert call["function"]["name"] == "lights"
    assert isinstance(json.loads(call["function"]["arguments"])["on"], bool)
    assert seen["after"]


def test_an_answer_keeps_to_a_json_schema(address: str):
    form = {"type": "json_schema", "json_schema": {"name": "answer", "schema": SCHEMA, "strict": True}}
    assert isinstance(play(address, "schema", ask("Is the sky blue?", response_format=form))["yes"], bool)


@pytest.mark.parametrize("part, outcome", [("leave", "left the stream"), ("abort", "APIUserAbortError")])
def test_a_client_that_leaves_frees_its_row(address: str, lm: mlx_mtp.MTPModel, part: str, outcome: str):
    assert play(address, part, ask("Hi", max_tokens=4000, ignore_eos=True), 200) == outcome
    wait_until(lambda: not lm._session.call(lambda it: it.scheduler).busy, seconds=5)


def test_an_error_is_one_of_the_clients_own(address: str):
    seen = play(address, "error", ask("Hi", model="gpt-4"))
    assert (seen["name"], seen["status"]) == ("NotFoundError", 404)
    assert "no model 'gpt-4'" in seen["message"]
