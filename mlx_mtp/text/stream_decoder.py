"""From tokens to answer, reasoning and tool calls, while tokens come."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Protocol

from .characters import CharacterStream
from .control_tokens import CHANNEL, CHANNEL_END
from .tool_calls import CALL, CALL_END, QUOTE, QUOTE_MARK, CallIds, Tools, parse_calls


class Vocabulary(Protocol):
    """What a decoder asks a tokenizer (`tokenizer.Tokenizer`).

    Attributes:
        special: Names of the special tokens, by id.
        stop_tokens: Ids of the tokens that end an answer.
    """

    special: dict[int, str]
    stop_tokens: frozenset[int]

    def token_id(self, token: str) -> int | None:
        """The id of a token by its name, None if there is no such token."""

    def characters(self) -> CharacterStream:
        """What turns tokens into characters, one token at a time."""


class StreamDecoder:
    """Turns tokens into text while they come, never giving out half a character.

    Thoughts, between the channel tokens, and tool calls are kept apart from the answer. A call that begins within a
    thought ends it. Calls end with their closing token, or where the turn, the text or the next call makes it plain.

    Attributes:
        calls: The tool calls so far, as messages have them: {"id": ..., "type": "function", "function": {"name": ...,
            "arguments": {...}}}.
        errors: Why something that was begun as a call isn't one; it becomes text.
    """

    def __init__(self, tokenizer: Vocabulary, prompt: Sequence[int] = (), tools: Tools | None = None):
        """Begins a text.

        Args:
            tokenizer: Whose tokens they are.
            prompt: What the tokens follow. After a tool's answer it ends with the beginning of a thought.
            tools: What calls are checked against; None for no check.
        """
        self.calls: list[dict[str, Any]] = []
        self.errors: list[str] = []
        self._tokenizer, self._tools, self._ids = tokenizer, tools, CallIds(prompt)
        self._characters = tokenizer.characters()
        self._begin, self._end = tokenizer.token_id(CHANNEL), tokenizer.token_id(CHANNEL_END)
        self._quote = tokenizer.token_id(QUOTE)
        self._call_begin, self._call_end = tokenizer.token_id(CALL), tokenizer.token_id(CALL_END)
        self._in_thought = False
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
            elif not self._in_thought:
                text += piece
            elif self._header is None:
                reasoning += piece
            else:
                # A channel's first line is its name.
                self._header += piece
                if "\n" in self._header:
                    reasoning += self._header.split("\n", 1)[1]
                    self._header = None
            if mark:
                text += self._end_call()
                self._in_thought = token == self._begin
                self._header = "" if self._in_thought else None
            elif token == self._call_begin:
                text += self._end_call()
                self._in_thought, self._header, self._call = False, None, []
            elif token == self._call_end or token in self._tokenizer.stop_tokens:
                text += self._end_call(closed=token == self._call_end)
            elif special and self._call is not None:
                # Without it, what stands around it would be read as one.
                self._call.append(QUOTE_MARK if token == self._quote else self._tokenizer.special[token])
        return text, reasoning

    def _end_call(self, closed: bool = False) -> str:
        """Ends a call, if one was begun; returns what is text after all."""
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
            self.errors.append(f"{shown!r} is no tool call: {' '.join(str(error).split())[:200]}")
            return text
        for number, (name, arguments) in zip(self._ids.of(text, len(found)), found, strict=True):
            self.calls.append({"id": number, "type": "function", "function": {"name": name, "arguments": arguments}})
        return ""

    def finish(self) -> str:
        """What is left of an incomplete character, or of what is no tool call, when no token follows."""
        rest = self._characters.finish()
        if self._call is not None:
            self._call.append(rest)
            return self._end_call()
        return "" if self._in_thought else rest
