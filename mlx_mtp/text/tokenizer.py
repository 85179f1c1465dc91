"""Between text and token ids: a checkpoint's tokenizer, with its chat template.

Reads what Gemma 4 folders hold: tokenizer.json (BPE with byte fallback, "▁" for a space, no prefix space) and
tokenizer_config.json; without tokenizer.json, sentencepiece's tokenizer.model.

Not here: the chat format (template.py), conversations (chat.py), and images or audio.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import tokenizers

from ..errors import CheckpointError, PromptError
from ..files import read_bytes, read_json
from . import sentencepiece_model
from .characters import CharacterStream
from .control_tokens import NOT_UTF8, ControlTokens
from .stream_decoder import StreamDecoder
from .template import ChatTemplate, token_name

FILE = "tokenizer.json"

_STOPS = ("<eos>", "<turn|>", "<|tool_response>")
"""What ends an answer in Gemma 4's chat format: the end of the text or of the turn, or where a tool's answer goes."""

_CHATS = re.compile(r"(?<![a-z])(it|instruct|chat)(?![a-z])", re.IGNORECASE)
"""What says in a model's name that it was taught to chat."""


class Tokenizer:
    """A checkpoint's tokenizer and chat template.

    Attributes:
        folder: Where it comes from.
        special: The special tokens, which are no text: their names by id.
        stop_tokens: Ids of those that end an answer: the ones of Gemma 4's chat format that the vocabulary has, and
            tokenizer_config.json's `eos_token`. Not every generation_config.json of a fine-tune names them all.
        control: The special tokens by name, as `control_tokens.ControlTokens`.
        bos: Id of the token that begins a text, tokenizer_config.json's `bos_token` or <bos>; None without one.
    """

    def __init__(
        self,
        folder: Path,
        tokenizer: tokenizers.Tokenizer,
        template: ChatTemplate,
        eos_token: str | None = None,
        bos_token: str | None = None,
    ):
        """See `from_folder`."""
        self.folder = folder
        names = [*_STOPS, eos_token] if eos_token else _STOPS
        ids = (tokenizer.token_to_id(name) for name in names)
        self.stop_tokens = frozenset(i for i in ids if i is not None)
        self.bos = tokenizer.token_to_id(bos_token or "<bos>")
        added = tokenizer.get_added_tokens_decoder()
        self.special = {i: token.content for i, token in added.items() if token.special}
        self.control = ControlTokens(self.special.values())
        tokenizer.encode_special_tokens = True  # what it is given has none: `_ids` takes them out
        self._tokenizer = tokenizer
        self._template = template

    @classmethod
    def from_folder(cls, folder: Path) -> Tokenizer:
        """Reads a checkpoint's tokenizer.

        Raises:
            CheckpointError: No tokenizer.json or tokenizer.model, or files that can't be read.
        """
        config = read_json(folder / "tokenizer_config.json", required=False)
        if (folder / FILE).is_file() or not (folder / sentencepiece_model.FILE).is_file():
            tokenizer = _read_tokenizer(folder / FILE)
        else:
            tokenizer = sentencepiece_model.read_model(
                folder / sentencepiece_model.FILE, config.get("added_tokens_decoder")
            )
        return cls(
            folder,
            tokenizer,
            ChatTemplate.from_folder(folder, config),
            eos_token=token_name(config, "eos_token"),
            bos_token=token_name(config, "bos_token"),
        )

    def encode(self, text: str) -> list[int]:
        """Token ids of a text. No special token is added; those that are spelt out in the text are recognised.

        Raises:
            PromptError: The text can't be written as UTF-8, as when it was read from a file in another encoding.
        """
        return self._ids(text)

    def encode_prompt(self, text: str) -> list[int]:
        """Token ids of a text from `prompt`, in which what is hidden is text."""
        return self._ids(text, self.control.show)

    def _ids(self, text: str, shown: Callable[[str], str] = str) -> list[int]:
        ids: list[int] = []
        try:
            for i, piece in enumerate(self.control.split(text)):
                if i % 2:
                    ids.append(cast(int, self._tokenizer.token_to_id(piece)))
                elif piece:
                    ids += self._tokenizer.encode(shown(piece), add_special_tokens=False).ids
        except (TypeError, UnicodeEncodeError):
            raise PromptError(NOT_UTF8) from None
        return ids

    def seems_base(self, stop_tokens: Iterable[int]) -> bool:
        """Whether this belongs to a base model, which wasn't taught to chat: no template, and no sign of one.

        Args:
            stop_tokens: What ends the model's texts, by its files.
        """
        turn_end = self.token_id("<turn|>")
        cached = self.folder.parent.name == "snapshots"  # of a repository, whose folder is named like it
        name = (self.folder.parents[1] if cached else self.folder.resolve()).name
        chats = turn_end is None or turn_end in stop_tokens or _CHATS.search(name) is not None
        return self._template.built_in and not chats

    def encode_raw(self, text: str) -> list[int]:
        """As `encode`, after the token that begins a text."""
        tokens = self.encode(text)
        return tokens if self.bos is None or tokens[:1] == [self.bos] else [self.bos, *tokens]

    def decode(self, tokens: Iterable[int]) -> str:
        """The text of token ids; thoughts, tool calls and special tokens left out."""
        decoder = StreamDecoder(self)
        text, _ = decoder.push(tokens)
        return text + decoder.finish()

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        thinking: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        sanitize: bool = True,
    ) -> list[int]:
        """Token ids of a conversation; see `render`.

        Args:
            messages, thinking, tools: As for `ChatTemplate.render`.
            sanitize: Whether special tokens that are spelt out in messages and tools are text, see `control`.

        Raises:
            PromptError: Also for messages with images or sound, which this text decoder can't take.
        """
        return self.encode_prompt(self.prompt(messages, thinking, tools, sanitize))

    def prompt(
        self,
        messages: Sequence[Mapping[str, Any]],
        thinking: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        sanitize: bool = True,
    ) -> str:
        """As `chat`, but the text that `encode_prompt` takes."""
        for i, message in enumerate(messages):
            content = message.get("content")
            if isinstance(content, list) and any(isinstance(p, Mapping) and p.get("type") != "text" for p in content):
                raise PromptError(f"message {i} holds more than text: images, audio and video aren't supported")
        return self._render(messages, thinking, tools, control=self.control if sanitize else None)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        thinking: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **variables: Any,
    ) -> str:
        """The text of a conversation, up to where the model's answer begins or goes on; see `ChatTemplate.render`.

        It doesn't tell special tokens of the template's from those that are spelt out in a message: `chat` does.

        Raises:
            CheckpointError: The template is broken, or there is none and the vocabulary isn't Gemma 4's.
        """
        return self._render(messages, thinking, tools, **variables)

    def _render(self, *conversation: Any, **variables: Any) -> str:
        if self._template.built_in and self.token_id("<|turn>") is None:
            raise CheckpointError(f"{self.folder} has no chat template: give the prompt as token ids")
        return self._template.render(*conversation, **variables)

    def characters(self) -> CharacterStream:
        """What turns this tokenizer's tokens into characters, one token at a time."""
        return CharacterStream(self._tokenizer)

    def token_id(self, token: str) -> int | None:
        """The id of a token by its name, None if there is no such token."""
        return self._tokenizer.token_to_id(token)

    def special_id(self, text: str) -> int | None:
        """The id of the special token that a text names, None if it names none."""
        token = self.token_id(text)
        return token if token in self.special else None


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder has a tokenizer's file."""
    return any((folder / name).is_file() for name in (FILE, sentencepiece_model.FILE))


def _read_tokenizer(path: Path) -> tokenizers.Tokenizer:
    if not path.is_file():
        raise CheckpointError(f"{path.parent} has no {path.name}")
    try:
        return tokenizers.Tokenizer.from_buffer(read_bytes(path))
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # the library raises the bare class, and panics of its own
        raise CheckpointError(f"{path} can't be read: {error}") from error
