"""Conversations: history, and tokens that are the same from turn to turn.

Each turn is rendered with all earlier ones; of these the model's prompt cache holds the KV, as long as the tokens are
the very ones that it was written for, and they aren't prefilled again. Thoughts are not part of the history: the chat
format drops them once the answer is there.

Not here: reading from a terminal (cli/chat.py).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any, Protocol

from .config import TargetConfig
from .decode.request import Stats
from .errors import PromptError
from .session.answer import Chunk
from .session.inbox import Stream
from .text.tokenizer import Tokenizer


class Model(Protocol):
    """What a conversation asks of a model; `api.MTPModel` says what each is."""

    folder: Path
    config: TargetConfig
    tokenizer: Tokenizer | None

    def stream(self, prompt: list[int], **more: Any) -> Stream[Chunk]:
        """Generates text piece by piece."""


class Chat:
    """A conversation with a model.

    Attributes:
        system: System prompt, or None; may be changed between turns.
        thinking: Whether the model is asked to think first; may be changed between turns.
        messages: The turns so far, dicts with "role" ("user" or "assistant") and "content".
        stats: Statistics of the latest answer, or None.
    """

    def __init__(self, model: Model, system: str | None = None, thinking: bool = False):
        """Starts an empty conversation.

        Args:
            model: The model; it must stay open.

        Raises:
            PromptError: The model has no tokenizer.
        """
        if model.tokenizer is None:
            raise PromptError(f"{model.folder} has no tokenizer.json: it can't chat")
        self.system, self.thinking = system, thinking
        self.messages: list[dict[str, Any]] = []
        self.stats: Stats | None = None
        self._model, self._tokenizer = model, model.tokenizer
        # The latest turn as text and as the very tokens whose KV is kept.
        self._past: tuple[str, list[int]] = ("", [])
        # Weak, so that an iterator that is dropped ends at once.
        self._running: Callable[[], Stream[Chunk] | None] = lambda: None

    def send(self, text: str, **options: Any) -> Stream[Chunk]:
        """Says something, and streams the answer.

        Args:
            text: The user's message.
            **options: As for `MTPModel.stream`, but for tools, whose calls a conversation doesn't keep; `thinking` is
                for this turn, in place of the conversation's. A conversation needs its chat template.

        Returns:
            The answer's chunks. The turn becomes part of the history once they are exhausted; closing the iterator,
            from any thread, or sending the next message, ends the answer where it is.

        Raises:
            PromptError: Empty, or too long together with the history, which stays as it is but for a running answer:
                that one is ended all the same.
        """
        thinking = options.pop("thinking", self.thinking)
        sanitize = options.pop("sanitize", True)
        if "tools" in options or "chat_template" in options:
            raise PromptError("a conversation takes no tools and no chat_template: generate and stream do")
        if not isinstance(text, str) or not text.strip():
            raise PromptError("the message is empty, or no text")
        self._end_running()
        question = {"role": "user", "content": text}
        system = [{"role": "system", "content": self.system}] if self.system else []
        rendered = self._tokenizer.prompt([*system, *self.messages, question], thinking, sanitize=sanitize)
        past_text, past_tokens = self._past
        # An answer need not be cut into tokens again the way the model has put it together.
        known = bool(past_text) and rendered.startswith(past_text)
        tokens = past_tokens + self._tokenizer.encode_prompt(rendered[len(past_text) :]) if known else None
        tokens = tokens or self._tokenizer.encode_prompt(rendered)
        room = self._model.config.text.max_positions
        if self.messages and len(tokens) > room:
            raise PromptError(
                f"the conversation has {len(tokens)} tokens now, the model's context only {room}: reset it"
            )
        chunks = self._model.stream(tokens, **options)
        self.stats = None
        answer = Stream(self._answer(question, rendered, tokens, chunks), chunks.close)
        self._running = weakref.ref(answer)
        return answer

    def reset(self) -> None:
        """Ends a running answer and forgets all turns; system prompt and settings stay."""
        self._end_running()
        self.messages.clear()
        self.stats, self._past = None, ("", [])

    def _end_running(self) -> None:
        """Closes an answer that was left unfinished: the next one is to find its KV."""
        if running := self._running():
            running.close()

    def _answer(
        self, question: dict[str, Any], rendered: str, tokens: list[int], chunks: Stream[Chunk]
    ) -> Generator[Chunk, None, None]:
        answer, generated, reasoning = "", [], False
        try:
            for chunk in chunks:
                answer += chunk.text
                generated += chunk.tokens
                reasoning = reasoning or bool(chunk.reasoning)
                self.stats = chunk.stats
                yield chunk
        finally:
            chunks.close()
            if generated:
                self.messages += [question, {"role": "assistant", "content": answer}]
                # What ends an answer, and white space, the chat format strips again.
                while generated and (
                    generated[-1] in self._tokenizer.special or not self._tokenizer.decode(generated[-1:]).strip()
                ):
                    generated.pop()
                kept = answer.rstrip()
                exact = not reasoning and self._tokenizer.decode(generated) == kept
                self._past = (
                    (rendered + self._tokenizer.control.hide_in_answer(kept), tokens + generated) if exact else ("", [])
                )
