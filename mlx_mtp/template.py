"""Chat templates: a conversation becomes the text that a model was trained on.

A checkpoint's own template is used: chat_template.jinja, or what tokenizer_config.json holds. One without gets
Gemma 4's format as written in this package's chat_template.jinja. Templates run in a sandbox; nothing else from a
folder is run.
"""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from jinja2.ext import Extension
from jinja2.nodes import Node
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from .checkpoint import read_json
from .control import CHANNEL_END, ControlTokens
from .errors import CheckpointError, PromptError

_END = "\udfff"
"""Marks the end of a message that is to be continued: a lone surrogate like control.py's, and none of these."""

_NOT_ASCII = re.compile("[^\x00-\x7f\ud800-\udfff]")

ROLES = ("system", "developer", "user", "assistant", "model", "tool")

BUILT_IN = Path(__file__).parent / "chat_template.jinja"


class ChatTemplate:
    """A checkpoint's chat template.

    Attributes:
        folder: Where it comes from.
        built_in: Whether it is this package's, since the folder has none.
    """

    def __init__(self, folder: Path, source: str | None, variables: Mapping[str, Any]):
        """Takes a template's text, None for the built-in one, and variables that every conversation needs."""
        self.folder = folder
        self.built_in = source is None
        self._source = BUILT_IN.read_text(encoding="utf-8") if source is None else source
        self._variables = variables

    @classmethod
    def from_folder(cls, folder: Path, config: Mapping[str, Any]) -> ChatTemplate:
        """Finds a checkpoint's template, or the built-in one if it has none.

        Args:
            folder: The checkpoint.
            config: Its tokenizer_config.json.

        Raises:
            CheckpointError: A template that can't be read.
        """
        variables = {
            name: token["content"] if isinstance(token, Mapping) else token
            for name, token in config.items()
            if name.endswith("_token") and isinstance(token, str | Mapping)
        }
        source = _own_source(folder, config)
        if source is None:
            # The models with per-layer embeddings, E2B and E4B, are those that begin an answer at once.
            model = read_json(folder / "config.json", required=False)
            variables["empty_thought"] = not model.get("text_config", model).get("hidden_size_per_layer_input")
        return cls(folder, source, variables)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        thinking: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        control: ControlTokens | None = None,
        **variables: Any,
    ) -> str:
        """Puts a conversation into the template, up to where the model's answer begins, or goes on.

        It goes on where the last message is the model's own, without tool calls: the prompt ends with that message's
        text. With tool calls it ends as the template has it; in Gemma 4's, where a tool's response is to come.

        Args:
            messages: Dicts with "role", one of ROLES, and "content" or "tool_calls". Null is the same as missing.
            thinking: Whether the model is asked to think first.
            tools: Tool declarations, JSON schemas as in OpenAI's interface.
            control: Control tokens that are hidden in all of these, see `control`; None to let them be what they are.
            **variables: Others that the template knows, such as `preserve_thinking`. With `add_generation_prompt` the
                template alone says how the prompt ends.

        Raises:
            PromptError: Malformed messages, or messages that the template refuses, or a last one that it doesn't end
                with, so that it can't be continued.
            CheckpointError: The template is broken.
        """
        if not messages:
            raise PromptError("there are no messages: give at least one")
        for i, message in enumerate(messages):
            _check(i, message)
        if tools is not None and not (isinstance(tools, Sequence) and all(isinstance(tool, Mapping) for tool in tools)):
            raise PromptError('tools must be a list of dicts like {"type": "function", "function": {...}}')
        try:
            turns = [_without_null(i, message) for i, message in enumerate(messages)]
            if control:
                turns = [control.hide_in_message(turn) for turn in turns]
                tools, variables = control.hide(tools), control.hide(variables)
        except RecursionError:
            raise PromptError("the messages or tools are nested too deeply") from None
        last = turns[-1]
        own = last["role"] in ("assistant", "model") and not last.get("tool_calls") and not last.get("tool_responses")
        if not own or "add_generation_prompt" in variables:
            given = {"messages": turns, "tools": tools, "enable_thinking": thinking, "add_generation_prompt": True}
            return self._run({**given, **self._variables, **variables})
        turns[-1], said = _marked(last)
        given = {"messages": turns, "tools": tools, "enable_thinking": thinking, "add_generation_prompt": False}
        prompt, *rest = self._run({**given, **self._variables, **variables}).split(_END)
        if len(rest) != 1 or not prompt.endswith(said):
            raise PromptError(
                f"the chat template of {self.folder} changes the last message's text, so the answer can't go on from "
                "there: end with another role's message, or give the prompt as token ids"
            )
        return prompt

    def _run(self, variables: Mapping[str, Any]) -> str:
        template = self._template
        try:
            text: str = template.render(variables)
        except Exception as error:  # a template is a program, and not ours
            why = " ".join(str(error).split())
            raise PromptError(f"the chat template of {self.folder} refuses the messages: {why}") from error
        return text

    @cached_property
    def _template(self) -> Any:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _Generation]
        )
        environment.globals["raise_exception"] = _refuse
        environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
        # Jinja's own filter escapes HTML.
        environment.filters["tojson"] = _to_json
        try:
            return environment.from_string(self._source)
        except TemplateError as error:
            raise CheckpointError(f"the chat template of {self.folder} is broken: {error}") from error


