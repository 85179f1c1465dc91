"""Chat templates: render a conversation as text in the format that a model was trained on.

A checkpoint's own template is used if it has one (template_files.py finds it), otherwise this package's
chat_template.jinja, which writes Gemma 4's format. Templates run in a sandbox (sandbox.py); no other code from a
checkpoint's folder is run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, PromptError, one_line
from ..files import read_json
from .control_tokens import CHANNEL_END, ControlTokens
from .sandbox import Environment
from .template_files import chat_templates
from .tool_calls import read_arguments

_END = "\udfff"
"""Marks the end of a message to be continued: a lone surrogate that control_tokens.py doesn't use as a stand-in."""

ROLES = ("system", "developer", "user", "assistant", "model", "tool")

BUILT_IN = Path(__file__).parent / "chat_template.jinja"


class ChatTemplate:
    """A checkpoint's chat templates: "default", and perhaps "tool_use" for conversations with tools.

    Attributes:
        folder: The checkpoint's folder.
        built_in: Whether the template is this package's because the folder has none.
    """

    def __init__(self, folder: Path, sources: Mapping[str, str], variables: Mapping[str, Any]) -> None:
        """Takes templates.

        Args:
            folder: The checkpoint's.
            sources: Template texts by name; without "default", the built-in one is used.
            variables: Variables for every rendering.
        """
        self.folder = folder
        self.built_in = "default" not in sources
        self._sources = {"default": BUILT_IN.read_text(encoding="utf-8")} if self.built_in else {}
        self._sources |= sources
        self._compiled: dict[str, Any] = {}
        self._environment = Environment()
        self._variables = variables

    @classmethod
    def from_folder(cls, folder: Path, config: Mapping[str, Any]) -> ChatTemplate:
        """Finds a checkpoint's template, or the built-in one if it has none.

        Args:
            folder: The checkpoint.
            config: Its tokenizer_config.json.

        Raises:
            CheckpointError: A template can't be read.
        """
        variables: dict[str, Any] = {
            name: token
            for name in config
            if name.endswith("_token") and (token := token_name(config, name)) is not None
        }
        sources = chat_templates(folder, config)
        if "default" not in sources:
            # Models with per-layer embeddings (E2B, E4B) answer without an empty channel of reasoning.
            model = read_json(folder / "config.json", required=False)
            variables["empty_thought"] = not model.get("text_config", model).get("hidden_size_per_layer_input")
        return cls(folder, sources, variables)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        thinking: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        control: ControlTokens | None = None,
        **variables: Any,
    ) -> str:
        """Renders a conversation, up to where the model's answer begins or continues.

        If the last message is the model's own and has no tool calls, the prompt ends with its text, so that the answer
        continues it. If it has tool calls, the template decides; Gemma 4's ends where a tool's response follows.

        Args:
            messages: Dicts with "role", one of ROLES, and "content" or "tool_calls". Null counts as missing.
            thinking: Whether the model is asked to think first.
            tools: Tool declarations, JSON schemas as in OpenAI's interface.
            control: Hides the names of control tokens in messages, tools and variables; None leaves them as they are.
            **variables: Further variables of the template, such as `preserve_thinking`. If `add_generation_prompt` is
                among them, the template alone decides how the prompt ends.

        Returns:
            The prompt; hidden characters are still hidden.

        Raises:
            PromptError: Messages are malformed, the template refuses them, or the last message can't be continued
                because the template changes its text.
            CheckpointError: The template is broken.
        """
        if not messages:
            raise PromptError("there are no messages: give at least one")
        for i, message in enumerate(messages):
            _check(i, message)
        messages = [_with_read_arguments(message) for message in messages]
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
            return self._run({**given, **variables})
        turns[-1], said = _marked(last)
        given = {"messages": turns, "tools": tools, "enable_thinking": thinking, "add_generation_prompt": False}
        prompt, *rest = self._run({**given, **variables}).split(_END)
        if len(rest) != 1 or not prompt.endswith(said):
            raise PromptError(
                f"the chat template of {self.folder} changes the last message's text, so the answer can't go on from "
                "there: end with another role's message, or give the prompt as token ids"
            )
        return prompt

    def _run(self, variables: Mapping[str, Any]) -> str:
        template = self._template("tool_use" if variables["tools"] and "tool_use" in self._sources else "default")
        try:
            return self._environment.run(template, {**self._variables, **variables})
        except Exception as error:  # a template may raise anything
            why = " ".join(str(error).split())
            raise PromptError(f"the chat template of {self.folder} refuses the messages: {why}") from error

    def _template(self, name: str) -> Any:
        if name not in self._compiled:
            try:
                self._compiled[name] = self._environment.compiled(self._sources[name])
            except Exception as error:  # Jinja compiles to Python, so either parser may fail
                raise CheckpointError(f"the chat template of {self.folder} is broken: {one_line(error)}") from error
        return self._compiled[name]


