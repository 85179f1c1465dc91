"""A checkpoint's tokenizer and chat template: text to token ids and back.

Reads tokenizer.json (BPE with byte fallback, "▁" for a space, no prefix space) or, if a folder has none,
sentencepiece's tokenizer.model, and tokenizer_config.json.

Not here: the chat format (template.py) and conversations (chat.py). Images and audio aren't supported.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import tokenizers

from ..errors import CheckpointError, PromptError
from ..files import read_bytes, read_json
from . import sentencepiece_model
from .characters import CharacterStream
from .control_tokens import NOT_UTF8, ControlTokens
from .longest_token import longest_token
from .stream_decoder import StreamDecoder
from .template import ChatTemplate, token_name

FILE = "tokenizer.json"

_STOPS = ("<eos>", "<turn|>", "<|tool_response>")
"""Tokens that end an answer in Gemma 4's chat format: end of text, end of turn, and beginning of a tool's response."""

_CHATS = re.compile(r"(?<![a-z])(it|instruct|chat)(?![a-z])", re.IGNORECASE)
"""Parts of a model's name that say it was trained to chat."""


class Tokenizer:
    """A checkpoint's tokenizer and chat template.

    Attributes:
        folder: The checkpoint's folder.
        special: Names of the special tokens by id; they are left out of decoded text.
        stop_tokens: Ids that end an answer: those of Gemma 4's chat format that the vocabulary has, and
            tokenizer_config.json's `eos_token`. The generation_config.json of a fine-tune may lack some of them.
        control: The special tokens, as `control_tokens.ControlTokens`.
        library: The `tokenizers.Tokenizer` itself, which takes no special tokens in text (`encode` cuts them out).
        bos: Id of the token that begins a text: tokenizer_config.json's `bos_token`, else <bos>; None if the
            vocabulary has neither.
    """

    def __init__(
        self,
        folder: Path,
        tokenizer: tokenizers.Tokenizer,
        template: ChatTemplate,
        eos_token: str | None = None,
        bos_token: str | None = None,
    ) -> None:
        """See `from_folder`."""
        self.folder, self.library = folder, tokenizer
        names = [*_STOPS, eos_token] if eos_token else _STOPS
        self.stop_tokens = frozenset(i for i in map(self.token_id, names) if i is not None)
        self.bos = self.token_id(bos_token or "<bos>")
        added = tokenizer.get_added_tokens_decoder()
        self.special = {i: token.content for i, token in added.items() if token.special}
        self.control = ControlTokens(self.special.values())
        tokenizer.encode_special_tokens = True  # as plain text: `_ids` cuts out those that are meant
        self._template = template

    @classmethod
    def from_folder(cls, folder: Path) -> Tokenizer:
        """Reads a checkpoint's tokenizer.

        Raises:
            CheckpointError: There is neither tokenizer.json nor tokenizer.model, or a file can't be read.
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
        """Token ids of a text. No special token is added; names of special tokens in the text become those tokens.

        Raises:
            PromptError: The text can't be encoded as UTF-8, for example because it was read in another encoding.
        """
        return self._ids(text)

    def encode_prompt(self, text: str) -> list[int]:
        """Token ids of a text returned by `prompt`; its hidden characters are restored and encoded as plain text."""
        return self._ids(text, self.control.show)

    def _ids(self, text: str, shown: Callable[[str], str] = str) -> list[int]:
        ids: list[int] = []
        try:
            for i, piece in enumerate(self.control.split(text)):
                if i % 2:
                    ids.append(cast(int, self.library.token_to_id(piece)))
                elif piece:
                    ids += self.library.encode(shown(piece), add_special_tokens=False).ids
        except (TypeError, UnicodeEncodeError):
            raise PromptError(NOT_UTF8) from None
        return ids

    def fewest_tokens(self, text: str) -> int:
        """A number of token ids that a text has at least, found without encoding it; 0 where nothing is certain."""
        return -(-len(text) // self._longest) if self._longest else 0

    @cached_property
    def _longest(self) -> int | None:
        return longest_token(self.library)

    def seems_base(self, stop_tokens: Iterable[int]) -> bool:
        """Whether this seems to be a base model, which wasn't trained to chat.

        True if the folder has no chat template, <turn|> doesn't end its texts, and its name doesn't say that it chats.

        Args:
            stop_tokens: Stop tokens of the model's generation_config.
        """
        turn_end = self.token_id("<turn|>")
        cached = self.folder.parent.name == "snapshots"  # in the hub's cache, the repository's name is two levels up
        name = (self.folder.parents[1] if cached else self.folder.resolve()).name
        chats = turn_end is None or turn_end in stop_tokens or _CHATS.search(name) is not None
        return self._template.built_in and not chats

    def encode_raw(self, text: str) -> list[int]:
        """As `encode`, with the token that begins a text in front unless it is there already."""
        tokens = self.encode(text)
        return tokens if self.bos is None or tokens[:1] == [self.bos] else [self.bos, *tokens]

    def decode(self, tokens: Iterable[int]) -> str:
        """The text of token ids, without reasoning, tool calls and special tokens."""
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
            messages: See `ChatTemplate.render`.
            thinking: Whether the model is asked to think first.
            tools: Tool declarations, or None.
            sanitize: Whether names of special tokens in messages and tools are encoded as plain text.

        Raises:
            PromptError: As for `render`, or a message has images, audio or video, which aren't supported.
            CheckpointError: As for `render`.
        """
        return self.encode_prompt(self.prompt(messages, thinking, tools, sanitize))

    def prompt(
        self,
        messages: Sequence[Mapping[str, Any]],
        thinking: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        sanitize: bool = True,
    ) -> str:
        """As `chat`, but returns the text from which `encode_prompt` makes the token ids."""
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
        """The text of a conversation up to the model's answer; see `ChatTemplate.render`.

        Names of special tokens in messages can't be told from the template's own here; `chat` keeps them apart.

        Raises:
            PromptError: Messages are malformed, or the template refuses them.
            CheckpointError: The template is broken, or there is none and the vocabulary isn't Gemma 4's.
        """
        return self._render(messages, thinking, tools, **variables)

    def _render(self, *conversation: Any, **variables: Any) -> str:
        if self._template.built_in and self.token_id("<|turn>") is None:
            raise CheckpointError(f"{self.folder} has no chat template: give the prompt as token ids")
        return self._template.render(*conversation, **variables)

    def characters(self) -> CharacterStream:
        """A new decoder from this tokenizer's tokens to characters."""
        return CharacterStream(self.library)

    def token_id(self, token: str) -> int | None:
        """The id of the token of that name, or None if there is none."""
        try:
            return self.library.token_to_id(token)
        except UnicodeEncodeError:  # half a surrogate pair, which no token's name has
            return None

    def special_id(self, text: str) -> int | None:
        """The id of the special token of that name, or None if there is none."""
        token = self.token_id(text)
        return token if token in self.special else None


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder has a tokenizer.json or tokenizer.model."""
    return any((folder / name).is_file() for name in (FILE, sentencepiece_model.FILE))


def _read_tokenizer(path: Path) -> tokenizers.Tokenizer:
    if not path.is_file():
        raise CheckpointError(f"{path.parent} has no {path.name}")
    try:
        return tokenizers.Tokenizer.from_buffer(read_bytes(path))
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # the library raises Exception itself, and its panics aren't Exceptions
        raise CheckpointError(f"{path} can't be read: {error}") from error
