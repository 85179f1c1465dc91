"""Anthropic's interface: `/v1/messages` and `/v1/messages/count_tokens`."""

from __future__ import annotations

import json
import secrets
from collections.abc import AsyncGenerator, Iterator, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field

from ..errors import PromptError
from ..session.answer import Generation
from .bodies import Body, joined_text, options_of
from .events import event
from .service import Answers, Job

_CHOICES = {"auto": "auto", "any": "required", "none": "none"}
"""Names of tool choices here, by Anthropic's."""


class Thinking(Body):
    """Whether the model thinks first, and how long."""

    type: Literal["enabled", "adaptive", "between_tools", "disabled"]
    budget_tokens: int | None = None
    display: Any = None  # ignored: thoughts are always shown


class OutputFormat(Body):
    """What the answer must be."""

    type: Literal["json_schema"]
    schema_: Annotated[dict[str, Any], Field(alias="schema")]  # pydantic's models have a method of that name


class OutputConfig(Body):
    """How the answer is written."""

    format: OutputFormat | None = None
    effort: Any = None  # ignored

    @property
    def response_format(self) -> dict[str, Any] | None:
        """The format as in OpenAI's interface."""
        return {"type": "json_schema", "json_schema": {"schema": self.format.schema_}} if self.format else None


class MessagesBody(Body):
    """The body of a request; that of `count_tokens` too, which needs no `max_tokens`."""

    model: str
    messages: list[dict[str, Any]]
    max_tokens: int | None = None
    system: str | list[dict[str, Any]] | None = None
    stop_sequences: list[str] | None = None
    stream: bool | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: dict[str, Any] | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None

    # Ignored: they have no meaning for a model on this machine. `cache_control` of messages and tools is ignored too.
    metadata: Any = None
    service_tier: Any = None
    container: Any = None
    context_management: Any = None
    cache_control: Any = None
    diagnostics: Any = None
    inference_geo: Any = None
    speed: Any = None
    user_profile_id: Any = None
    workspace_id: Any = None

    def job(self) -> Job:
        """What the request asks for.

        Raises:
            PromptError: A value can't be used.
        """
        thinking = self.thinking is not None and self.thinking.type != "disabled"
        options = options_of(
            max_tokens=self.max_tokens,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            stop=self.stop_sequences,
            tools=[_tool(tool) for tool in self.tools or ()] or None,
            tool_choice=_tool_choice(self.tool_choice),
            thinking=thinking,
            thinking_budget=self.thinking.budget_tokens if self.thinking and thinking else None,
            response_format=self.output_config and self.output_config.response_format,
        )
        system = joined_text(self.system)
        messages = [{"role": "system", "content": system}] if system else []
        for message in self.messages:
            messages += _turns(message)
        return Job(prompts=[messages], options=options, model=self.model)


class MessagesReply:
    """The response to a request: whole, or as events."""

    def __init__(self, body: MessagesBody, answers: Answers) -> None:
        """Takes a request and its answers."""
        self._stops, self._answers = body.stop_sequences or [], answers
        self._id = f"msg_{secrets.token_hex(12)}"

    def whole(self, generations: Sequence[Generation]) -> dict[str, Any]:
        """The response object."""
        (generation,) = generations
        content: list[dict[str, Any]] = []
        if generation.reasoning:
            content.append({"type": "thinking", "thinking": generation.reasoning, "signature": ""})
        if generation.text:
            content.append({"type": "text", "text": generation.text, "citations": None})
        content += [_tool_use(call) for call in generation.tool_calls]
        return self._message(content) | self._end(generation) | {"usage": _usage(generation)}

    async def events(self) -> AsyncGenerator[str, None]:
        """The response as server-sent events."""
        began, blocks = False, _Blocks()
        async for _, chunk in self._answers.chunks():
            if not began:  # the first chunk knows how many tokens of the prompt were cached
                began = True
                start = self._message([]) | {
                    "usage": _usage_of(chunk.stats.prompt_tokens, chunk.stats.cached_tokens, 0)
                }
                yield event({"type": "message_start", "message": start}, "message_start")
            for part in blocks.add(chunk.reasoning, chunk.text, chunk.tool_calls):
                yield event(part, part["type"])
        for part in blocks.close():
            yield event(part, part["type"])
        (generation,) = self._answers.generations()
        end = {"type": "message_delta", "delta": self._end(generation), "usage": _usage(generation)}
        yield event(end, "message_delta")
        yield event({"type": "message_stop"}, "message_stop")

    def _message(self, content: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self._id,
            "type": "message",
            "role": "assistant",
            "model": self._answers.model,
            "content": content,
            "stop_reason": None,
            "stop_sequence": None,
        }

    def _end(self, generation: Generation) -> dict[str, Any]:
        """Why the answer ended; one that the time limit ended has the reason "max_tokens"."""
        if generation.finish_reason != "stop":
            return {"stop_reason": "max_tokens", "stop_sequence": None}
        # What follows the text is the string that ended it, unless a stop token did.
        rest = self._answers.tokenizer.decode(generation.tokens)[len(generation.text) :]
        found = next((stop for stop in self._stops if rest.startswith(stop)), None)
        if found is not None:
            return {"stop_reason": "stop_sequence", "stop_sequence": found}
        return {"stop_reason": "tool_use" if generation.tool_calls else "end_turn", "stop_sequence": None}