def _check(i: int, message: Mapping[str, Any]) -> None:
    """Checks what templates don't: they would fail without a reason, or print wrong values.

    Raises:
        PromptError: The i-th message is malformed.
    """
    role, calls = message.get("role"), message.get("tool_calls") or []
    if role not in ROLES:
        raise PromptError(f"message {i} has the role {role!r}: use one of {', '.join(ROLES)}")
    content = message.get("content")
    if isinstance(content, list) and not all(isinstance(part, Mapping) for part in content):
        raise PromptError(f'message {i} ({role}) has a part that isn\'t {{"type": "text", "text": ...}}')
    if not isinstance(calls, list | tuple):
        raise PromptError(f"message {i} ({role}) has tool_calls that aren't a list")
    if not isinstance(content, str | list) and not calls:
        raise PromptError(f"message {i} ({role}) has no content: give a string")
    for call in calls:
        function = call.get("function") if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise PromptError(
                f'message {i} has a tool call that isn\'t {{"function": {{"name": ..., "arguments": ...}}}}'
            )
        if read_arguments(function.get("arguments")) is None:
            name = " ".join(function["name"].split())
            raise PromptError(f"message {i} calls {name} with arguments that are neither a dict nor JSON of one")


def _with_read_arguments(message: Mapping[str, Any]) -> Mapping[str, Any]:
    """The message with the arguments of its calls as dicts, as templates need them."""
    if not message.get("tool_calls"):
        return message
    calls = []
    for call in message["tool_calls"]:
        function = {**call["function"], "arguments": read_arguments(call["function"].get("arguments"))}
        calls.append({**call, "function": function})
    return {**message, "tool_calls": calls}


def _without_null(i: int, message: Mapping[str, Any]) -> dict[str, Any]:
    """The i-th message without null values; missing content becomes ""."""
    turn = {"content": ""} | {key: value for key, value in message.items() if value is not None}
    for part in turn["content"] if isinstance(turn["content"], list) else ():
        if part.get("type") == "text" and not isinstance(part.get("text"), str):
            raise PromptError(f"message {i} ({turn['role']}) has a part of type text whose text isn't a string")
    return turn


def _marked(message: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    """A message with `_END` after its text, and the text that the prompt must have before `_END`."""
    content = message["content"]
    marked: str | list[Any]
    if isinstance(content, str):
        marked, text = content + _END, content
    else:
        text = content[-1].get("text", "") if content else ""
        marked = [*content[:-1], {"type": "text", **(content[-1] if content else {}), "text": text + _END}]
    # Templates may drop reasoning, and white space before the text.
    return {**message, "content": marked}, text.rsplit(CHANNEL_END, 1)[-1].lstrip()


def token_name(config: Mapping[str, Any], key: str) -> str | None:
    """The name of a special token in tokenizer_config.json: a string, or an object with "content"; else None."""
    token = config.get(key)
    token = token.get("content") if isinstance(token, Mapping) else token
    return token if isinstance(token, str) else None
