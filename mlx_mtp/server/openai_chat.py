"""OpenAI's chat completions: `/v1/chat/completions`."""

from __future__ import annotations

import json
import secrets
from collections.abc import AsyncGenerator, Sequence
from typing import Any

from ..errors import PromptError
from ..session.answer import Chunk, Generation
from .bodies import joined_text
from .events import event
from .openai_common import IgnoredFields, SamplingBody, usage
from .openai_logprobs import TextLogprobs
from .service import Answers, Job


class ChatBody(SamplingBody, IgnoredFields):
    """The body of a request.

    Attributes:
        reasoning_effort: "none" and "minimal" ask for no thoughts, anything else asks the model to think first.
        chat_template_kwargs: {"enable_thinking": ...} asks for thoughts or none, as other local servers have it.
        thinking_budget: See `GenerationOptions`.
    """

    messages: list[dict[str, Any]]
    max_completion_tokens: int | None = None
    response_format: dict[str, Any] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    prediction: dict[str, Any] | None = None
    reasoning_effort: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    thinking_budget: int | None = None

    # Ignored, besides `IgnoredFields`.
    modalities: Any = None
    verbosity: Any = None

    def job(self, most_tokens: int) -> Job:
        """What the request asks for.

        Args:
            most_tokens: `max_tokens` of a request that doesn't say.

        Raises:
            PromptError: A value can't be used.
        """
        if self.top_logprobs is not None and not self.logprobs:
            raise PromptError("top_logprobs needs logprobs: true")
        options = self.options(
            most_tokens,
            max_tokens=self.max_completion_tokens if self.max_tokens is None else self.max_tokens,
            response_format=self.response_format,
            tools=self.tools or None,
            tool_choice=self.tool_choice,
            logprobs=(self.top_logprobs or 0) if self.logprobs else None,
            prediction=self.prediction,
            thinking=self._thinking,
            thinking_budget=self.thinking_budget,
        )
        messages = [{**message, "content": joined_text(message.get("content"))} for message in self.messages]
        return Job(prompts=[messages], options=options, model=self.model, n=self.n or 1)

    @property
    def _thinking(self) -> bool:
        if self.reasoning_effort is not None:
            return asks_for_thoughts(self.reasoning_effort)
        return bool((self.chat_template_kwargs or {}).get("enable_thinking", False))


class ChatReply:
    """The response to a request: whole, or as events."""

    def __init__(self, body: ChatBody, answers: Answers) -> None:
        """Takes a request and its answers."""
        self._body, self._answers = body, answers
        self._id = f"chatcmpl-{secrets.token_hex(12)}"

    def whole(self, generations: Sequence[Generation]) -> dict[str, Any]:
        """The response object."""
        choices = [
            {
                "index": i,
                "message": _message(it),
                "logprobs": _logprobs(TextLogprobs(self._answers.tokenizer), it),
                "finish_reason": finish_reason(it.finish_reason, bool(it.tool_calls)),
            }
            for i, it in enumerate(generations)
        ]
        return self._object("chat.completion", choices) | {"usage": usage(generations, self._body.n or 1)}

    async def events(self) -> AsyncGenerator[str, None]:
        """The response as server-sent events."""
        for i in range(self._answers.count):
            yield self._event(i, {"role": "assistant", "content": ""})
        calls = [0] * self._answers.count
        scores = [TextLogprobs(self._answers.tokenizer) for _ in calls]
        async for i, chunk in self._answers.chunks():
            logprobs = _logprobs(scores[i], chunk)
            if delta := _delta(chunk, calls[i]):
                yield self._event(i, delta, logprobs=logprobs, **self._body.spans(chunk))
            calls[i] += len(chunk.tool_calls)
            if chunk.finish_reason:
                yield self._event(i, {}, finish_reason=finish_reason(chunk.finish_reason, bool(calls[i])))
        if self._body.with_usage:
            total = usage(self._answers.generations(), self._body.n or 1)
            yield event(self._object("chat.completion.chunk", []) | {"usage": total})
        yield "data: [DONE]\n\n"

    def _event(self, i: int, delta: dict[str, Any], **more: Any) -> str:
        choice = {"index": i, "delta": delta, "logprobs": None, "finish_reason": None} | more
        usage_later = {"usage": None} if self._body.with_usage else {}
        return event(self._object("chat.completion.chunk", [choice]) | usage_later)

    def _object(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        answers = self._answers
        return {"id": self._id, "object": kind, "created": answers.begun, "model": answers.model, "choices": choices}


def _logprobs(scores: TextLogprobs, new: Generation | Chunk) -> dict[str, Any] | None:
    """The field `logprobs` of a choice: those of new text, if they were asked for."""
    if new.logprobs is None:
        return None
    scores.push(new.logprobs)
    return {"content": scores.pop() if new.text else [], "refusal": None}


def asks_for_thoughts(effort: str | None) -> bool:
    """Whether an effort of reasoning asks the model to think first."""
    return effort not in (None, "none", "minimal")


def finish_reason(reason: str, called: bool) -> str:
    """OpenAI's name of a finish reason; an answer that the time limit ended has the reason "length"."""
    if reason != "stop":
        return "length"
    return "tool_calls" if called else "stop"


def written_call(call: dict[str, Any]) -> dict[str, Any]:
    """A tool call with its arguments as JSON text."""
    function = call["function"]
    arguments = json.dumps(function["arguments"], ensure_ascii=False)
    return {"id": call["id"], "type": "function", "function": {"name": function["name"], "arguments": arguments}}


def _message(generation: Generation) -> dict[str, Any]:
    calls = [written_call(call) for call in generation.tool_calls]
    message: dict[str, Any] = {"role": "assistant", "content": generation.text or (None if calls else "")}
    message["refusal"] = None
    if generation.reasoning:
        message["reasoning_content"] = generation.reasoning
    return message | ({"tool_calls": calls} if calls else {})


def _delta(chunk: Chunk, calls: int) -> dict[str, Any]:
    """What a chunk adds to a message that has a number of tool calls already."""
    delta: dict[str, Any] = {}
    if chunk.reasoning:
        delta["reasoning_content"] = chunk.reasoning
    if chunk.text:
        delta["content"] = chunk.text
    if chunk.tool_calls:
        delta["tool_calls"] = [{"index": calls + j, **written_call(call)} for j, call in enumerate(chunk.tool_calls)]
    return delta
