"""OpenAI's interface, through OpenAI's own client: what it reads is what the same call in Python gives."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest

import mlx_mtp
from mlx_mtp.decode.logprobs import TokenLogprob
from mlx_mtp.server.openai_logprobs import TextLogprobs
from tests.support.server import LIGHTS, PROMPTS, SCHEMA, wait_until


@pytest.fixture(scope="module")
def client(address: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as made:
        yield made


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def test_models_are_listed_by_name(client: openai.OpenAI):
    assert [model.id for model in client.models.list()] == ["demo"]
    assert client.models.retrieve("demo").owned_by == "mlx-mtp"
    with pytest.raises(openai.NotFoundError, match="no model 'gpt-4'"):
        client.chat.completions.create(model="gpt-4", messages=user("Hi"))


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0},
        {"temperature": 0.9, "seed": 7, "top_p": 0.9},
        {"temperature": 1.0, "seed": 3, "presence_penalty": 0.5, "frequency_penalty": 0.3},
        {"temperature": 0, "stop": ["draft"]},
        {"temperature": 0, "logit_bias": {"300": -100, "301": 5}},
    ],
)
def test_a_text_is_that_of_the_same_call_in_python(
    client: openai.OpenAI, lm: mlx_mtp.MTPModel, options: dict[str, Any]
):
    direct = lm.generate(PROMPTS[0], max_tokens=40, **options)
    answer = client.chat.completions.create(model="demo", messages=user(PROMPTS[0]), max_tokens=40, **options)
    (choice,) = answer.choices
    assert choice.message.content == direct.text
    assert choice.finish_reason == direct.finish_reason
    assert answer.usage.completion_tokens == direct.stats.generated_tokens
    assert answer.usage.prompt_tokens == direct.stats.prompt_tokens


def test_other_servers_options_are_known_too(client: openai.OpenAI, lm: mlx_mtp.MTPModel):
    options = {"top_k": 20, "min_p": 0.05, "repetition_penalty": 1.2, "ignore_eos": True, "draft_length": 2}
    direct = lm.generate(PROMPTS[0], max_tokens=30, temperature=1.0, seed=5, **options)
    answer = client.chat.completions.create(
        model="demo", messages=user(PROMPTS[0]), max_completion_tokens=30, temperature=1.0, seed=5, extra_body=options
    )
    assert answer.choices[0].message.content == direct.text
    assert answer.choices[0].finish_reason == "length"


def test_streamed_pieces_make_the_same_text_and_end_with_the_usage(client: openai.OpenAI, lm: mlx_mtp.MTPModel):
    direct = lm.generate(PROMPTS[1], max_tokens=60, temperature=0.8, seed=1)
    chunks = list(
        client.chat.completions.create(
            model="demo",
            messages=user(PROMPTS[1]),
            max_tokens=60,
            temperature=0.8,
            seed=1,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    *pieces, last = chunks
    assert "".join(it.choices[0].delta.content or "" for it in pieces) == direct.text
    assert sum(bool(it.choices[0].delta.content) for it in pieces) > 2
    assert pieces[0].choices[0].delta.role == "assistant"
    assert [it.choices[0].finish_reason for it in pieces if it.choices[0].finish_reason] == [direct.finish_reason]
    assert len({it.id for it in chunks}) == 1
    assert last.choices == []
    details = last.usage.completion_tokens_details
    assert details.accepted_prediction_tokens > 0
    assert details.rejected_prediction_tokens >= 0
    assert last.usage.total_tokens == direct.stats.prompt_tokens + direct.stats.generated_tokens


@pytest.mark.parametrize("options", [{}, {"stop": ["verif"]}, {"draft_length": 0}])
def test_a_stream_says_what_came_from_drafts_if_it_is_asked(
    client: openai.OpenAI, lm: mlx_mtp.MTPModel, options: dict[str, Any]
):
    ask = {"model": "demo", "max_tokens": 60, "temperature": 0, "stream": True, "extra_body": options}
    direct = list(lm.stream(PROMPTS[0], max_tokens=60, temperature=0, **options))
    told = {"include_spans": True, "include_usage": True}
    chunks = list(client.chat.completions.create(messages=user(PROMPTS[0]), stream_options=told, **ask))
    choices = [choice for chunk in chunks for choice in chunk.choices]
    spans = [span for choice in choices for span in getattr(choice, "spans", [])]
    assert "".join(span["text"] for span in spans) == "".join(chunk.text for chunk in direct)
    assert all("".join(span["text"] for span in getattr(it, "spans", [])) == (it.delta.content or "") for it in choices)
    drafted = sum(span["drafted"] for span in spans)
    if options.get("draft_length") == 0:
        assert drafted == 0
    else:
        assert 0 < drafted <= chunks[-1].usage.completion_tokens_details.accepted_prediction_tokens
    plain = client.chat.completions.create(messages=user(PROMPTS[0]), **ask)
    assert not any(hasattr(choice, "spans") for chunk in plain for choice in chunk.choices)


def test_parallel_requests_get_the_texts_that_they_get_alone(client: openai.OpenAI, lm: mlx_mtp.MTPModel):
    prompts = PROMPTS * 3
    alone = {it: lm.generate(it, max_tokens=40, temperature=0).text for it in PROMPTS}

    def ask(prompt: str) -> str:
        answer = client.chat.completions.create(model="demo", messages=user(prompt), max_tokens=40, temperature=0)
        return answer.choices[0].message.content

    with ThreadPoolExecutor(len(prompts)) as threads:
        assert list(threads.map(ask, prompts)) == [alone[it] for it in prompts]


@pytest.mark.parametrize("stream", [False, True])
def test_n_answers_are_those_of_generate(client: openai.OpenAI, lm: mlx_mtp.MTPModel, stream: bool):
    direct = lm.generate(PROMPTS[1], max_tokens=20, temperature=1.0, seed=4, n=3)
    answer = client.chat.completions.create(
        model="demo", messages=user(PROMPTS[1]), max_tokens=20, temperature=1.0, seed=4, n=3, stream=stream
    )
    texts = [""] * 3
    if stream:
        for chunk in answer:
            texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    else:
        texts = [choice.message.content for choice in answer.choices]
        assert answer.usage.prompt_tokens == direct[0].stats.prompt_tokens
    assert texts == [it.text for it in direct]


def test_a_prompt_that_was_seen_before_is_cached(client: openai.OpenAI):
    messages = user("Tell me what a cache of prompts is good for, please, in a few words.")
    for _ in range(2):
        answer = client.chat.completions.create(model="demo", messages=messages, max_tokens=4)
    assert answer.usage.prompt_tokens_details.cached_tokens > 0


def test_thoughts_are_apart_from_the_answer(client: openai.OpenAI, lm: mlx_mtp.MTPModel):
    direct = lm.generate("What is the capital of France?", max_tokens=60, temperature=0, thinking=True)
    ask = {"model": "demo", "messages": user("What is the capital of France?"), "max_tokens": 60, "temperature": 0}
    message = client.chat.completions.create(**ask, reasoning_effort="low").choices[0].message
    assert (message.reasoning_content, message.content) == (direct.reasoning, direct.text)
    extra = {"chat_template_kwargs": {"enable_thinking": True}}
    deltas = [it.choices[0].delta for it in client.chat.completions.create(**ask, stream=True, extra_body=extra)]
    assert "".join(getattr(it, "reasoning_content", "") for it in deltas) == direct.reasoning
    message = client.chat.completions.create(**ask, reasoning_effort="none").choices[0].message
    assert not hasattr(message, "reasoning_content")


def test_log_probabilities_are_those_of_the_call_in_python(client: openai.OpenAI, lm: mlx_mtp.MTPModel):
    direct = lm.generate(PROMPTS[0], max_tokens=10, temperature=0, ignore_eos=True, logprobs=3)
    answer = client.chat.completions.create(
        model="demo",
        messages=user(PROMPTS[0]),
        max_tokens=10,
        temperature=0,
        logprobs=True,
        top_logprobs=3,
        extra_body={"ignore_eos": True},
    )
    scored = answer.choices[0].logprobs.content
    assert [it.logprob for it in scored] == [it.logprob for it in direct.logprobs]
    assert "".join(it.token for it in scored) == direct.text
    assert bytes(byte for it in scored for byte in it.bytes).decode() == direct.text
    assert [len(it.top_logprobs) for it in scored] == [3] * 10


def test_log_probabilities_of_thoughts_calls_and_special_tokens_are_left_out(lm: mlx_mtp.MTPModel):
    thought, call = "<|channel>thought\nhm\n<channel|>", '<|tool_call>call:lights{how:<|"|>now<|"|>}<tool_call|>'
    tokens = lm.encode(f"{thought}On it. {call}Done.<turn|>", chat_template=False)
    scores = TextLogprobs(lm.tokenizer)
    for token in tokens:
        scores.push([TokenLogprob(token, -0.5, [(token, -0.5)])])
    written = scores.pop()
    assert "".join(it["token"] for it in written) == "On it. Done."
    assert all(it["top_logprobs"][0]["token"] == it["token"] for it in written)
    assert scores.pop() == []


@pytest.mark.parametrize("stream", [False, True])
def test_a_tool_is_called_and_its_answer_taken(client: openai.OpenAI, stream: bool):
    messages: list[Any] = user("Switch the lights on.")
    ask = {"model": "demo", "tools": [LIGHTS], "max_tokens": 60, "temperature": 0, "stream": stream}
    answer = client.chat.completions.create(messages=messages, tool_choice="required", logprobs=True, **ask)
    if stream:
        chunks = list(answer)
        (call,) = [call for it in chunks for call in it.choices[0].delta.tool_calls or ()][:1]
        reason = chunks[-1].choices[0].finish_reason
        turn = {"role": "assistant", "tool_calls": [call.model_dump(exclude={"index"})]}
        said = "".join(it.choices[0].delta.content or "" for it in chunks)
        scores = [score for it in chunks if it.choices[0].logprobs for score in it.choices[0].logprobs.content]
    else:
        turn, reason = answer.choices[0].message, answer.choices[0].finish_reason
        call, said, scores = turn.tool_calls[0], turn.content or "", answer.choices[0].logprobs.content
    assert "".join(it.token for it in scores) == said  # none of the call's
    assert call.id
    assert call.function.name == "lights"
    assert isinstance(json.loads(call.function.arguments)["on"], bool)
    assert reason in ("tool_calls", "length")  # the demo pair may not know when to end
    messages += [turn, {"role": "tool", "tool_call_id": call.id, "content": "done"}]
    after = client.chat.completions.create(messages=messages, **ask)
    assert len(list(after)) > 1 if stream else after.choices[0].message.content is not None


def test_an_answer_keeps_to_a_json_schema(client: openai.OpenAI):
    answer = client.chat.completions.create(
        model="demo",
        messages=user("Is the sky blue?"),
        max_tokens=40,
        temperature=0,
        response_format={"type": "json_schema", "json_schema": {"name": "answer", "schema": SCHEMA, "strict": True}},
    )
    assert isinstance(json.loads(answer.choices[0].message.content)["yes"], bool)


def test_a_prediction_changes_nothing_but_the_speed(client: openai.OpenAI, lm: mlx_mtp.MTPModel):
    direct = lm.generate(PROMPTS[1], max_tokens=40, temperature=0)
    answer = client.chat.completions.create(
        model="demo",
        messages=user(PROMPTS[1]),
        max_tokens=40,
        temperature=0,
        prediction={"type": "content", "content": direct.text},
    )
    assert answer.choices[0].message.content == direct.text


def test_text_parts_are_joined_and_others_refused(client: openai.OpenAI):
    parts = [{"type": "text", "text": "What is "}, {"type": "text", "text": "a drafter?"}]
    ask = {"model": "demo", "max_tokens": 20, "temperature": 0}
    texts = [
        client.chat.completions.create(messages=[{"role": "user", "content": it}], **ask).choices[0].message.content
        for it in (parts, "What is a drafter?")
    ]
    assert texts[0] == texts[1]
    image = [{"type": "image_url", "image_url": {"url": "data:,"}}]
    with pytest.raises(openai.BadRequestError, match="'image_url': this server reads text only"):
        client.chat.completions.create(messages=[{"role": "user", "content": image}], **ask)


def test_plain_completion_uses_no_chat_template(client: openai.OpenAI, lm: mlx_mtp.MTPModel):
    direct = lm.generate("The capital of", max_tokens=12, temperature=0, chat_template=False, logprobs=2)
    answer = client.completions.create(model="demo", prompt="The capital of", max_tokens=12, temperature=0, logprobs=2)
    assert answer.choices[0].text == direct.text
    assert answer.choices[0].logprobs.token_logprobs[:5] == [it.logprob for it in direct.logprobs[:5]]
    tokens = lm.encode("The capital of", chat_template=False)
    several = client.completions.create(model="demo", prompt=[tokens, tokens], max_tokens=12, temperature=0)
    assert [it.text for it in several.choices] == [direct.text] * 2
    streamed = client.completions.create(
        model="demo",
        prompt="The capital of",
        max_tokens=12,
        temperature=0,
        stream=True,
        stream_options={"include_spans": True},
    )
    choices = [it.choices[0] for it in streamed]
    assert "".join(it.text for it in choices) == direct.text
    assert "".join(span["text"] for it in choices for span in it.spans) == direct.text


@pytest.mark.parametrize(
    "path, body, message",
    [
        ("chat/completions", b"{", "isn't JSON"),
        ("chat/completions", {"messages": []}, "the prompt is empty"),
        ("chat/completions", {"messages": [{"role": "king", "content": "Hi"}]}, "the role 'king'"),
        ("chat/completions", {"messages": user("Hi"), "colour": 1}, "unknown field: colour"),
        ("chat/completions", {"messages": user("Hi"), "n": 0}, "n: "),
        ("chat/completions", {"messages": user("Hi"), "temperature": "hot"}, "temperature: "),
        ("chat/completions", {"messages": user("Hi"), "max_tokens": 0}, "max_tokens must be"),
        ("chat/completions", {"messages": user("Hi"), "top_logprobs": 2}, "top_logprobs needs logprobs"),
        ("chat/completions", {"messages": user("Hi"), "logit_bias": {"cat": 1}}, "isn't a token id"),
        ("chat/completions", {"messages": user("Hi" * 20000)}, "the model's context only"),
        ("chat/completions", {"messages": [{"role": "user", "content": 5}]}, "has no content"),
        ("completions", {"prompt": ""}, "the prompt is empty"),
        ("completions", {"prompt": [2**40]}, "outside the vocabulary"),
        ("completions", {"prompt": "Hi", "echo": True}, "echo: "),
    ],
)
def test_a_request_that_cannot_be_used_says_why(
    address: str, path: str, body: Any, message: str, caplog: pytest.LogCaptureFixture
):
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    answer = httpx.post(f"{address}/v1/{path}", content=content, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert message in error["message"]
    assert caplog.text == ""  # it is the client's affair


def test_unknown_addresses_and_methods_are_errors_in_the_same_form(address: str):
    assert httpx.get(f"{address}/health").json() == {"status": "ok"}
    assert httpx.get(f"{address}/v1/nothing").json()["error"]["message"] == "Not Found"
    assert httpx.get(f"{address}/v1/chat/completions").status_code == 405


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_its_rows(address: str, lm: mlx_mtp.MTPModel, stream: bool):
    body = {"messages": user("Hi"), "max_tokens": 4000, "ignore_eos": True, "n": 3, "stream": stream}
    scheduler = lm._session.call(lambda it: it.scheduler)

    async def leave() -> None:
        async with httpx.AsyncClient() as client:
            asking = asyncio.create_task(client.post(f"{address}/v1/chat/completions", json=body, timeout=60))
            while not scheduler.busy:
                await asyncio.sleep(0.01)
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)

    asyncio.run(leave())
    wait_until(lambda: not scheduler.busy, seconds=5)


def test_a_failure_while_decoding_is_told_without_details(
    client: openai.OpenAI, lm: mlx_mtp.MTPModel, monkeypatch: pytest.MonkeyPatch
):
    engine = lm._session.call(lambda it: it.scheduler).engine

    def fail(*_: Any) -> None:
        raise RuntimeError("/secret/path")

    ask = {"model": "demo", "messages": user("Hi"), "max_tokens": 50}
    with monkeypatch.context() as patch:
        patch.setattr(type(engine), "round", fail)
        with pytest.raises(openai.InternalServerError, match="log says why") as whole:
            client.chat.completions.create(**ask)
        with pytest.raises(openai.APIError, match="log says why") as streamed:
            list(client.chat.completions.create(**ask, stream=True))
    assert "secret" not in str(whole.value) + str(streamed.value)
    assert client.chat.completions.create(**ask).choices[0].message.content
