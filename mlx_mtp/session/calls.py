"""The generating calls of `MTPModel`: they turn prompts and options into rows of the batch, and rows into answers.

All answers of a call share an inbox. Closing it, as every call does in the end, cancels the rows that still run.
"""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar, cast

from ..config import TargetConfig
from ..decode.limits import is_int
from ..decode.noise import row_seed
from ..decode.request import Request
from ..errors import MTPError, PromptError
from ..text.stop_strings import StopStrings
from ..text.tokenizer import Tokenizer
from ..text.tool_calls import Tools
from .answer import Answer, Chunk, Generation
from .controls import Controls
from .generation_config import GenerationDefaults
from .inbox import Inbox, News, Stream, failure
from .options import GenerationOptions
from .owner import Session

T = TypeVar("T")

Message = Mapping[str, Any]
Prompt = str | Sequence[int] | Sequence[Message]
BatchPrompt = Prompt | Mapping[str, Any]
"""A prompt of a batch; a dict holds it as "prompt", with options of its own by name."""

MOST_ANSWERS = 256
"""Most answers of one call to one prompt: each has buffers of its own, and all are returned together."""


class Calls:
    """Prepares and runs the answers of one model; `MTPModel` is its public face."""

    def __init__(
        self,
        session: Session,
        tokenizer: Tokenizer | None,
        config: TargetConfig,
        defaults: GenerationDefaults,
        folder: Path,
        most_rows: int,
    ) -> None:
        """Takes the parts of a model.

        Args:
            session: Runs the requests.
            tokenizer: The target's, or None.
            config: The target's.
            defaults: The target's generation_config.
            folder: The target's, for messages.
            most_rows: The batch size "auto".
        """
        self._session, self._tokenizer, self._config = session, tokenizer, config
        self._defaults, self._folder, self._most_rows = defaults, folder, most_rows
        self._controls = Controls(tokenizer, config.text.vocab_size, defaults, folder)

    def prepare(self, prompt: Prompt, options: GenerationOptions, n: int = 1) -> list[Answer]:
        """Checks a prompt and its options against the model, and prepares n answers to it.

        Args:
            prompt: See `MTPModel.generate`.
            options: Without a seed, one is drawn. The i-th answer runs with `row_seed(seed, i)`.
            n: Number of answers.

        Raises:
            PromptError: The prompt or an option can't be used.
            MemoryBudgetError: The KV doesn't fit, even alone.
            MTPError: The model is closed.
        """
        capacity = self._session.capacity
        stop_tokens, stop_strings = self._stops(options)
        seed = _drawn(options.seed)
        tools = Tools(options.tools) if options.tools else None
        request = Request(
            prompt=self.tokens(prompt, options, most=self._config.text.max_positions),
            max_tokens=options.max_tokens,
            sampling=options.sampling(self._defaults, seed),
            draft_length=options.draft_length,
            exactness=options.exactness,
            stop_tokens=stop_tokens,
            control=self._controls.control(options),
            logprobs=options.logprobs,
            prediction=self._predicted(options.prediction),
            prefill_progress=options.prefill_progress,
        )
        capacity.check(request)
        return [
            Answer(
                replace(
                    request,
                    sampling=replace(request.sampling, seed=row_seed(seed, i)),
                    prefill_progress=request.prefill_progress if i == 0 else None,
                ),
                StopStrings(stop_strings),
                self._tokenizer,
                tools,
                options.cancel,
            )
            for i in range(n)
        ]

    def tokens(self, prompt: Prompt, options: GenerationOptions, most: int | None = None) -> list[int]:
        """Token ids of a prompt.

        Args:
            prompt: See `MTPModel.generate`.
            options: Those of the chat template count.
            most: How many there is room for; a text that certainly has more isn't encoded, which takes long.

        Raises:
            PromptError: Empty, malformed, text without a tokenizer, or certainly too long.
        """
        if isinstance(prompt, str):
            if not prompt.strip():
                raise PromptError("the prompt is empty")
            if not options.chat_template:
                if options.thinking or options.tools:
                    raise PromptError("thinking and tools need the chat template: leave out chat_template=False")
                return self._text_tokenizer().encode_raw(self._not_too_long(prompt, most))
            prompt = [{"role": "user", "content": prompt}]
        known = prompt if isinstance(prompt, Sequence) and not isinstance(prompt, bytes) else [None]
        tokens = [t for t in known if is_int(t)]
        messages = [m for m in known if isinstance(m, Mapping)]
        if not known:
            raise PromptError("the prompt is empty")
        if len(tokens) == len(known):
            return tokens
        if len(messages) != len(known):
            raise PromptError("a prompt is a string, a list of messages (dicts), or a list of token ids (ints)")
        if not options.chat_template:
            raise PromptError("messages need the chat template: give a string to complete it as it is")
        tokenizer = self._text_tokenizer()
        text = tokenizer.prompt(messages, options.thinking, options.tools, options.sanitize)
        return tokenizer.encode_prompt(self._not_too_long(text, most))

    def _not_too_long(self, text: str, most: int | None) -> str:
        least = self._text_tokenizer().fewest_tokens(text) if most and len(text) > most else 0
        if most and least > most:
            raise PromptError(f"the prompt has at least {least} tokens, the model's context only {most}")
        return text

    def generate(self, prompt: Prompt, options: GenerationOptions, n: int) -> list[Generation]:
        """See `MTPModel.generate`."""
        if not is_int(n) or not 1 <= n <= MOST_ANSWERS:
            raise PromptError(f"n must be a whole number from 1 to {MOST_ANSWERS}, not {n!r}: make several calls")
        return self._run(self.prepare(prompt, options, n), n)

    def generate_batch(
        self, prompts: Iterable[BatchPrompt], batch_size: int | str, common: GenerationOptions
    ) -> list[Generation]:
        """See `MTPModel.generate_batch`; `common` holds the options of all prompts."""
        seed = _drawn(common.seed)
        answers = [self._prepare_ith(i, prompt, common, seed) for i, prompt in enumerate(check_several(prompts))]
        return self._run(answers, self._rows(batch_size))

    def generate_each(
        self, prompts: Iterable[BatchPrompt], batch_size: int | str, common: GenerationOptions
    ) -> Stream[tuple[int, Generation | MTPError]]:
        """See `MTPModel.generate_each`; `common` holds the options of all prompts."""
        inbox, rows, seed = self._inbox(), self._rows(batch_size), _drawn(common.seed)
        numbered = enumerate(check_several(prompts))

        def answers() -> Iterator[tuple[int, Answer | MTPError]]:
            for i, prompt in numbered:
                try:
                    yield i, self._prepare_ith(i, prompt, common, seed)
                except MTPError as error:
                    yield i, error

        def results() -> Generator[tuple[int, Generation | MTPError], None, None]:
            with closing(self._finished(answers(), rows, inbox)) as finished:
                for i, answer in finished:
                    yield i, answer.generation() if isinstance(answer, Answer) else answer

        return Stream(results(), inbox.close)

    def stream(self, answer: Answer) -> Stream[Chunk]:
        """Runs an answer, and yields its chunks; the first request for a chunk submits it."""
        inbox = self._inbox()

        def chunks() -> Generator[Chunk, None, None]:
            try:
                self._submit(answer, inbox)
                while answer.reason is None:
                    yield from _chunks_of(answer, inbox.get())
            finally:
                inbox.close()

        return Stream(chunks(), inbox.close)

    async def astream(self, answer: Answer) -> AsyncIterator[Chunk]:
        """As `stream`, for an event loop."""
        inbox = self._inbox()
        try:
            self._submit(answer, inbox)
            while answer.reason is None:
                for chunk in _chunks_of(answer, await inbox.aget()):
                    yield chunk
        finally:
            inbox.close()

    def _run(self, answers: Sequence[Answer], rows: int) -> list[Generation]:
        """Runs answers to their end, `rows` at a time."""
        with closing(self._finished(enumerate(answers), rows, self._inbox())) as finished:
            for _, answer in finished:
                if isinstance(answer, MTPError):
                    raise answer
        return [answer.generation() for answer in answers]

    def _finished(
        self, answers: Iterator[tuple[int, Answer | MTPError]], rows: int, inbox: Inbox
    ) -> Generator[tuple[int, Answer | MTPError], None, None]:
        """Runs numbered answers, `rows` at a time, and yields each when it is finished; errors among them at once.

        A row's own error (`Row.fail`) takes the place of its answer; any other is raised. The iterator may block, or
        use the model itself.
        """
        running: dict[int, tuple[int, Answer]] = {}
        try:
            while True:
                while len(running) < rows and (item := next(answers, None)) is not None:
                    i, answer = item
                    if isinstance(answer, Answer):
                        self._submit(answer, inbox, rows)
                        running[answer.row.number] = i, answer
                    else:
                        yield i, answer
                if not running:
                    return
                news = inbox.get()
                if news.row.number not in running:
                    continue  # the row had found a stop string before this news came
                i, answer = running[news.row.number]
                answer.push(news)
                error = failure(news.error) if news.error else None
                if error and not isinstance(error, PromptError):
                    raise error
                if error or answer.reason:
                    del running[news.row.number]
                    yield i, error or answer
        finally:
            inbox.close()

    def _prepare_ith(self, i: int, prompt: BatchPrompt, common: GenerationOptions, seed: int) -> Answer:
        """Prepares the answer to the i-th prompt of a batch; options of its own replace the common ones."""
        own: dict[str, Any] = {"seed": row_seed(seed, i)}
        if isinstance(prompt, Mapping):
            if "prompt" not in prompt:
                raise PromptError('a prompt with options is a dict with "prompt"')
            own |= prompt
            prompt = cast(Prompt, own.pop("prompt"))
        return self.prepare(prompt, common.updated(own))[0]

    def _rows(self, batch_size: int | str) -> int:
        """The number of rows that decode at a time.

        Raises:
            PromptError: `batch_size` isn't "auto" or a whole number from 1.
        """
        if batch_size == "auto":
            return self._most_rows
        if not is_int(batch_size) or batch_size < 1:
            raise PromptError(f"batch_size must be 'auto' or at least 1, not {batch_size!r}")
        return batch_size

    def _stops(self, options: GenerationOptions) -> tuple[frozenset[int], list[str]]:
        """The tokens and the strings that end an answer."""
        tokenizer, strings = self._tokenizer, options.stop_strings
        if strings and tokenizer is None:
            raise PromptError(f"stop strings need a tokenizer, and {self._folder} has none")
        given = [] if options.stop_token_ids is None else options.stop_token_ids
        vocabulary = self._config.text.vocab_size
        if not isinstance(given, Sequence) or not all(is_int(token) and 0 <= token < vocabulary for token in given):
            raise PromptError(f"stop_token_ids must be a list of token ids below {vocabulary}, not {given!r}")
        tokens = set(given)
        if not options.ignore_eos:
            tokens.update(self._defaults.stop_tokens, tokenizer.stop_tokens if tokenizer else ())
        # A special token never becomes text, so a search in the text can't find its name.
        special = {text: tokenizer.special_id(text) for text in strings} if tokenizer else {}
        tokens.update(token for token in special.values() if token is not None)
        return frozenset(tokens), [text for text in strings if special.get(text) is None]

    def _predicted(self, prediction: str | Sequence[int] | Mapping[str, Any] | None) -> list[int]:
        """Token ids of a prediction."""
        content = prediction.get("content") if isinstance(prediction, Mapping) else prediction
        if isinstance(content, Sequence) and all(isinstance(part, Mapping) for part in content) and content:
            content = "".join(str(part.get("text", "")) for part in content if isinstance(part, Mapping))
        if isinstance(content, str):
            return self._text_tokenizer().encode(content)
        vocabulary, given = self._config.text.vocab_size, [] if prediction is None else content
        if not isinstance(given, Sequence) or not all(is_int(token) and 0 <= token < vocabulary for token in given):
            raise PromptError(f"prediction must be a string, or token ids below {vocabulary}, not {prediction!r}")
        return [token for token in given if is_int(token)]

    def _text_tokenizer(self) -> Tokenizer:
        if self._tokenizer is None:
            raise PromptError(
                f"{self._folder} has no tokenizer.json: copy the original's there, or give token ids from Python"
            )
        return self._tokenizer

    def _inbox(self) -> Inbox:
        return Inbox(self._session.wake)

    def _submit(self, answer: Answer, inbox: Inbox, width: int = 0) -> None:
        answer.row = self._session.submit(answer.request, inbox, width, answer.cancel)


def _chunks_of(answer: Answer, news: News) -> Iterator[Chunk]:
    """The chunk that news of a row gives its reader; after an error, the last tokens and then the error."""
    if news.tokens or not news.error:
        yield answer.push(news)
    if news.error:
        raise failure(news.error)


def check_several(prompts: Iterable[T]) -> Iterable[T]:
    """Returns the prompts of a batch.

    Raises:
        PromptError: A single prompt was given, whose characters or keys would be taken for prompts.
    """
    if isinstance(prompts, str | bytes | Mapping) or not isinstance(prompts, Iterable):
        raise PromptError("expected a list of prompts: generate takes a single one")
    return prompts


def _drawn(seed: int | None) -> int:
    """The seed, or a random one of 32 bits instead of None."""
    return secrets.randbits(32) if seed is None else seed
