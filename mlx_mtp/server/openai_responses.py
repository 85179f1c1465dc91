"""OpenAI's responses: `/v1/responses`. Nothing is stored: every request brings the whole conversation."""

from __future__ import annotations

import secrets
from collections.abc import AsyncGenerator, Iterator, Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from ..errors import PromptError
from ..session.answer import Generation
from .bodies import joined_text, options_of
from .events import event
from .openai_chat import asks_for_thoughts
from .openai_common import IgnoredFields
from .response_items import Items
from .service import Answers, Job

LOGPROBS = "message.output_text.logprobs"
"""What `include` asks for log-probabilities with; the rest of what it may list comes from OpenAI's own tools."""

TEXT_PARTS = ("input_text", "output_text", "text")
"""Types of content parts that hold text."""


class Reasoning(BaseModel):
    """Whether the model thinks first; other fields are ignored."""

    model_config = ConfigDict(extra="ignore")

    effort: str | None = None


class TextFormat(BaseModel):
    """What the answer must be; other fields are ignored."""

    model_config = ConfigDict(extra="ignore")

    format: dict[str, Any] | None = None


class ResponsesBody(IgnoredFields):
    """The body of a request. Null is the same as a missing field."""

    input: str | list[dict[str, Any]]
    model: str | None = None
    instructions: str | None = None
    max_output_tokens: int | None = None
    stream: bool | None = None
    temperature: float | None = None
    top_p: float | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    text: TextFormat | None = None
    reasoning: Reasoning | None = None
    include: list[str] | None = None
    top_logprobs: int | None = None

    # Beyond OpenAI's interface.
    seed: int | None = None
    top_k: int | None = None
    min_p: float | None = None

    # Only the values that ask for nothing: no response is stored or made later.
    background: Literal[False] | None = None
    conversation: Literal[None] = None
    previous_response_id: Literal[None] = None

    # Ignored, besides `IgnoredFields`.
    max_tool_calls: Any = None
    stream_options: Any = None
    truncation: Any = None

    def job(self, most_tokens: int) -> Job:
        """What the request asks for.

        Args:
            most_tokens: Most tokens of an answer whose request doesn't say.

        Raises:
            PromptError: A value can't be used.
        """
        options = options_of(
            max_tokens=most_tokens if self.max_output_tokens is None else self.max_output_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            min_p=self.min_p,
            seed=self.seed,
            tools=[_tool(tool) for tool in self.tools or ()] or None,
            tool_choice=self._tool_choice,
            response_format=self._response_format,
            logprobs=(self.top_logprobs or 0) if LOGPROBS in (self.include or ()) else None,
            thinking=asks_for_thoughts(self.reasoning.effort) if self.reasoning else None,
        )
        items = [{"role": "user", "content": self.input}] if isinstance(self.input, str) else self.input
        messages = _messages(items)
        if self.instructions:
            messages = [{"role": "system", "content": self.instructions}, *messages]
        return Job(prompts=[messages], options=options, model=self.model)

    @property
    def _tool_choice(self) -> str | None:
        choice = self.tool_choice
        if not isinstance(choice, dict):
            return choice
        name = choice.get("name")
        if choice.get("type") != "function" or not isinstance(name, str):
            raise PromptError('a tool_choice that is a dict looks like {"type": "function", "name": ...}')
        return name

    @property
    def _response_format(self) -> dict[str, Any] | None:
        """The text's format, in the form of chat completions."""
        given = self.text.format if self.text else None
        if given is None or given.get("type") != "json_schema":
            return given
        return {"type": "json_schema", "json_schema": {"schema": given.get("schema")}}


