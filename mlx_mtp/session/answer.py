"""From a row's tokens to an answer: text, thoughts, and why it ended."""

from __future__ import annotations

import threading
from dataclasses import asdict, dataclass
from typing import Any

from ..decode.request import Request, Row, Stats
from ..text.stop_strings import StopStrings
from ..text.stream_decoder import StreamDecoder
from ..text.tokenizer import Tokenizer
from ..text.tool_calls import Tools
from .inbox import News


@dataclass(frozen=True)
class Generation:
    """One finished generation.

    Attributes:
        text: The answer, without special tokens and tool calls; cut before a stop string.
        reasoning: What the model thought before it answered; "" if it didn't.
        tool_calls: Tools that the model wants to be called, as `{"id": ..., "type": "function", "function": {"name":
            ..., "arguments": {...}}}`, which is what "tool_calls" of an assistant's message holds. The id is the same
            for the same seed, and another for every call of a conversation.
        tool_errors: One line for everything that was written as a call but can't be read, isn't complete, or doesn't
            fit the declared tools. It is part of the text.
        tokens: All generated token ids, up to and including the stop token, or the end of the stop string.
        finish_reason: "stop" (a stop token or stop string), "length" (`max_tokens`, or the context is full) or
            "cancelled" (the option `cancel` was set).
        stats: What it took.
    """

    text: str
    reasoning: str
    tool_calls: list[dict[str, Any]]
    tool_errors: list[str]
    tokens: list[int]
    finish_reason: str
    stats: Stats

    def as_dict(self) -> dict[str, Any]:
        """All of it as JSON has it; the statistics with the rates that follow from them."""
        return asdict(self) | {"stats": asdict(self.stats) | self.stats.rates()}


@dataclass(frozen=True)
class Chunk:
    """A piece of a streamed generation; the texts of all chunks, joined, are `Generation.text`.

    Attributes:
        text: New text; may be empty while a character or a possible stop string is incomplete.
        reasoning: New text of the model's thoughts.
        tool_calls: Tool calls that are complete now, see `Generation`.
        tool_errors: What turned out to be none, see `Generation`.
        tokens: New token ids.
        finish_reason: Set in the last chunk, see `Generation`.
        stats: The running statistics, one object for all chunks of a generation.
    """

    text: str
    reasoning: str
    tool_calls: list[dict[str, Any]]
    tool_errors: list[str]
    tokens: list[int]
    finish_reason: str | None
    stats: Stats


class Answer:
    """Turns a row's tokens into text.

    Attributes:
        request: What was asked for.
        cancel: What ends it early once set, or None.
        row: Its row, once submitted.
        reason: Why it has ended; None while it hasn't.
        stats: What it has taken, as far as it was read.
    """

    row: Row
    reason: str | None

    def __init__(
        self,
        request: Request,
        stops: StopStrings,
        tokenizer: Tokenizer | None,
        tools: Tools | None = None,
        cancel: threading.Event | None = None,
    ):
        self.request, self.cancel = request, cancel
        self.reason = None
        self._stops = stops
        self._decoder = StreamDecoder(tokenizer, request.prompt, tools) if tokenizer else None
        self._chunks: list[Chunk] = []
        self._generated = 0
        self.stats = Stats()

    def push(self, news: News) -> Chunk:
        """Takes new tokens of the row."""
        tokens, stops, decoder = news.tokens, self._stops, self._decoder
        reason = None
        if news.done and not news.error:  # after an error, `tokens` isn't all there would have been
            stopped = bool(tokens) and tokens[-1] in self.request.stop_tokens
            reason = "cancelled" if news.cancelled else "stop" if stopped else "length"
        text = reasoning = ""
        known, failed = (len(decoder.calls), len(decoder.errors)) if decoder else (0, 0)
        for i, token in enumerate(tokens):
            answer, piece = decoder.push([token]) if decoder else ("", "")
            text, reasoning = text + stops.push(answer), reasoning + piece
            if stops.hit:  # what the round holds after it depends on how much was drafted
                tokens = tokens[: i + 1]
                break
        if decoder and reason:
            text += stops.push(decoder.finish()) + stops.finish()
        self.reason = "stop" if stops.hit else reason
        calls, errors = (decoder.calls[known:], decoder.errors[failed:]) if decoder else ([], [])
        self._generated += len(tokens)
        vars(self.stats).update(vars(news.stats))
        if stops.hit:
            self.row.cancel()  # nothing after it is wanted, nor counted
            self.stats.generated_tokens = self._generated
        chunk = Chunk(text, reasoning, calls, errors, tokens, self.reason, self.stats)
        self._chunks.append(chunk)
        return chunk

    def generation(self) -> Generation:
        """The finished answer."""
        chunks = self._chunks
        return Generation(
            text="".join(chunk.text for chunk in chunks),
            reasoning="".join(chunk.reasoning for chunk in chunks),
            tool_calls=[call for chunk in chunks for call in chunk.tool_calls],
            tool_errors=[error for chunk in chunks for error in chunk.tool_errors],
            tokens=[token for chunk in chunks for token in chunk.tokens],
            finish_reason=self.reason or "length",
            stats=self.stats,
        )