class _Blocks:
    """The content blocks of a streamed answer: which one is open, and the events that open, fill and close them."""

    def __init__(self) -> None:
        self._index, self._open = 0, ""

    def add(self, reasoning: str, text: str, calls: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """Events for what a chunk brings."""
        if reasoning:
            yield from self._opened("thinking", {"thinking": "", "signature": ""})
            yield self._delta({"type": "thinking_delta", "thinking": reasoning})
        if text:
            yield from self._opened("text", {"text": "", "citations": None})
            yield self._delta({"type": "text_delta", "text": text})
        for call in calls:
            used = _tool_use(call)
            yield from self.close()
            yield from self._opened("tool_use", {**used, "input": {}})
            arguments = json.dumps(used["input"], ensure_ascii=False)
            yield self._delta({"type": "input_json_delta", "partial_json": arguments})
            yield from self.close()

    def close(self) -> Iterator[dict[str, Any]]:
        """The event that closes the open block, if there is one."""
        if self._open:
            yield {"type": "content_block_stop", "index": self._index}
            self._index, self._open = self._index + 1, ""

    def _opened(self, kind: str, block: dict[str, Any]) -> Iterator[dict[str, Any]]:
        if self._open != kind:
            yield from self.close()
            self._open = kind
            yield {"type": "content_block_start", "index": self._index, "content_block": {"type": kind, **block}}

    def _delta(self, delta: dict[str, Any]) -> dict[str, Any]:
        return {"type": "content_block_delta", "index": self._index, "delta": delta}


def _turns(message: dict[str, Any]) -> list[dict[str, Any]]:
    """A message in the form of chat templates: a tool's results become messages of their own, before the text.

    Raises:
        PromptError: A block has a type that isn't known, or lacks a field.
    """
    role, content = message.get("role"), message.get("content")
    if role not in ("user", "assistant", "system"):
        raise PromptError(f"a message has the role {role!r}: use user, assistant or system")
    if not isinstance(content, list):
        return [{"role": role, "content": content}]
    results, calls, texts, thoughts = [], [], [], []
    for block in content:
        kind = block.get("type") if isinstance(block, dict) else None
        if kind == "tool_result":
            told = joined_text(block.get("content") or "")
            results.append({"role": "tool", "tool_call_id": block.get("tool_use_id"), "content": told})
        elif kind == "tool_use":
            function = {"name": block.get("name"), "arguments": block.get("input")}
            calls.append({"id": block.get("id"), "type": "function", "function": function})
        elif kind == "thinking":
            thoughts.append(str(block.get("thinking", "")))
        elif kind != "redacted_thinking":  # it is encrypted
            texts.append(block)
    turn: dict[str, Any] = {"role": role, "content": joined_text(texts)}
    turn |= {"tool_calls": calls} if calls else {}
    turn |= {"reasoning": "".join(thoughts)} if thoughts else {}
    return [*results, turn] if texts or calls or not results else results


def _tool(tool: dict[str, Any]) -> dict[str, Any]:
    """A tool in OpenAI's form.

    Raises:
        PromptError: It is one that Anthropic's servers run.
    """
    if tool.get("type", "custom") != "custom":
        raise PromptError(f"tools of the type {tool['type']!r} aren't supported: declare your own")
    function = {"name": tool.get("name"), "description": tool.get("description") or ""}
    return {"type": "function", "function": {**function, "parameters": tool.get("input_schema") or {}}}


def _tool_choice(choice: dict[str, Any] | None) -> str | None:
    if choice is None:
        return None
    kind, name = choice.get("type"), choice.get("name")
    if kind == "tool" and isinstance(name, str):
        return name
    if not isinstance(kind, str) or kind not in _CHOICES:
        raise PromptError('tool_choice is a dict with the type "auto", "any", "none", or "tool" and a name')
    return _CHOICES[kind]


def _tool_use(call: dict[str, Any]) -> dict[str, Any]:
    function = call["function"]
    return {"type": "tool_use", "id": call["id"], "name": function["name"], "input": function["arguments"]}


def _usage(generation: Generation) -> dict[str, Any]:
    stats = generation.stats
    return _usage_of(stats.prompt_tokens, stats.cached_tokens, stats.generated_tokens)


def _usage_of(prompt: int, cached: int, output: int) -> dict[str, Any]:
    """Usage in Anthropic's way of counting: `input_tokens` are those that weren't cached."""
    return {
        "input_tokens": prompt - cached,
        "cache_read_input_tokens": cached,
        "cache_creation_input_tokens": 0,
        "output_tokens": output,
    }
