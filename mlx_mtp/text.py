"""Between text and token ids: tokenizer, chat template, streaming detokenizer, stop strings.

Reads what Gemma 4 folders hold: tokenizer.json (BPE with byte fallback, "▁" for a space, no prefix space),
tokenizer_config.json and chat_template.jinja. The template runs in a sandbox; nothing else from a folder is run.

Not here: conversations (chat.py), and images or audio.
"""

from __future__ import annotations

import codecs
import datetime
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers
from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from .checkpoint import read_json
from .errors import CheckpointError, PromptError

ROLES = ("system", "developer", "user", "assistant", "model", "tool")

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
_CHANNEL, _CHANNEL_END = "<|channel>", "<channel|>"


class Tokenizer:
    """A checkpoint's tokenizer and chat template.

    Attributes:
        folder: Where it comes from.
        special: Ids of the special tokens, which are no text.
    """

    def __init__(self, folder: Path, tokenizer: tokenizers.Tokenizer, config: Mapping[str, Any], template: str | None):
        """See `from_folder`."""
        self.folder = folder
        self.special = frozenset(i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special)
        self._tokenizer = tokenizer
        self._template_source = template
        self._named_tokens = {
            name: token["content"] if isinstance(token, Mapping) else token
            for name, token in config.items()
            if name.endswith("_token") and isinstance(token, str | Mapping)
        }

    @classmethod
    def from_folder(cls, folder: Path) -> Tokenizer:
        """Reads a checkpoint's tokenizer.

        Raises:
            CheckpointError: No tokenizer.json, or files that can't be read.
        """
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise CheckpointError(f"{folder} has no tokenizer.json")
        try:
            tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises the bare class
            raise CheckpointError(f"{path} can't be read: {error}") from error
        config = read_json(folder / "tokenizer_config.json", required=False)
        return cls(folder, tokenizer, config, _read_template(folder, config))

    def encode(self, text: str) -> list[int]:
        """Token ids of a text. No special token is added; those that are spelt out in the text are recognised.

        Raises:
            PromptError: The text can't be written as UTF-8, as when it was read from a file in another encoding.
        """
        try:
            return self._tokenizer.encode(text, add_special_tokens=False).ids
        except (TypeError, UnicodeEncodeError):
            raise PromptError("the text holds bytes that aren't UTF-8: convert it first") from None

    def decode(self, tokens: Iterable[int]) -> str:
        """The text of token ids, thoughts and special tokens left out."""
        decoder = StreamDecoder(self)
        text, _ = decoder.push(tokens)
        return text + decoder.finish()

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        thinking: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> list[int]:
        """Token ids of a conversation, up to where the model's answer begins; see `render`."""
        return self.encode(self.render(messages, thinking, tools))

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        thinking: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> str:
        """Puts a conversation into the checkpoint's chat template.

        Args:
            messages: Dicts with "role", one of ROLES, and "content".
            thinking: Whether the model is asked to think first.
            tools: Tool declarations, JSON schemas as in OpenAI's interface.

        Raises:
            PromptError: Malformed messages, or messages that the template refuses.
            CheckpointError: There is no template, or it is broken.
        """
        if not messages:
            raise PromptError("there are no messages: give at least one")
        for i, message in enumerate(messages):
            if message.get("role") not in ROLES:
                raise PromptError(f"message {i} has the role {message.get('role')!r}: use one of {', '.join(ROLES)}")
            if not isinstance(message.get("content"), str | list) and not message.get("tool_calls"):
                raise PromptError(f"message {i} ({message['role']}) has no content: give a string")
        template = self._template
        try:
            return template.render(
                messages=messages,
                tools=tools,
                enable_thinking=thinking,
                add_generation_prompt=True,
                **self._named_tokens,
            )
        except Exception as error:  # a template is a program, and not ours
            why = " ".join(str(error).split())
            raise PromptError(f"the chat template of {self.folder} refuses the messages: {why}") from error

    def piece(self, token: int) -> bytes:
        """The UTF-8 bytes that a token stands for; a part of a character in the case of byte tokens."""
        piece = self._tokenizer.id_to_token(token)
        # Models have more embeddings than the tokenizer has tokens.
        if piece is None or token in self.special:
            return b""
        byte = _BYTE.fullmatch(piece)
        return bytes([int(byte[1], 16)]) if byte else piece.replace("▁", " ").encode()

    def token_id(self, token: str) -> int | None:
        """The id of a token by its name, None if there is no such token."""
        return self._tokenizer.token_to_id(token)

    @cached_property
    def _template(self) -> Any:
        if self._template_source is None:
            raise CheckpointError(f"{self.folder} has no chat template: give the prompt as token ids")
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.globals["raise_exception"] = _refuse
        environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
        # Jinja's own filter escapes HTML.
        environment.filters["tojson"] = _to_json
        try:
            return environment.from_string(self._template_source)
        except TemplateError as error:
            raise CheckpointError(f"the chat template of {self.folder} is broken: {error}") from error