def _own_source(folder: Path, config: Mapping[str, Any]) -> str | None:
    """A checkpoint's template: a file of its own, or in tokenizer_config.json, where it may be one of several."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise CheckpointError(f"{path} can't be read: {error}") from error
    template = config.get("chat_template")
    if isinstance(template, list):
        named = [t for t in template if isinstance(t, Mapping) and t.get("name") == "default"]
        template = named[0].get("template") if named else None
    if not isinstance(template, str | None):
        raise CheckpointError(f"{folder / 'tokenizer_config.json'}: chat_template is no text")
    return template


def _check(i: int, message: Mapping[str, Any]) -> None:
    """Refuses the i-th message for what templates would stumble over, or print as if it were right."""
    role, calls = message.get("role"), message.get("tool_calls") or []
    if role not in ROLES:
        raise PromptError(f"message {i} has the role {role!r}: use one of {', '.join(ROLES)}")
    content = message.get("content")
    if isinstance(content, list) and not all(isinstance(part, Mapping) for part in content):
        raise PromptError(f'message {i} ({role}) has a part that isn\'t {{"type": "text", "text": ...}}')
    if not isinstance(calls, list | tuple):
        raise PromptError(f"message {i} ({role}) has tool_calls that are no list")
    if not isinstance(content, str | list) and not calls:
        raise PromptError(f"message {i} ({role}) has no content: give a string")
    for call in calls:
        function = call.get("function") if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise PromptError(
                f'message {i} has a tool call that isn\'t {{"function": {{"name": ..., "arguments": ...}}}}'
            )
        if not isinstance(function.get("arguments"), Mapping):
            raise PromptError(
                f"message {i} calls {function['name']} with arguments that are no dict: parse the JSON first"
            )


def _without_null(i: int, message: Mapping[str, Any]) -> dict[str, Any]:
    """The i-th message as templates take it: what is null is missing, but for the content, which then is empty."""
    turn = {"content": ""} | {key: value for key, value in message.items() if value is not None}
    for part in turn["content"] if isinstance(turn["content"], list) else ():
        if part.get("type") == "text" and not isinstance(part.get("text"), str):
            raise PromptError(f"message {i} ({turn['role']}) has a part of type text whose text is no string")
    return turn


def _marked(message: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    """A message with a mark at its end, and what must stand before that in the prompt."""
    content = message["content"]
    if isinstance(content, str):
        marked, text = content + _END, content
    else:
        text = content[-1].get("text", "") if content else ""
        marked = [*content[:-1], {"type": "text", **(content[-1] if content else {}), "text": text + _END}]
    # Templates may drop thoughts, and white space before the text.
    return {**message, "content": marked}, text.rsplit(CHANNEL_END, 1)[-1].lstrip()


def _refuse(message: str) -> None:
    raise TemplateError(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    text = json.dumps(value, ensure_ascii=False, indent=indent, separators=separators, sort_keys=sort_keys)
    # Written out, what stands for a hidden character would be lost.
    return _NOT_ASCII.sub(lambda found: json.dumps(found[0])[1:-1], text) if ensure_ascii else text


class _Generation(Extension):
    """`{% generation %}`, between which and its end fine-tuning says what is learnt: no difference here."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> list[Node]:
        """The statements in between."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)
