"""Decodes streamed tokens into answer, reasoning and tool calls."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Protocol

from .characters import CharacterStream
from .control_tokens import CHANNEL, CHANNEL_END
from .tool_calls import CALL, CALL_END, QUOTE, QUOTE_MARK, CallIds, Tools, parse_calls


class Vocabulary(Protocol):
    """The part of `tokenizer.Tokenizer` that a decoder uses.

    Attributes:
        special: Names of the special tokens, by id.
        stop_tokens: Ids of the tokens that end an answer.
    """

    special: dict[int, str]
    stop_tokens: frozenset[int]

    def token_id(self, token: str) -> int | None:
        """The id of the token of that name, or None if there is none."""

    def characters(self) -> CharacterStream:
        """A new decoder from tokens to characters."""


class StreamDecoder:
    """Decodes tokens as they are generated, whole characters only.

    Separates reasoning (between the channel tokens) and tool calls from the answer. A call that begins within reasoning
    ends the reasoning. A call ends with its closing token, the turn, the text, or the beginning of the next call.

    Attributes:
        calls: The tool calls so far, in the form of messages: {"id": ..., "type": "function", "function": {"name":
            ..., "arguments": {...}}}.
        errors: One line for each call that couldn't be read; its text becomes part of the answer.
    """

    def __init__(self, tokenizer: Vocabulary, prompt: Sequence[int] = (), tools: Tools | None = None) -> None:
        """Starts an empty answer.

        Args:
            tokenizer: Decodes the tokens.
            prompt: Token ids that the answer follows. After a tool's response they end within reasoning.
            tools: Declared tools to check calls against; None for no check.
        """
        self.calls: list[dict[str, Any]] = []
        self.errors: list[str] = []
        self._tokenizer, self._tools, self._ids = tokenizer, tools, CallIds(prompt)
        self._characters = tokenizer.characters()
        self._begin, self._end = tokenizer.token_id(CHANNEL), tokenizer.token_id(CHANNEL_END)
        self._quote = tokenizer.token_id(QUOTE)
        self._call_begin, self._call_end = tokenizer.token_id(CALL), tokenizer.token_id(CALL_END)
        self._in_reasoning = False
        self._header: str | None = None
        self._call: list[str] | None = None
        last = next((i for i in range(len(prompt) - 1, -1, -1) if prompt[i] in tokenizer.special), None)
        if last is not None and prompt[last] == self._begin:
            self.push(prompt[last:])

    def push(self, tokens: Iterable[int]) -> tuple[str, str]:
        """Takes tokens; returns the new text and the new reasoning."""
        text, reasoning = "", ""
        for token in tokens:
            mark = token in (self._begin, self._end)
            special = mark or token == self._quote or token in self._tokenizer.special
            piece = self._characters.finish() if special else self._characters.push(token)
            if self._call is not None:
                self._call.append(piece)
            elif not self._in_reasoning:
                text += piece
            elif self._header is None:
                reasoning += piece
            else:
                # The first line of a channel is its name.
                self._header += piece
                if "\n" in self._header:
                    reasoning += self._header.split("\n", 1)[1]
                    self._header = None
            if mark:
                text += self._end_call()
                self._in_reasoning = token == self._begin
                self._header = "" if self._in_reasoning else None
            elif token == self._call_begin:
                text += self._end_call()
                self._in_reasoning, self._header, self._call = False, None, []
            elif token == self._call_end or token in self._tokenizer.stop_tokens:
                text += self._end_call(closed=token == self._call_end)
            elif special and self._call is not None:
                # A special token separates the texts around it, so it stays in the call.
                self._call.append(QUOTE_MARK if token == self._quote else self._tokenizer.special[token])
        return text, reasoning

    def _end_call(self, closed: bool = False) -> str:
        """Ends the open call, if any; returns its text if it can't be read."""
        if self._call is None:
            return ""
        marked, self._call = "".join(self._call), None
        text = marked.replace(QUOTE_MARK, QUOTE)
        try:
            found = parse_calls(marked, closed)
            if self._tools:
                found = [self._tools.fitted(name, arguments) for name, arguments in found]
        except ValueError as error:
            shown = text if len(text) <= 80 else f"{text[:80]}..."
            self.errors.append(f"{shown!r} isn't a valid tool call: {' '.join(str(error).split())[:200]}")
            return text
        for number, (name, arguments) in zip(self._ids.of(text, len(found)), found, strict=True):
            self.calls.append({"id": number, "type": "function", "function": {"name": name, "arguments": arguments}})
        return ""

    def finish(self) -> str:
        """Ends the text: returns U+FFFD for an incomplete character, and the text of a call that can't be read."""
        rest = self._characters.finish()
        if self._call is not None:
            self._call.append(rest)
            return self._end_call()
        return "" if self._in_reasoning else rest
