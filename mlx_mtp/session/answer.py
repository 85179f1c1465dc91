"""Turns a row's tokens into an answer: text, reasoning, tool calls, and the reason it ended."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from ..decode.logprobs import TokenLogprob
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
        reasoning: The model's reasoning before the answer; "" if there is none.
        tool_calls: Calls that the model asks for, as `{"id": ..., "type": "function", "function": {"name": ...,
            "arguments": {...}}}`, the form of "tool_calls" in an assistant's message. Ids are unique within a
            conversation, and the same for the same seed.
        tool_errors: One line for each call that is malformed, incomplete, or doesn't fit the declared tools. `text`
            holds such a call as it was written.
        tokens: All generated token ids, up to and including the stop token or the end of the stop string.
        finish_reason: "stop" (a stop token or stop string), "length" (`max_tokens`, or the context is full) or
            "cancelled" (the option `cancel` was set).
        stats: Counts and times.
        logprobs: One for each of `tokens`, if the option `logprobs` was given; else None.
    """

    text: str
    reasoning: str
    tool_calls: list[dict[str, Any]]
    tool_errors: list[str]
    tokens: list[int]
    finish_reason: str
    stats: Stats
    logprobs: list[TokenLogprob] | None = None

    @classmethod
    def joined(cls, chunks: Sequence[Chunk]) -> Generation:
        """The generation whose chunks these are: all of them, in order, and at least one."""
        last = chunks[-1]
        return cls(
            text="".join(chunk.text for chunk in chunks),
            reasoning="".join(chunk.reasoning for chunk in chunks),
            tool_calls=[call for chunk in chunks for call in chunk.tool_calls],
            tool_errors=[error for chunk in chunks for error in chunk.tool_errors],
            tokens=[token for chunk in chunks for token in chunk.tokens],
            finish_reason=last.finish_reason or "length",
            stats=last.stats,
            logprobs=None if last.logprobs is None else [score for chunk in chunks for score in chunk.logprobs or ()],
        )

    def as_dict(self) -> dict[str, Any]:
        """All fields as JSON values; the statistics include their rates, see `Stats.rates`."""
        return asdict(self) | {"stats": asdict(self.stats) | self.stats.rates()}


class Span(NamedTuple):
    """A piece of text.

    Attributes:
        text: The text that one token completed, or that the end of the answer let go.
        drafted: Whether that token was a draft that the target accepted; else it is the target's own.
    """

    text: str
    drafted: bool


@dataclass(frozen=True)
class Chunk:
    """A piece of a streamed generation. The joined texts of all chunks are `Generation.text`.

    Attributes:
        text: New text; may be empty while a character or a possible stop string is incomplete.
        spans: The same text, token by token, for those who want to show what came from drafts. Never an empty one.
        reasoning: New reasoning; only the first chunks of a generation have any.
        tool_calls: Tool calls that are now complete, see `Generation`.
        tool_errors: Errors of calls that ended in this chunk, see `Generation`.
        tokens: New token ids.
        finish_reason: Set in the last chunk, see `Generation`.
        stats: The running statistics, one object for all chunks of a generation.
        logprobs: One for each of `tokens`, if they were asked for; else None.
    """

    text: str
    reasoning: str
    tool_calls: list[dict[str, Any]]
    tool_errors: list[str]
    tokens: list[int]
    finish_reason: str | None
    stats: Stats
    logprobs: list[TokenLogprob] | None = None
    spans: Sequence[Span] = ()


class Answer:
    """Turns the news of a row into chunks, and in the end into a `Generation`.

    Attributes:
        request: The request that it answers.
        cancel: Event that ends it early, or None.
        row: Its row; `Calls` sets it when it submits the request.
        reason: The finish reason; None until the answer has ended.
        stats: The row's statistics up to the latest news.
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
    ) -> None:
        self.request, self.cancel = request, cancel
        self.reason = None
        self._stops = stops
        self._decoder = StreamDecoder(tokenizer, request.prompt, tools) if tokenizer else None
        self._chunks: list[Chunk] = []
        self._generated = 0
        self.stats = Stats()

    def push(self, news: News) -> Chunk:
        """Takes news of the row, and returns its chunk; a stop string in it cancels the row."""
        tokens, stops, decoder = news.tokens, self._stops, self._decoder
        reason = None
        if news.done and not news.error:  # an error cuts the answer off: there is no finish reason
            stopped = bool(tokens) and tokens[-1] in self.request.stop_tokens
            reason = "cancelled" if news.cancelled else "stop" if stopped else "length"
        reasoning = ""
        spans = list[Span]()
        begin = self._generated
        known, failed = (len(decoder.calls), len(decoder.errors)) if decoder else (0, 0)
        for i, token in enumerate(tokens):
            answer, piece = decoder.push([token]) if decoder else ("", "")
            spans.append(Span(stops.push(answer), news.row.drafted[begin + i]))
            reasoning += piece
            if stops.hit:  # the round's later tokens depend on the draft length: drop them
                tokens = tokens[: i + 1]
                break
        if decoder and reason:
            spans.append(Span(stops.push(decoder.finish()) + stops.finish(), False))
        self.reason = "stop" if stops.hit else reason
        calls, errors = (decoder.calls[known:], decoder.errors[failed:]) if decoder else ([], [])
        self._generated += len(tokens)
        scores = None if self.request.logprobs is None else news.row.logprobs[begin : self._generated]
        vars(self.stats).update(vars(news.stats))
        if stops.hit:
            self.row.cancel()
            self.stats.generated_tokens = self._generated
        spans = [span for span in spans if span.text]
        text = "".join(span.text for span in spans)
        chunk = Chunk(text, reasoning, calls, errors, tokens, self.reason, self.stats, scores, spans)
        self._chunks.append(chunk)
        return chunk

    def generation(self) -> Generation:
        """The finished answer."""
        return Generation.joined(self._chunks)
