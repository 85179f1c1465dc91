"""Conversations: the history of turns, and prompts whose KV the prompt cache can serve.

Each turn's prompt holds all earlier turns. If its tokens begin with exactly those of the earlier turn, the prompt cache
serves their KV, and only the new message is prefilled. The history holds no reasoning: the chat format drops it after
the answer.

A conversation that outgrows the model's context is refused, unless it is `rolling`: then its oldest turns are left out.

Not here: reading from a terminal (cli/chat.py).
"""

from __future__ import annotations

import weakref
from bisect import bisect_left
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from .config import TargetConfig
from .decode.limits import is_int
from .decode.noise import row_seed
from .decode.request import Stats
from .errors import PromptError
from .session.answer import Chunk
from .session.inbox import Stream
from .session.merged import merged
from .session.options import GenerationOptions, resolve_options
from .text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from .session.options import OptionFields


T = TypeVar("T")

MOST_CHOICES = 16
"""Most answers of `send_several`: each has a thread that reads it."""


class Model(Protocol):
    """The part of `api.MTPModel` that a conversation uses."""

    folder: Path
    config: TargetConfig
    tokenizer: Tokenizer | None

    def stream(self, prompt: Sequence[int], *, options: GenerationOptions) -> Stream[Chunk]:
        """Generates text piece by piece."""


@dataclass(frozen=True)
class _Turn:
    """A message that is about to be answered.

    Attributes:
        question: The message.
        rendered: The prompt as text: system prompt, the turns that the model still sees, and the message.
        tokens: The same as token ids.
        forgotten: Number of the oldest messages that the prompt leaves out.
    """

    question: dict[str, Any]
    rendered: str
    tokens: list[int]
    forgotten: int


class _Collected:
    """What has come of an answer so far: its text, and its tokens for the next turn's prompt."""

    def __init__(self, turn: _Turn, tokenizer: Tokenizer) -> None:
        self.turn, self.text = turn, ""
        self.begun = False
        self._tokenizer = tokenizer
        self._tokens: list[int] = []
        self._reasoned = False

    def add(self, chunk: Chunk) -> None:
        """Takes the next chunk."""
        self.begun = self.begun or bool(chunk.tokens)
        self.text += chunk.text
        self._tokens += chunk.tokens
        self._reasoned = self._reasoned or bool(chunk.reasoning)

    def messages(self) -> list[dict[str, Any]]:
        """Question and answer."""
        return [self.turn.question, {"role": "assistant", "content": self.text}]

    def past(self) -> tuple[str, list[int]]:
        """Prompt and answer as text, and as the tokens that stand for it; empty if a later prompt can't begin so."""
        tokenizer, generated = self._tokenizer, list(self._tokens)
        # The chat format strips the special tokens and the white space that end an answer.
        while generated and (generated[-1] in tokenizer.special or not tokenizer.decode(generated[-1:]).strip()):
            generated.pop()
        text = self.text.rstrip()
        if self._reasoned or tokenizer.decode(generated) != text:
            return "", []
        return self.turn.rendered + tokenizer.control.hide_in_answer(text), self.turn.tokens + generated


