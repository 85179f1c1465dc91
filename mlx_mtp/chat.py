"""Conversations: the history of turns, and prompts whose KV the prompt cache can serve.

Each turn's prompt holds all earlier turns. If its tokens begin with exactly those of the earlier turn, the prompt cache
serves their KV, and only the new message is prefilled. The history holds no reasoning: the chat format drops it after
the answer.

Not here: reading from a terminal (cli/chat.py).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from .config import TargetConfig
from .decode.request import Stats
from .errors import PromptError
from .session.answer import Chunk
from .session.inbox import Stream
from .session.options import GenerationOptions, resolve_options
from .text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from .session.options import OptionFields


class Model(Protocol):
    """The part of `api.MTPModel` that a conversation uses."""

    folder: Path
    config: TargetConfig
    tokenizer: Tokenizer | None

    def stream(self, prompt: Sequence[int], *, options: GenerationOptions) -> Stream[Chunk]:
        """Generates text piece by piece."""


class Chat:
    """A conversation with a model.

    Attributes:
        system: System prompt, or None; may be changed between turns.
        thinking: Whether the model is asked to think first; may be changed between turns.
        messages: The turns so far, dicts with "role" ("user" or "assistant") and "content".
        stats: Statistics of the latest answer, or None.
    """

    def __init__(self, model: Model, system: str | None = None, thinking: bool = False) -> None:
        """Starts an empty conversation.

        Args:
            model: The model; it must stay open.
            system: System prompt.
            thinking: Whether the model is asked to think first.

        Raises:
            PromptError: The model has no tokenizer.
        """
        if model.tokenizer is None:
            raise PromptError(f"{model.folder} has no tokenizer.json: it can't chat")
        self.system, self.thinking = system, thinking
        self.messages: list[dict[str, Any]] = []
        self.stats: Stats | None = None
        self._model, self._tokenizer = model, model.tokenizer
        # Prompt and answer of the latest turn: as text, and as the tokens whose KV the prompt cache may hold.
        self._past: tuple[str, list[int]] = ("", [])
        # Weak, so that dropping the iterator ends the answer at once.
        self._running: Callable[[], Stream[Chunk] | None] = lambda: None

    def send(
        self,
        text: str,
        max_tokens: int | None = None,
        *,
        options: GenerationOptions | None = None,
        **more: Unpack[OptionFields],
    ) -> Stream[Chunk]:
        """Sends a message and streams the answer.

        Args:
            text: The user's message.
            max_tokens: Most tokens to generate; None takes that of `options`, by default 256.
            options: As for `MTPModel.stream`, except that a conversation takes no `tools`, whose calls it doesn't
                record, and needs its chat template. The conversation's own `thinking` holds, not that of `options`.
            **more: Options by name; they replace those of `options`. `thinking` is for this turn only.

        Returns:
            The answer's chunks. When they are exhausted, the turn becomes part of the history. Closing the iterator,
            from any thread, or sending the next message ends the answer; the history then holds what came of it.

        Raises:
            PromptError: The message is empty, or too long together with the history, or an option can't be used. The
                history stays as it is, except that an answer that is still running may be ended.
        """
        chosen = resolve_options(options, max_tokens, more)
        thinking = more.get("thinking", self.thinking)
        if chosen.tools is not None or not chosen.chat_template:
            raise PromptError("a conversation takes no tools and no chat_template=False: generate and stream do")
        if not isinstance(text, str) or not text.strip():
            raise PromptError("the message is empty, or isn't a string")
        self._end_running()
        question = {"role": "user", "content": text}
        system = [{"role": "system", "content": self.system}] if self.system else []
        rendered = self._tokenizer.prompt([*system, *self.messages, question], thinking, sanitize=chosen.sanitize)
        past_text, past_tokens = self._past
        # Encoding an answer's text again may give other tokens than the model generated, so those are reused.
        known = bool(past_text) and rendered.startswith(past_text)
        tokens = past_tokens + self._tokenizer.encode_prompt(rendered[len(past_text) :]) if known else None
        tokens = tokens or self._tokenizer.encode_prompt(rendered)
        room = self._model.config.text.max_positions
        if self.messages and len(tokens) > room:
            raise PromptError(
                f"the conversation has {len(tokens)} tokens now, the model's context only {room}: reset it"
            )
        chunks = self._model.stream(tokens, options=chosen)
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
        """Closes an unfinished answer, so that the next turn finds its text in the history and its KV in the cache."""
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
                # The chat format strips the special tokens and the white space that end an answer.
                while generated and (
                    generated[-1] in self._tokenizer.special or not self._tokenizer.decode(generated[-1:]).strip()
                ):
                    generated.pop()
                text = answer.rstrip()
                exact = not reasoning and self._tokenizer.decode(generated) == text
                self._past = (
                    (rendered + self._tokenizer.control.hide_in_answer(text), tokens + generated) if exact else ("", [])
                )