def _read_template(folder: Path, config: Mapping[str, Any]) -> str | None:
    """The chat template: a file of its own, or in tokenizer_config.json, where it may be one of several."""
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


def _refuse(message: str) -> None:
    raise TemplateError(message)


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, sort_keys: bool = False) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, sort_keys=sort_keys)


class StreamDecoder:
    """Turns tokens into text while they come, never giving out half a character.

    Thoughts, between the channel tokens, are kept apart from the answer.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int] = ()):
        """Begins a text.

        Args:
            tokenizer: Whose tokens they are.
            prompt: What the tokens follow. After a tool's answer it ends with the beginning of a thought.
        """
        self._tokenizer = tokenizer
        self._characters = codecs.getincrementaldecoder("utf-8")("replace")
        self._begin, self._end = tokenizer.token_id(_CHANNEL), tokenizer.token_id(_CHANNEL_END)
        self._in_thought = False
        self._header: str | None = None
        last = next((i for i in range(len(prompt) - 1, -1, -1) if prompt[i] in tokenizer.special), None)
        if last is not None and prompt[last] == self._begin:
            self.push(prompt[last:])

    def push(self, tokens: Iterable[int]) -> tuple[str, str]:
        """Takes tokens; returns the new text and the new thought."""
        text, thought = "", ""
        for token in tokens:
            mark = token in (self._begin, self._end)
            special = mark or token in self._tokenizer.special
            piece = self._characters.decode(b"" if special else self._tokenizer.piece(token), final=special)
            if not self._in_thought:
                text += piece
            elif self._header is None:
                thought += piece
            else:
                # A channel's first line is its name.
                self._header += piece
                if "\n" in self._header:
                    thought += self._header.split("\n", 1)[1]
                    self._header = None
            if mark:
                self._in_thought = token == self._begin
                self._header = "" if self._in_thought else None
        return text, thought

    def finish(self) -> str:
        """What is left of an incomplete character when no token follows."""
        rest = self._characters.decode(b"", final=True)
        return "" if self._in_thought else rest


class StopStrings:
    """Ends a streamed text before the first of some strings to be complete.

    How the text is cut into pieces makes no difference.

    Attributes:
        hit: Whether one of them has come; the text is complete then.
    """

    def __init__(self, strings: Sequence[str]):
        """Takes the strings.

        Raises:
            PromptError: One of them is empty.
        """
        if not all(strings):
            raise PromptError("a stop string is empty: it would stop everything")
        self.hit = False
        self._strings = strings
        self._held = ""

    def push(self, text: str) -> str:
        """Takes text; returns what can't be the beginning of a stop string any more."""
        if self.hit:
            return ""
        self._held += text
        found = [(at + len(s), at) for s in self._strings if (at := self._held.find(s)) >= 0]
        if found:
            self.hit = True
            _, begin = min(found)
            done, self._held = self._held[:begin], ""
            return done
        keep = max((_overlap(self._held, s) for s in self._strings), default=0)
        done, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return done

    def finish(self) -> str:
        """The held text, when none follows."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of the text that is a beginning of the stop string."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