class Chat:
    """A conversation with a model.

    Attributes:
        system: System prompt, or None; may be changed between turns.
        thinking: Whether the model is asked to think first; may be changed between turns.
        rolling: Whether the oldest turns are left out of the prompt once the conversation outgrows the model's context.
            Else such a message is refused. May be changed between turns.
        messages: The turns so far, dicts with "role" ("user" or "assistant") and "content".
        forgotten: Number of messages, from the oldest on, that the latest prompt left out; 0 unless `rolling`.
        stats: Statistics of the latest answer, or None.
    """

    def __init__(
        self, model: Model, system: str | None = None, thinking: bool = False, *, rolling: bool = False
    ) -> None:
        """Starts an empty conversation.

        Args:
            model: The model; it must stay open.
            system: System prompt.
            thinking: Whether the model is asked to think first.
            rolling: See the attribute.

        Raises:
            PromptError: The model has no tokenizer.
        """
        if model.tokenizer is None:
            raise PromptError(f"{model.folder} has no tokenizer.json: it can't chat")
        self.system, self.thinking, self.rolling = system, thinking, rolling
        self.messages: list[dict[str, Any]] = []
        self.forgotten = 0
        self.stats: Stats | None = None
        self._model, self._tokenizer = model, model.tokenizer
        # Prompt and answer of the latest turn: as text, and as the tokens whose KV the prompt cache may hold.
        self._past: tuple[str, list[int]] = ("", [])
        self._choices: list[_Collected] = []  # the answers that `choose` chooses from
        # Weak, so that dropping the iterator ends the answer at once.
        self._running: Callable[[], Stream[Any] | None] = lambda: None

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
            PromptError: The message is empty, or too long (unless `rolling`: together with the history), or an option
                can't be used. The history stays as it is, except that an answer that is still running may be ended.
        """
        chosen = resolve_options(options, max_tokens, more)
        turn = self._turn(text, chosen, more.get("thinking", self.thinking))
        chunks = self._model.stream(turn.tokens, options=chosen)
        return self._began(turn, Stream(self._answer(_Collected(turn, self._tokenizer), chunks), chunks.close))

    def send_several(
        self,
        text: str,
        n: int,
        max_tokens: int | None = None,
        *,
        options: GenerationOptions | None = None,
        **more: Unpack[OptionFields],
    ) -> Stream[tuple[int, Chunk]]:
        """Sends a message and streams several answers to it, which are decoded together.

        The turn then becomes part of the history with the first answer; `choose` puts another in its place. The i-th
        answer runs with `row_seed(seed, i)`, so the first equals that of `send`. Arguments are those of `send`.

        Args:
            text: The user's message.
            n: Number of answers, 1 to MOST_CHOICES.
            max_tokens: Most tokens of each.
            options: As for `send`.
            **more: As for `send`.

        Returns:
            Pairs: the number of an answer, from 0, and its next chunk. Closing works as for `send`.

        Raises:
            PromptError: As for `send`, or `n` can't be used.
        """
        if not is_int(n) or not 1 <= n <= MOST_CHOICES:
            raise PromptError(f"n must be a whole number from 1 to {MOST_CHOICES}, not {n!r}")
        chosen = resolve_options(options, max_tokens, more)
        turn = self._turn(text, chosen, more.get("thinking", self.thinking))
        seeds = [chosen.seed if chosen.seed is None else row_seed(chosen.seed, i) for i in range(n)]
        chunks = merged([self._model.stream(turn.tokens, options=replace(chosen, seed=seed)) for seed in seeds])
        answers = [_Collected(turn, self._tokenizer) for _ in range(n)]
        return self._began(turn, Stream(self._answers(answers, chunks), chunks.close))

    def choose(self, i: int) -> None:
        """Puts another answer of the latest `send_several` into the history; may be called again.

        Args:
            i: Its number, from 0.

        Raises:
            PromptError: There is no such answer, or the conversation has gone on since.
        """
        self._end_running()
        if not is_int(i) or not 0 <= i < len(self._choices) or not self._choices[i].begun:
            raise PromptError(f"there is no answer {i!r} to choose")
        self.messages[-2:], self._past = self._choices[i].messages(), self._choices[i].past()

    def undo(self) -> str | None:
        """Ends a running answer, and takes the latest turn out of the history.

        Returns:
            The user's message of that turn; None if there was no turn.
        """
        self._end_running()
        asked = [i for i, message in enumerate(self.messages) if message["role"] == "user"]
        if not asked:
            return None
        text = str(self.messages[asked[-1]]["content"])
        del self.messages[asked[-1] :]
        self._choices = []
        self.forgotten = min(self.forgotten, len(self.messages))
        return text

    def restore(self, messages: Sequence[Mapping[str, Any]]) -> None:
        """Ends a running answer, and goes on with another conversation.

        Args:
            messages: Its turns, as `messages` has them. One with the role "system" in front becomes the system prompt;
                without it, the conversation has none.

        Raises:
            PromptError: They aren't turns of user and assistant, a question first, with text. Nothing is changed.
        """
        system, turns = checked_turns(messages)
        self.reset()
        self.system, self.messages = system, turns

    def reset(self) -> None:
        """Ends a running answer and forgets all turns; system prompt and settings stay."""
        self._end_running()
        self.messages.clear()
        self.forgotten, self.stats, self._past, self._choices = 0, None, ("", []), []

    def _end_running(self) -> None:
        """Closes an unfinished answer, so that the next turn finds its text in the history and its KV in the cache."""
        if running := self._running():
            running.close()

    def _began(self, turn: _Turn, answer: Stream[T]) -> Stream[T]:
        """Makes an answer the running one."""
        self.stats, self.forgotten, self._choices = None, turn.forgotten, []
        self._running = weakref.ref(answer)
        return answer

    def _turn(self, text: str, options: GenerationOptions, thinking: bool) -> _Turn:
        """The prompt for a message; a rolling conversation leaves out what has no room.

        Raises:
            PromptError: See `send`.
        """
        if options.tools is not None or not options.chat_template:
            raise PromptError("a conversation takes no tools and no chat_template=False: generate and stream do")
        if not isinstance(text, str) or not text.strip():
            raise PromptError("the message is empty, or isn't a string")
        self._end_running()
        question = {"role": "user", "content": text}

        def without(forgotten: int) -> _Turn:
            return self._without(forgotten, question, thinking, options.sanitize)

        turn, room = without(self.forgotten if self.rolling else 0), self._model.config.text.max_positions
        if self.rolling:
            answer = min(options.max_tokens, room // 4)
            if len(turn.tokens) + answer > room:
                # A quarter more than must be leaves, because all that stays is prefilled again.
                goal = room - room // 4 - answer
                asked = (i for i, it in enumerate(self.messages) if it["role"] == "user" and i > turn.forgotten)
                begins = [*asked, len(self.messages)]
                found = bisect_left(begins, True, key=lambda begin: len(without(begin).tokens) <= goal)
                turn = without(begins[min(found, len(begins) - 1)])
            if len(turn.tokens) > room:
                raise PromptError(
                    f"the message has {len(turn.tokens)} tokens with the system prompt, the model's context only "
                    f"{room}: shorten it"
                )
        elif self.messages and len(turn.tokens) > room:
            raise PromptError(
                f"the conversation has {len(turn.tokens)} tokens now, the model's context only {room}: reset it"
            )
        return turn

    def _without(self, forgotten: int, question: dict[str, Any], thinking: bool, sanitize: bool) -> _Turn:
        """The prompt for a message without the oldest messages."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        rendered = self._tokenizer.prompt([*system, *self.messages[forgotten:], question], thinking, sanitize=sanitize)
        past_text, past_tokens = self._past
        # Encoding an answer's text again may give other tokens than the model generated, so those are reused.
        known = bool(past_text) and rendered.startswith(past_text)
        tokens = past_tokens + self._tokenizer.encode_prompt(rendered[len(past_text) :]) if known else None
        return _Turn(question, rendered, tokens or self._tokenizer.encode_prompt(rendered), forgotten)

    def _answer(self, answer: _Collected, chunks: Stream[Chunk]) -> Generator[Chunk, None, None]:
        try:
            for chunk in chunks:
                answer.add(chunk)
                self.stats = chunk.stats
                yield chunk
        finally:
            chunks.close()
            if answer.begun:
                self.messages += answer.messages()
                self._past = answer.past()

    def _answers(
        self, answers: list[_Collected], chunks: Stream[tuple[int, Chunk]]
    ) -> Generator[tuple[int, Chunk], None, None]:
        try:
            for i, chunk in chunks:
                answers[i].add(chunk)
                if self.stats is None or not i:
                    self.stats = chunk.stats
                yield i, chunk
        finally:
            chunks.close()
            if first := next((answer for answer in answers if answer.begun), None):
                self.messages += first.messages()
                self._past, self._choices = first.past(), answers


def checked_turns(messages: Sequence[Mapping[str, Any]]) -> tuple[str | None, list[dict[str, Any]]]:
    """Checks the messages of a conversation, as they may come from a file.

    Args:
        messages: See `Chat.restore`.

    Returns:
        The system prompt, or None, and copies of the turns.

    Raises:
        PromptError: See `Chat.restore`.
    """
    if not isinstance(messages, Sequence) or not all(isinstance(it, Mapping) for it in messages):
        raise PromptError("a conversation is a list of messages, each with role and content")
    turns = [{"role": message.get("role"), "content": message.get("content")} for message in messages]
    if any(not isinstance(turn["content"], str) for turn in turns):
        raise PromptError("a message of the conversation has no text as its content")
    system = turns.pop(0)["content"] if turns and turns[0]["role"] == "system" else None
    if [turn["role"] for turn in turns] != [("user", "assistant")[i % 2] for i in range(len(turns))] or len(turns) % 2:
        raise PromptError("a conversation's messages must be the user's and the assistant's in turn, an answer last")
    return system, turns
