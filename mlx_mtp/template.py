"""Chat templates: a conversation becomes the text that a model was trained on.

A checkpoint's own template is used: chat_template.jinja, or what tokenizer_config.json holds. One without gets
Gemma 4's format as written in this package's chat_template.jinja. Templates run in a sandbox; nothing else from a
folder is run.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from jinja2.ext import Extension
from jinja2.nodes import Node
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from .errors import CheckpointError, PromptError
from .files import read_json
from .tools import read_arguments

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
            name: token.get("content", "") if isinstance(token, Mapping) else token
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
        **variables: Any,
    ) -> str:
        """Puts a conversation into the template, up to where the model's answer begins.

        Args:
            messages: Dicts with "role", one of ROLES, and "content" or "tool_calls".
            thinking: Whether the model is asked to think first.
            tools: Tool declarations, JSON schemas as in OpenAI's interface.
            **variables: Others that the template knows, such as `preserve_thinking`.

        Raises:
            PromptError: Malformed messages, or messages that the template refuses.
            CheckpointError: The template is broken.
        """
        if not messages:
            raise PromptError("there are no messages: give at least one")
        for i, message in enumerate(messages):
            _check(i, message)
        messages = [_with_read_arguments(message) for message in messages]
        if tools is not None and not (isinstance(tools, Sequence) and all(isinstance(tool, Mapping) for tool in tools)):
            raise PromptError('tools must be a list of dicts like {"type": "function", "function": {...}}')
        template = self._template
        try:
            return template.render(
                {"messages": messages, "tools": tools, "enable_thinking": thinking, "add_generation_prompt": True},
                **{**self._variables, **variables},
            )
        except Exception as error:  # a template is a program, and not ours
            why = " ".join(str(error).split())
            raise PromptError(f"the chat template of {self.folder} refuses the messages: {why}") from error

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
        if read_arguments(function.get("arguments")) is None:
            raise PromptError(
                f"message {i} calls {function['name']} with arguments that are neither a dict nor JSON's text of one"
            )


def _with_read_arguments(message: Mapping[str, Any]) -> Mapping[str, Any]:
    """The message with its calls' arguments as dicts, which is what templates take."""
    if not message.get("tool_calls"):
        return message
    calls = []
    for call in message["tool_calls"]:
        function = {**call["function"], "arguments": read_arguments(call["function"].get("arguments"))}
        calls.append({**call, "function": function})
    return {**message, "tool_calls": calls}


def _refuse(message: str) -> None:
    raise TemplateError(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


class _Generation(Extension):
    """`{% generation %}`, between which and its end fine-tuning says what is learnt: no difference here."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> list[Node]:
        """The statements in between."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)