class ResponsesReply:
    """The response to a request: whole, or as events."""

    def __init__(self, body: ResponsesBody, answers: Answers) -> None:
        """Takes a request and its answers."""
        self._body, self._answers = body, answers
        self._id = f"resp_{secrets.token_hex(12)}"

    def whole(self, generations: Sequence[Generation]) -> dict[str, Any]:
        """The response object."""
        (generation,) = generations
        items = Items(self._answers.tokenizer)
        for _ in items.add(generation):
            pass  # the events aren't needed here
        return self._ended(generation, items)

    async def events(self) -> AsyncGenerator[str, None]:
        """The response as server-sent events."""
        items, number = Items(self._answers.tokenizer), 0

        def numbered(events: Iterator[dict[str, Any]]) -> Iterator[str]:
            nonlocal number
            for it in events:
                yield event(it | {"sequence_number": number}, it["type"])
                number += 1

        begun = self._response("in_progress", [])
        for text in numbered({"type": f"response.{it}", "response": begun} for it in ("created", "in_progress")):
            yield text
        async for _, chunk in self._answers.chunks():
            for text in numbered(items.add(chunk)):
                yield text
        for text in numbered(items.close()):
            yield text
        (generation,) = self._answers.generations()
        ended = self._ended(generation, items)
        for text in numbered(iter([{"type": f"response.{ended['status']}", "response": ended}])):
            yield text

    def _ended(self, generation: Generation, items: Items) -> dict[str, Any]:
        """The response with its answer."""
        for _ in items.close():
            pass
        status = "completed" if generation.finish_reason == "stop" else "incomplete"
        return self._response(status, items.output) | {"usage": self._usage(generation)}

    def _response(self, status: str, output: list[dict[str, Any]]) -> dict[str, Any]:
        body = self._body
        return {
            "id": self._id,
            "object": "response",
            "created_at": self._answers.begun,
            "status": status,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "metadata": {},
            "model": self._answers.model,
            "output": output,
            "parallel_tool_calls": True,
            "previous_response_id": None,
            "temperature": body.temperature,
            "tool_choice": body.tool_choice or "auto",
            "tools": body.tools or [],
            "top_logprobs": body.top_logprobs or 0,
            "top_p": body.top_p,
            "usage": None,
        }

    def _usage(self, generation: Generation) -> dict[str, Any]:
        """Usage; tokens of thought are counted by encoding it again."""
        stats, tokenizer = generation.stats, self._answers.tokenizer
        thought = len(tokenizer.encode(generation.reasoning)) if generation.reasoning else 0
        return {
            "input_tokens": stats.prompt_tokens,
            "input_tokens_details": {"cached_tokens": stats.cached_tokens, "cache_write_tokens": 0},
            "output_tokens": stats.generated_tokens,
            "output_tokens_details": {"reasoning_tokens": thought},
            "total_tokens": stats.prompt_tokens + stats.generated_tokens,
        }


def _messages(items: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Input items as messages; what one turn of the assistant consists of becomes one message.

    Raises:
        PromptError: An item has a type that isn't known.
    """
    messages: list[dict[str, Any]] = []
    thought = ""
    for item in items:
        kind = item.get("type", "message")
        if kind == "message":
            message = {"role": item.get("role"), "content": joined_text(item.get("content"), TEXT_PARTS)}
            if message["role"] == "assistant" and thought:
                message["reasoning"], thought = thought, ""
            messages.append(message)
        elif kind == "reasoning":
            thought = joined_text(item.get("content") or [], ("reasoning_text",))
        elif kind == "function_call":
            function = {"name": item.get("name"), "arguments": item.get("arguments")}
            if not messages or messages[-1]["role"] != "assistant":
                messages.append({"role": "assistant", "content": "", **({"reasoning": thought} if thought else {})})
                thought = ""
            calls = messages[-1].setdefault("tool_calls", [])
            calls.append({"id": item.get("call_id"), "type": "function", "function": function})
        elif kind == "function_call_output":
            output = joined_text(item.get("output"), TEXT_PARTS)
            messages.append({"role": "tool", "tool_call_id": item.get("call_id"), "content": output})
        else:
            raise PromptError(f"input has an item of the type {kind!r}, which this server doesn't know")
    return messages


def _tool(tool: dict[str, Any]) -> dict[str, Any]:
    """A tool in the form of chat completions.

    Raises:
        PromptError: It is one that OpenAI's servers run.
    """
    if tool.get("type") != "function":
        raise PromptError(f"tools of the type {tool.get('type')!r} aren't supported: declare functions")
    function = {name: tool.get(name) for name in ("name", "description", "parameters")}
    return {"type": "function", "function": {name: value for name, value in function.items() if value is not None}}
